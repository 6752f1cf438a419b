"""Wrappers of unlearners: an edit kept to few tensors, and one that is held back where it costs too much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.unlearners.fisher import RESPONSE, masses
from clients.unlearners.retrain import Retrain
from clients.unlearners.ssd import SSD
from clients.unlearners.wrappers import Guarded, Localised, heaviest
from fedcl.base.tree import equal
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.unlearner import Local, Samples, UnlearnContext, Unlearner, UnlearnView
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model
from tests.clients.serving import ASKED, NOTHING, Serving
from tests.toy import configure, run_toy, write_files


class Sets(Unlearner):
    """Puts a given vector in every model's place."""

    scopes = frozenset({"class"})
    guarantee = "exact"
    observes = True

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector
        self.seen: list[Any] = []

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        return Local(7, {"step": torch.tensor(len(step))})

    def observe(self, updates: Any, before: Tensor, view: Any) -> None:
        self.seen.append(("observe", before))

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[str, Tensor], view: UnlearnView
    ) -> dict[str, Tensor]:
        return dict.fromkeys(models, self.vector)

    def metrics(self) -> dict[str, float]:
        return {"of_base": 1.0}

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        return ErasureOutcome("Sets", "erased", request.id)

    def state_dict(self) -> dict[str, Any]:
        return {"vector": self.vector}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vector = state["vector"]


def line(flipped: float = 0.0) -> FlatModel:
    """Return a model of one input that says class 1 where x > flipped."""
    model = FlatModel(MLP(input_shape=(1,), heads=(2,), hidden=()))
    model.flat.copy_(torch.tensor([-1.0, 1.0, flipped, -flipped]))
    return model


X = torch.linspace(-1.0, 1.0, 21)[:, None]
STAYS = Samples(X, (X[:, 0] > 0.01).long())  # x = 0 is of class 0


def guarded(bound: float, shift: float, **settings: Any) -> Serving:
    """Serve a model that is right everywhere by one whose border lies at ``shift``."""
    model = line(0.02)
    return Serving(
        Guarded(base=Sets(line(shift).vector()), max_retain_drop=bound, **settings), model, {"0": (NOTHING, STAYS)}
    )


@pytest.mark.parametrize(
    ("bound", "scale", "drop"),
    [(1.0, 1.0, 8 / 21), (0.2, 0.5, 4 / 21), (0.1, 0.25, 2 / 21), (0.05, 0.125, 1 / 21), (0.04, 0.0625, 0.0)],
)
def test_the_edit_is_halved_until_it_fits(bound: float, scale: float, drop: float) -> None:
    serving = guarded(bound, 0.85)
    edited = serving.serve()
    metrics = serving.unlearner.metrics()
    assert metrics == {
        "of_base": 1.0,
        "guard/scale": scale,
        "guard/retain_drop": pytest.approx(drop),
        "guard/rolled_back": 0.0,
    }
    torch.testing.assert_close(edited, line(0.02 + scale * 0.83).vector())
    assert ("0.5 of the edit" in serving.unlearner.promise()) is (scale == 0.5)


def test_an_edit_that_never_fits_is_taken_back_and_this_is_said() -> None:
    serving = guarded(0.05, 0.85, halvings=2)
    assert torch.equal(serving.serve(), serving.initial)
    metrics = serving.unlearner.metrics()
    assert (metrics["guard/scale"], metrics["guard/rolled_back"], metrics["guard/retain_drop"]) == (0.0, 1.0, 0.0)
    assert serving.unlearner.promise().startswith("none: rolled back")


def test_a_harmless_edit_is_taken_bit_for_bit() -> None:
    serving = guarded(0.0, 0.07)
    assert torch.equal(serving.serve(), line(0.07).vector())
    assert serving.unlearner.promise() == f"{Sets(X).promise()}; within the allowed loss of accuracy"


def test_accuracy_is_that_of_the_clients_that_use_the_model() -> None:
    """Client 0 uses the target's model and loses nothing; client 1, which uses another, would lose everything."""
    other = Samples(torch.tensor([[0.5]] * 5), torch.ones(5, dtype=torch.long))
    serving = guarded(0.0, 0.6)
    serving.held = {"0": (NOTHING, Samples(X[:10], STAYS.y[:10])), "1": (NOTHING, other)}
    serving.model_of = {"0": serving.initial, "1": serving.initial + 1}.__getitem__  # type: ignore[method-assign]
    assert torch.equal(serving.serve(), line(0.6).vector())
    assert {client for _, client in serving.asked} == {"0"}
    serving.model_of = lambda client: serving.initial  # type: ignore[method-assign]
    assert not torch.equal(serving.serve(), line(0.6).vector())


def test_masked_columns_are_no_prediction() -> None:
    allowed = torch.tensor([[False, True]]).expand(21, 2)
    serving = guarded(0.0, 5.0)
    serving.held = {"0": (NOTHING, Samples(X, torch.ones(21, dtype=torch.long), allowed))}
    assert torch.equal(serving.serve(), line(5.0).vector())  # right whatever the model says


# -- localised ------------------------------------------------------------


