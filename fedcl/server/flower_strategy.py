"""A stock Flower strategy in place of the pipeline: it aggregates, fedcl does everything else.

The strategy's own ``configure_train`` and ``aggregate_train`` run unchanged. It sees the round's selection as the nodes
of its grid, and the accepted replies in canonical client order.

Flower's strategies take the whole vector for weights. Batch-norm statistics and other buffers are none: a step along
their change, scaled and with momentum, makes statistics of no data, variances below 0 among them. Unless a strategy
only averages or chooses among what clients sent, the buffers of the result are therefore fedcl's: their weighted mean.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    MultiKrum,
)
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor

from fedcl.base.randomness import key
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Target, Update
from fedcl.contracts.view import ServerView
from fedcl.messages import ARRAYS, CONFIG, METRICS, NUM_EXAMPLES
from fedcl.messages.arrays import FLAT, vector_record
from fedcl.models.flat import Spec
from fedcl.server.aggregation import PartialSums
from fedcl.server.strategy import Outgoing, Strategy

_AVERAGE = (FedAvg, FedProx)  # these themselves: what is derived from them may step
_CHOOSE = (FedMedian, FedTrimmedAvg, MultiKrum, Bulyan)
_PRIVATE = (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)


class CohortGrid(Grid):
    """The grid a stock strategy is shown: its nodes are the round's selection, and it can send nothing itself."""

    def __init__(self, node_ids: Iterable[int]) -> None:
        self._node_ids = list(node_ids)

    def get_node_ids(self) -> list[int]:
        """Return the selected nodes."""
        return list(self._node_ids)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("a stock strategy may ask which nodes were selected; fedcl does all messaging itself")

    set_run = create_message = push_messages = pull_messages = send_and_receive = _refuse
    run = property(_refuse)


