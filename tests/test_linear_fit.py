"""The linear stage on a set: states are told apart, poses are corrected in rounds, caches keep the poses they have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from opustomo import linear, linear_fit, preparation
from opustomo.analysis.score_poses import pose_errors
from opustomo.config import GridOptions, InputOptions
from opustomo.data.inputs import Inputs, read_inputs
from opustomo.data.particles import Particles
from opustomo.data.poses import move_poses, moved_from, same_poses
from opustomo.errors import UserError
from opustomo.linear_fit import WORTH, LinearResult, Plan, code_statistics, fit_linear, polish, pose_error
from opustomo.mixture import mean_evidence
from opustomo.physics.fourier import from_band, irfft3
from opustomo.physics.observation import model_band
from opustomo.physics.volume import centre_crop
from opustomo.preparation import RowMaker
from opustomo.reconstruct import Rows
from small_set import PARTICLES, PIXEL, MemoryRows, SmallSet, gaussians, make_set

TRAIN, HELD = torch.arange(54), torch.arange(54, PARTICLES)
EVERY = torch.arange(PARTICLES)
Fitted = tuple[Particles, Rows, LinearResult]


@pytest.fixture(scope="module")
def inputs(small_set: SmallSet) -> Inputs:
    return read_inputs(small_set.star, InputOptions(), GridOptions(mask=small_set.mask, downfrac=0.7))


@pytest.fixture(scope="module")
def make_rows(inputs: Inputs) -> RowMaker:
    return RowMaker(inputs, None, InputOptions(), 1)


@pytest.fixture(scope="module")
def as_given(inputs: Inputs, make_rows: RowMaker) -> Fitted:
    """One component at the poses of the file."""
    plan = Plan(TRAIN, HELD, estpose=False, seed=0, limit=1)
    return fit_linear(inputs.particles, make_rows, inputs.grid, inputs.mask, plan)


@pytest.fixture(scope="module")
def corrected(inputs: Inputs, make_rows: RowMaker) -> Fitted:
    plan = Plan(TRAIN, HELD, estpose=True, seed=0, limit=1)
    return fit_linear(inputs.particles, make_rows, inputs.grid, inputs.mask, plan)


def best_poses(fitted: Fitted, inputs: Inputs) -> Particles:
    """Poses of the rows and the last step from there, as they are written."""
    particles, _, result = fitted
    return move_poses(particles, result.pose_error, inputs.grid)


def errors_of(particles: Particles, truth: SmallSet) -> dict[str, float]:
    return pose_errors(particles.rotation, particles.origin, truth.rotation, truth.origin)


def test_two_states_are_told_apart(small_set: SmallSet, as_given: Fitted, corrected: Fitted) -> None:
    separation = []
    for _, _, result in (as_given, corrected):
        code = result.posterior.code[:, 0].numpy()
        low, high = (code[small_set.state == s] for s in (0, 1))
        assert low.max() < high.min() or high.max() < low.min()
        separation.append(abs(high.mean() - low.mean()) / max(low.std(), high.std()))
    assert separation[0] > 3
    assert separation[1] > separation[0]  # poses put right take their noise out of the code


def test_states_are_gaussians_of_the_mixture(small_set: SmallSet, corrected: Fitted) -> None:
    """Two states: a mixture of two or more, no Gaussian of which holds particles of both."""
    result = corrected[2]
    assert len(result.mixture.share) >= 2
    number = result.codes.share.argmax(1).numpy()
    majority = sum(max(np.bincount(small_set.state[number == j])) for j in np.unique(number))
    assert majority >= PARTICLES - 1
    assert float(result.codes.evidence[HELD].mean()) > float(result.posterior.evidence[HELD].mean())


# ------------------------------------------------------------------------------------------------ poses


@pytest.mark.parametrize("rounds", ["as_given", "corrected"])
def test_pose_errors_of_the_set_are_measured(rounds: str, request: pytest.FixtureRequest) -> None:
    """Those of the file, before and after correction: 2 degrees about a random axis are 1.15 per axis, 0.3 pixels."""
    turn, shift = request.getfixturevalue(rounds)[2].model.pose_scale
    assert math.degrees(turn) == pytest.approx(2.0 / math.sqrt(3.0), rel=0.35)
    assert shift * PIXEL * 24 / 16 == pytest.approx(0.3 * PIXEL, rel=0.25)


def test_corrected_poses_are_nearer_to_the_truth(
    small_set: SmallSet, inputs: Inputs, as_given: Fitted, corrected: Fitted
) -> None:
    given = errors_of(inputs.particles, small_set)
    once, rounds = (errors_of(best_poses(fitted, inputs), small_set) for fitted in (as_given, corrected))
    assert as_given[0] is inputs.particles
    assert not same_poses(corrected[0], inputs.particles)
    for after in (once, rounds):
        assert after["shift_median"] < 0.4 * given["shift_median"]
        assert after["shift_p90"] < 0.5 * given["shift_p90"]
        assert after["angle_p90"] < 0.8 * given["angle_p90"]
    assert rounds["angle_median"] < 0.95 * once["angle_median"]


def test_rounds_mend_poses_that_one_step_cannot(tmp_path: Path) -> None:
    """5 degrees and 0.8 pixels: the derivatives at the poses given are no longer those where the particle is."""
    truth = make_set(tmp_path / "set", rot_err=5.0, shift_err=0.8)
    inputs = read_inputs(truth.star, InputOptions(), GridOptions(mask=truth.mask, downfrac=0.7))
    make_rows = RowMaker(inputs, None, InputOptions(), 1)
    after = []
    for estpose in (False, True):
        how = Plan(TRAIN, HELD, estpose=estpose, seed=0, limit=1)
        fitted = fit_linear(inputs.particles, make_rows, inputs.grid, inputs.mask, how)
        after.append(errors_of(best_poses(fitted, inputs), truth))
    once, rounds = after
    given = errors_of(inputs.particles, truth)
    for name in ("angle_median", "angle_p90", "shift_median", "shift_p90"):
        assert rounds[name] < 0.7 * once[name], name
        assert rounds[name] < 0.55 * given[name], name


def test_corrections_do_not_move_the_map(inputs: Inputs, corrected: Fitted) -> None:
    """A move common to all particles is none: the mean of the corrections in the consensus frame is zero."""
    given, best = inputs.particles, best_poses(corrected, inputs)
    relative = given.rotation.swapaxes(1, 2) @ best.rotation
    shift = -np.einsum("pji,pj->pi", given.rotation, best.origin - given.origin)
    assert np.abs(Rotation.from_matrix(relative).as_rotvec().mean(0)).max() < 1e-3
    assert np.abs(shift.mean(0)).max() < 1e-2


def test_rows_know_how_far_they_are_from_the_file(inputs: Inputs, corrected: Fitted) -> None:
    particles, rows, result = corrected
    assert torch.equal(rows.moved, moved_from(particles, inputs.particles, inputs.grid))
    # prior N(0, scale) of the errors of the given poses: what was moved is what was found, shrunk
    spread = rows.moved.square().mean(0).unflatten(0, (2, 3)).mean(1).sqrt()
    assert torch.all(spread < 1.1 * torch.tensor(result.model.pose_scale))


def test_evidence_of_a_particle_survives_a_move_of_its_pose(inputs: Inputs, make_rows: RowMaker) -> None:
    """Half the way to the pose found: the total is that pose again, and the evidence what it was."""
    grid = inputs.grid
    given = make_rows(inputs.particles)
    model = linear.fit(linear.average(given, EVERY, grid, inputs.mask), given, EVERY, grid, inputs.mask, 6)
    first = linear.infer(model, given, EVERY, grid)
    found = pose_error(model, given, grid, first.code, first.gain)
    pose = 0.6 * (found - found.mean(0))
    rows = make_rows(move_poses(inputs.particles, pose, grid))
    second = linear.infer(model, rows, EVERY, grid, first.gain)
    remaining = pose_error(model, rows, grid, second.code, first.gain)
    total = rows.moved + remaining
    for part in (slice(0, 3), slice(3, 6)):
        error = (total - found)[:, part].square().mean().sqrt()
        left = remaining[:, part].square().mean().sqrt()
        assert float(error) < 0.35 * float(found[:, part].square().mean().sqrt())
        assert float(left) < 0.65 * float(found[:, part].square().mean().sqrt())
    forgotten = MemoryRows(rows.numerator(EVERY), rows.weight(EVERY))
    naive = linear.infer(model, forgotten, EVERY, grid, first.gain)
    change, without = (float((p.evidence - first.evidence).mean()) for p in (second, naive))
    assert without > change + 0.5


class Spoilt:
    """Rows that lose most of their signal from the ``bad``-th move on; poses seen before keep their rows."""

    def __init__(self, make_rows: Callable[[Particles], Rows], bad: int) -> None:
        self.make_rows, self.bad = make_rows, bad
        self.tried: list[Particles] = []  # first the poses given, then every move

    def __call__(self, particles: Particles) -> Rows:
        if not any(particles is old for old in self.tried):
            self.tried.append(particles)
        number = next(i for i, old in enumerate(self.tried) if particles is old)
        rows = self.make_rows(particles)
        faint = 0.3 if number >= self.bad else 1.0
        return MemoryRows(faint * rows.numerator(EVERY), rows.weight(EVERY), rows.moved)


def test_round_that_explains_held_out_particles_worse_is_refused(
    inputs: Inputs, make_rows: RowMaker, as_given: Fitted
) -> None:
    maker = Spoilt(make_rows, 1)
    plan = Plan(TRAIN, HELD, estpose=True, seed=0, limit=1)
    particles, rows, result = fit_linear(inputs.particles, maker, inputs.grid, inputs.mask, plan)
    assert len(maker.tried) == 2
    assert particles is inputs.particles
    assert float(rows.moved.abs().max()) == 0.0
    assert torch.equal(result.posterior.evidence, as_given[2].posterior.evidence)


def test_later_round_that_is_worse_leaves_the_one_before(
    inputs: Inputs, make_rows: RowMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opustomo.linear_fit.WORTH", -1.0)  # go on even where little is gained
    monkeypatch.setattr("opustomo.linear_fit.SETTLED", 0.0)  # or little is left to correct
    maker = Spoilt(make_rows, 2)
    plan = Plan(TRAIN, HELD, estpose=True, seed=0, limit=1)
    particles, rows, result = fit_linear(inputs.particles, maker, inputs.grid, inputs.mask, plan)
    assert len(maker.tried) == 3  # as given, a good round, a spoilt one
    assert particles is maker.tried[1]
    assert torch.equal(rows.moved, moved_from(particles, inputs.particles, inputs.grid))
    again = linear.infer(result.model, make_rows(particles), EVERY, inputs.grid)
    assert torch.allclose(again.evidence, result.posterior.evidence, atol=1e-2)


def test_rounds_end_where_nothing_is_gained(inputs: Inputs, make_rows: RowMaker, corrected: Fitted) -> None:
    """From the corrected poses, a further fit with those as the given ones finds nothing worth a round."""
    assert WORTH > 0
    tried = 0

    def counted(particles: Particles) -> Rows:
        nonlocal tried
        tried += 1
        rows = make_rows(particles)
        return MemoryRows(rows.numerator(EVERY), rows.weight(EVERY))

    plan = Plan(TRAIN, HELD, estpose=True, seed=0, limit=1)
    fit_linear(corrected[0], counted, inputs.grid, inputs.mask, plan)
    assert tried <= 3


# ------------------------------------------------------------------------------------------------ caches


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_shared_cache_keeps_the_poses_given(inputs: Inputs, tmp_path: Path) -> None:
    few = replace(inputs, particles=inputs.particles.subset(np.arange(8)))
    shared, own = tmp_path / "shared", tmp_path / "run/cache"
    maker = RowMaker(few, own, InputOptions(), 1, shared=shared)
    given = maker(few.particles)
    before = contents(shared)
    assert not own.exists()
    move = torch.randn((8, 6), generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1] * 3 + [0.5] * 3)
    moved = maker(move_poses(few.particles, move, few.grid))
    assert torch.allclose(moved.moved, move - move.mean(0), atol=1e-5)
    assert contents(shared) == before
    assert own.exists()
    eight = torch.arange(8)
    change = (moved.numerator(eight) - given.numerator(eight)).norm() / given.numerator(eight).norm()
    assert float(change) > 0.05
    back = maker(few.particles)
    assert torch.equal(back.numerator(eight), given.numerator(eight)) and float(back.moved.abs().max()) == 0.0
    assert contents(shared) == before


@pytest.mark.parametrize("disk", [True, False])
def test_noise_is_estimated_once(inputs: Inputs, tmp_path: Path, disk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At other poses the noise is that of the first: their evidences can be compared."""
    estimate, calls = preparation.estimate_noise, []
    monkeypatch.setattr(preparation, "estimate_noise", lambda *a, **k: calls.append(1) or estimate(*a, **k))
    few = replace(inputs, particles=inputs.particles.subset(np.arange(8)))
    maker = RowMaker(few, tmp_path / "cache" if disk else None, InputOptions(), 1)
    maker(few.particles)
    noise = maker.noise
    assert noise is not None
    turned = move_poses(few.particles, 0.3 * torch.randn(8, 6), few.grid)
    maker(turned)
    assert len(calls) == 1
    assert maker.noise is not None and torch.equal(maker.noise.power, noise.power)


