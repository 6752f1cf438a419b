from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.base.tree import equal, pack, unpack
from fedcl.contracts.learner import LocalTraining
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.strategy import GLOBAL, LocalWork, Update
from strategies.staleness.gradient_inversion import GradientInversion
from tests.strategies.late import (
    BATCHES,
    EACH,
    FULL,
    MOMENTUM,
    STREAM,
    View,
    cosine_distance,
    network,
    part,
    relative,
    shifted,
    train,
    update,
)
from tests.toy import configure, run_toy, write_files


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("training", [FULL, MOMENTUM], ids=["full batch", "momentum and decay"])
def test_at_the_same_model_the_change_is_given_back(training: LocalTraining) -> None:
    base = network().vector()
    late = update(base, 5, training)
    inversion = part(training)
    (back,) = inversion.admit([late], View(base))
    assert inversion.metrics()["inverted"] == 1
    # found by descent on an L1 distance through ReLUs: a tenth of the norm after 300 iterations
    assert relative(back.delta, late.delta) < 0.1


@pytest.mark.parametrize("training", [FULL, BATCHES], ids=["full batch", "batches"])
def test_at_another_model_it_is_nearer_to_the_truth_than_the_late_change(training: LocalTraining) -> None:
    base = network().vector()
    now = shifted(base)
    late, true = update(base, 8, training), train("a", now, training, visit=1).double() - now.double()
    (new,) = part(training, iterations=150).admit([late], View(now))
    assert torch.equal(new.base, now)
    assert cosine_distance(new.delta, true) < 0.5 * cosine_distance(late.delta, true)
    assert (new.delta - true).abs().sum() < (late.delta - true).abs().sum()


def test_fresh_updates_are_left_alone_and_several_late_ones_are_inverted() -> None:
    base = network().vector()
    now = shifted(base, 2)
    fresh, late = update(now, 0, client="b"), update(base, 2)
    inversion = part(iterations=60, max_residual=2.0)
    assert inversion.admit([fresh], View(now)) == [fresh]
    assert inversion.state_dict() == {}
    assert inversion.metrics() == {}
    other = update(base, 2, client="b")
    first, second = inversion.admit([late, other], View(now))
    assert inversion.metrics()["inverted"] == 2
    assert not torch.equal(first.model, second.model)
    assert inversion.metrics()["searches"] == 2


def test_clients_searched_together_are_searched_as_one_by_one_but_for_rounding() -> None:
    base = network().vector()
    now = shifted(base, 2)
    late = [update(base, 2), update(base, 2, client="b")]

    def admitted(steps: int, together: int) -> list[Tensor]:
        # with patience for all steps nobody stops early by a hair
        settings = {"iterations": steps, "patience": steps, "tolerance": 0.0, "max_residual": 2.0}
        inversion = part(together=together, **settings)
        return [one.delta for one in inversion.admit(late, View(now))]

    for pair, alone in zip(admitted(10, 2), admitted(10, 1), strict=True):
        assert relative(pair, alone) < 1e-3
    # rounding grows along a descent on absolute values; what is found stays as good
    for pair, alone in zip(admitted(60, 2), admitted(60, 1), strict=True):
        assert cosine_distance(pair, alone) < 0.01


def test_visits_of_other_shapes_are_searched_apart() -> None:
    base = network().vector()
    now = shifted(base, 2)
    late = [update(base, 2), replace(update(base, 2, client="b"), num_examples=EACH - 4)]
    view, calls = View(now), []

    def compute(fn: Callable[..., Any], *args: Any) -> Future[Any]:
        calls.append(args)
        return View.compute(view, fn, *args)

    view.compute = compute  # type: ignore[method-assign]
    inversion = part(iterations=5, max_residual=2.0, together=2)
    inversion.admit(late, view)
    assert [len(riddles) for _, _, riddles in calls] == [1, 1]
    assert inversion.metrics()["searches"] == 2


def test_another_process_finds_the_same_bits() -> None:
    base = network().vector()
    now, late = shifted(base, 2), update(base, 2)
    here = part(iterations=20, max_residual=2.0).admit([late], View(now))
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        view = View(now)
        view.compute = pool.submit  # type: ignore[method-assign]
        there = part(iterations=20, max_residual=2.0).admit([late], view)
    assert torch.equal(there[0].model, here[0].model)


