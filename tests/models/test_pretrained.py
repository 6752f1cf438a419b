from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model
from fedcl.models.resnet import ResNet


def mlp(seed: int = 0, **params: Any) -> MLP:
    return build_model(lambda: MLP(**({"input_shape": (4,), "heads": (3,), "hidden": (5,)} | params)), seed=seed)


def write(path: Path, tensors: dict[str, Tensor]) -> str:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
    else:
        torch.save(tensors, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".pth"])
def test_every_format_gives_back_what_was_written(tmp_path: Path, suffix: str) -> None:
    source = mlp(seed=1)
    file = write(tmp_path / f"weights{suffix}", {k: v.detach() for k, v in source.state_dict().items()})
    loaded = mlp(pretrained=file)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


def test_a_head_that_is_absent_or_of_other_classes_keeps_its_own_values(tmp_path: Path) -> None:
    body = {k: v.detach() for k, v in mlp(seed=1).state_dict().items() if k.startswith("hidden")}
    foreign = {"head.weight": torch.zeros(9, 5), "fc.bias": torch.zeros(1000)}
    for i, tensors in enumerate((body, body | foreign)):
        loaded = mlp(pretrained=write(tmp_path / f"{i}.safetensors", tensors)).state_dict()
        assert torch.equal(loaded["hidden.0.weight"], body["hidden.0.weight"])
        assert torch.equal(loaded["head.weight"], mlp().state_dict()["head.weight"])


def test_running_statistics_are_loaded_and_the_batch_counter_may_be_absent(tmp_path: Path) -> None:
    def make(**params: Any) -> ResNet:
        shape: dict[str, Any] = {"input_shape": (1, 8, 8), "heads": (2,), "blocks": (1,), "width": 2, "norm": "batch"}
        return build_model(lambda: ResNet(**shape, **params), seed=0)

    source = make()
    source(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    tensors = {k: v.detach() for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    loaded = FlatModel(make(pretrained=write(tmp_path / "r.npz", tensors)))
    assert torch.equal(loaded.spec.view(loaded.vector(), "bn1.running_mean"), tensors["bn1.running_mean"])


def test_what_does_not_fit_is_listed_and_the_list_is_short(tmp_path: Path) -> None:
    tensors = {f"block{i}.weight": torch.zeros(1) for i in range(7)} | {"hidden.0.weight": torch.zeros(5, 9)}
    with pytest.raises(ValueError, match=r"hidden\.0\.bias is missing") as caught:
        mlp(pretrained=write(tmp_path / "other.npz", tensors))
    assert str(caught.value).startswith(f"model.pretrained={tmp_path}")
    assert "block2.weight is no tensor of this model and 5 more" in str(caught.value)
    state = {k: v.detach() for k, v in mlp().state_dict().items()}
    wide = write(tmp_path / "wide.npz", state | {"hidden.0.weight": torch.zeros(5, 9)})
    with pytest.raises(ValueError, match=r"hidden\.0\.weight has shape \(5, 9\), the model's has \(5, 4\)"):
        mlp(pretrained=wide)


class Payload:
    """What a hostile file would run."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.pt"])
def test_damaged_and_hostile_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"these are no weights")
    with pytest.raises(ValueError, match=rf"model\.pretrained={file}: cannot be read as plain tensors") as caught:
        mlp(pretrained=str(file))
    assert "\n" not in str(caught.value)
    torch.save({"hidden.0.weight": Payload(tmp_path / "owned")}, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        mlp(pretrained=str(tmp_path / "hostile.pt"))
    assert not (tmp_path / "owned").exists()


def test_files_are_also_looked_for_beside_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "w.npz", {k: v.detach() for k, v in mlp(seed=1).state_dict().items()})
    monkeypatch.setenv("FEDCL_DATA", str(tmp_path))
    assert torch.equal(mlp(pretrained="w.npz").state_dict()["head.bias"], mlp(seed=1).state_dict()["head.bias"])
    with pytest.raises(ValueError, match=r"model\.pretrained=v\.npz: must be a file"):
        mlp(pretrained="v.npz")
    (tmp_path / "w.bin").touch()
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.npz, \.pt, \.pth"):
        mlp(pretrained="w.bin")


def test_frozen_parameters_are_those_that_the_expression_finds() -> None:
    model = FlatModel(mlp(freeze=r"^hidden\."))
    assert list(model.fixed) == ["hidden.0.weight", "hidden.0.bias"]
    assert [tensor.name for tensor in model.spec] == ["head.weight", "head.bias"]
    assert len(model.trainable) == 2


@pytest.mark.parametrize(("freeze", "message"), [("nothing", "must match some"), (".", "leave some"), ("(", "regular")])
def test_bad_freeze_is_refused(freeze: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.freeze=.*{message}"):
        mlp(freeze=freeze)
