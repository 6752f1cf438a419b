"""Any ``nn.Module`` as a network: the layer that classifies is replaced by the stream's heads."""

# B = batch, F = features, L = logit columns over all heads
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fedcl.models.networks import Dropout, Network, Output
from fedcl.models.pretrained import load_weights
from fedcl.models.resnet import BatchNorm2d

_DROPOUTS = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}  # trailing axes that share one draw
_SHOWN = 6  # how many layers an error lists


class Features(nn.Module):
    """Stands where the classifier was: keeps what it receives, and passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        """Return ``features`` unchanged."""
        self.received.append(features)
        return features


class ModuleNetwork(Network):
    """A network around any ``nn.Module``.

    Its classifier is replaced by the stream's heads, which read the classifier's inputs, flattened to (B, F). Torch's
    dropout layers are replaced by fedcl's, whose draws are keyed, and two-dimensional batch norm by one that accepts a
    batch with a single value a channel. What the module returns is not used, so it may be a tensor, a tuple or an
    object. Tensors are named ``body.*``.

    Parameters
    ----------
    input_shape, heads
        Shape of one sample, and logit columns of each head.
    module
        The module, or a function that returns it.
    classifier
        Dotted name of the layer that computes the logits, such as ``fc``, ``classifier.1`` or ``head``.
    dtype
        What the module reads: float32, or int64 for token ids.
    pretrained
        A file with the module's own tensor names; those of the classifier are passed over.
    head, head_scale, head_width, freeze
        As in `Network.attach_heads` and `Network.prepare`; ``freeze`` is searched for in names with ``body.``.

    Raises
    ------
    ValueError
        The module has no such layer, does not call it exactly once with one tensor, cannot process a sample, or has a
        dropout layer that cannot be replaced.
    """

    components: ClassVar[tuple[str, ...]] = ("module",)
    nested = components  # also what is inside: a configuration object, a backbone

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        heads: Sequence[int],
        module: nn.Module | Callable[[], nn.Module],
        classifier: str,
        dtype: Literal["float32", "int64"] = "float32",
        head: str = "linear",
        head_scale: float | None = None,
        head_width: int | None = None,
        pretrained: str | None = None,
        freeze: str | None = None,
    ) -> None:
        super().__init__()
        body = module if isinstance(module, nn.Module) else module()
        if not isinstance(body, nn.Module):
            raise ValueError(f"model.module: gives a {type(body).__name__}, must be a torch.nn.Module")
        self._dtype = getattr(torch, dtype)
        self._features = Features()
        _replace(body, _own_layer)
        _put(body, classifier, self._features)
        self.body = body
        self.attach_heads(self._width(input_shape), heads, kind=head, scale=head_scale, width=head_width)
        self.prepare(pretrained=None, freeze=freeze)
        if pretrained is not None:
            load_weights(body, pretrained, classifier=classifier)  # after the freeze: what is fixed stays in the file

    def forward(self, x: Tensor) -> Output:
        """Map samples (B, *input_shape) to logits (B, L) and the classifier's inputs (B, F)."""
        return self.classify(self._inputs(x))

    def _inputs(self, x: Tensor) -> Tensor:
        """Return what the classifier would have read, (B, F)."""
        received = self._features.received
        received.clear()
        self.body(x.to(self._dtype))
        if len(received) != 1:
            raise ValueError(f"model.classifier: is called {len(received)} times in a forward pass, must be once")
        return received.pop().flatten(1)

    def _width(self, input_shape: Sequence[int]) -> int:
        name, training = type(self.body).__name__, self.body.training
        self.body.eval()
        try:
            with torch.no_grad():
                features = self._inputs(torch.zeros((2, *input_shape)))
        except Exception as error:  # a module of somebody else's fails in its own ways
            reason = str(error).split("\n")[0] or type(error).__name__
            raise ValueError(
                f"model.module: {name} cannot process samples of shape {tuple(input_shape)} as model.dtype="
                f"{str(self._dtype).removeprefix('torch.')}: {reason}"
            ) from error
        finally:
            self.body.train(training)
        if len(features) != 2:
            raise ValueError(f"model.classifier: gets {len(features)} rows for 2 samples, must be one row a sample")
        return features.shape[1]


class _ChannelDropout(Dropout):
    """Dropout of whole channels: the last ``axes`` axes share one draw."""

    def __init__(self, p: float, axes: int) -> None:
        super().__init__(p)
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with channels dropped; same shape."""
        if not self.training or self.p == 0.0:
            return x
        ones = x.new_ones(x.shape[: x.ndim - self.axes])
        return x * super().forward(ones).reshape(*ones.shape, *[1] * self.axes)


def _own_layer(name: str, layer: nn.Module) -> nn.Module:
    """Return what replaces ``layer``: itself, or one of fedcl's with its parameters and buffers."""
    if isinstance(layer, _DropoutNd):
        axes = _DROPOUTS.get(type(layer))
        if axes is None and layer.p:
            raise ValueError(f"model.module: layer {name} is a {type(layer).__name__}, which cannot be repeated bit "
                             "for bit; set its probability to 0")  # fmt: skip
        return _ChannelDropout(layer.p, axes) if axes else Dropout(layer.p)
    if type(layer) is nn.BatchNorm2d and layer.track_running_stats:
        own = BatchNorm2d(layer.num_features, layer.eps, layer.momentum, layer.affine)
        own._parameters, own._buffers, own.training = layer._parameters, layer._buffers, layer.training
        return own
    return layer


def _replace(module: nn.Module, new: Callable[[str, nn.Module], nn.Module], prefix: str = "") -> None:
    """Replace the layers of ``module``, in place, by what ``new`` makes of each name and layer."""
    for name, layer in module.named_children():
        made = new(prefix + name, layer)
        if made is not layer:
            setattr(module, name, made)
        else:
            _replace(layer, new, f"{prefix}{name}.")


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Replace the layer at a dotted path."""
    parent, _, name = path.rpartition(".")
    try:
        owner = module.get_submodule(parent)
        owner.get_submodule(name)
    except AttributeError as error:
        names = [found for found, _ in module.named_modules() if found]
        last = ", ".join(names[-_SHOWN:]) or "none"
        raise ValueError(
            f"model.classifier={path}: {type(module).__name__} has no such layer; its last ones are {last}"
        ) from error
    setattr(owner, name, layer)