def test_where_the_loss_is_not_the_clients_the_gate_decides_and_says_so() -> None:
    base = network().vector()
    now, honest = shifted(base, 2), update(base, 4)
    # a client whose objective is none of the server's business: no samples explain such a change
    noise = 0.05 * torch.randn(base.shape, generator=torch.Generator().manual_seed(0))
    odd = Update("b", 0, GLOBAL, 6, base, base + noise, EACH, float(EACH), 0, 0, 4)
    inversion = GradientInversion(samples=EACH, iterations=100)
    inversion.setup(network().spec)
    inversion.bind(LocalWork(network(), FULL, STREAM, (6,), plain_loss=False))
    assert [note["kind"] for note in inversion.notes()] == ["inversion_of_plain_loss"]
    corrected, weighted = inversion.admit([honest, odd], View(now))
    assert torch.allclose(weighted.delta, 2 ** (-4 / 20) * odd.delta, atol=1e-6)
    assert cosine_distance(corrected.delta, honest.delta) > 1e-4
    (note,) = inversion.notes()
    assert (note["kind"], note["client"], note["age"], note["reason"]) == ("inversion_refused", "b", 4, "residual")
    assert note["residual"] > 0.3
    assert inversion.notes() == []
    assert inversion.metrics() == pytest.approx(
        {"searches": 2, "inverted": 1, "fallbacks": 1, "fallbacks_residual": 1}
        | {name: inversion.metrics()[name] for name in ("iterations", "residual")}
    )


def test_seconds_are_told_once_and_are_no_metric() -> None:
    base = network().vector()
    inversion = part(iterations=5)
    inversion.admit([update(base, 2)], View(base))
    assert inversion.timings()["inversion"] > 0
    assert inversion.timings() == {}
    assert not any("second" in name or "time" in name for name in inversion.metrics())


def test_a_search_that_has_found_enough_stops() -> None:
    base = network().vector()
    warm = part(iterations=300, tolerance=0.2)
    for version in (10, 11):
        warm.admit([update(base, 3)], View(base, version=version))
        steps = warm.metrics()["iterations"]
        if version == 10:
            first = steps
    assert 0 < first < 300
    assert steps == first  # the second search begins where the first ended: near enough


def test_samples_that_explain_too_little_are_not_used() -> None:
    base = network().vector()
    now, late = shifted(base, 2), update(base, 20)
    inversion = part(max_residual=1e-6, iterations=5)
    (weighted,) = inversion.admit([late], View(now))
    assert torch.allclose(weighted.delta, 0.5 * late.delta, atol=1e-6)
    counts = inversion.metrics()
    assert (counts["fallbacks"], counts["fallbacks_residual"]) == (1, 1)
    assert "clients" not in inversion.state_dict()
    (as_it_came,) = part(max_residual=1e-6, iterations=5, half_life=None).admit([late], View(now))
    assert as_it_came is late


def test_long_visits_and_updates_like_the_fresh_ones_are_weighted() -> None:
    base = network().vector()
    late, fresh = update(base, 2), update(base, 0)
    long = part(max_steps=FULL.epochs - 1)
    long.admit([late], View(base))
    assert long.metrics() == {"fallbacks": 1, "fallbacks_size": 1}
    few = part(BATCHES, samples=2)  # three batches an epoch
    few.admit([update(base, 2, BATCHES)], View(base))
    assert few.metrics() == {"fallbacks": 1, "fallbacks_size": 1}
    same = part(uniqueness=0.1)
    same.admit([late, replace(fresh, client="b")], View(base))
    assert same.metrics() == {"fallbacks": 1, "fallbacks_uniqueness": 1}


def test_an_update_that_moved_nothing_is_no_riddle() -> None:
    base = network().vector()
    still = Update("a", 0, GLOBAL, 5, base, base.clone(), EACH, 1.0, 0, 0, 5)
    inversion = part()
    (kept,) = inversion.admit([still], View(base))
    assert torch.equal(kept.model, base)
    assert inversion.metrics() == {"fallbacks": 1, "fallbacks_nothing": 1}


