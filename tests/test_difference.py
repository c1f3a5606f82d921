"""Difference maps of two classes: what is called significant is there, and of noise alone hardly ever anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from opustomo.analysis.difference import difference
from opustomo.cli import main
from opustomo.data.mrc import read_volume
from opustomo.data.pickles import save_pickle
from opustomo.physics.grid import Grid
from opustomo.physics.volume import spherical_mask
from small_set import MemoryRows, SmallSet, even_weights, gaussians, observed

GRID = Grid(box=24, pixel_size=10.0, working_box=16, crop=12, templateres=16)
MASK = spherical_mask(12, 4.5, 1.0)
BODY = gaussians(12, np.array([[0, 0, 0], [2, 1, 0], [-2, 0, 1]]), 1.2)
EXTRA = gaussians(12, np.array([[0, -2, 1]]), 1.3)
COUNT = 60


def rows_of(extra: torch.Tensor, seed: int, strength: float = 0.3) -> tuple[MemoryRows, torch.Tensor]:
    """Particles of ``BODY`` with ``extra`` (COUNT,) parts of ``EXTRA``, each with a wedge of its own, in noise."""
    weights = even_weights(COUNT, 16, seed, strength)
    return observed(BODY + extra[:, None, None, None] * EXTRA, weights, 16, seed), weights


def test_noise_is_called_a_difference_no_more_often_than_stated() -> None:
    """24 pairs of equal particles at a false rate of 0.2: the share with any voxel called is at most that rate.

    Half of the pairs are of classes that are a third and two thirds, half lack their wedges in other directions.
    """
    wrong, beyond = 0, 0
    for seed in range(24):
        rows, weights = rows_of(torch.zeros(COUNT), seed)
        side = np.arange(COUNT) < 20
        if seed % 2:  # of the highest weights along one line of Fourier space
            side = np.argsort(np.argsort(weights[:, 3].numpy())) < 30
        found = difference(rows, side, ~side, MASK, GRID, 0.2, 24, seed)
        wrong += bool(found.significant.any())
        beyond += found.p_value <= 0.2
    # 4.8 expected of the exact one; more than 9 has a probability of 1 % there, none one of 0.5 %
    assert wrong <= 9 and 1 <= beyond <= 9


def test_the_part_that_differs_is_found_where_it_is_and_with_its_sign() -> None:
    extra = (torch.arange(COUNT) % 3 == 0).float()
    rows, _ = rows_of(extra, 7, 3.0)
    first = extra.numpy() == 1
    found = difference(rows, first, ~first, MASK, GRID)
    true = (EXTRA * MASK).numpy()
    core = (true > 0.5) & (MASK.numpy() > 0.5)
    assert found.significant[core].mean() > 0.8
    # the band and the missing mean leave ripples of a few percent
    outside = found.significant & (true < 0.02)
    assert outside.sum() <= 0.1 * found.significant.sum()
    assert found.p_value == pytest.approx(1 / 101)
    assert (found.z[found.significant & core] > 0).all()
    assert np.corrcoef(found.density.ravel(), true.ravel())[0, 1] > 0.85
    assert 0.3 < found.density[core].sum() / true[core].sum() < 1.1
    turned = difference(rows, ~first, first, MASK, GRID)
    np.testing.assert_allclose(turned.density, -found.density, atol=1e-4)


def test_classes_of_other_sizes_are_not_shrunk_apart() -> None:
    """Ten particles against fifty without noise: a prior that acts on each map by itself would leave a difference."""
    rows, _ = rows_of(torch.zeros(COUNT), 1)
    clean = observed(BODY.expand(COUNT, -1, -1, -1), rows.weights, 16, None)
    first = np.arange(COUNT) < 10
    found = difference(clean, first, ~first, MASK, GRID, permutations=9)
    assert np.abs(found.density).max() < 0.02 * float(BODY.max())


def test_the_verb_writes_maps_in_register_and_refuses_what_is_no_pair(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.pkl"
    save_pickle(labels, np.asarray(small_set.state))
    line = ["quality", str(finished_run), "--labels", str(labels), "-o", str(tmp_path / "out"), "--difference"]
    assert main([*line, "1", "0"]) == 0
    density, z, mask = (read_volume(tmp_path / "out" / f"difference1-0{kind}.mrc")[0] for kind in ("", "_z", "_mask"))
    assert mask.sum() > 20 and set(np.unique(mask)) == {0.0, 1.0}
    assert (z[mask == 1] * density[mask == 1] > 0).all()
    table = (tmp_path / "out" / "difference1-0.csv").read_text().splitlines()
    row = dict(zip(table[0].split(","), table[1].split(","), strict=True))
    assert int(row["significant"]) == mask.sum() and int(row["particles_a"]) == (small_set.state == 1).sum()
    for words, message in ((["1", "1"], "two different"), (["0", "9"], "class 9 has 0 particles"), (["0"], "two diff")):
        assert main([*line, *words]) == 2
        assert message in capsys.readouterr().err
    assert main([*line, "0", "1", "--false-rate", "1.5"]) == 2
