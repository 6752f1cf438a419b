"""FedCAC: each client keeps a model of its own and shares critical parameters with clients that agree on them.

Wu et al., "Bold but Cautious: Unlocking the Potential of Personalized Federated Learning through Cautiously Aggressive
Collaboration", ICCV 2023 (arXiv 2309.11103), with the details of its author's code (FLAIR-Community/Fling).
"""

# K = clients known, P = length of the flat vector, B = ceil(P / 8) bytes
from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedcl.contracts.fields import TensorField
from fedcl.contracts.learner import Payload
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Collaboration, LocalWork, Target, Update
from fedcl.contracts.view import ServerView
from fedcl.models.flat import Spec
from fedcl.models.masks import common_bits, count_bits, critical_mask, pack_bits, trained_parameters, unpack_bits

__all__ = ["FedCAC", "collaboration_threshold", "collaborators", "critical_mask", "overlap", "overlap_packed"]

CRITICAL = Payload("critical", "up", TensorField(("bitmask",), "uint8"), reduction="stack")
_SHOWN = 32  # clients up to which every pair's overlap is recorded: K (K - 1) numbers a round
_CHUNK = 1 << 16  # columns merged at a time: the float64 copies of all clients' models stay small


def overlap(masks_KP: Tensor) -> Tensor:
    """Return the overlap of critical positions O_KK of bool masks, float64: O_ij = 1 - |M_i - M_j|_1 / (2 |M_i|_1).

    It is not symmetric when the counts differ. The diagonal is 1; a client without critical parameters overlaps with
    nobody (0), as there is nothing it could share.
    """
    return overlap_packed(pack_bits(masks_KP), masks_KP.shape[1])


