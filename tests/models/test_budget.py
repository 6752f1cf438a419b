"""A network that would take more than there is: refused while it is being built, by the setting to look at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedcl.assembly import load_dataset, make_model, make_stream
from fedcl.config.compose import compose
from fedcl.config.value_rules import ConfigError
from fedcl.models import budget
from fedcl.models.networks import MLP, build_model


def build(*overrides: str) -> None:
    cfg = compose(list(overrides))
    dataset = load_dataset(cfg)
    make_model(cfg, dataset, make_stream(cfg, dataset), torch.device("cpu"))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.hidden=[64,9000]"], r"model\.hidden=\[64, 9000\]"),
        (["model.head=random", "model.head_width=9000"], r"model\.head_width=9000"),
        (["model=vit", "model.dim=1024"], r"model\.dim=1024"),
        (["model=resnet8", "model.width=1024"], r"model\.width=1024"),
    ],
)
def test_weights_beyond_a_quarter_of_the_memory_are_refused_before_they_are_made(
    overrides: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda: 4 << 20)
    with pytest.raises(
        ConfigError, match=rf"^{named}: the network would take 0\.0\d+ GiB or more, .* has 0\.00391 GiB"
    ):
        build(*overrides)


def test_a_network_of_too_many_tensors_is_refused_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_MOST_TENSORS", 300)
    with pytest.raises(ConfigError, match=r"^model\.depth=64: the network would have more than 300 tensors"):
        build("model=vit", "model.dim=4", "model.patch=4", "model.depth=64")
    build("model=vit", "model.dim=4", "model.depth=4")


def test_counting_moves_no_weight_and_a_layer_is_refused_unmade(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MLP(input_shape=(4,), heads=(3,), hidden=(5,))
    assert [p.shape for p in plain.parameters()] == [
        p.shape for p in build_model(lambda: MLP(input_shape=(4,), heads=(3,), hidden=(5,)), seed=0).parameters()
    ]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = nn.Linear(4, 5).weight
    assert torch.equal(expected, build_model(lambda: nn.Linear(4, 5), seed=7).weight)
    with pytest.raises(budget.TooLarge, match=r"would take 3\.73e\+09 GiB"):
        build_model(lambda: nn.Linear(10**9, 10**9), seed=0)
