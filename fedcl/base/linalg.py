"""Subspaces: spectra, orthonormal bases, and what lies outside of them. Pure functions over tensors.

The results have the dtype and the device of the matrices given; give float64 where a later step builds on them.
"""

# D = dimension of the space, K = directions in a basis, Q = columns of a sketch, N = new directions, R = rows
from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# A unit vector of which less than this is left outside a basis is inside it, but for rounding.
_INSIDE = 1e-6
# Eigenvalues below this share of the largest are what rounding to float32 has left in a sketch.
_NOISE = 1e-6


def project_out(rows_RD: Tensor, basis_DK: Tensor) -> Tensor:
    """Return the rows without their parts in the span of an orthonormal basis: X - (X U) U^T, in O(R D K).

    The product is never formed as X (I - U U^T), whose D x D matrix costs D / 2K times as much.
    """
    return rows_RD - (rows_RD @ basis_DK) @ basis_DK.T


def project_out_gram(gram_DD: Tensor, basis_DK: Tensor) -> Tensor:
    """Return the Gram matrix (I - U U^T) C (I - U U^T) of what the samples of ``gram_DD`` have outside the basis."""
    half = project_out(gram_DD, basis_DK)
    outside = project_out(half.T, basis_DK)
    return (outside + outside.T) / 2


def gram_spectrum(gram_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Return (energies (D,), descending and >= 0; directions (D, D), as columns) of a symmetric Gram matrix A A^T.

    The energies are the squared singular values of A; those that rounding made negative are 0. Raises
    ``torch.linalg.LinAlgError`` if the decomposition does not converge in float64 on the CPU either.
    """
    energies, directions = _retried(torch.linalg.eigh, gram_DD)
    return energies.flip(0).clamp_min(0.0).to(gram_DD), directions.flip(1).to(gram_DD)


def definite(symmetric_DD: Tensor) -> Tensor:
    """Return the positive definite matrix next to a symmetric one: eigenvalues are at least 1e-12 of the largest.

    Sums of clients' Gram matrices are definite with any ridge; what clients send instead need not be.
    """
    energies, directions = _retried(torch.linalg.eigh, (symmetric_DD + symmetric_DD.T) / 2)
    least = (1e-12 * energies.abs().max()).clamp_min(1e-12)
    found: Tensor = (directions * energies.clamp_min(least)) @ directions.T
    return found.to(symmetric_DD)


def sketch_spectrum(sketch_DQ: Tensor) -> tuple[Tensor, Tensor]:
    """Return (squared singular values (m,), descending; left directions (D, m)) of a sketch, m = min(D, Q).

    Raises as :func:`gram_spectrum`.
    """
    directions, singular, _ = _retried(lambda matrix: torch.linalg.svd(matrix, full_matrices=False), sketch_DQ)
    return singular.square().to(sketch_DQ), directions.to(sketch_DQ)


def random_signs(rows: int, columns: int, seed: int) -> Tensor:
    """Return a float32 matrix (rows, columns) of independent signs: the same bits for a seed on every machine.

    As many columns as rows are the identity instead: chance would make them dependent, and these miss nothing.
    """
    if columns == rows:
        return torch.eye(rows)
    generator = torch.Generator().manual_seed(seed)
    # Normal numbers would differ in their last bits between processors with and without vector instructions.
    return torch.randint(0, 2, (rows, columns), generator=generator).float().mul_(2).sub_(1)


def nystrom_spectrum(sketch_DQ: Tensor, test_DQ: Tensor) -> tuple[Tensor, Tensor]:
    """Return (energies (m,), descending; directions (D, m)), m <= Q, of a Gram matrix C that only C Omega is known of.

    They are those of C Omega (Omega^T C Omega)^+ (C Omega)^T, which never exceeds C: the directions hold at least the
    energy returned, and all of it where the rank of C is at most Q. One pass over the samples is enough, and
    C Omega is a sum over samples (Tropp, Yurtsever, Udell, Cevher, "Fixed-rank approximation of a positive-semidefinite
    matrix from streaming data", NeurIPS 2017). Raises as :func:`gram_spectrum`.
    """
    core_QQ = test_DQ.T @ sketch_DQ
    values, vectors = gram_spectrum((core_QQ + core_QQ.T) / 2)
    held = int((values > _NOISE * values[0]).sum())
    return sketch_spectrum(sketch_DQ @ (vectors[:, :held] / values[:held].sqrt()))


def extend_basis(basis_DK: Tensor, directions_DN: Tensor) -> Tensor:
    """Return an orthonormal basis (D, K + n), n <= N, of the span of both; its first K columns are ``basis_DK`` itself.

    ``basis_DK`` must be orthonormal (K may be 0) and the directions be of unit length. Those that lie in the basis
    already add nothing, and no basis grows beyond D.
    """
    room = basis_DK.shape[0] - basis_DK.shape[1]
    # Twice, because one pass leaves what the first rounding made of a direction that lies mostly inside.
    outside = project_out(project_out(directions_DN.T, basis_DK), basis_DK).T
    outside = outside[:, torch.linalg.vector_norm(outside, dim=0) > _INSIDE][:, :room]
    new, _ = torch.linalg.qr(outside)
    return torch.cat([basis_DK, new], dim=1)


def leading(energies: Tensor, share: float, *, strict: bool = False, total: float | None = None) -> int:
    """Return the smallest k whose k first ``energies`` hold at least ``share`` of their sum (``strict``: more than it).

    All of them where no k does; 0 for a share of at most 0 unless ``strict``; 0 where the sum is 0. ``total`` takes the
    place of the sum where ``energies`` are not all there are.
    """
    whole = energies.sum() if total is None else torch.as_tensor(total)
    if not whole > 0 or (share <= 0 and not strict):
        return 0
    held = energies.cumsum(0) / whole
    enough = held > share if strict else held >= share
    return int(enough.to(torch.uint8).argmax()) + 1 if bool(enough.any()) else len(energies)


def _retried(decompose: Callable[[Tensor], T], matrix: Tensor) -> T:
    """Decompose, and where that does not converge, once more in float64 on the CPU."""
    try:
        return decompose(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return decompose(matrix.double().cpu())
