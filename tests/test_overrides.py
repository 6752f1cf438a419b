"""What people type: paths with any sign in them are taken where they are plain, or the form that works is shown."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcl.config.compose import ConfigError, compose
from fedcl.config.overrides import as_text, in_quotes, parse
from fedcl.sweep import _sweep_dir
from fedcl.sweep.expansion import expand


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("in/ümlaut/x.npz", "in/ümlaut/x.npz"),
        ("a=b", "a=b"),
        ("=x", "=x"),
        ("123", "123"),
        ("0123", "0123"),
        ("1e5", "1e5"),
        ("true", "true"),
        ("nan", "nan"),
        ("my run", "my run"),
        ("a:b", "a:b"),
        ("a[1]", "a[1]"),
        ("a(1)", "a(1)"),
        ("a{b}", "a{b}"),
        ("it's", "it's"),
        ('a"b', 'a"b'),
        ("a;b&c#d!e^f", "a;b&c#d!e^f"),
        ("+x", "+x"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("C:\\data\\new.npz", "C:\\data\\new.npz"),
        ("\\\\server\\share\\x", "\\\\server\\share\\x"),
        ("x\\", "x\\"),
        ("😀/数据", "😀/数据"),
        ("'a,b'", "a,b"),
        ('"[a]"', "[a]"),
        ("a\\,b", "a,b"),
        ("$fedcl_is_not_set/x", "$fedcl_is_not_set/x"),
    ],
)
def test_a_path_is_taken_as_it_is_typed(text: str, value: str) -> None:
    for key in ("run_dir", "data.root"):
        node = compose([f"{key}={text}"])
        assert (node["run_dir"] if key == "run_dir" else node["data"]["root"]) == value


def test_home_and_variables_of_the_shell_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("FEDCL_TEST_PLACE", "/srv")
    assert compose(["data.root=~/x.npz"])["data"]["root"] == "/home/me/x.npz"
    assert compose(["run_dir=$FEDCL_TEST_PLACE/x"])["run_dir"] == "/srv/x"
    assert compose(["name=2024"])["name"] == "2024"


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("run_dir=a,b", 'run_dir="a,b"'),
        ("run_dir=[a]", 'run_dir="[a]"'),
        ("run_dir={a}", 'run_dir="{a}"'),
        ("run_dir=[a", 'run_dir="[a"'),
        ("run_dir=(a)", 'run_dir="(a)"'),
        ('run_dir="a', 'run_dir="\\"a"'),
    ],
)
def test_what_is_not_plain_is_refused_with_the_form_that_works(text: str, form: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([text])
    assert shlex.quote(form) in str(caught.value)
    assert compose([form])["run_dir"] == text.partition("=")[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_dir=", "run_dir=: must be path or null"),
        ("run_dir=''", "run_dir=: must be path or null"),
        ("run_dir=a\nb", "run_dir=a b: must be path or null"),
        ("data.root=\udcfc", "must be path or null"),
        ("name=\udcfc", "must be"),
        ("run_dir=${HOME}/x", "${} names another key; a variable of the shell is $NAME"),
        ("++seed=1", "++seed=1: keys cannot be added, only set: seed=1"),
        ("~seed", "keys cannot be removed"),
        ("learner.er", "not an override; write key=value"),
    ],
)
def test_what_names_no_file_and_sets_no_key_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([text])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12))
def test_any_text_survives_its_quotes(value: str) -> None:
    assert parse(as_text("run_dir", value)).value() == value
    assert parse(shlex.split(in_quotes(f"run_dir={value}"))[0]).value() == value


def test_a_sweep_takes_the_same_paths() -> None:
    assert [job.overrides for job in expand(["data.root=in/ümlaut/a=b.npz", "seed=0,1"])] == [
        ("data.root=in/ümlaut/a=b.npz", "seed=0"),
        ("data.root=in/ümlaut/a=b.npz", "seed=1"),
    ]
    jobs = expand(["data.root=~/ä.npz,~/ö.npz"])
    home = os.path.expanduser("~")
    roots = [compose(list(job.overrides))["data"]["root"] for job in jobs]
    assert roots == [str(Path(home) / "ä.npz"), str(Path(home) / "ö.npz")]


@pytest.mark.parametrize(
    ("text", "folder"),
    [("sweep_dir=a=b", "a=b"), ("sweep_dir=123", "123"), ("sweep_dir='a,b'", "a,b"), ("sweep_dir=ü", "ü")],
)
def test_a_sweeps_folder_is_a_path_like_any_other(text: str, folder: str) -> None:
    assert _sweep_dir([text, "seed=0,1"]) == (["seed=0,1"], Path(folder))


@pytest.mark.parametrize("text", ["sweep_dir=", "sweep_dir=a,b", "sweep_dir=[a]"])
def test_what_is_no_folder_of_a_sweep_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"must be one path; as text, write '"):
        _sweep_dir([text])