def overlap_packed(packed_KB: Tensor, size: int) -> Tensor:
    """Return :func:`overlap` of masks of ``size`` positions packed by ``fedcl.models.masks.pack_bits``: the same bits.

    Raises
    ------
    ValueError
        If the bytes are not as many as ``size`` bits need.
    """
    if packed_KB.shape[1] != -(-size // 8):
        raise ValueError(f"packed masks have {packed_KB.shape[1]} bytes: {size} positions need {-(-size // 8)}")
    common_KK = common_bits(packed_KB).double()
    size_K = common_KK.diagonal()
    distance_KK = size_K[:, None] + size_K[None, :] - 2 * common_KK
    overlap_KK = 1 - distance_KK / (2 * size_K[:, None]).clamp_min(1)
    overlap_KK[size_K == 0] = 0.0
    return overlap_KK.fill_diagonal_(1.0)


def collaboration_threshold(overlap_KK: Tensor, aggregation: int, beta: int) -> float:
    """Return eps_t = O_avg + (t / beta) (O_max - O_avg) over ordered pairs of clients; t counts aggregations from 1.

    With one client alone there is no pair, and the threshold is 1.
    """
    off_diagonal = overlap_KK[~torch.eye(len(overlap_KK), dtype=torch.bool)]
    if len(off_diagonal) == 0:
        return 1.0
    highest = float(off_diagonal.max())
    mean = min(float(off_diagonal.mean()), highest)
    # at t = beta the closest pair still passes, whatever rounding makes of the sum
    return highest if aggregation == beta else mean + aggregation / beta * (highest - mean)


def collaborators(overlap_KK: Tensor, threshold: float) -> Tensor:
    """Return who shares critical parameters with whom, bool (K, K): row i holds i and every j with O_ij >= eps."""
    return (overlap_KK >= threshold).fill_diagonal_(True)


class FedCAC(Collaboration):
    """Merge, for each client known so far, its customised model where it is critical with the global one elsewhere.

    The global model is the mean of the round's models by number of samples. A client's customised model is the plain
    mean over itself and those whose critical parameters overlap with its own by at least eps_t. Last model and mask of
    every client ever seen are kept, so a client that sits a round out still collaborates. Buffers of a personal model
    stay its client's own, and so does a task head that the client did not train lately.

    Parameters
    ----------
    tau
        Share of each tensor's parameters that is critical, in (0, 1].
    beta
        Aggregations until critical parameters stay entirely personal: an integer of at least 1, or a share of the run's
        rounds in (0, 1). A third to half of the rounds is usual.
    masks
        ``server`` computes the masks there, from the model that was sent, or what staleness correction made of it.
        ``client`` has them sent, one bit a parameter, by ``clients.strategies.fedcac.CriticalMask``. On time both are
        the same.
    """

    needs: ClassVar[Literal["sum", "stack"]] = "stack"
    personal: ClassVar[bool] = True

    def __init__(self, *, tau: float = 0.5, beta: float = 0.5, masks: Literal["server", "client"] = "server") -> None:
        self.tau = tau
        self.beta = beta
        self.masks = masks
        if masks == "client":
            self.payloads = (CRITICAL,)  # type: ignore[misc]
        self._horizon = int(beta)  # 0: a share of rounds that are not known yet
        self._aggregations = 0
        self._models: dict[str, Tensor] = {}
        self._packed: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}
        self._metrics: dict[str, float] = {}

    def bind(self, work: LocalWork) -> None:
        """Turn a ``beta`` that is a share of the rounds into aggregations, at least one."""
        if self.beta < 1:
            self._horizon = max(1, round(self.beta * work.num_rounds))

    def message_for(self, client: str, view: ServerView) -> tuple[Target, dict[str, Tensor]]:
        return (client if client in self._models else GLOBAL), {}

    def combine(self, updates: list[Update], view: ServerView) -> dict[Target, Tensor]:
        """Return the new global model, float64 (P,), and one for each client known, float32 (P,)."""
        if not updates:
            return {}
        if not self._horizon:
            raise RuntimeError(f"beta={self.beta} is a share of the rounds, and nobody said how many there are: bind")
        self._aggregations += 1
        for update in updates:
            self._remember(update, view.spec)
        global_P = self._global_model(updates, view)
        return {GLOBAL: global_P, **self._personal_models(global_P, view.spec)}

    def _remember(self, update: Update, spec: Spec) -> None:
        """Keep the update's model and mask, save for heads of other tasks, which weight decay alone may have moved."""
        model, mask = update.model.clone(), self._mask_of(update, spec)
        before = self._packed.get(update.client)
        known = None if before is None else unpack_bits(before, spec.size)
        for tensor in update.other_heads(spec):
            part = slice(tensor.start, tensor.stop)
            model[part] = update.base[part]
            mask[part] = False if known is None else known[part]
        self._models[update.client], self._packed[update.client] = model, pack_bits(mask)
        self._seen[update.client] = self._aggregations

    def _mask_of(self, update: Update, spec: Spec) -> Tensor:
        """Return the update's mask, bool (P,): as sent, or computed where none is sent."""
        if self.masks == "client":
            mask = unpack_bits(update.payload[CRITICAL.name], spec.size)
            for tensor in spec:
                if tensor.kind == "buffer":
                    mask[tensor.start : tensor.stop] = False
            return mask
        return critical_mask(update.base, update.model, trained_parameters(spec, update.head), self.tau)

    def _global_model(self, updates: list[Update], view: ServerView) -> Tensor:
        """Return the weighted mean of the round's models (P,); a head counts those that trained it, if any."""
        models_KP = torch.stack([self._models[update.client] for update in updates]).double()
        weights_K = torch.tensor([update.weight for update in updates], dtype=torch.float64)
        global_P = (weights_K / weights_K.sum()) @ models_KP
        for tensor in view.spec:
            if tensor.task is None:
                continue
            part = slice(tensor.start, tensor.stop)
            heads_K = weights_K * torch.tensor([update.head == tensor.task for update in updates])
            if float(heads_K.sum()) > 0:
                global_P[part] = (heads_K / heads_K.sum()) @ models_KP[:, part]
            else:
                global_P[part] = view.global_model[part].double()
        return global_P

    def _personal_models(self, global_P: Tensor, spec: Spec) -> dict[Target, Tensor]:
        clients = list(self._models)
        packed_KB = torch.stack([self._packed[client] for client in clients])
        overlap_KK = overlap_packed(packed_KB, spec.size)
        threshold = collaboration_threshold(overlap_KK, self._aggregations, self._horizon)
        shares_KK = collaborators(overlap_KK, threshold).double()
        merged_KP = self._merge(shares_KK / shares_KK.sum(1, keepdim=True), global_P, packed_KB)
        for row, client in enumerate(clients):
            for tensor in spec:
                if tensor.kind == "buffer":
                    part = slice(tensor.start, tensor.stop)
                    merged_KP[row, part] = self._models[client][part]
        self._metrics = {
            "threshold": threshold,
            "collaborators": float(shares_KK.sum(1).mean()) - 1,
            "critical_share": float(count_bits(packed_KB).double().mean()) / spec.size,
            "oldest_model": float(self._aggregations - min(self._seen.values())),
            **(_pairs(clients, overlap_KK) if len(clients) <= _SHOWN else {}),
        }
        return dict(zip(clients, merged_KP, strict=True))

    def _merge(self, weights_KK: Tensor, global_P: Tensor, packed_KB: Tensor) -> Tensor:
        """Return M C + (1 - M) G with C the product of weights and models, float32 (K, P), piece by piece."""
        models = list(self._models.values())
        merged_KP = torch.empty(len(models), len(global_P))
        for start in range(0, len(global_P), _CHUNK):
            stop = min(start + _CHUNK, len(global_P))
            own_KC = torch.stack([model[start:stop] for model in models]).double()
            masks_KC = unpack_bits(packed_KB[:, start // 8 : -(-stop // 8)], stop - start)
            merged_KP[:, start:stop] = torch.where(masks_KC, weights_KK @ own_KC, global_P[start:stop])
        return merged_KP

    def state_dict(self) -> dict[str, Any]:
        """Return last model, packed mask and aggregation of every client seen, and the number of aggregations."""
        return {
            "aggregations": self._aggregations,
            "models": dict(self._models),
            "masks": dict(self._packed),
            "seen": dict(self._seen),
            "metrics": dict(self._metrics),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._aggregations = state["aggregations"]
        self._models, self._packed = dict(state["models"]), dict(state["masks"])
        self._seen, self._metrics = dict(state["seen"]), dict(state["metrics"])

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop model and mask of the clients that hold the forget set; all of them when the request names none.

        Those of other clients stay until they train again: they began at mixtures with the dropped ones.
        """
        named = request.clients or tuple(self._models)
        dropped = [client for client in named if self._models.pop(client, None) is not None]
        for client in dropped:
            del self._packed[client], self._seen[client]
        name = type(self).__name__
        if not dropped:
            return ErasureOutcome(name, "not applicable", "keeps no model of the clients concerned")
        why = f"model and mask of {', '.join(dropped)} are dropped; customised models follow at the next aggregation"
        if self._models:
            return ErasureOutcome(name, "retained", f"{why}; other clients' stay, trained from mixtures with them")
        return ErasureOutcome(name, "reset", why)

    def metrics(self) -> dict[str, float]:
        """Return eps_t, mean number of collaborators, critical share, age of the oldest model, ``overlap/<i>/<j>``."""
        return dict(self._metrics)


def _pairs(clients: list[str], overlap_KK: Tensor) -> dict[str, float]:
    """Return the overlap of every ordered pair of clients, which eps_t turns into who collaborates."""
    return {
        f"overlap/{one}/{other}": float(overlap_KK[i, j])
        for i, one in enumerate(clients)
        for j, other in enumerate(clients)
        if i != j
    }
