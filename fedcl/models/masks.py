"""Masks over logit columns, and over a flat vector: which parameters matter most, kept and sent as bits."""

# P = length of the flat vector, B = ceil(P / 8) bytes, C = logit columns
from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.models.flat import Spec, TensorSpec

_WORDS = 2000  # of 64 bits, in a piece of a mask; with a power of two all rows would fall into the same cache sets


def column_mask(columns: Iterable[int] | None, num_columns: int, device: torch.device) -> Tensor | None:
    """Return a bool mask (C,) of logit ``columns``, or None when they are all the columns (``columns`` None: all)."""
    chosen = range(num_columns) if columns is None else list(columns)
    if len(chosen) == num_columns:
        return None
    mask = torch.zeros(num_columns, dtype=torch.bool, device=device)
    mask[chosen] = True
    return mask


def columns_of(y_B: Tensor, num_columns: int) -> Tensor:
    """Return the columns that are the target of a sample, bool (C,)."""
    present = torch.zeros(num_columns, dtype=torch.bool, device=y_B.device)
    present[y_B] = True
    return present


def divergence(teacher_BC: Tensor, student_BC: Tensor, columns_BC: Tensor) -> Tensor:
    """Return KL(teacher || student) of logits over each sample's own ``columns`` (bool), the mean over the batch."""
    log_p, log_q = (
        F.log_softmax(logits.masked_fill(~columns_BC, -torch.inf), dim=1).masked_fill(~columns_BC, 0.0)
        for logits in (teacher_BC, student_BC)
    )
    return (log_p.exp() * columns_BC * (log_p - log_q)).sum(1).mean()


def critical_mask(old_P: Tensor, new_P: Tensor, tensors: Iterable[TensorSpec], tau: float) -> Tensor:
    """Return which parameters are critical, bool (P,): per tensor, those with the largest |(new - old) new|.

    Of a tensor of n elements int(tau n) are critical, and all that tie with the last of them. None is when
    int(tau n) = 0. When the last one's sensitivity is at most 1e-10, the smallest above 1e-20 takes its place as the
    threshold, if there is one. Elements outside ``tensors`` are not critical.

    Wu et al., "Bold but Cautious", ICCV 2023, with the details of its author's code.
    """
    mask_P = torch.zeros(len(new_P), dtype=torch.bool, device=new_P.device)
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


def trained_parameters(spec: Spec, head: int) -> list[TensorSpec]:
    """Return the parameters that a client with the task of head ``head`` trains: all but other tasks' heads."""
    return [tensor for tensor in spec if tensor.kind == "parameter" and tensor.task in (None, head)]


def pack_bits(mask: Tensor) -> Tensor:
    """Return a bool mask (..., P) as uint8 (..., B) on the CPU: position 8 b + k is bit k of byte b, the rest zero."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little"))


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """Return what :func:`pack_bits` packed, bool (..., size).

    Raises
    ------
    ValueError
        If the bytes are not as many as ``size`` bits need, or not bytes.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != -(-size // 8):
        raise ValueError(f"packed mask is {packed.dtype} {tuple(packed.shape)}: must be uint8 (..., {-(-size // 8)})")
    bits = np.unpackbits(packed.numpy(), axis=-1, count=size, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


def count_bits(packed: Tensor) -> Tensor:
    """Return how many positions each packed mask (..., B) holds, int64 (...)."""
    return torch.from_numpy(np.asarray(np.bitwise_count(packed.numpy()).sum(-1, dtype=np.int64)))


def common_bits(packed_KB: Tensor) -> Tensor:
    """Return how many positions each two of K packed masks share, int64 (K, K); the diagonal counts each one's own.

    Exact, on the CPU: a byte-wise AND and a population count, over pieces that stay in the cache. One matrix product of
    the masks as float32 takes three times as long, and 32 times the memory.
    """
    count, num_bytes = packed_KB.shape
    common_KK = np.zeros((count, count), np.int64)
    both, ones = np.empty((count, _WORDS), np.uint64), np.empty((count, _WORDS), np.uint8)
    padded = np.zeros((count, 8 * _WORDS), np.uint8)
    for start in range(0, num_bytes, 8 * _WORDS):
        piece = packed_KB[:, start : start + 8 * _WORDS].numpy()
        padded[:, : piece.shape[1]] = piece
        padded[:, piece.shape[1] :] = 0
        words = padded.view(np.uint64)
        for i in range(count):
            rest = count - i
            np.bitwise_and(words[i:], words[i], out=both[:rest])
            np.bitwise_count(both[:rest], out=ones[:rest])
            common_KK[i, i:] += ones[:rest].sum(1, dtype=np.uint32)
    upper = np.triu(common_KK, 1)
    return torch.from_numpy(common_KK + upper.T)
