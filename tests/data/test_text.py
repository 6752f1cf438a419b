from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedcl.data.text import text

PLAY = """A line that nobody speaks.
ANNA:
abcab
BEN BOLT:
cccccccccc
ANNA:
bcabc
EVE:
a
"""


def write(folder: Path, content: str = PLAY) -> str:
    (folder / "play.txt").write_text(content, encoding="utf-8")
    return str(folder / "play.txt")


def test_windows_are_what_a_speaker_says_and_the_label_is_what_follows(tmp_path: Path) -> None:
    dataset = text(root=write(tmp_path), window=3, test_fraction=0.5)
    assert dataset.classes == ("\\n", "a", "b", "c")
    anna = dataset.train.meta["speaker"] == "ANNA"
    # Anna says "abcab\nbcabc\n": the first half of these twelve characters is "abcab\n".
    assert dataset.train.x[anna].tolist() == [[1, 2, 3], [2, 3, 1], [3, 1, 2]]
    assert dataset.train.y[anna].tolist() == [1, 2, 0]
    assert dataset.train.x.dtype == np.uint8
    assert set(dataset.train.meta["speaker"]) == set(dataset.test.meta["speaker"]) == {"ANNA", "BEN BOLT"}
    assert dataset.test.x[dataset.test.meta["speaker"] == "ANNA"].tolist() == [[2, 3, 1], [3, 1, 2], [1, 2, 3]]
    assert dataset.normalise(dataset.train.x).tolist() == dataset.train.x.tolist()
    assert dataset.input_shape == (3,)


def test_strides_skip_and_another_mark_finds_other_speakers(tmp_path: Path) -> None:
    root = write(tmp_path)
    every, third = (text(root=root, window=2, stride=stride, test_fraction=0.5).train for stride in (1, 3))
    anna = [half.x[half.meta["speaker"] == "ANNA"] for half in (every, third)]
    assert np.array_equal(anna[1], anna[0][::3])
    named = text(
        root=write(tmp_path, "# one\nabcabcabc\n# two\nbbbbbbbbb\n"), window=2, speaker=r"^# (\w+)$", test_fraction=0.4
    )
    assert set(named.train.meta["speaker"]) == {"one", "two"}


def test_a_given_alphabet_fixes_the_codes(tmp_path: Path) -> None:
    dataset = text(root=write(tmp_path), window=3, test_fraction=0.5, alphabet="cba\nxyz")
    assert dataset.num_classes == 7
    assert dataset.train.x[0].tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match=r"data\.source\.alphabet='abc': lacks '\\n' of the file"):
        text(root=write(tmp_path), window=3, alphabet="abc")
    with pytest.raises(ValueError, match="has a character twice"):
        text(root=write(tmp_path), window=3, alphabet="abca")


def test_more_than_256_characters_are_kept_apart(tmp_path: Path) -> None:
    many = "".join(chr(0x4E00 + i) for i in range(300))
    dataset = text(root=write(tmp_path, f"ANNA:\n{many}\n"), window=2, test_fraction=0.1)
    assert dataset.train.x.dtype == np.float32
    assert dataset.train.x[-1].tolist() == [269, 270]
    assert dataset.train.y[-1] == 271


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"window": 50}, r"no speaker says enough for data\.source\.window=50 in both halves; .*3 lines"),
        ({"speaker": "("}, r"data\.source\.speaker='\(': must be a regular expression"),
        ({"speaker": "^ANNA:$"}, "must have a group"),
        ({"speaker": "^(nobody)$"}, "no speaker says enough"),
    ],
)
def test_text_says_what_is_wrong(tmp_path: Path, params: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text(root=write(tmp_path), **params)  # type: ignore[arg-type]


def test_text_says_what_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; must be a file"):
        text(root=str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read as UTF-8 text"):
        text(root=str(tmp_path / "binary"))
