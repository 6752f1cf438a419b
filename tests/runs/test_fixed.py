"""Fixed tensors are constants of a run: in no vector, message, checkpoint or state, and alike wherever they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedcl.assembly import client_ids, load_dataset, make_model, make_stream, split_dataset
from fedcl.config.compose import compose
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.strategy import GLOBAL
from fedcl.models.fixed import digest_of
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model
from fedcl.results import load, recorder
from fedcl.results.checkpoint import Checkpoints
from fedcl.runs.experiment import resume, run
from fedcl.runs.export import export, load_model
from fedcl.simulation.worker import Worker
from tests.runs.test_resume import Killed, _nth_call, killed_and_resumed

RunExperiment = Callable[..., Path]
Hash = Callable[[Path], str]
# 64 -> 6 -> 5 -> two heads of 5; the first layer frozen: (6 * 5 + 5) + (5 * 10 + 10) = 95 of 485 numbers are learned
SHORT = (
    "data=digits", "num_clients=4", "clients_per_round=2", "rounds_per_task=2", "scenario.num_tasks=2",
    "client.epochs=1", "model=mlp", "model.hidden=[6,5]", "model.freeze='hidden.0'",
)  # fmt: skip
PLAIN = "strategy/projection=none"
WHOLE, LEARNED = 64 * 6 + 6 + 95, 95


def network(**params: Any) -> FlatModel:
    return FlatModel(build_model(lambda: MLP(input_shape=(64,), heads=(10,), hidden=(6, 5), **params), seed=3))


def test_the_digest_names_values_names_shapes_and_types() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2)}
    digest = digest_of(tensors)
    assert digest_of({}) == network().base_digest == ""
    assert digest_of(dict(reversed(tensors.items()))) == digest
    others = [
        {"a": torch.arange(4.0), "c": torch.ones(2)},
        {"a": torch.arange(4.0).view(2, 2), "b": torch.ones(2)},
        {"a": torch.arange(4.0).double(), "b": torch.ones(2)},
        {"a": torch.tensor([0.0, 1.0, 2.0, 3.0000002]), "b": torch.ones(2)},
        {"a": torch.arange(4.0)},
    ]
    assert len({digest, *map(digest_of, others)}) == 6


@pytest.mark.parametrize("params", [{"freeze": "hidden"}, {"head": "simplex"}, {"head": "random", "head_width": 7}])
def test_copies_share_what_is_fixed_and_nothing_else(params: dict[str, Any]) -> None:
    model = network(**params)
    again = model.copy()
    assert again.fixed.keys() == model.fixed.keys()
    assert all(again.fixed[name].data_ptr() == tensor.data_ptr() for name, tensor in model.fixed.items())
    assert again.base_digest == model.base_digest != ""
    assert again.spec == model.spec
    again.flat.zero_()
    assert bool(model.flat.any())
    x = torch.rand(3, 64)
    assert not torch.equal(model(x).logits, again(x).logits)


def test_a_fixed_body_stays_in_the_mapped_file(tmp_path: Path) -> None:
    source = network().module.state_dict()
    save_file({name: tensor + 1 for name, tensor in source.items()}, tmp_path / "w.safetensors")
    model = network(pretrained=str(tmp_path / "w.safetensors"), freeze="hidden")
    assert torch.equal(model.fixed["hidden.0.weight"], source["hidden.0.weight"] + 1)
    place = model.fixed["hidden.0.weight"].data_ptr()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("w.safetensors")]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    assert any(low <= place < high for low, high in spans)
    assert torch.equal(model.spec.view(model.flat, "head.bias"), source["head.bias"] + 1)


def test_bytes_are_those_of_what_is_learned_and_results_name_both_sizes(run_experiment: RunExperiment) -> None:
    found = {
        "fedavg": run_experiment("fedavg", *SHORT[:-1], PLAIN),
        "frozen": run_experiment("frozen", *SHORT, PLAIN),
    }
    messages = 4 * 2  # rounds x clients, each way
    for name, size in (("fedavg", WHOLE), ("frozen", LEARNED)):
        summary = load(found[name]).summary
        assert (summary["bytes/down"], summary["bytes/up"]) == (messages * 4 * size, messages * 4 * size)
        assert summary["cost/parameters"] == size
    assert load(found["frozen"]).summary["cost/parameters_fixed"] == WHOLE - LEARNED
    assert "cost/parameters_fixed" not in load(found["fedavg"]).summary
    state, _ = Checkpoints(found["frozen"]).load()
    assert [len(model) for model in state["server"]["models"].values()] == [LEARNED]


LATE = ("async.buffer=1", "async.finished_task=keep", "devices=lognormal", "client.optimizer.lr=0.1")
METHODS = {
    "fot": ["strategy/projection=fot", "learner=er"],
    "fedcac": ["strategy/collaboration=fedcac", PLAIN],
    "inversion": [
        *("strategy/staleness=gradient_inversion", "strategy.staleness.server.iterations=3", PLAIN, *LATE),
        "strategy.staleness.server.max_residual=2.0",
    ],
    "stack": ["engine=stack", PLAIN],
    "fedper": ["strategy/collaboration=fedper", PLAIN, "learner=ewc"],
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_see_the_learned_vector_alone(name: str, run_experiment: RunExperiment) -> None:
    folder = run_experiment(name, *SHORT, *METHODS[name])
    metrics, (state, clients) = load(folder).metrics, Checkpoints(folder).load()
    assert {len(model) for model in state["server"]["models"].values()} == {LEARNED}
    names = set(metrics["name"])
    if name == "fot":
        assert {n for n in names if n.startswith("projection/rank/")} == {"projection/rank/hidden.1"}
    if name == "fedcac":
        assert len(state["server"]["models"]) > 1
    if name == "inversion":
        assert metrics[metrics["name"] == "staleness/inverted"]["value"].sum() > 0
    if name == "fedper":
        kept = [state["plugins"] for _, state in clients.values()]
        sizes = {len(own["learner.ewc"]["anchor"][0]) for own in kept if own["learner.ewc"]}
        assert sizes == {LEARNED}


@pytest.mark.parametrize("unlearner", ["ssd", "gradient_ascent"])
def test_unlearners_edit_the_learned_vector_alone(unlearner: str, run_experiment: RunExperiment) -> None:
    request = "unlearning.requests=[{scope: client, clients: ['1'], at: {task: 1}}]"
    folder = run_experiment(unlearner, *SHORT, PLAIN, f"unlearner={unlearner}", request, "unlearning.reference=false")
    assert len(list((folder / "certificates").glob("*.json"))) == 1
    assert [len(model) for model in Checkpoints(folder).load()[0]["server"]["models"].values()] == [LEARNED]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", ["fot", "fedper"])
def test_ray_gives_the_bits_of_inline(name: str, run_experiment: RunExperiment, metrics_hash: Hash) -> None:
    inline = run_experiment("inline", *SHORT, *METHODS[name])
    ray = run_experiment("ray", *SHORT, *METHODS[name], "backend=ray", "backend.workers=2")
    assert metrics_hash(ray) == metrics_hash(inline)


def test_an_interrupted_run_with_a_fixed_body_goes_on(
    tmp_path: Path, run_experiment: RunExperiment, metrics_hash: Hash, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_experiment("whole", *SHORT, *METHODS["fot"])
    killed_and_resumed([*SHORT, *METHODS["fot"]], tmp_path / "cut", 60, monkeypatch)
    assert metrics_hash(tmp_path / "cut") == metrics_hash(whole)


def test_a_run_with_other_fixed_tensors_than_its_checkpoint_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "w.safetensors"
    save_file(network().module.state_dict(), file)
    overrides = [*SHORT, PLAIN, "backend=inline", "compare_with=null", "figures=false", f"run_dir={tmp_path / 'cut'}"]
    overrides += [f"model.pretrained={file}", "checkpoint.min_seconds=0"]
    with monkeypatch.context() as patched:
        _nth_call(patched, recorder.Recorder, "_line", 70)
        with pytest.raises(Killed):
            run(compose(overrides), overrides, [], quiet=True)
    file.unlink()
    save_file({name: tensor + 1 for name, tensor in network().module.state_dict().items()}, file)
    with pytest.raises(ConfigError, match=r"fixed tensors are not those of the checkpoint; model\.pretrained"):
        resume(tmp_path / "cut", force=False, quiet=True)


def test_a_worker_with_another_base_is_refused() -> None:
    cfg = compose([*SHORT, PLAIN, "backend=inline", "compare_with=null"])
    dataset = load_dataset(cfg)
    with pytest.raises(ConfigError, match="has other fixed tensors than the server"):
        Worker(dict(cfg), dataset, split_dataset(cfg, dataset), client_ids(cfg), [], "0f" * 32)


@pytest.mark.parametrize("more", [(), ("model.freeze=null", "model.head=random", "model.head_width=7")])
def test_an_exported_model_is_whole(more: tuple[str, ...], tmp_path: Path, run_experiment: RunExperiment) -> None:
    folder = run_experiment("run", *SHORT, PLAIN, "seed=5", *more)
    model = load_model(export(folder))
    cfg = load(folder).config
    dataset = load_dataset(cfg)
    own = make_model(cfg, dataset, make_stream(cfg, dataset), torch.device("cpu"))
    own.load(Checkpoints(folder).load()[0]["server"]["models"][GLOBAL])
    own.eval()
    x = torch.rand(5, *dataset.input_shape)
    assert torch.equal(model(x), own(x).logits)
    assert model.about["base_digest"] == own.base_digest
