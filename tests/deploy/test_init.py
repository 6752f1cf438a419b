"""A fleet's folder, its certificates and commands, without starting anything."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedcl.config.value_rules import ConfigError
from fedcl.deploy.bundle import sign
from fedcl.deploy.check import check
from fedcl.deploy.init import init
from fedcl.deploy.layout import Fleet, Launch, read_launches, write_launch
from fedcl.deploy.processes import free_ports

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path, **options: object) -> Fleet:
    port, control_port = free_ports(2)
    given = {"devices": 2, "address": "127.0.0.1", "port": port, "control_port": control_port} | options
    return init(folder, **given)  # type: ignore[arg-type]


def test_a_fleet_is_written_and_read_again(tmp_path: Path) -> None:
    fleet = make(tmp_path / "fleet", address="farm.example")
    assert Fleet.load(tmp_path / "fleet") == fleet
    certificate = x509.load_pem_x509_certificate((fleet.server / "server.crt").read_bytes())
    authority = x509.load_pem_x509_certificate((fleet.ca / "ca.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "farm.example" in names.get_values_for_type(x509.DNSName)
    secrets = (fleet.ca / "ca.key", fleet.server / "server.key", fleet.ca / "bundle.key", fleet.device("0") / "key")
    for secret in secrets:
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert not (fleet.device("0") / "ca.key").exists()
    public = serialization.load_ssh_public_key((fleet.server / "keys" / "1.pub").read_bytes())
    private = serialization.load_ssh_private_key((fleet.device("1") / "key").read_bytes(), password=None)
    assert private.public_key() == public


def test_every_way_to_start_runs_the_same_script(tmp_path: Path) -> None:
    fleet = make(tmp_path / "fleet")
    compose = yaml.safe_load((fleet.folder / "compose.yaml").read_text())
    assert sorted(compose["services"]) == ["device-0", "device-1", "server"]
    for service in compose["services"].values():
        assert service["command"] == ["/bin/sh", "/fleet/start.sh"]
        assert (fleet.folder / service["volumes"][0].split(":")[0] / "start.sh").is_file()
    unit = (fleet.device("0") / "fedcl-device.service").read_text()
    assert 'ExecStart=/bin/sh "/opt/fedcl/device/start.sh"' in unit
    unit = (fleet.server / "fedcl-server.service").read_text()
    assert f'ExecStart=/bin/sh "{fleet.server}/start.sh"' in unit
    for folder in (fleet.server, fleet.device("0"), fleet.device("1")):
        subprocess.run(["/bin/sh", "-n", str(folder / "start.sh")], check=True, timeout=20)
    assert "python -m fedcl.deploy.superlink --host 127.0.0.1 " in (fleet.server / "start.sh").read_text()
    for name in fleet.devices:  # a device runs nothing that this fleet's server has not signed
        script = (fleet.device(name) / "start.sh").read_text()
        assert "--trusted-entities trusted.yaml --host 127.0.0.1 " in script


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    make(tmp_path / "fleet")
    with pytest.raises(ConfigError, match="must be new or empty"):
        make(tmp_path / "fleet")


@pytest.mark.parametrize(("key", "value"), [("devices", 0), ("port", 70000), ("address", "a b"), ("address", "-x")])
def test_wrong_options_are_refused(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        make(tmp_path / "fleet", **{key: value})


def test_own_certificates_leave_room_that_check_asks_for(tmp_path: Path) -> None:
    fleet = make(tmp_path / "fleet", own_certificates=True)
    assert [file.name for file in fleet.ca.iterdir()] == ["bundle.key"]
    said = [finding.text for finding in check(fleet.folder) if finding.wrong]
    assert any(text.endswith("server.crt: is missing; PEM") for text in said)
    other = make(tmp_path / "other")
    for name in ("ca.crt", "server.crt", "server.key"):
        shutil.copy(other.server / name, fleet.server / name)
    for name in fleet.devices:
        shutil.copy(other.server / "ca.crt", fleet.device(name) / "ca.crt")
    assert not [finding.text for finding in check(fleet.folder) if finding.wrong]


def test_a_signing_key_that_devices_do_not_trust_is_named(tmp_path: Path) -> None:
    fleet, other = make(tmp_path / "fleet"), make(tmp_path / "other")
    shutil.copy(other.device("1") / "trusted.yaml", fleet.device("1") / "trusted.yaml")
    (fleet.device("0") / "trusted.yaml").unlink()
    said = "\n".join(finding.text for finding in check(fleet.folder) if finding.wrong)
    assert "device 1: trusted.yaml: its server's bundle was not signed by that key" in said
    assert f"device 0: {fleet.device('0') / 'trusted.yaml'} is missing" in said
    shutil.rmtree(other.ca)  # as it should be once the fleet is made
    assert not [finding.text for finding in check(other.folder) if finding.wrong]
    (other.server / "app" / "README.md").write_text("another")
    with pytest.raises(ConfigError, match=r"bundle\.key: this bundle is not signed yet, and the key cannot be read"):
        sign(other.server, other.ca / "bundle.key")


def test_a_certificate_for_another_host_is_named(tmp_path: Path) -> None:
    fleet = make(tmp_path / "fleet", address="farm.example")
    text = (fleet.folder / "fleet.yaml").read_text().replace("farm.example", "barn.example")
    (fleet.folder / "fleet.yaml").write_text(text)
    said = "\n".join(finding.text for finding in check(fleet.folder) if finding.wrong)
    assert "server.crt: is not for barn.example" in said


def test_launches_are_kept_and_replaced(tmp_path: Path) -> None:
    fleet = make(tmp_path / "fleet")
    write_launch(fleet, Launch("a", "/runs/a"))
    write_launch(fleet, Launch("b", "/runs/b"))
    write_launch(fleet, Launch("a", "/runs/a", 1, "123456"))
    assert [(one.run, one.attempt) for one in read_launches(fleet)] == [("b", 0), ("a", 1)]


def test_the_command_line_is_loud_about_insecure_and_plain_about_mistakes(tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        given = [sys.executable, "-m", "fedcl", "deploy", *arguments]
        return subprocess.run(given, capture_output=True, text=True, env=env, check=False, timeout=120)

    made = call("init", str(tmp_path / "bare"), "--devices", "1", "--insecure")
    assert made.returncode == 0
    assert "NO TLS AND NO AUTHENTICATION" in made.stderr
    assert "without --address only this machine can reach the server" in made.stdout
    fleet = tmp_path / "bare"
    start = [f"  {fleet / 'server' / 'start.sh'}", f"  {fleet / 'devices' / '0' / 'start.sh'}"]
    assert made.stdout.splitlines()[1:] == ["next:", *start, f"  fedcl deploy run {fleet}", str(fleet)]
    run = call("run", str(tmp_path / "bare"), "rounds_per_task=1")
    assert run.returncode == 2
    assert "NO TLS AND NO AUTHENTICATION" in run.stderr
    assert "nothing listens at" in run.stderr
    assert call("check", str(tmp_path)).returncode == 2
    wrong = call("run", str(tmp_path / "bare"), "learner=nonsense")
    assert wrong.returncode == 2
    assert "learner=nonsense: no such choice" in wrong.stderr
    mine = tmp_path / "my" / "learner" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text((ROOT / "configs" / "learner" / "er.yaml").read_text().replace("\ner:", "\nmine:"))
    own = call("run", str(tmp_path / "bare"), "--config-dir", str(tmp_path / "my"), "learner=mine")
    assert "nothing listens at" in own.stderr  # the name is known
    assert not (tmp_path / "bare" / "runs").exists()
