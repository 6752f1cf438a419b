from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from fedcl.config.conform import conform
from fedcl.config.instantiate import build
from fedcl.data.partition import PartitionInput

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
PARTITIONS = sorted(path.stem for path in (CONFIGS / "data" / "partition").glob("*.yaml"))


def composed(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        tree = OmegaConf.to_container(compose(None, overrides=list(overrides)), resolve=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def settings(*overrides: str) -> dict[str, Any]:
    choices = [override for override in overrides if "/" in override.split("=")[0] or override.startswith("+")]
    return conform(composed(*overrides), composed(*choices))["data"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("choice", DATA)
def test_every_choice_takes_the_documented_overrides(choice: str) -> None:
    divide = ["data/partition=dirichlet"] if choice == "text" else []
    data = settings(f"+data={choice}", *divide, "data.root=somewhere", "data.partition.alpha=0.25")
    assert data["root"] == data["source"]["root"] == "somewhere"
    assert data["partition"] == {"_target_": "fedcl.data.partition.dirichlet", "alpha": 0.25, "min_samples": 1}
    assert callable(build(data["source"], at="data.source"))


@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_partition_is_built_from_its_yaml(partition: str) -> None:
    if partition == "flwr":
        pytest.importorskip("flwr_datasets")
    data = settings("+data=digits", f"data/partition={partition}")
    dataset = build(data["source"], at="data.source")()
    divide = build(data["partition"], at="data.partition")
    train, test = dataset.train.y, dataset.test.y
    columns = {"speaker": train % 3}, {"speaker": test % 3}
    made = divide(PartitionInput(train, test, 2, 10, np.random.default_rng(0), *columns))
    assert len(made.train) == 2
    # devices hold their own data: the server deals out none
    assert all(bool(len(part)) is (partition != "local") for part in (*made.train, *made.test))


def test_a_bad_alpha_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ValueError, match=r"data\.partition\.alpha=-1: must be number > 0"):
        settings("+data=digits", "data.partition.alpha=-1")