def small() -> FlatModel:
    return FlatModel(build_model(lambda: MLP(input_shape=(4,), heads=(3,), hidden=(8, 8)), seed=0))


def held() -> dict[str, tuple[Samples, Samples]]:
    generator = torch.Generator().manual_seed(0)
    samples = Samples(torch.randn(30, 4, generator=generator), torch.arange(30) % 3)
    return {
        str(k): (
            samples.at((samples.y == 0) & (torch.arange(30) % 2 == k)),
            samples.at((samples.y != 0) & (torch.arange(30) % 2 == k)),
        )
        for k in (0, 1)
    }


def test_only_the_heaviest_tensors_change() -> None:
    model = small()
    serving = Serving(Localised(base=Sets(torch.full((model.spec.size,), 9.0)), k=2), model, held())
    edited = serving.serve()
    changed = [
        t.name for t in model.spec if not torch.equal(edited[t.start : t.stop], serving.initial[t.start : t.stop])
    ]
    assert len(changed) == 2
    assert all(bool((model.spec.view(edited, name) == 9.0).all()) for name in changed)
    ssd = Serving(SSD(), model, held())
    found = masses(ssd.ask("importance", {"0": serving.initial, "1": serving.initial}, RESPONSE))
    assert found is not None
    assert sorted(heaviest(model.spec, found, 2)) == sorted(changed)
    ratio = {
        t.name: float(found.forget[t.start : t.stop].sum() / found.whole[t.start : t.stop].sum()) for t in model.spec
    }
    assert min(ratio[name] for name in changed) >= max(r for name, r in ratio.items() if name not in changed)
    share = sum(model.spec[name].size for name in changed) / model.num_parameters
    assert serving.unlearner.metrics() == {"of_base": 1.0, "localised/share": pytest.approx(share)}


def test_tensors_can_be_named() -> None:
    model = small()
    serving = Serving(Localised(base=Sets(torch.full((model.spec.size,), 9.0)), tensors="^head"), model, held())
    edited, head = serving.serve(), model.spec["head.weight"].start
    assert torch.equal(edited[:head], serving.initial[:head])
    assert bool((edited[head:] == 9.0).all())
    assert serving.asked == []  # no importance is needed
    with pytest.raises(ValueError, match=r"unlearner.tensors='tail': matches none of hidden.0.weight"):
        Localised(base=SSD(), tensors="tail").check(model)


def test_wrapped_ssd_is_ssd_within_its_tensors() -> None:
    plain = Serving(SSD(alpha=0.1), small(), held()).serve()
    serving = Serving(Localised(base=SSD(alpha=0.1), k=3), small(), held())
    edited = serving.serve()
    assert {step for step, _ in serving.asked} == {"localised/importance", "importance"}
    for tensor in serving.spec:
        part = slice(tensor.start, tensor.stop)
        assert torch.equal(edited[part], plain[part]) or torch.equal(edited[part], serving.initial[part])
    assert not torch.equal(edited, plain)
    assert not torch.equal(edited, serving.initial)


# -- both ------------------------------------------------------------


@pytest.mark.parametrize("wrap", [Guarded, Localised])
def test_everything_else_is_the_bases(wrap: Any) -> None:
    base = Sets(X)
    wrapper = wrap(base=base)
    assert (wrapper.scopes, wrapper.observes, wrapper.guarantee) == (frozenset({"class"}), True, "approximate")
    wrapper.observe([], X, None)
    assert base.seen == [("observe", X)]
    assert wrapper.forget(ASKED) == ErasureOutcome("Sets", "erased", "a")
    assert equal(wrapper.state_dict(), {"vector": X})
    wrapper.load_state_dict({"vector": STAYS.y})
    assert base.vector is STAYS.y
    assert int(wrapper.local(None, "abc").tensors["step"]) == 3
    with pytest.raises(TypeError, match="has no step 'abc'"):
        wrapper.local(None, f"{wrapper.prefix}/abc")
    with pytest.raises(ValueError, match=r"unlearner.base=Retrain: retrains"):
        wrap(base=Retrain())


def test_a_guard_around_a_local_edit_runs(tmp_path: Path, device: torch.device) -> None:
    """In a whole run, nested as a configuration nests them; a bound of 0 lets nothing harmful in."""
    files = write_files(tmp_path)
    rows = {}
    for name, extra in (
        ("guarded_ssd", ["unlearner.max_retain_drop=0", "unlearner.base.alpha=0.05"]),
        ("localised_ssd", []),
    ):
        request = "unlearning.requests=[{id: a, scope: class, classes: [0], at: {round: 3}}]"
        cfg = configure({"unlearner": name}, files, device, request, "unlearning.reference=false", *extra, num_tasks=2)
        diary = run_toy(cfg)
        assert not diary.faults
        rows[name] = {r["name"]: r["value"] for r in diary.rows if r["phase"] == "unlearning"}
    assert rows["guarded_ssd"]["unlearner/guard/retain_drop"] <= 0
    assert 0 < rows["guarded_ssd"]["unlearner/selected"] <= 1
    assert 0 < rows["localised_ssd"]["unlearner/localised/share"] < 1
