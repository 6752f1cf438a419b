"""FedCAC: each client keeps a model of its own and shares critical parameters with clients that agree on them.

Wu et al., "Bold but Cautious: Unlocking the Potential of Personalized Federated Learning through Cautiously Aggressive
Collaboration", ICCV 2023 (arXiv 2309.11103), with the details of its author's code (FLAIR-Community/Fling).
"""

# K = clients known, P = length of the flat vector
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedcl.models.flat import Spec, TensorSpec
from fedcl.requests import ForgetRequest, Residual
from fedcl.server.contracts import GLOBAL, Collaboration, ServerView, Target, Update

_CHUNK = 1 << 22  # columns a float32 product may count before it must be added up elsewhere: counts stay exact


def critical_mask(old_P: Tensor, new_P: Tensor, tensors: Sequence[TensorSpec], tau: float) -> Tensor:
    """Return which parameters are critical, bool (P,): per tensor, those with the largest |(new - old) new|.

    Of a tensor of n elements int(tau n) are critical, and all that tie with the last of them. None is when
    int(tau n) = 0. When the last one's sensitivity is at most 1e-10, the smallest above 1e-20 takes its place as the
    threshold, if there is one. Elements outside ``tensors`` are not critical.
    """
    mask_P = torch.zeros(len(new_P), dtype=torch.bool)
    for tensor in tensors:
        count = int(tau * tensor.size)
        if count == 0:
            continue
        new = new_P[tensor.start : tensor.stop]
        sensitivity = ((new - old_P[tensor.start : tensor.stop]) * new).abs()
        threshold = torch.kthvalue(sensitivity, tensor.size - count + 1).values
        if threshold <= 1e-10:
            larger = sensitivity[sensitivity > 1e-20]
            if len(larger):
                threshold = larger.min()
        mask_P[tensor.start : tensor.stop] = sensitivity >= threshold
    return mask_P


def overlap(masks_KP: Tensor) -> Tensor:
    """Return the overlap of critical positions O_KK, float64: O_ij = 1 - |M_i - M_j|_1 / (2 |M_i|_1).

    It is not symmetric when the counts differ. The diagonal is 1; a client without critical parameters overlaps with
    nobody (0), as there is nothing it could share.
    """
    common_KK = torch.zeros(len(masks_KP), len(masks_KP), dtype=torch.float64)
    for start in range(0, masks_KP.shape[1], _CHUNK):
        chunk = masks_KP[:, start : start + _CHUNK].float()
        common_KK += chunk @ chunk.T
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
        Aggregations until critical parameters stay entirely personal, at least 1; a third to half of the rounds.

    Raises
    ------
    ValueError
        If a parameter is out of its range.
    """

    needs: ClassVar[Literal["sum", "stack"]] = "stack"
    personal: ClassVar[bool] = True

    def __init__(self, *, tau: float = 0.5, beta: int = 100) -> None:
        if not 0 < tau <= 1:
            raise ValueError(f"strategy.collaboration.server.tau={tau}: must be in (0, 1]")
        if beta < 1:
            raise ValueError(f"strategy.collaboration.server.beta={beta}: must be int >= 1")
        self.tau = tau
        self.beta = beta
        self._aggregations = 0
        self._models: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}
        self._metrics: dict[str, float] = {}

    def message_for(self, client: str, view: ServerView) -> tuple[Target, dict[str, Tensor]]:
        """Return the client's own target once it has a model there."""
        return (client if client in self._models else GLOBAL), {}

    def combine(self, updates: list[Update], view: ServerView) -> dict[Target, Tensor]:
        """Return the new global model and one for each client known, float64 (P,)."""
        if not updates:
            return {}
        self._aggregations += 1
        for update in updates:
            self._remember(update, view.spec)
        global_P = self._global_model(updates, view)
        return {GLOBAL: global_P, **self._personal_models(global_P, view.spec)}

    def _remember(self, update: Update, spec: Spec) -> None:
        """Keep the update's model and mask, save for heads of other tasks, which weight decay alone may have moved."""
        model, foreign = update.model.clone(), _foreign(update, spec)
        trained = [tensor for tensor in spec if tensor.kind == "parameter" and tensor not in foreign]
        mask = critical_mask(update.base, model, trained, self.tau)
        for tensor in foreign:
            part = slice(tensor.start, tensor.stop)
            model[part] = update.base[part]
            if update.client in self._masks:
                mask[part] = self._masks[update.client][part]
        self._models[update.client], self._masks[update.client] = model, mask
        self._seen[update.client] = self._aggregations

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
        masks_KP = torch.stack([self._masks[client] for client in clients])
        own_KP = torch.stack([self._models[client] for client in clients]).double()
        overlap_KK = overlap(masks_KP)
        threshold = collaboration_threshold(overlap_KK, self._aggregations, self.beta)
        shares_KK = collaborators(overlap_KK, threshold).double()
        customised_KP = (shares_KK / shares_KK.sum(1, keepdim=True)) @ own_KP
        merged_KP = torch.where(masks_KP, customised_KP, global_P)
        for tensor in spec:
            if tensor.kind == "buffer":
                merged_KP[:, tensor.start : tensor.stop] = own_KP[:, tensor.start : tensor.stop]
        self._metrics = {
            "threshold": threshold,
            "collaborators": float(shares_KK.sum(1).mean()) - 1,
            "critical_share": float(masks_KP.double().mean()),
            "oldest_model": float(self._aggregations - min(self._seen.values())),
        }
        return dict(zip(clients, merged_KP, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return last model, mask and aggregation of every client seen, and how many aggregations there were."""
        return {
            "aggregations": self._aggregations,
            "models": dict(self._models),
            "masks": dict(self._masks),
            "seen": dict(self._seen),
            "metrics": dict(self._metrics),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._aggregations = state["aggregations"]
        self._models, self._masks = dict(state["models"]), dict(state["masks"])
        self._seen, self._metrics = dict(state["seen"]), dict(state["metrics"])

    def forget(self, request: ForgetRequest) -> Residual:
        """Drop model and mask of the clients that hold the forget set; all of them when the request names none."""
        named = request.clients or tuple(self._models)
        dropped = [client for client in named if self._models.pop(client, None) is not None]
        for client in dropped:
            del self._masks[client], self._seen[client]
        name = type(self).__name__
        if not dropped:
            return Residual(name, "none", "keeps no model of the clients concerned")
        why = f"last model and mask of {', '.join(dropped)}; customised models follow at the next aggregation"
        return Residual(name, "erased" if request.clients else "reset", why)

    def metrics(self) -> dict[str, float]:
        """Return eps_t, the mean number of collaborators, the critical share and the age of the oldest model."""
        return dict(self._metrics)


def _foreign(update: Update, spec: Spec) -> list[TensorSpec]:
    return [tensor for tensor in spec if tensor.task is not None and tensor.task != update.head]