class FlowerAdapter(Strategy):
    """Runs one of ``flwr.serverapp.strategy`` inside fedcl's round loop.

    Raises
    ------
    ValueError
        If ``strategy`` is not a Flower strategy, or needs more nodes than the ``selected`` ones of a round.
    """

    def __init__(self, strategy: Any, *, seed: int, nodes: Mapping[str, int], selected: int) -> None:
        if not isinstance(strategy, FlowerStrategy):
            raise ValueError(f"strategy.stock: {type(strategy).__name__} is not a flwr.serverapp.strategy.Strategy")
        self.strategy = strategy
        self._seed = seed
        self._nodes = dict(nodes)
        self._clients = {node: client for client, node in self._nodes.items()}
        self._sent: dict[str, Message] = {}
        self._parameters: int | None = None
        self._check_selection(selected)

    def setup(self, spec: Spec) -> None:
        """Learn where the buffers begin, which Flower's strategies know nothing of.

        Raises
        ------
        ValueError
            If there are any and the strategy adds noise: the plain mean of the buffers would reveal what it hides.
        """
        buffers = [tensor.name for tensor in spec if tensor.kind == "buffer"]
        if buffers and isinstance(self.strategy, _PRIVATE):
            raise ValueError(
                f"strategy.stock={type(self.strategy).__name__}: adds noise to {buffers[0]} as to a weight, which "
                "leaves no statistic; choose a model without batch normalisation"
            )
        steps = type(self.strategy) not in _AVERAGE and not isinstance(self.strategy, _CHOOSE)
        self._parameters = spec.size - sum(t.size for t in spec if t.kind == "buffer") if buffers and steps else None

    def _check_selection(self, selected: int) -> None:
        # Flower would wait, for ever, until enough nodes are there
        for name in ("min_available_nodes", "min_train_nodes"):
            needed = getattr(self.strategy, name, 0)
            if needed > selected:
                raise ValueError(f"strategy.stock.{name}={needed}: must be <= {selected}, the clients of a round")

    def outgoing(self, selected: Sequence[str], view: ServerView) -> list[Outgoing]:
        """Let the strategy configure the round over the selected nodes."""
        self._check_selection(len(selected))
        arrays = vector_record(view.global_model, live=True)
        if isinstance(vars(self.strategy).get("current_arrays"), ArrayRecord):
            # some keep their own copy instead of the arrays they are given: an unlearning edit would be undone
            vars(self.strategy)["current_arrays"] = None
        grid = CohortGrid(self._nodes[client] for client in selected)
        with self._random("configure", view.version):
            messages = list(self.strategy.configure_train(view.version + 1, arrays, ConfigRecord(), grid))
        self._sent = {self._clients[message.metadata.dst_node_id]: message for message in messages}
        chosen = [client for client in selected if client in self._sent]
        return [self._outgoing(client, arrays, view) for client in chosen]

    def _outgoing(self, client: str, arrays: ArrayRecord, view: ServerView) -> Outgoing:
        content = self._sent[client].content
        extra = set(content) - {ARRAYS, CONFIG}
        config = dict(content.config_records.get(CONFIG, {}))
        asked = sorted({*extra, *(config.keys() - {"server-round"})})
        if asked or content.array_records.get(ARRAYS) is not arrays:
            raise ConfigError(
                f"strategy.stock={type(self.strategy).__name__}: sends clients more than the global model "
                f"({', '.join(asked) or 'another model'}), which they would ignore: it needs parts of its own"
            )
        return Outgoing(client, GLOBAL, view.global_model, {}, config)

    def aggregate(
        self, positions: Sequence[Update | None], view: ServerView, partial: PartialSums | None = None
    ) -> dict[Target, Tensor]:
        """Let the strategy aggregate the accepted replies."""
        updates = [update for update in positions if update is not None]
        # Flower refuses replies whose metrics differ in name, and a client may have nothing to test itself on
        common = set.intersection(*(set(update.metrics) for update in updates)) if updates else set()
        replies = [self._reply(update, common) for update in updates]
        with self._random("aggregate", view.version):
            arrays, _ = self.strategy.aggregate_train(view.version + 1, replies)
        if arrays is None:
            return {}
        model = torch.from_numpy(arrays[FLAT].numpy().astype("float32", copy=False))
        return {GLOBAL: model if self._parameters is None else self._with_buffers(model, updates, self._parameters)}

    @staticmethod
    def _with_buffers(model: Tensor, updates: Sequence[Update], start: int) -> Tensor:
        """Return ``model`` (P,) with the clients' weighted mean, in float64 and rounded once, from ``start`` on."""
        total = sum(update.num_examples for update in updates)
        mean = sum(update.num_examples / total * update.model[start:].double() for update in updates)
        return torch.cat([model[:start], torch.as_tensor(mean).float()])

    def _reply(self, update: Update, names: set[str]) -> Message:
        metrics: dict[str, Any] = {NUM_EXAMPLES: update.num_examples}
        metrics.update((name, value) for name, value in update.metrics.items() if name in names)
        records = {ARRAYS: vector_record(update.model, live=True), METRICS: MetricRecord(metrics)}
        return Message(RecordDict(cast(Any, records)), reply_to=self._sent[update.client])

    @contextmanager
    def _random(self, purpose: str, version: int) -> Iterator[None]:
        """Give the strategy a keyed ``random``: Flower samples nodes from Python's global stream."""
        saved = random.getstate()
        random.seed(key(self._seed, "stock", version, purpose))
        try:
            yield
        finally:
            random.setstate(saved)

    def state_dict(self) -> dict[str, Any]:
        """Return the strategy's numeric attributes and arrays: moments of FedAdam, norms of adaptive clipping."""
        plain: dict[str, Any] = {}
        for name, value in vars(self.strategy).items():
            if value is None or isinstance(value, (bool, int, float, str)):
                plain[name] = value
            elif isinstance(value, dict) and all(isinstance(item, np.ndarray) for item in value.values()):
                plain[name] = {key: torch.from_numpy(item.copy()) for key, item in value.items()}
            elif isinstance(value, list) and all(isinstance(item, np.ndarray) for item in value):
                plain[name] = [torch.from_numpy(item.copy()) for item in value]
        return plain

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them. The model a strategy remembers as an ``ArrayRecord`` comes back with the next round."""
        for name, value in state.items():
            if not isinstance(vars(self.strategy).get(name), ArrayRecord):
                setattr(self.strategy, name, _arrays(value))

    def forget(self, request: ForgetRequest) -> list[ErasureOutcome]:
        """Say what a stock strategy may still hold."""
        return [ErasureOutcome(type(self.strategy).__name__, "retained", "a stock strategy cannot forget its moments")]


def _arrays(value: Any) -> Any:
    """Return stored state as Flower keeps it: numpy arrays of its own, in dicts or lists."""
    if isinstance(value, torch.Tensor):
        return value.numpy().copy()
    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_arrays(item) for item in value]
    return value
