"""What holds for every learner: off means naive, on does not, and state carries everything."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from clients.learners.agem import AGEM
from clients.learners.der import DER
from clients.learners.ema import EMA
from clients.learners.er import ER
from clients.learners.er_ace import ERACE
from clients.learners.ewc import EWC
from clients.learners.feature_distillation import FeatureDistillation
from clients.learners.fpf import FPF, KFPF
from clients.learners.gdumb import GDumb
from clients.learners.gpm import GPM
from clients.learners.hft import HFT
from clients.learners.l2 import L2
from clients.learners.lines import LiNeS
from clients.learners.lwf import LwF
from clients.learners.mas import MAS
from clients.learners.refresh import Refresh
from clients.learners.si import SI
from clients.learners.uer import UER
from clients.learners.view_batch import ViewBatch
from fedcl.base.tree import equal
from fedcl.contracts.learner import Plugin
from fedcl.data.dataset import Dataset
from fedcl.scenario.domains import DomainPermuted
from fedcl.scenario.streams import ClassIncremental, TaskIncremental
from fedcl.scenario.task import Stream
from tests.clients.conftest import SCRIPT, RunExperiment
from tests.sampling import sampled

Build = Callable[[], Plugin]
SCENARIOS = [ClassIncremental, TaskIncremental, DomainPermuted]
OFF: dict[str, Build] = {
    "l2": partial(L2, weight=0.0),
    "mas": partial(MAS, weight=0.0),
    "si": partial(SI, weight=0.0),
    "feature_distillation": partial(FeatureDistillation, weight=0.0),
    "der": partial(DER, budget=0),
    "der_without_terms": partial(DER, alpha=0.0),
    "er_ace": partial(ERACE, budget=0),
    "uer": partial(UER, budget=0),
    "agem": partial(AGEM, budget=0),
    "gdumb": partial(GDumb, budget=0),
    "gpm": partial(GPM, epsilon=0.0),
    "lines": partial(LiNeS, shallow=1.0),
    "hft": partial(HFT, share=0.0),
    "fpf": partial(FPF, steps=0),
    "fpf_without_memory": partial(FPF, budget=0),
    "k_fpf": partial(KFPF, steps=0),
    "refresh": partial(Refresh, delta=0.0),
    "view_batch": partial(ViewBatch, repeats=1, weight=0.0),
    "ema": partial(EMA, alpha=1.0),
    "ewc": partial(EWC, weight=0.0),
    "ewc_in_scope": partial(EWC, weight=0.0, scope="^hidden"),
    "lwf": partial(LwF, weight=0.0),
    "er": partial(ER, budget=0),
}
# what acts only once a task has ended, then what acts at once
LATE: dict[str, Build] = {
    "l2": L2,
    "mas": MAS,
    "si": SI,
    "feature_distillation": FeatureDistillation,
    "der": partial(DER, budget=9),
    "agem": partial(AGEM, budget=9),
    "gpm": GPM,
    "ewc_in_scope": partial(EWC, scope="^hidden"),
    "mas_in_scope": partial(MAS, scope="weight$"),
    "si_in_scope": partial(SI, scope="^hidden"),
    "ewc": EWC,
    "ewc_separate": partial(EWC, mode="separate", fisher="per_batch", half=False),
    "lwf": LwF,
}
EARLY: dict[str, Build] = {
    "derpp": partial(DER, budget=9, beta=0.5),
    "er_ace": partial(ERACE, budget=9),
    "uer": partial(UER, budget=9),
    "gdumb": partial(GDumb, budget=9),
    "lines": LiNeS,
    "hft": HFT,
    "fpf": partial(FPF, budget=9, steps=3),
    "k_fpf": partial(KFPF, budget=9, steps=3, times=3, visits=2),
    "refresh": partial(Refresh, delta=1e-3),
    "view_batch": ViewBatch,
    "ema": EMA,
    "er": partial(ER, budget=9),
    "all": Plugin,  # see TOGETHER
}
TOGETHER: dict[str, Build] = {"er": partial(ER, budget=9), "lwf": LwF, "ewc": partial(EWC, weight=1.0)}
STATELESS = {"lines", "hft", "ema"}


def learner(name: str) -> dict[str, Build]:
    """Return the learner of this name: one plugin, or all of those that go together."""
    return TOGETHER if name == "all" else {name: (LATE | EARLY)[name]}


def stream(kind: type[Any], dataset: Dataset) -> Stream:
    made: Stream = kind(num_classes=dataset.num_classes, input_shape=dataset.input_shape, seed=0, num_tasks=3)
    return made


@pytest.mark.parametrize(("name", "scenario"), sampled(OFF, SCENARIOS, every=3))
def test_turned_off_it_is_fine_tuning_bit_for_bit(played: RunExperiment, scenario: type[Any], name: str) -> None:
    naive, _ = played("naive", {}, scenario)
    same, _ = played(f"{name} off", {name: OFF[name]}, scenario)
    assert all(torch.equal(a, b) for a, b in zip(naive, same, strict=True))
    assert all(not torch.equal(a, b) for a, b in pairwise(naive[:2]))


@pytest.mark.parametrize(("name", "scenario"), sampled([*LATE, *EARLY], SCENARIOS, every=3))
def test_turned_on_it_is_not(played: RunExperiment, scenario: type[Any], name: str) -> None:
    naive, _ = played("naive", {}, scenario)
    other, _ = played(name, learner(name), scenario)
    assert torch.isfinite(other[-1]).all()
    assert not torch.equal(naive[-1], other[-1])
    # what acts late changes nothing before the first task has ended
    assert torch.equal(naive[1], other[1]) == (name in LATE)


@pytest.mark.parametrize(("name", "scenario"), sampled([*LATE, *EARLY], SCENARIOS, every=3))
def test_state_carried_over_continues_as_if_uninterrupted(
    blobs: Dataset, make_client: Callable[..., Any], played: RunExperiment, scenario: type[Any], name: str
) -> None:
    straight, state = played(name, learner(name), scenario)
    carried = make_client(blobs, stream(scenario, blobs), learner(name))
    for a, b in zip(straight, carried.run(SCRIPT, rebuild=True), strict=True):
        assert torch.equal(a, b)
    assert equal(state, carried.state)
    assert set(state) == set(learner(name))
    assert all(bool(own) == (plugin not in STATELESS) for plugin, own in state.items())


def test_the_order_of_listing_does_not_matter(
    blobs: Dataset, make_client: Callable[..., Any], played: RunExperiment
) -> None:
    forward, _ = played("all", learner("all"), ClassIncremental)
    # of one phase are only EWC and LwF: a sum of two terms does not depend on their order by more than rounding
    reverse = dict(reversed(TOGETHER.items()))
    backward = list(make_client(blobs, stream(ClassIncremental, blobs), reverse).run(SCRIPT))
    torch.testing.assert_close(forward[-1], backward[-1], rtol=1e-3, atol=1e-4)
