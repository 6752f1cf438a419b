"""Plain linear networks, recognised: their training step can be written down without automatic differentiation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedcl.models.networks import BETWEEN, MLP

Names = tuple[str, str]  # of a linear layer's weight and bias


@dataclass(frozen=True, slots=True)
class Chain:
    """Linear layers with ReLU and perhaps dropout after each but the last ones, the heads, which stand side by side.

    ``dropout`` has the drop probability after each hidden layer.
    """

    hidden: tuple[Names, ...]
    heads: tuple[Names, ...]
    dropout: tuple[float, ...]


def chain_of(module: nn.Module) -> Chain | None:
    """Return the names of ``module``'s layers if it is a plain linear network that is trained as a whole, else None."""
    if type(module) is not MLP or not all(p.requires_grad for p in module.parameters()):
        return None
    if any(name in module._modules for name in BETWEEN):
        return None
    heads = (
        {"head": module.head} if "head" in module._modules else {f"heads.{k}": h for k, h in enumerate(module.heads)}
    )
    if not all(type(head) is nn.Linear for head in heads.values()):
        return None
    return Chain(
        hidden=tuple((f"hidden.{k}.weight", f"hidden.{k}.bias") for k in range(len(module.hidden))),
        heads=tuple((f"{name}.weight", f"{name}.bias") for name in heads),
        dropout=tuple(layer.p for layer in module.dropouts),  # type: ignore[misc]
    )