# ------------------------------------------------------------------------------------------------ small and last


@pytest.mark.parametrize("held", [0, 1])
def test_three_particles_are_enough(inputs: Inputs, held: int) -> None:
    few = replace(inputs, particles=inputs.particles.subset(np.arange(3)))
    plan = Plan(torch.arange(held, 3), torch.arange(held), estpose=True, seed=0, iterations=3, use_held=held > 0)
    maker = RowMaker(few, None, InputOptions(), 1)
    _, _, result = fit_linear(few.particles, maker, few.grid, few.mask, plan)
    assert result.codes.centre().shape == (3, result.model.size) and result.model.size >= 1
    assert torch.isfinite(result.codes.evidence).all() and torch.isfinite(result.codes.spread()).all()


def test_one_particle_is_not_enough(inputs: Inputs, make_rows: RowMaker) -> None:
    plan = Plan(torch.arange(1), torch.arange(1, 5), estpose=True, seed=0)
    with pytest.raises(UserError, match="at least 2 are needed"):
        fit_linear(inputs.particles, make_rows, inputs.grid, inputs.mask, plan)


def test_held_out_particles_may_take_part_once_all_is_chosen(
    inputs: Inputs, make_rows: RowMaker, as_given: Fitted
) -> None:
    """The same choices, and then the particles held out are explained better than where they stay unseen."""
    plan = Plan(TRAIN, HELD, estpose=False, seed=0, limit=1, use_held=True)
    without, together = as_given[2], fit_linear(inputs.particles, make_rows, inputs.grid, inputs.mask, plan)[2]
    assert together.trail == without.trail
    assert len(together.mixture.share) == len(without.mixture.share)
    assert float((together.codes.evidence - without.codes.evidence)[HELD].mean()) > 0.1


