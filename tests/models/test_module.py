"""Any module as a network: its classifier is found, its draws are keyed, and what cannot work is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcl.cli import main
from fedcl.models.check import check_network
from fedcl.models.flat import FlatModel, is_head
from fedcl.models.module import ModuleNetwork
from fedcl.models.networks import Dropout, build_model
from fedcl.models.resnet import BatchNorm2d

SHAPE = (1, 8, 8)


class Cnn(nn.Module):
    """A network as people write them: torch's own dropout, logits from a layer named ``fc``, then a log-softmax."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.heads = nn.ModuleList([nn.Linear(4, 4)])  # a name that fedcl gives to classifiers
        self.channels, self.dropout = nn.Dropout2d(p), nn.Dropout(p)
        self.fc = nn.Linear(4, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels(self.norm(self.conv(x)).relu())
        x = self.heads[0](x.mean((2, 3)))
        return self.fc(self.dropout(x)).log_softmax(1)


class Text(nn.Module):
    """Reads token ids and returns an object; its classifier is a part of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(15, 2))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.classifier(self.embedding(ids))}


class Twice(Cnn):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(-x)


class Functional(Cnn):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class Alpha(Cnn):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.AlphaDropout(0.1)


def network(module: Any = Cnn, classifier: str = "fc", shape: tuple[int, ...] = SHAPE, **more: Any) -> ModuleNetwork:
    return build_model(
        lambda: ModuleNetwork(input_shape=shape, heads=(3, 2), module=module, classifier=classifier, **more), seed=0
    )


def test_the_heads_read_what_the_classifier_read() -> None:
    net = network().eval()
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    out = net(x)
    hidden = net.body.heads[0](net.body.norm(net.body.conv(x)).relu().mean((2, 3)))
    torch.testing.assert_close(out.features, hidden)
    torch.testing.assert_close(out.logits, torch.cat([head(hidden) for head in net.heads], 1))
    assert not [name for name, _ in net.named_parameters() if "fc" in name]


def test_only_the_streams_heads_are_heads() -> None:
    spec = FlatModel(network()).spec
    assert [t.name for t in spec if is_head(t)] == [
        "heads.0.weight", "heads.0.bias", "heads.1.weight", "heads.1.bias",
    ]  # fmt: skip
    assert spec["body.heads.0.weight"].task is None
    assert spec["body.norm.weight"].norm


def test_draws_follow_the_generator_whatever_the_global_state() -> None:
    model = FlatModel(network())
    check_network(model, SHAPE, 5)
    x = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    outs = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        model.set_generator(torch.Generator().manual_seed(seed))
        outs.append(model(x).features.detach())
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_channels_are_dropped_whole_and_the_mean_is_kept() -> None:
    layer = network(lambda: Cnn(0.25)).body.channels
    assert isinstance(layer, Dropout)
    layer.set_generator(torch.Generator().manual_seed(0))
    out = layer.train()(torch.ones(500, 4, 2, 2))
    assert {round(float(v), 6) for v in out.unique()} == {0.0, round(1 / 0.75, 6)}
    assert torch.equal(out, out[:, :, :1, :1].expand_as(out))
    assert float((out > 0).double().mean()) == pytest.approx(0.75, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)


def test_dropout_is_replaced_where_it_drops_nothing_too() -> None:
    model = FlatModel(network(lambda: Cnn(0.0)))  # which refuses torch's own
    assert torch.equal(model(torch.ones(2, *SHAPE)).features, model(torch.ones(2, *SHAPE)).features)


def test_other_types_of_numbers_are_refused_by_name() -> None:
    net = network()
    net.body.conv.double()
    with pytest.raises(ValueError, match=r"^model: tensor body\.conv\.weight is torch\.float64; .*float32 only$"):
        FlatModel(net)


def test_batch_norm_takes_a_client_with_one_value_a_channel() -> None:
    net = network()
    assert type(net.body.norm) is BatchNorm2d
    assert net.body.norm.train()(torch.ones(1, 4, 1, 1)).shape == (1, 4, 1, 1)


def test_token_ids_and_classifiers_of_several_layers() -> None:
    net = network(Text, "classifier", (5,), dtype="int64").eval()
    assert net(torch.tensor([[1.0, 2, 3, 4, 6]])).features.shape == (1, 15)
    inner = network(Text, "classifier.1", (5,), dtype="int64").eval()
    ids = torch.tensor([[1.0, 2, 3, 4, 6]])
    torch.testing.assert_close(inner(ids).features, net(ids).features)


def test_a_file_has_the_modules_own_names(tmp_path: Path) -> None:
    torch.manual_seed(5)
    theirs = Cnn()
    torch.save(theirs.state_dict(), tmp_path / "cnn.pt")
    net = network(pretrained=str(tmp_path / "cnn.pt"), freeze="^body")
    assert {t.name.split(".")[0] for t in FlatModel(net).spec} == {"heads"}
    assert torch.equal(net.body.conv.weight, theirs.conv.weight)
    assert torch.equal(net.body.heads[0].weight, theirs.heads[0].weight)


@pytest.mark.parametrize(
    ("module", "more", "said"),
    [
        (Cnn, {"classifier": "last"}, r"^model\.classifier=last: Cnn has no such layer; its last ones are .*, fc$"),
        (Cnn, {"classifier": "conv"}, r"^model\.module: Cnn cannot process samples of shape \(1, 8, 8\) as model\.dty"),
        (Twice, {}, r"^model\.module: Twice .*model\.classifier: is called 2 times in a forward pass, must be once$"),
        (Cnn, {"classifier": "dropout", "shape": (3, 8, 8)}, r"model\.module: Cnn cannot process samples of shape"),
        (Alpha, {}, r"^model\.module: layer other is a AlphaDropout, .*; set its probability to 0$"),
        (lambda: 3, {}, r"^model\.module: gives a int, must be a torch\.nn\.Module$"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(module: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        network(module, **more)
    assert "\n" not in str(caught.value)


def test_functional_dropout_is_noticed() -> None:
    with pytest.raises(ValueError, match=r"^model: Functional draws .*; set the probabilities of its functional drop"):
        check_network(FlatModel(network(Functional)), SHAPE, 5)


RUN = ["backend=inline", "num_clients=3", "rounds_per_task=1", "scenario.num_tasks=2", "compare_with=null",
       "figures=false", "run_dir=run", "model=module"]  # fmt: skip
RESNET = (
    "model.module={_target_: transformers.ResNetForImageClassification, config: {_target_: transformers.ResNetConfig, "
    "num_channels: 1, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}}"
)
VIT = (
    "model.module={_target_: transformers.ViTForImageClassification, config: {_target_: transformers.ViTConfig, "
    "num_channels: 1, image_size: 8, patch_size: 4, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 16}}"
)


@pytest.mark.parametrize("module", [RESNET, VIT], ids=["resnet", "vit"])
def test_a_package_of_somebody_elses(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*RUN, module, "model.classifier=classifier", "trusted_packages=[transformers]", "learner=er"]
    assert main(["run", *words, "strategy/projection=none"]) == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.classifier=fc"], "model.module: has no _target_"),
        (["model.module._target_=mine.Net"], "model.classifier: must be given"),
        (["model.module._target_=its.Net", "model.module.wid=2", "model.classifier=fc"], "model.module.wid: no such"),
        ([RESNET, "model.classifier=classifier"], "package 'transformers' is not trusted"),
    ],
)
def test_settings_that_cannot_work(
    settings: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "its" if "its" in settings[0] else "mine"  # one file a name: what is imported stays so
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, width=2):\n        super().__init__()\n"
    )
    assert main(["run", *RUN, *settings]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
