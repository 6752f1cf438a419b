"""A certificate authority of one's own, the server's certificate, and the keys by which devices are known."""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS, SERVER_DAYS = 3650, 825  # browsers and Apple's TLS refuse servers' certificates of more than 825 days
_CLOCK_SKEW = datetime.timedelta(days=1)  # a Raspberry Pi without network time may be behind


def new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Make a P-384 key, which only its owner may read, as PEM at ``path``."""
    key = ec.generate_private_key(ec.SECP384R1())
    form, nothing = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    _write_secret(path, key.private_bytes(serialization.Encoding.PEM, form, nothing))
    return key


def new_device_key(private: Path, public: Path) -> None:
    """Make a SuperNode's key pair in OpenSSH's format, as Flower reads it."""
    key = ec.generate_private_key(ec.SECP384R1())
    form, nothing = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    _write_secret(private, key.private_bytes(serialization.Encoding.PEM, form, nothing))
    encoded = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    public.write_bytes(encoded + b"\n")


def new_signing_key(private: Path) -> ed25519.Ed25519PublicKey:
    """Make the key that signs bundles for devices, in OpenSSH's format; return its public half."""
    key = ed25519.Ed25519PrivateKey.generate()
    form, nothing = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    _write_secret(private, key.private_bytes(serialization.Encoding.PEM, form, nothing))
    return key.public_key()


def _write_secret(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def new_authority(key_file: Path, certificate_file: Path) -> None:
    """Make a certificate authority: it signs this fleet's server certificate, and nothing else."""
    key = new_key(key_file)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedcl fleet CA")])
    certificate = (
        _builder(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def new_server_certificate(
    ca: Path, key_file: Path, certificate_file: Path, host: str, days: int = SERVER_DAYS
) -> None:
    """Make the server's key and a certificate for ``host`` and this machine's own names, signed by the CA in ``ca``.

    Negative ``days`` make one that has expired.
    """
    authority = x509.load_pem_x509_certificate((ca / "ca.crt").read_bytes())
    signer = serialization.load_pem_private_key((ca / "ca.key").read_bytes(), password=None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{ca / 'ca.key'}: must be an elliptic-curve key")
    key = new_key(key_file)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    names = [general_name(one) for one in dict.fromkeys((host, "localhost", "127.0.0.1"))]
    certificate = (
        _builder(name, authority.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def general_name(host: str) -> x509.DNSName | x509.IPAddress:
    """Return a host's name or address as a certificate says it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _CLOCK_SKEW)
        .not_valid_after(end)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
