from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedcl.base import linalg
from fedcl.base.linalg import (
    extend_basis,
    gram_spectrum,
    leading,
    nystrom_spectrum,
    project_out,
    project_out_gram,
    random_signs,
    sketch_spectrum,
)


def orthonormal(dim: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, rank, generator=generator, dtype=torch.float64))[0]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_projection_of_a_vector_written_by_hand() -> None:
    basis = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    # (3, 1) has 2.6 along (0.6, 0.8), which is (1.56, 2.08).
    torch.testing.assert_close(
        project_out(torch.tensor([[3.0, 1.0]]).double(), basis), torch.tensor([[1.44, -1.08]]).double()
    )


def test_projection_is_orthogonal_to_the_basis_idempotent_and_linear() -> None:
    basis, rows, more = orthonormal(40, 17), normal(9, 40), normal(9, 40, seed=2)
    outside = project_out(rows, basis)
    assert float((outside @ basis).norm() / rows.norm()) < 1e-12
    assert float((project_out(outside, basis) - outside).norm() / rows.norm()) < 1e-12
    both = project_out(2 * rows - 3 * more, basis)
    torch.testing.assert_close(both, 2 * outside - 3 * project_out(more, basis), rtol=0, atol=1e-12)


def test_projecting_a_gram_matrix_is_projecting_its_samples() -> None:
    basis, columns = orthonormal(12, 5), normal(12, 30)
    residual = project_out(columns.T, basis).T
    torch.testing.assert_close(project_out_gram(columns @ columns.T, basis), residual @ residual.T, rtol=0, atol=1e-11)


def test_gram_and_sketch_give_the_squared_singular_values_in_order() -> None:
    matrix = normal(8, 20)
    expected = torch.linalg.svdvals(matrix).square()
    for energies, directions in (gram_spectrum(matrix @ matrix.T), sketch_spectrum(matrix)):
        torch.testing.assert_close(energies, expected, rtol=1e-10, atol=0)
        for k in range(8):
            along = directions[:, k] @ matrix
            torch.testing.assert_close(along.square().sum(), expected[k], rtol=1e-10, atol=0)


def test_rounding_makes_no_negative_energy() -> None:
    column = normal(30, 1).float()
    energies, _ = gram_spectrum(column @ column.T)
    assert float(energies.min()) >= 0.0
    assert leading(energies, 0.999) == 1


def test_an_extended_basis_keeps_its_first_columns_and_stays_orthonormal() -> None:
    basis, directions = orthonormal(20, 6), orthonormal(20, 7, seed=3)
    extended = extend_basis(basis, directions)
    assert extended.shape == (20, 13)
    assert torch.equal(extended[:, :6], basis)
    torch.testing.assert_close(extended.T @ extended, torch.eye(13, dtype=torch.float64), rtol=0, atol=1e-13)
    assert float(project_out(directions.T, extended).norm()) < 1e-12


def test_directions_inside_the_basis_add_nothing() -> None:
    basis = orthonormal(10, 4)
    mixed = basis @ torch.linalg.qr(normal(4, 4))[0]
    assert torch.equal(extend_basis(basis, mixed), basis)


def test_no_basis_grows_beyond_its_space() -> None:
    basis = orthonormal(6, 4)
    extended = extend_basis(basis, orthonormal(6, 6, seed=5))
    assert extended.shape == (6, 6)
    torch.testing.assert_close(extended.T @ extended, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("share", "strict", "count"),
    [
        (0.9, False, 2),
        (0.9, True, 2),
        (0.5, False, 1),
        (0.5, True, 2),
        (0.0, False, 0),
        (0.0, True, 1),
        (-1.0, False, 0),
        (-1.0, True, 1),
        (1.0, False, 3),
        (1.0, True, 3),
    ],
)
def test_leading_counts_until_the_share_is_held(share: float, strict: bool, count: int) -> None:
    assert leading(torch.tensor([4.0, 3.5, 0.5]), share, strict=strict) == count


def test_nothing_leads_where_there_is_no_energy() -> None:
    assert leading(torch.zeros(4), 0.9, strict=True) == 0


