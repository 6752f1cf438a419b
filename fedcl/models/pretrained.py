"""Weights from a file: safetensors, npz, or PyTorch's own format read without running code from it.

A safetensors file is mapped: parameters that are fixed stay in it, and all processes of a machine that read the file
share its memory. The other formats are read into each process's own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

_FEW = 4  # how many names an error lists
# What classifiers are called, here and in the files that people share; their classes are not ours.
_CLASSIFIER = re.compile(r"^(?:heads?|fc|classifier)\.")


def load_weights(module: nn.Module, path: str, *, classifier: str | None = None) -> None:
    """Give the tensors of ``module`` the values of a file's equally named ones: by copy, or where fixed, as they are.

    The head keeps its own values where the file has none, and a file's classifier (``head.*``, ``heads.*``, ``fc.*``,
    ``classifier.*``) that does not fit the module is passed over; everything else must be there in both, in one shape.

    Parameters
    ----------
    module
        The network.
    path
        A ``.safetensors``, ``.npz``, ``.pt`` or ``.pth`` file; one that is not here is looked for in the folder that
        the environment variable ``FEDCL_DATA`` names.
    classifier
        Dotted name of a further layer of the file that is passed over.

    Raises
    ------
    ValueError
        The file is missing or unreadable, or names or shapes differ; the first few are listed.
    """
    found = _read(_locate(path), path)
    own, parameters = module.state_dict(), dict(module.named_parameters())
    wrong = [f"{name} is missing" for name in own if name not in found and _needed(name)]
    for name, tensor in found.items():
        target = own.get(name)
        if classifier is not None and name.startswith(f"{classifier}."):
            continue
        if _CLASSIFIER.match(name) and (target is None or target.shape != tensor.shape):
            continue
        if target is None:
            wrong.append(f"{name} is no tensor of this model")
        elif target.shape != tensor.shape:
            wrong.append(f"{name} has shape {tuple(tensor.shape)}, the model's has {tuple(target.shape)}")
        elif name in parameters and not parameters[name].requires_grad and tensor.dtype == target.dtype:
            parameters[name].data = tensor.contiguous()  # as the file holds it: processes share the pages of a map
        else:
            with torch.no_grad():
                target.copy_(tensor)
    if wrong:
        more = f" and {len(wrong) - _FEW} more" if len(wrong) > _FEW else ""
        raise ValueError(f"model.pretrained={path}: {'; '.join(wrong[:_FEW])}{more}")


def _needed(name: str) -> bool:
    return not _CLASSIFIER.match(name) and not name.endswith("num_batches_tracked")


def _locate(path: str) -> Path:
    file = Path(path).expanduser()
    shared = os.environ.get("FEDCL_DATA")
    if not file.exists() and shared and not file.is_absolute():
        file = Path(shared).expanduser() / file
    if not file.is_file():
        raise ValueError(f"model.pretrained={path}: must be a file, here or in the folder that FEDCL_DATA names")
    return file


def _read(file: Path, path: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    readers = {".safetensors": lambda: load_file(file), ".npz": lambda: _read_npz(file)}
    readers |= dict.fromkeys((".pt", ".pth"), lambda: torch.load(file, map_location="cpu", weights_only=True))
    if file.suffix not in readers:
        raise ValueError(f"model.pretrained={path}: must end in {', '.join(readers)}")
    try:
        tensors = readers[file.suffix]()
    except Exception as error:  # readers of foreign bytes fail in every way there is
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"model.pretrained={path}: cannot be read as plain tensors: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"model.pretrained={path}: must hold a state dict, tensors by name")
    return tensors


def _read_npz(file: Path) -> dict[str, Tensor]:
    # Opened here because np.load leaves its own file open when the archive is broken.
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        return {name: torch.from_numpy(np.array(archive[name])) for name in archive.files}
