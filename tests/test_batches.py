"""Which particles make a batch: every one once an epoch, of one wedge orientation, in an order that can be repeated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from opustomo.config import TrainConfig
from opustomo.data.batches import bank_rows, batch_order, wedge_groups
from opustomo.training.start import split_of


def groups(count: int, kinds: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, kinds, count)


@pytest.mark.parametrize("batch", [1, 7, 8, 200])
@pytest.mark.parametrize("kinds", [1, 5])
def test_every_particle_once_an_epoch(batch: int, kinds: int) -> None:
    index = torch.from_numpy(np.random.default_rng(1).permutation(120)[:100])
    batches = batch_order(index, groups(120, kinds), batch, 0, 3)
    assert sorted(torch.cat(batches).tolist()) == sorted(index.tolist())
    assert all(1 <= len(part) <= batch for part in batches)


def test_batches_come_from_one_orientation_but_for_the_remainders() -> None:
    group = groups(200, 4)
    batches = batch_order(torch.arange(200), group, 8, 0, 0)
    mixed = [part for part in batches if len(set(group[part.numpy()])) > 1]
    assert sum(map(len, mixed)) <= 4 * 7
    assert sum(len(part) < 8 for part in batches) <= 1


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(batch_order(torch.arange(60), groups(60, 3), 8, seed, epoch)).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)


def test_orientations_are_grouped_up_to_the_sign_of_the_beam() -> None:
    """A particle and the same one upside down share a wedge; four batches a group are left on average."""
    rng = np.random.default_rng(0)
    rotation = Rotation.random(300, rng=rng).as_matrix()
    upside_down = np.diag([1.0, -1.0, -1.0]) @ rotation
    both = wedge_groups(np.concatenate([rotation, upside_down]), 4)
    assert np.array_equal(both[:300], both[300:])
    count = len(np.unique(both))
    assert count > 1 and 600 / count >= 16
    assert len(np.unique(wedge_groups(rotation[:10], 8))) == 1


def test_wedges_turned_about_the_beam_are_told_apart() -> None:
    """A quarter turn about the beam is another wedge, half a turn the same one."""
    rotation = Rotation.random(4000, rng=np.random.default_rng(3)).as_matrix()
    quarter, half = (Rotation.from_euler("z", turn, degrees=True).as_matrix() @ rotation for turn in (90, 180))
    group = wedge_groups(np.concatenate([rotation, quarter, half]), 8)
    first, turned, same = group[:4000], group[4000:8000], group[8000:]
    assert np.mean(first == same) > 0.999  # rounding at an edge
    assert np.mean(first == turned) < 0.01
    assert len(group) / len(np.unique(group)) >= 4 * 8


def test_batches_are_compared_with_trained_particles_of_eight_other_orientations() -> None:
    group, index = groups(3000, 12), torch.arange(0, 3000, 2)
    batch = index[torch.from_numpy(group[index.numpy()] == 5)][:8]
    rows = bank_rows(index, group, batch, torch.Generator().manual_seed(1))
    found = set(group[rows.numpy()].tolist())
    assert len(found) == 8 and 5 not in found
    expected = index[torch.from_numpy(np.isin(group[index.numpy()], list(found)))]
    assert not torch.equal(rows, expected) and torch.equal(rows.sort().values, expected)
    assert len(bank_rows(index, np.zeros(3000, np.int64), batch, torch.Generator())) == 0


def test_at_most_12800_codes_are_compared_with() -> None:
    rows = bank_rows(torch.arange(20_000), groups(20_000, 2), torch.arange(1), torch.Generator().manual_seed(1))
    few = bank_rows(torch.arange(60_000), groups(60_000, 3), torch.arange(1), torch.Generator().manual_seed(1))
    assert len(rows) < 12_800 == len(few) == len(set(few.tolist()))


def test_particles_that_all_look_the_same_way_are_one_group() -> None:
    """Also at the pole, where the tilt axis has no direction to start from; nothing is left to compare with."""
    for rotation in (np.eye(3), Rotation.from_euler("zyz", [20, 70, 40], degrees=True).as_matrix()):
        group = wedge_groups(np.repeat(rotation[None], 64, 0), 4)
        assert group.tolist() == [0] * 64
        batches = batch_order(torch.arange(64), group, 4, 0, 0)
        assert sorted(torch.cat(batches).tolist()) == list(range(64))
        assert len(bank_rows(torch.arange(64), group, batches[0], torch.Generator())) == 0


def test_the_seed_chooses_who_is_held_out(tmp_path: Path) -> None:
    held = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split = split_of(TrainConfig(Path(), tmp_path / name, seed=seed), np.arange(60).astype(object))
        assert sorted([*split.train.tolist(), *split.held.tolist()]) == list(range(60))
        held.append(sorted(split.held.tolist()))
    assert held[0] == held[1] != held[2]