@pytest.mark.parametrize(("name", "spectrum"), [("eigh", gram_spectrum), ("svd", sketch_spectrum)])
def test_a_decomposition_that_does_not_converge_is_done_again_in_float64(
    monkeypatch: pytest.MonkeyPatch, name: str, spectrum: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    real, dtypes = getattr(torch.linalg, name), []

    def stubborn(matrix: Tensor, **options: bool) -> object:
        dtypes.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, **options)

    monkeypatch.setattr(linalg.torch.linalg, name, stubborn)
    energies, directions = spectrum(torch.diag(torch.tensor([1.0, 3.0])))
    assert dtypes == [torch.float32, torch.float64]
    assert energies.dtype == directions.dtype == torch.float32
    assert directions.abs().tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_what_never_converges_is_an_error() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        gram_spectrum(torch.full((3, 3), float("nan")))


def test_signs_are_signs_and_a_square_of_them_is_the_identity() -> None:
    signs = random_signs(50, 20, seed=4)
    assert signs.shape == (50, 20)
    assert signs.unique().tolist() == [-1.0, 1.0]
    assert abs(float(signs.mean())) < 0.1
    assert torch.equal(signs, random_signs(50, 20, seed=4))
    assert not torch.equal(signs, random_signs(50, 20, seed=5))
    assert torch.equal(random_signs(5, 5, seed=4), torch.eye(5))


@pytest.mark.parametrize("width", [6, 10, 30])
def test_a_nystrom_spectrum_is_that_of_the_gram_matrix_where_its_rank_is_no_larger(width: int) -> None:
    columns = orthonormal(30, 6) @ torch.diag(torch.tensor([9.0, 5, 3, 2, 1, 0.1]).double()) @ normal(6, 50)
    gram, signs = columns @ columns.T, random_signs(30, width, seed=2).double()
    energies, directions = nystrom_spectrum((gram @ signs).float().double(), signs)
    exact, _ = gram_spectrum(gram)
    torch.testing.assert_close(energies[:6], exact[:6], rtol=1e-3, atol=1e-4)
    assert float(energies[6:].sum()) < 1e-4
    assert float(project_out(columns.T, directions[:, :6]).norm() / columns.norm()) < 1e-3


def test_nystrom_directions_hold_at_least_the_energy_they_promise() -> None:
    columns = normal(40, 100) / torch.arange(1, 41)[:, None].double()
    gram, signs = columns @ columns.T, random_signs(40, 15, seed=2).double()
    energies, directions = nystrom_spectrum(gram @ signs, signs)
    torch.testing.assert_close(directions.T @ directions, torch.eye(15, dtype=torch.float64), rtol=0, atol=1e-12)
    for count in range(1, 16):
        held = float((directions[:, :count].T @ gram @ directions[:, :count]).trace())
        assert float(energies[:count].sum()) <= held * (1 + 1e-12)
    assert float(energies.sum()) > 0.9 * float(gram.trace())


def test_leading_of_a_spectrum_that_is_not_whole() -> None:
    energies = torch.tensor([4.0, 3.5, 0.5])
    assert leading(energies, 0.7, total=10.0) == 2
    assert leading(energies, 0.9, total=10.0) == 3
    assert leading(energies, 0.9, total=0.0) == 0


def test_the_definite_matrix_next_to_one_that_is_none() -> None:
    turned = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    energies = torch.tensor([4.0, 1.0, 0.0, -3.0], dtype=torch.float64)
    definite = linalg.definite((turned * energies) @ turned.T)
    found = torch.linalg.eigvalsh(definite).flip(0)
    torch.testing.assert_close(found, torch.tensor([4.0, 1.0, 4e-12, 4e-12], dtype=torch.float64), rtol=0, atol=1e-14)
    for hopeless in (torch.zeros(3, 3, dtype=torch.float64), torch.full((3, 3), -1e18, dtype=torch.float64)):
        assert int(torch.linalg.cholesky_ex(linalg.definite(hopeless))[1]) == 0
