"""Text by speaker: a model reads the last L characters and tells the next one."""

# N = samples, L = characters of a sample
from __future__ import annotations

import io
import re
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from fedcl.data.assembly import Half, assemble, resolve
from fedcl.data.dataset import Dataset, Meta
from fedcl.data.reading import damaged, read_bytes, require_room


def text(
    *,
    root: str,
    speaker: str = r"^([A-Z][^:\n]{0,40}):$",
    window: int = 80,
    stride: int = 1,
    test_fraction: float = 0.2,
    alphabet: str | None = None,
) -> Dataset:
    """Load a text file in which a line by itself says who speaks next, as windows of characters and what follows them.

    The task of Shakespeare in LEAF (Caldas et al. 2018): next-character prediction from 80 characters. Samples (N, L)
    are character codes, their positions in the alphabet, and enter a model unscaled; labels are the code of the next
    character; the meta column ``speaker`` is a name. What one speaker says is joined in the order of the file. Its last
    part is the test half; no train window reaches into it. A speaker who says too little for one window in each half is
    left out.

    Parameters
    ----------
    root
        The file, UTF-8.
    speaker
        Regular expression that a whole line of a speaker's name matches; its first group is the name.
    window
        L, characters of a sample.
    stride
        Characters from the start of one sample to that of the next.
    test_fraction
        Share of each speaker's characters that goes to the test half.
    alphabet
        The characters, in the order of their codes; None takes those of the file, sorted. Where devices hold different
        files, give it, so that codes agree.

    Raises
    ------
    ValueError
        The file is missing or no text, nobody says enough, or the alphabet lacks a character.
    """
    speeches = _speeches(root, speaker)
    codes = _codes(speeches, alphabet)
    halves: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    owners: tuple[list[str], list[str]] = ([], [])
    for name, speech in speeches.items():
        coded = np.array([codes[character] for character in speech], np.int64)
        cut = len(coded) - round(test_fraction * len(coded))
        if min(cut, len(coded) - cut) <= window:
            continue
        for half, part, owner in zip(halves, (coded[:cut], coded[cut:]), owners, strict=True):
            half.append(sliding_window_view(part, window + 1)[::stride])
            owner += [name] * len(half[-1])
    if not halves[0]:
        raise ValueError(
            f"data.root={root}: no speaker says enough for data.source.window={window} in both halves; "
            f"test_fraction={test_fraction}, {len(speeches)} lines match data.source.speaker={speaker!r}"
        )
    meta: list[Meta] = [{"speaker": np.array(owner)} for owner in owners]
    kind = np.uint8 if len(codes) <= 256 else np.float32
    samples: list[Half] = []
    require_room(sum(part.size for half in halves for part in half) * 8, root, "all windows")
    for half in halves:
        windows = np.concatenate(half)
        samples.append((windows[:, :-1].astype(kind), windows[:, -1].copy()))
    names = [character if character.isprintable() else repr(character)[1:-1] for character in codes]
    return assemble(root, samples, scale=1.0, mean=(0.0,), std=(1.0,), classes=names, meta=meta, vocabulary=True)


def _speeches(root: str, speaker: str) -> dict[str, str]:
    """Return all that each speaker says, by name; what stands before the first name is nobody's."""
    path = resolve(root)
    try:
        pattern = re.compile(speaker)
    except re.error as error:
        raise ValueError(f"data.source.speaker={speaker!r}: must be a regular expression ({error})") from error
    data = read_bytes(path, root)
    with damaged(root, path.name, "cannot be read as UTF-8 text"):
        lines = io.StringIO(data.decode("utf-8"), newline=None).read().splitlines(keepends=True)
    if pattern.groups < 1:
        raise ValueError(f"data.source.speaker={speaker!r}: must have a group, which is the name")
    said: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in lines:
        found = pattern.match(line.rstrip("\r\n"))
        if found:
            current = said.setdefault(found[1], [])
        elif current is not None:
            current.append(line)
    return {name: "".join(parts) for name, parts in said.items()}


def _codes(speeches: dict[str, str], alphabet: str | None) -> dict[str, int]:
    """Return the code of each character."""
    there = set().union(*speeches.values()) if speeches else set()
    characters: Sequence[str] = sorted(there) if alphabet is None else alphabet
    if len(set(characters)) != len(characters):
        raise ValueError(f"data.source.alphabet={alphabet!r}: has a character twice")
    lacking = sorted(there - set(characters))
    if lacking:
        raise ValueError(f"data.source.alphabet={alphabet!r}: lacks {', '.join(map(repr, lacking[:8]))} of the file")
    return {character: code for code, character in enumerate(characters)}