def test_the_next_search_begins_where_the_last_one_ended() -> None:
    base = network().vector()
    warm, cold = part(iterations=50), part(iterations=50, warm_start=False)
    for inversion in (warm, cold):
        for version in (10, 11):
            inversion.admit([update(base, 3)], View(base, version=version))
    assert warm.metrics()["residual"] < cold.metrics()["residual"]


def arrive(inversion: GradientInversion, updates: list[Update], view: View) -> None:
    """Do with updates that have come what the pipeline does."""
    for one in updates:
        inversion.observe(one, view)
    inversion.admit(updates, view)


def test_hindsight_switches_inversion_off_when_it_errs_more_than_staleness() -> None:
    base = network().vector()
    now = shifted(base, 4)
    inversion = part(switch_after=1, iterations=100)
    arrive(inversion, [update(base, 4)], View(now))
    arrive(inversion, [update(now, 0, visit=1)], View(now, version=11))
    errors = inversion.metrics()
    assert errors["hindsight_inverted"] < errors["hindsight_late"]
    assert errors["hindsight_late"] == pytest.approx(
        float(
            (update(base, 4).delta.float() - update(now, 0, visit=1).delta).abs().sum()
            / update(now, 0, visit=1).delta.abs().sum()
        ),
        rel=1e-5,
    )
    arrive(inversion, [update(base, 4, visit=2)], View(now, version=12))
    assert inversion.metrics()["inverted"] == 2
    # a client whose data have turned into what its late change said all along: the late change is exact
    wrong = part(switch_after=1, iterations=100)
    late = update(base, 4)
    arrive(wrong, [late], View(now))
    arrive(
        wrong, [Update("a", 1, GLOBAL, 10, now, now + late.delta.float(), EACH, 1.0, 0, 0, 0)], View(now, version=11)
    )
    assert wrong.metrics()["hindsight_late"] < 1e-3
    arrive(wrong, [update(base, 4, visit=2)], View(now, version=12))
    assert wrong.metrics()["fallbacks_switch"] == 1
    never = part(switch_after=None, iterations=100)
    never.load_state_dict(unpack(*pack(wrong.state_dict())))
    arrive(never, [update(base, 4, visit=2)], View(now, version=12))
    assert never.metrics()["inverted"] == 2


def test_state_survives_and_is_forgotten() -> None:
    base = network().vector()
    now = shifted(base, 2)

    def go_on(inversion: GradientInversion) -> list[Tensor]:
        first = inversion.admit([update(now, 0, visit=1), update(base, 3, client="b")], View(now, version=11))
        return [one.model for one in first + inversion.admit([update(base, 3, visit=2)], View(now, version=12))]

    whole, resumed = part(iterations=40, max_residual=2.0), part(iterations=40, max_residual=2.0)
    whole.admit([update(base, 2)], View(now))
    resumed.load_state_dict(unpack(*pack(whole.state_dict())))
    assert equal(resumed.state_dict(), whole.state_dict())
    assert equal(go_on(resumed), go_on(whole))
    assert equal(resumed.state_dict(), whole.state_dict())
    assert resumed.metrics() == whole.metrics()
    whole.forget(ForgetRequest("r", "client", clients=("a",)))
    assert set(whole.state_dict()["clients"]) == {"b"}
    whole.forget(ForgetRequest("r", "class", classes=(1,)))
    assert "clients" not in whole.state_dict()


def test_a_whole_asynchronous_run_inverts_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    part_ = "strategy.staleness.server"
    cfg = configure(
        {"strategy/staleness": "gradient_inversion", "devices": "trace"},
        write_files(tmp_path),
        torch.device("cpu"),
        *("async.buffer=1", "async.finished_task=keep", "client.optimizer.lr=0.1"),
        *(f"{part_}.iterations=15", f"{part_}.max_residual=2.0", f"{part_}.samples=8"),
        num_tasks=2,
    )
    whole = run_toy(cfg)
    inverted = [row["value"] for row in whole.rows if row["name"] == "staleness/inverted"]
    assert inverted == [1, 2, 3]  # of four rounds with one update each, the first alone is fresh
    begun = run_toy(cfg, until=1)
    rest = run_toy(cfg, start=begun.saved[-1])
    assert begun.hashes + rest.hashes == whole.hashes
    assert equal(rest.saved[-1], whole.saved[-1])
