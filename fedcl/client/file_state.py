"""Client state on disk, for devices and for simulations whose state does not fit into memory.

``<folder>/<client>/visit_<n>.safetensors`` holds the state that visit ``n`` staged: its tensors, and in the header the
JSON of the rest with the client, the visit and a SHA-256 of every other byte of the file.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from pathlib import Path

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fedcl.base.files import sync_folder, write_bytes_atomic
from fedcl.base.tree import pack, unpack
from fedcl.client.state import NEVER
from fedcl.contracts.learner import State

_CLIENT = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HASH = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # within a JSON string its quotes would be escaped
_NO_HASH = "0" * 64
_ABANDONED = 3600.0  # seconds after which the writer of a temporary file counts as dead


class StateDamaged(ValueError):
    """A state file is not what was written; the message names the client and the visit."""


class FileStateStore:
    """Client state in one folder a client, one file a visit: whole or absent, hashed, never pickled.

    Several stores, in several processes, may share a folder; of two that stage the same visit the last one wins.

    Parameters
    ----------
    folder
        Holds the clients' folders; made when the first state is staged. Client ids consist of at most 128 of
        ``A-Z a-z 0-9 . _ -`` and are neither ``.`` nor ``..``; on a file system that ignores case, two ids must not
        differ by case alone. Only the owner can enter a client's folder, because state may hold samples.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def load(self, client: str, visit: int) -> State:
        """Return the state staged by ``visit``, its tensors on the CPU; an empty one for ``NEVER``.

        Raises
        ------
        KeyError
            If that visit's state is not here.
        StateDamaged
            If its file was changed, cut, or written for another client or visit.
        ValueError
            If ``client`` is not an allowed id.
        """
        path = self._path(client, visit)
        if visit == NEVER:
            return {}
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise KeyError(f"client {client}: no state of visit {visit} in {self.folder}") from None
        header = _verified_header(data, f"client {client}, visit {visit}: {path}")
        if (header["client"], header["visit"]) != (client, str(visit)):
            raise StateDamaged(
                f"client {client}, visit {visit}: {path} is of client {header['client']}, visit {header['visit']}"
            )
        state: State = unpack(json.loads(header["tree"]), load_tensors(data))
        return state

    def stage(self, client: str, visit: int, state: State) -> None:
        """Write ``state`` beside the committed one; staging the same visit again replaces it.

        Raises
        ------
        OSError
            If it cannot be written, for instance to a full disk; what was there before stays.
        TypeError
            If the state holds what :func:`fedcl.base.tree.pack` cannot store.
        ValueError
            If ``client`` is not an allowed id, or ``visit`` is negative.
        """
        path = self._path(client, visit)
        if visit < 0:
            raise ValueError(f"client {client}: visit={visit}: must be >= 0 to be staged")
        data = _to_bytes(client, visit, state)
        if not path.parent.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self.folder)
        write_bytes_atomic(path, data)

    def commit(self, client: str, visit: int) -> None:
        """Remove every other state of the client; ``visit``'s own file is not touched."""
        keep = self._path(client, visit)
        if not keep.parent.is_dir():
            return
        # A power cut may bring removed files back; the next commit removes them again, so no fsync is spent on them.
        for path in keep.parent.iterdir():
            if path.name == keep.name or (path.suffix == ".tmp" and not _is_abandoned(path)):
                continue
            path.unlink(missing_ok=True)

    def has(self, client: str, visit: int) -> bool:
        """Whether ``visit``'s state is here (that of ``NEVER`` always is); its hash is checked by ``load`` only."""
        path = self._path(client, visit)
        return visit == NEVER or path.is_file()

    def drop(self, client: str) -> None:
        """Erase everything about a client, durably; staging at the same time fails."""
        home = self._path(client, NEVER).parent
        if home.is_dir():
            shutil.rmtree(home)
            sync_folder(self.folder)

    def _path(self, client: str, visit: int) -> Path:
        """Return a state's file; reject ids and links that lead anywhere else."""
        if not _CLIENT.fullmatch(client) or client in (".", ".."):
            raise ValueError(f"client={client!r}: must be 1 to 128 of A-Z a-z 0-9 . _ - and neither '.' nor '..'")
        path = self.folder / client / f"visit_{visit}.safetensors"
        if path.resolve() != self.folder.resolve() / client / path.name:
            raise ValueError(f"client={client!r}: {path} leads out of the client's folder")
        return path


def _to_bytes(client: str, visit: int, state: State) -> bytes:
    tree, tensors = pack(state)
    header = {"tree": json.dumps(tree), "client": client, "visit": str(visit), "sha256": _NO_HASH}
    # Clones, since safetensors refuses tensors that share memory, which state may well hold.
    data = save_tensors({name: tensor.clone() for name, tensor in tensors.items()}, metadata=header)
    match = _HASH.search(data)
    assert match is not None
    return b"".join((data[: match.start(1)], hashlib.sha256(data).hexdigest().encode(), data[match.end(1) :]))


def _verified_header(data: bytes, what: str) -> dict[str, str]:
    """Return the metadata of a state file after checking its hash: that of the file with zeros in its place."""
    end = 8 + int.from_bytes(data[:8], "little")  # the format: header length, header, tensors
    match = _HASH.search(data[:end])
    if match is None:
        raise StateDamaged(f"{what} holds no hash")
    digest = hashlib.sha256(data[: match.start(1)] + _NO_HASH.encode())
    digest.update(memoryview(data)[match.end(1) :])
    if digest.hexdigest().encode() != match[1]:
        raise StateDamaged(f"{what} does not match its hash")
    header: dict[str, str] = json.loads(data[8:end])["__metadata__"]
    return header


def _is_abandoned(path: Path) -> bool:
    """Whether a temporary file is so old that its process must have been killed."""
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED
    except FileNotFoundError:
        return False