def test_of_many_particles_a_sample_chooses_and_all_refine(
    inputs: Inputs, make_rows: RowMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the particles: what they find is refined on all; fewer reads."""
    reads = {"all": 0, "sample": 0}
    found = {}
    for name, sample in (("all", linear_fit.SAMPLE), ("sample", 27)):
        monkeypatch.setattr(linear_fit, "SAMPLE", sample)

        def made(particles: Particles, name: str = name) -> Rows:
            rows = make_rows(particles)
            numerators = rows.numerator(EVERY)

            class Counted(MemoryRows):
                def numerator(self, index: torch.Tensor) -> torch.Tensor:
                    reads[name] += len(index)
                    return super().numerator(index)

            return Counted(numerators, rows.weight(EVERY))

        plan = Plan(TRAIN, HELD, estpose=False, seed=0, components=1)
        found[name] = fit_linear(inputs.particles, made, inputs.grid, inputs.mask, plan)[2]
    evidence = {name: float(result.codes.evidence[TRAIN].mean()) for name, result in found.items()}
    # 54 particles know the component better than 27: by 6 of the 35 nats that it is worth
    assert evidence["all"] - 10 < evidence["sample"] != evidence["all"]
    assert len(found["sample"].codes.mean) == PARTICLES
    assert reads["sample"] < 0.75 * reads["all"]
    chosen = linear_fit._some(torch.arange(100, 200), 20, 3)
    assert len(chosen) == 20 and chosen.unique().equal(chosen) and chosen.min() >= 100 and chosen.max() < 200


def test_held_out_particles_are_not_seen(inputs: Inputs, make_rows: RowMaker) -> None:
    """Their data may be anything: model and mixture of the others are what they were."""
    results = []
    for factor in (1.0, 0.9):
        plan = Plan(TRAIN, HELD, estpose=False, seed=0, components=1, iterations=3)

        def made(particles: Particles, factor: float = factor) -> Rows:
            rows = make_rows(particles)
            numerators = rows.numerator(EVERY)
            numerators[HELD] *= factor
            return MemoryRows(numerators, rows.weight(EVERY))

        results.append(fit_linear(inputs.particles, made, inputs.grid, inputs.mask, plan)[2])
    assert torch.equal(results[0].model.mean, results[1].model.mean)
    assert torch.equal(results[0].model.components, results[1].model.components)


def test_polishing_explains_the_particles_better(inputs: Inputs, corrected: Fitted) -> None:
    """Mean, components and mixture together: EM never loses evidence of the particles it sees."""
    _, rows, result = corrected
    model, mixture, trail = result.model, result.mixture, []
    for _ in range(4):
        about = code_statistics(model, rows, linear.infer(model, rows, EVERY, inputs.grid).gain, inputs.grid)
        trail.append(mean_evidence(mixture, about))
        model, mixture = polish(model, mixture, rows, EVERY, inputs.grid, inputs.mask, 1)
    assert all(later > earlier - 0.05 for earlier, later in pairwise(trail))
    assert trail[-1] > trail[0]
    assert len(mixture.share) == len(result.mixture.share) and model.size == result.model.size


def test_bright_things_are_left_out_and_named(
    inputs: Inputs, make_rows: RowMaker, caplog: pytest.LogCaptureFixture
) -> None:
    """Three particles with a blob three times as strong as the molecule: not in the fit, in the warning, with codes."""
    given = make_rows(inputs.particles)
    weight, numerator = given.weight(EVERY), given.numerator(EVERY)
    size, crop = inputs.grid.working_box, inputs.grid.crop
    mean = linear.average(given, EVERY, inputs.grid, inputs.mask).mean
    blob = gaussians(crop, np.array([[2.0, 1.0, -1.0]]), 1.5) * inputs.mask
    blob *= 3.0 * mean.norm() / blob.norm()
    strange = torch.tensor([5, 21, 40])
    seen = from_band(model_band(blob, size) * weight[strange], size)
    numerator[strange] += centre_crop(irfft3(seen), crop)
    spoilt = MemoryRows(numerator, weight, given.moved)
    plan = Plan(TRAIN, HELD, estpose=False, seed=0, limit=2)
    with caplog.at_level("WARNING", logger="opustomo"):
        _, _, result = fit_linear(inputs.particles, lambda _: spoilt, inputs.grid, inputs.mask, plan)
    assert torch.nonzero(~result.typical)[:, 0].tolist() == strange.tolist()
    assert "3 particle(s) are far brighter than the others (rows 6, 22, 41)" in caplog.text
    assert result.codes.centre().isfinite().all() and len(result.codes.centre()) == PARTICLES
