"""The file of requests: whole lines only, each met in the same round again, and nothing in it stops a run."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from fedcl.contracts.requests import ForgetRequest
from fedcl.unlearning.sources import FILE, TAKEN, SubmittedRequests, lines, parse, submit

ASKED = ForgetRequest("a", "client", clients=("3",))
OTHER = ForgetRequest("b", "sample", samples=(1, 5, 9), clients=("0",))


def test_what_is_handed_in_is_what_is_read(tmp_path: Path) -> None:
    submit(tmp_path, ASKED)
    submit(tmp_path, OTHER, ["unlearner=ssd"])
    assert [(line.request, line.fault, line.overrides) for line in lines(tmp_path)] == [
        (ASKED, None, ()),
        (OTHER, None, ("unlearner=ssd",)),
    ]


def test_a_line_counts_when_it_is_whole(tmp_path: Path) -> None:
    submit(tmp_path, ASKED)
    whole = (tmp_path / FILE).read_bytes()
    for end in range(len(whole)):
        (tmp_path / FILE).write_bytes(whole[:end])
        assert SubmittedRequests(tmp_path)(0) == []
    (tmp_path / FILE).write_bytes(whole)
    assert SubmittedRequests(tmp_path)(0) == [(ASKED, None)]


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    submit(tmp_path, ASKED)
    torn = (tmp_path / FILE).read_bytes()[:-9]
    (tmp_path / FILE).write_bytes(torn)
    submit(tmp_path, OTHER)
    (bad, fault), good = SubmittedRequests(tmp_path)(0)
    assert bad.id == "line-1"
    assert fault is not None
    assert fault.startswith(f"{FILE} line 1: is not valid JSON")
    assert good == (OTHER, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '"client"',
        "{}",
        '{"id": "a"}',
        '{"id": 3, "scope": "client"}',
        '{"id": "a", "scope": "everything"}',
        '{"id": "a", "scope": ["client"]}',
        '{"id": "a", "scope": "client", "clients": "3"}',
        '{"id": "a", "scope": "client", "clients": [3]}',
        '{"id": "a", "scope": "class", "classes": [true]}',
        '{"id": "a", "scope": "class", "classes": [1.5]}',
        '{"id": "a", "scope": "class", "classes": {"1": 2}}',
        '{"id": "a", "scope": "client", "who": ["3"]}',
        "[" * 100_000,
        '{"id": "a", "scope": "class", "classes": [' + "9" * 10_000 + "]}",
    ],
    ids=range(18),
)
def test_what_is_no_request_is_refused_with_its_reason(text: str) -> None:
    with pytest.raises(ValueError, match=r"JSON|must be"):
        parse(text)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\xff\xfe\n\n" + b"\x00" * 30 + b"\n")
    faults = [fault for _, fault in SubmittedRequests(tmp_path)(0)]
    assert [fault is not None and fault.split(":")[0] for fault in faults] == [f"{FILE} line 1", f"{FILE} line 3"]


def test_a_run_that_goes_on_from_before_meets_each_request_in_the_same_round(tmp_path: Path) -> None:
    source = SubmittedRequests(tmp_path)
    assert source(0) == []
    submit(tmp_path, ASKED)
    assert source(4) == [(ASKED, None)]
    again = SubmittedRequests(tmp_path)  # resumed from a checkpoint before
    submit(tmp_path, OTHER)
    assert again(2) == again(3) == []
    assert again(4) == again(5) == [(ASKED, None), (OTHER, None)]


def test_a_note_that_a_kill_has_torn_is_made_again(tmp_path: Path) -> None:
    submit(tmp_path, ASKED)
    SubmittedRequests(tmp_path)(4)
    note = (tmp_path / TAKEN).read_bytes()
    (tmp_path / TAKEN).write_bytes(note[:-3])
    assert SubmittedRequests(tmp_path)(3) == [(ASKED, None)]
    assert SubmittedRequests(tmp_path)(2) == []


def _submit_many(folder: Path, client: int) -> None:
    for number in range(25):
        submit(folder, ForgetRequest(f"{client}-{number}", "client", clients=(str(client),) * 50))


def test_those_who_ask_at_once_do_not_tear_each_others_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    askers = [context.Process(target=_submit_many, args=(tmp_path, client)) for client in range(3)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    found = lines(tmp_path)
    assert [line.fault for line in found] == [None] * 75
    assert len({line.request.id for line in found}) == 75
