"""Files that are whole or absent: what is read was written to its end, whatever died in between."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_atomic(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader, or a crash, sees the old text or the new one."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace a file as a whole, and durably: a reader, a crash, a full disk leaves the old bytes or the new ones.

    Of several writers of one path, in any processes, the last to rename wins. A killed writer leaves its
    ``.<name>.<random>.tmp`` behind.

    Raises
    ------
    OSError
        If the folder is missing or the disk is full; the old file stays, and nothing partial does.
    """
    # Of its own name: two writers sharing one would rename each other's half-written bytes.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # in a folder that cannot be written, there is none
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed or removed in ``folder`` survive a power cut."""
    if os.name == "nt":  # where a folder cannot be opened, and the file system journals its names
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
