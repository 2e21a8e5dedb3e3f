"""Directions: orthonormal rows, initial values, difference in means."""

from __future__ import annotations

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, expected_got


def orthonormalize(direction: Tensor) -> Tensor:
    """The matrix with orthonormal rows nearest to `direction` (R, D) in the Frobenius norm: its polar factor.

    For one row this is w / |w|. Raises `InvalidInputError` if the rows are dependent or not finite.
    """
    if not torch.isfinite(direction).all():
        raise InvalidInputError(expected_got("direction", "finite numbers", "NaN or infinity"))
    if direction.shape[0] == 1:
        length = direction.norm()
        if length == 0:
            raise InvalidInputError(expected_got("direction", "a vector of non-zero length", "all zeros"))
        return direction / length
    left, singular, right = torch.linalg.svd(direction, full_matrices=False)
    if direction.shape[0] > direction.shape[1] or singular[-1] <= 1e-6 * singular[0]:
        wanted = f"{direction.shape[0]} independent rows of width {direction.shape[1]}"
        raise InvalidInputError(expected_got("direction", wanted, f"singular values {singular.tolist()}"))
    return left @ right


def is_orthonormal(direction: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether the rows of `direction` (R, D) are orthonormal up to `tolerance`."""
    identity = torch.eye(direction.shape[0], dtype=direction.dtype, device=direction.device)
    return bool((direction @ direction.T - identity).abs().max() <= tolerance)


def random_direction(rank: int, width: int, seed: int) -> Tensor:
    """Orthonormal rows (rank, width) in float32, uniformly distributed, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return orthonormalize(torch.randn(rank, width, generator=generator))


def difference_in_means(positive: Tensor, negative: Tensor, rank: int = 1, seed: int = 0) -> Tensor:
    """Unit difference of the mean source activations of the positive and the negative prompts.

    Args:
        positive: source activations (pairs, layers, D); the mean is taken over pairs and layers.
        negative: the same of the negative prompts.
        rank: with more than 1, random rows are added, orthogonal to the first.
        seed: of the random rows.

    Returns:
        (rank, D) float32.

    Source: Marks and Tegmark, "The Geometry of Truth" (2023).
    """
    difference = positive.float().mean((0, 1)) - negative.float().mean((0, 1))
    first = orthonormalize(difference[None])
    if rank == 1:
        return first
    others = random_direction(rank - 1, first.shape[1], seed).to(first)
    return torch.cat([first, orthonormalize(others - (others @ first.T) @ first)])


def principal_direction(positive: Tensor, negative: Tensor, rank: int = 1) -> Tensor:
    """Directions along which the source activations of the two prompts of a pair differ most.

        d_i = h_positive,i - h_negative,i;  the rows are the first right singular vectors of (d_1; d_2; ...), uncentred

    Args:
        positive: source activations (pairs, layers, D); each pair and layer is a difference.
        negative: the same of the negative prompts.
        rank: how many; each points to where its differences sum to more than 0.

    Returns:
        (rank, D) float32, orthonormal.

    Raises:
        InvalidInputError: fewer differences than `rank`, or dependent ones.

    Source: Zou et al., "Representation Engineering" (2023), whose reading vectors are these with rank 1.
    """
    differences = (positive.float() - negative.float()).flatten(0, 1)
    if min(differences.shape) < rank:
        wanted = f"at least {rank} pairs for a principal direction of that rank"
        raise InvalidInputError(expected_got("initial_direction", wanted, f"{len(differences)} differences"))
    _, singular, components = torch.linalg.svd(differences, full_matrices=False)
    if not singular[rank - 1] > 1e-6 * singular[0]:
        wanted = f"differences that span {rank} directions"
        raise InvalidInputError(expected_got("initial_direction", wanted, f"singular values {singular.tolist()[:8]}"))
    rows = components[:rank]
    signs = (differences.sum(0) @ rows.T).sign()
    return orthonormalize(rows * torch.where(signs == 0, 1.0, signs)[:, None])
