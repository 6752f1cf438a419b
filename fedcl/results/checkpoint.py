"""Checkpoints: whole or absent, hashed, never pickled.

``checkpoints/round_000012/``, or ``round_000012_0001/`` after requests served behind that round, holds ``state.json``
and ``tensors.safetensors`` with their SHA-256; a client's state is one file under ``checkpoints/clients/`` named by its
content, so an unchanged one is not written again. ``LATEST`` names the newest whole checkpoint and is replaced last.
The next checkpoint removes what a killed run left half-written.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedcl.base.files import write_atomic, write_bytes_atomic
from fedcl.base.tree import pack, unpack
from fedcl.config.value_rules import ConfigError

_ROUND = re.compile(r"round_\d{6,}(_\d{4,})?")
_HASH = re.compile(r"[0-9a-f]{64}")
ClientVersions = Mapping[str, int]  # client -> visit whose state is current


_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)


class CheckpointError(ConfigError):
    """No whole checkpoint could be read."""


class Checkpoints:
    """The checkpoints of one run's folder.

    Parameters
    ----------
    run_dir
        The run's folder.
    keep
        How many checkpoints stay; older ones go when a newer one is whole.
    """

    def __init__(self, run_dir: Path, *, keep: int = 2) -> None:
        self.folder = run_dir / "checkpoints"
        self._keep = keep
        self._written: dict[tuple[str, int], str] = {}

    def save(
        self,
        server_round: int,
        state: Any,
        clients: ClientVersions,
        load_client: Callable[[str, int], Any],
        *,
        alone: bool = False,
    ) -> None:
        """Write the checkpoint after ``server_round``; ``load_client`` gives a client's state at a visit.

        One that stays ``alone`` comes after that of the round, and every older one goes: what they hold was to be
        forgotten. If the process dies in between, :meth:`prune` finishes it.
        """
        if alone:
            self._written.clear()  # what a visit staged may have been replaced
        (self.folder / "clients").mkdir(parents=True, exist_ok=True)
        hashes = {}
        for client, visit in clients.items():
            key = (client, visit)
            if key not in self._written:
                self._written[key] = self._write_client(load_client(client, visit))
            hashes[client] = [visit, self._written[key]]
        self._written = {key: value for key, value in self._written.items() if clients.get(key[0]) == key[1]}
        tree, tensors = pack(state)
        files = {
            "state.json": json.dumps(
                {"state": tree, "clients": hashes, "round": server_round, "alone": alone}
            ).encode(),
            "tensors.safetensors": save_tensors(_apart(tensors)),
        }
        name = self._next_name(server_round) if alone else f"round_{server_round:06d}"
        self._write_folder(name, files)
        write_atomic(self.folder / "LATEST", name + "\n")
        self._prune(name)

    def prune(self) -> None:
        """Remove what a killed process left to be removed; call it before a run goes on."""
        newest = self._latest()
        if newest:
            self._prune(newest)

    def _next_name(self, server_round: int) -> str:
        base = f"round_{server_round:06d}"
        name, _, number = self._latest().rpartition("_")
        return f"{base}_{int(number) + 1 if name == base else 1:04d}"

    def begun(self) -> bool:
        """Whether a checkpoint was ever finished: if not, a run starts from its beginning."""
        return bool(self._latest() or self._names())

    def load(self) -> tuple[Any, dict[str, tuple[int, Any]]]:
        """Return the newest whole checkpoint: its state, and each client's (visit, state).

        A damaged one is passed over with a warning. One that a run at work has removed meanwhile is none: its newest
        is taken then.

        Raises
        ------
        CheckpointError
            If none is whole.
        """
        newest, damaged = self._latest(), []
        for name in self._candidates():
            try:
                found = self._read(name)
            except _DAMAGE as error:
                if self._latest() != newest:
                    return self.load()
                damaged.append(f"checkpoint {name} is damaged ({error}); taking the one before")
                continue
            for warning in damaged:
                warnings.warn(warning, stacklevel=2)
            return found
        for warning in damaged:
            warnings.warn(warning, stacklevel=2)
        raise CheckpointError(
            f"{self.folder.parent}: holds no whole checkpoint; it cannot be resumed, but fedcl resume starts it again "
            f"when {self.folder} is removed"
        )

    def every(self) -> Iterator[tuple[Any, dict[str, tuple[int, Any]]]]:
        """Yield what :meth:`load` returns for each whole checkpoint, the newest first."""
        for name in self._candidates():
            try:
                yield self._read(name)
            except _DAMAGE as error:
                warnings.warn(f"checkpoint {name} is damaged ({error}); passing it over", stacklevel=2)

    def _candidates(self) -> list[str]:
        """Names of checkpoints, newest first; those newer than LATEST were not finished."""
        names, newest = self._names(), self._latest()
        return [name for name in names if name <= newest] if newest else names

    def _latest(self) -> str:
        """Return the name of the newest whole checkpoint, empty if none is named; CheckpointError if none can be."""
        path = self.folder / "LATEST"
        for place in (self.folder, self.folder / "clients"):
            if place.exists() and not place.is_dir():
                raise CheckpointError(f"{place}: must be a folder; remove it, and what is in it is written again")
        try:
            name = path.read_bytes().decode("ascii", errors="replace").strip()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); remove it") from error
        return name if _ROUND.fullmatch(name) else ""

    def _read(self, name: str) -> tuple[Any, dict[str, tuple[int, Any]]]:
        folder = self.folder / name
        files = {}
        for line in (folder / "SHA256SUMS").read_text(encoding="ascii").splitlines():
            digest, _, member = line.partition("  ")
            if member not in ("state.json", "tensors.safetensors"):
                raise ValueError(f"names the foreign file {member!r}")
            files[member] = (folder / member).read_bytes()
            if hashlib.sha256(files[member]).hexdigest() != digest:
                raise ValueError(f"{member} does not match its hash")
        header = json.loads(files["state.json"])
        state = unpack(header["state"], load_tensors(files["tensors.safetensors"]))
        clients = {}
        for client, (visit, digest) in header["clients"].items():
            clients[client] = (int(visit), self._read_client(digest))
            self._written[(client, int(visit))] = digest
        return state, clients

    def _write_client(self, state: Any) -> str:
        tree, tensors = pack(state)
        data = save_tensors(_apart(tensors), metadata={"tree": json.dumps(tree)})
        digest = hashlib.sha256(data).hexdigest()
        path = self.folder / "clients" / f"{digest}.safetensors"
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:  # or damaged since
            write_bytes_atomic(path, data)
        return digest

    def _read_client(self, digest: str) -> Any:
        if not _HASH.fullmatch(digest):
            raise ValueError(f"names the foreign client file {digest!r}")
        path = self.folder / "clients" / f"{digest}.safetensors"
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"clients/{path.name} does not match its hash")
        with safe_open(path, framework="pt") as file:
            tree = json.loads(file.metadata()["tree"])
        return unpack(tree, load_tensors(data))

    def _write_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        target, temporary = self.folder / name, self.folder / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        sums = ""
        for member, data in files.items():
            write_bytes_atomic(temporary / member, data)
            sums += f"{hashlib.sha256(data).hexdigest()}  {member}\n"
        write_bytes_atomic(temporary / "SHA256SUMS", sums.encode())
        shutil.rmtree(target, ignore_errors=True)  # left by a run that was killed after it, and resumed before it
        temporary.rename(target)

    def _names(self) -> list[str]:
        """Names of the folders that are checkpoints, newest first; a link is none."""
        paths = (path for path in self.folder.glob("round_*") if path.is_dir() and not path.is_symlink())
        return sorted((path.name for path in paths if _ROUND.fullmatch(path.name)), reverse=True)

    def _prune(self, newest: str) -> None:
        """Drop all but the newest checkpoints, damaged ones, and client files that none of the kept ones names.

        None that is older than one that stays alone is kept, nor one that was never finished.
        """
        kept, used, alone = 0, set(), False
        for path in self.folder.glob(".round_*.tmp"):
            shutil.rmtree(path)
        for name in self._names():
            held = self._held(name) if name <= newest and kept < self._keep and not alone else None
            if held is None:
                shutil.rmtree(self.folder / name)
            else:
                digests, alone = held
                kept += 1
                used |= digests
        for path in (self.folder / "clients").iterdir():
            if path.stem not in used:
                path.unlink()

    def _held(self, name: str) -> tuple[set[str], bool] | None:
        """Return which client files a checkpoint names and whether it stays alone, or None if it cannot be read."""
        try:
            header = json.loads((self.folder / name / "state.json").read_bytes())
            return {digest for _, digest in header["clients"].values()}, bool(header.get("alone", False))
        except _DAMAGE:
            return None


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory, which safetensors refuses; a base of a message is often a model too."""
    apart, seen = {}, set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart
