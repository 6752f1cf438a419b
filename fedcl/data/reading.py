"""Files as data sources meet them: only regular ones are opened, and no header is believed beyond what a file can hold.

Whatever is wrong with a file is one line that names it. What a header announces is compared with the size of the file
and with the memory there is before anything is allocated.
"""

from __future__ import annotations

import gzip
import os
import stat
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from fedcl.base.memory import free_memory, gib
from fedcl.config.value_rules import ConfigError

_DEFLATE = 1032  # times; no deflated byte makes more
_BOMB = (100, 1 << 30)  # times, and bytes, beyond which an array is one of nothing but a pattern
_METHODS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _DEFLATE}
_UINT8_CODE = 0x08
_HEADERS: dict[tuple[int, int], Callable[[IO[bytes]], tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def kind_of(path: Path) -> str:
    """Return what lies at a path, in words: ``a file`` for a regular one, however many links lead to it."""
    kinds = (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "a link that leads nowhere" if path.is_symlink() else f"not to be read ({error.strerror})"
    return next((what for fits, what in kinds if fits(mode)), "a device")


def require_file(path: Path, root: object, name: str | None = None) -> None:
    """Raise ConfigError unless a regular file lies at ``path``; nothing is opened, so nothing can hang."""
    what = kind_of(path)
    if what != "a file":
        raise ConfigError(f"data.root={root}: {name or path.name} is {what}; must be a file")


@contextmanager
def damaged(root: object, name: str, what: str = "is damaged") -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into a ConfigError that names it."""
    try:
        yield
    except ConfigError:
        raise
    except MemoryError as error:
        raise ConfigError(f"data.root={root}: {name} asks for more memory than there is") from error
    except Exception as error:  # a damaged file fails in every way there is
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"data.root={root}: {name} {what}: {reason}") from error


@contextmanager
def opened(path: Path, root: object, what: str = "is damaged", *, name: str | None = None) -> Iterator[BinaryIO]:
    """Open a regular file for reading; what goes wrong with it is a ConfigError, as in :func:`damaged`."""
    require_file(path, root, name)
    with damaged(root, name or path.name, what), path.open("rb") as stream:
        yield stream


def require_room(count: int, root: object, what: str) -> None:
    """Raise ConfigError where ``what`` would take more than the memory there is; ``count`` is in bytes."""
    free = free_memory()
    if count > free:
        raise ConfigError(f"data.root={root}: {what} would take {gib(count)}; this machine has {gib(free)} free")


def entries(folder: Path, root: object) -> list[Path]:
    """Return what lies in a folder, in the order of the names."""
    with damaged(root, folder.name, "cannot be listed"):
        return sorted(folder.iterdir())


def read_bytes(path: Path, root: object) -> bytes:
    """Return a regular file as a whole."""
    with opened(path, root) as stream:
        require_room(os.fstat(stream.fileno()).st_size, root, path.name)
        return stream.read()


def read_idx(folder: Path, name: str, *, ndim: int, limit: int | None) -> NDArray[np.uint8]:
    """Read one idx file: two zero bytes, type code, number of axes, big-endian uint32 lengths, then the data.

    Raises
    ------
    ConfigError
        It is missing, no idx file of bytes with so many axes, or holds less, or more, than its header says.
    """
    path = next((folder / file for file in (name, f"{name}.gz") if os.path.lexists(folder / file)), None)
    if path is None:
        raise ConfigError(f"data.root={folder}: file {name} or {name}.gz is missing")
    place = f"data.root={folder}: {path.name}"
    with opened(path, folder) as packed:
        zipped = path.suffix == ".gz"
        size = os.fstat(packed.fileno()).st_size
        size = size * _DEFLATE if zipped else size - 4 - 4 * ndim
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=packed)) if zipped else packed
        head = stream.read(4 + 4 * ndim)
        if head[:4] != bytes((0, 0, _UINT8_CODE, ndim)):
            expected = bytes((0, 0, _UINT8_CODE, ndim)).hex()
            raise ConfigError(f"{place} starts with {head[:4].hex()}, must be {expected}")
        if len(head) < 4 + 4 * ndim:
            raise ConfigError(f"{place} is cut short; its header has {len(head)} bytes")
        shape = np.frombuffer(head[4:], ">u4").tolist()
        if prod(shape) > size:
            raise ConfigError(f"{place} is cut short; its header announces more data, {shape}, than it can hold")
        taken = shape if limit is None else [min(shape[0], limit), *shape[1:]]
        require_room(prod(taken), folder, path.name)
        body = stream.read(prod(taken))
        if len(body) < prod(taken):
            raise ConfigError(f"{place} is cut short; its header announces more data, {shape}, than it holds")
        if taken == shape and stream.read(1):
            raise ConfigError(f"{place} holds more data than its header announces, {shape}")
        return np.frombuffer(body, np.uint8).reshape(taken)


class Archive:
    """An open npz archive: the shape and type of each array is known, and none is read before it is asked for.

    Raises
    ------
    ConfigError
        It is no zip archive.
    """

    def __init__(self, stream: BinaryIO, root: object) -> None:
        self._root = root
        self._size = os.fstat(stream.fileno()).st_size
        magic = stream.read(6)
        if magic == b"\x93NUMPY":
            raise ConfigError(
                f"data.root={root}: not an npz archive but a single array (.npy); put samples and labels into one file "
                "with numpy.savez(FILE, x_train=..., y_train=..., x_test=..., y_test=...)"
            )
        stream.seek(0)
        self._zip = zipfile.ZipFile(stream)
        self._members = {info.filename.removesuffix(".npy"): info for info in self._zip.infolist()}

    def close(self) -> None:
        """Let go of the file; arrays that were read stay."""
        self._zip.close()

    @property
    def names(self) -> list[str]:
        """Names of the arrays, in the archive's order."""
        return list(self._members)

    def read(self, names: Collection[str]) -> dict[str, NDArray[Any]]:
        """Return arrays by name.

        Raises
        ------
        ConfigError
            One is damaged or pickled, its header announces more than it holds, or all of them more than the memory.
        """
        require_room(sum(self._members[name].file_size for name in names), self._root, "all arrays together")
        return {name: self._array(name, self._members[name]) for name in names}

    def _array(self, name: str, info: zipfile.ZipInfo) -> NDArray[Any]:
        if info.compress_type not in _METHODS:
            raise self._refused(name, "is packed by another method than numpy's; pack it with numpy.savez")
        most = min(info.compress_size, self._size) * _METHODS[info.compress_type]
        times, many = _BOMB
        if many < info.file_size and times * info.compress_size < info.file_size <= most:
            raise self._refused(
                name, f"unpacks to {gib(info.file_size)}, {times} times its size and more; store it with numpy.savez"
            )
        with damaged(self._root, f"not an npz archive of plain arrays: {name}"), self._zip.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in _HEADERS:
                raise self._refused(name, f"has a header of version {version}; write it with numpy.savez")
            shape, transposed, dtype = _HEADERS[version](stream)
            if dtype.hasobject:
                raise self._refused(name, "holds Python objects; give it a dtype of numbers or strings")
            count = prod(shape) * dtype.itemsize
            if min(shape, default=0) < 0 or count > most or count > info.file_size:
                raise self._refused(name, f"announces {list(shape)} of {dtype}, more than the file holds")
            flat = np.empty(prod(shape), dtype)
            view, filled = memoryview(flat.view(np.uint8).data if count else b""), 0
            while filled < count and (got := stream.readinto(view[filled:])):  # type: ignore[attr-defined]
                filled += got
            if filled < count or stream.read(1):
                raise self._refused(name, f"announces {list(shape)} of {dtype}, and holds another number of bytes")
        return flat.reshape(shape[::-1]).T if transposed else flat.reshape(shape)

    def _refused(self, name: str, why: str) -> ConfigError:
        return ConfigError(f"data.root={self._root}: not an npz archive of plain arrays: {name} {why}")


@contextmanager
def opened_archive(path: Path, root: object) -> Iterator[Archive]:
    """Open an npz archive."""
    with opened(path, root, "is not an npz archive of plain arrays") as stream:
        archive = Archive(stream, root)
        try:
            yield archive
        finally:
            archive.close()
