"""Pixel numbers agree with the ``healpix`` package, at random directions and where its branches meet."""

from __future__ import annotations

import healpix
import numpy as np
import pytest
import torch

from opustomo.physics.healpix import vector_to_pixel


@pytest.mark.parametrize("nside", [1, 2, 3, 4, 16])
def test_random_directions(nside: int) -> None:
    vectors = np.random.default_rng(nside).normal(size=(20000, 3)) * 5.0
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = healpix.vec2pix(nside, *unit.T)
    assert np.array_equal(vector_to_pixel(torch.from_numpy(vectors), nside).numpy(), expected)


@pytest.mark.parametrize("nside", [1, 2, 8])
def test_every_pixel_centre_returns_its_number(nside: int) -> None:
    pixels = np.arange(12 * nside**2).reshape(-1, 4)
    vectors = np.stack(healpix.pix2vec(nside, pixels), -1)
    found = vector_to_pixel(torch.from_numpy(vectors), nside)
    assert found.dtype == torch.int64
    assert np.array_equal(found.numpy(), pixels)


@pytest.mark.parametrize("nside", [1, 4])
def test_poles(nside: int) -> None:
    poles = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0], [1e-9, 1e-9, 1.0]])
    pixels = vector_to_pixel(poles, nside).tolist()
    assert pixels == [0, 12 * nside**2 - 4, 0]
