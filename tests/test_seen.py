"""Analyses of other codes than composition, and second rounds of some classes: ``dpc``, ``joint``, ``kpc``."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import small_set as sets
from opustomo import checkpoint, cli
from opustomo.analysis.dynamics import hinges, mass_of, spread_of
from opustomo.analysis.places import rows_within, stem
from opustomo.analysis.seen import seen_as, some_of
from opustomo.bodies import with_joints
from opustomo.compat import dsdsh
from opustomo.data.mrc import read_volume
from opustomo.data.pickles import load_labels, save_pickle
from opustomo.errors import UserError
from opustomo.physics.bodies import soft_bodies
from opustomo.physics.volume import centred_coordinates

SIZE = 20


def two_bodies() -> tuple[torch.Tensor, torch.Tensor]:
    """A ball and its halves left and right of x = 2, the left one heavier: density, weights."""
    place = centred_coordinates(SIZE)
    x = place[..., 0]
    return torch.exp(-((place.norm(dim=-1) / 5.0) ** 2)), soft_bodies(torch.stack([x - 2.0, 2.0 - x]), 1.0)


def test_mass_and_middle_are_those_of_the_density() -> None:
    density, weights = two_bodies()
    bodies = with_joints(weights, density, (0, 1))
    for body in (0, 1):
        part = weights[body] * density
        mass, middle = mass_of(bodies, body)
        assert mass == pytest.approx(float(part.sum() / density.sum()), rel=1e-3)
        expected = (part[..., None] * centred_coordinates(SIZE)).sum((0, 1, 2)) / part.sum()
        assert np.allclose(middle, expected, atol=0.01)


def test_a_hinge_is_found_whatever_the_whole_does() -> None:
    """Angles about a known line, in particles that turn and shift as a whole besides."""
    density, weights = two_bodies()
    bodies, rng = with_joints(weights, density, (0, 1)), np.random.default_rng(0)
    axis, point = np.array([0.3, 0.9, -0.2]) / np.linalg.norm([0.3, 0.9, -0.2]), np.array([3.0, -1.0, 2.0])
    angle, joints = np.linspace(-20, 20, 30), bodies.joints.numpy()
    motion = np.zeros((30, 2, 6))
    for n, degrees in enumerate(angle):
        whole, shift = Rotation.from_rotvec(0.1 * rng.normal(size=3)), rng.normal(size=3)
        turn = Rotation.from_rotvec(axis * np.deg2rad(degrees))
        for body, (inner, middle) in enumerate([(Rotation.identity(), np.zeros(3)), (turn, point)]):
            # x goes to whole(inner(x - middle) + middle) + shift
            both = whole * inner
            offset = whole.apply(middle - inner.apply(middle)) + shift
            motion[n, body, :3] = both.as_rotvec()
            motion[n, body, 3:] = offset - joints[body] + both.apply(joints[body])
    found = hinges(bodies, torch.from_numpy(motion).flatten(1).float())[0]
    assert (found.fixed, found.moving) == (0, 1)
    assert found.axis @ axis == pytest.approx(1.0, abs=1e-4)
    away = found.point - point
    assert np.linalg.norm(away - (away @ axis) * axis) < 0.01
    assert np.allclose(found.angle, angle, atol=0.01) and found.swept == pytest.approx(36.0, abs=0.1)
    assert found.coherence > 0.999 and found.slide < 0.01


def test_spread_of_the_angle_is_that_of_the_difference() -> None:
    density, weights = two_bodies()
    bodies = with_joints(weights, density, (0, 1))
    variance = torch.zeros(12)
    variance[2], variance[8] = 0.01, 0.03  # both turn about z, independently
    drawn = torch.randn(4000, 12, generator=torch.Generator().manual_seed(0)) * variance.sqrt()
    found = hinges(bodies, drawn)[0]
    assert abs(found.axis[2]) > 0.999
    assert spread_of(found, torch.diag(variance)) == pytest.approx(np.rad2deg(0.2), rel=1e-3)


def test_classes_of_a_second_round_are_read_and_refused(tmp_path: Path) -> None:
    folder = tmp_path / "analyze.3" / "kmeans4"
    folder.mkdir(parents=True)
    save_pickle(folder / "labels.pkl", np.array([0, 1, 2, 3, 2, 0]))
    assert rows_within(tmp_path, 3, "4:0,2-3").tolist() == [0, 2, 3, 4, 5]
    for wrong, words in (("4", "give K and classes"), ("4:3-2", "give K and classes"), ("4:1-4", "class 4"),
                         ("5:1", "--clusters 5")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            rows_within(tmp_path, 3, wrong)
    assert stem("conformation", True) == "defanalyze.filter"


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> tuple[sets.SmallSet, Path]:
    """A run with bodies of ribosomes whose 30S turns, analysed with three classes, and two of these again."""
    folder = tmp_path_factory.mktemp("seen")
    made = sets.make_set(folder / "set", states=(1, 2), rotation=(-20.0, 20.0), snr=2.0, rot_err=1.0)
    masks = str(made.folder / "bodies.star")
    assert sets.train(made, folder / "run", "-n", "1", "--masks", masks, "--encoderres", "0") == 0
    assert dsdsh.main(["analyze", str(folder / "run"), "0", "2", "3", "--skip-umap"]) == 0
    assert dsdsh.main(["analyze", str(folder / "run"), "0", "1", "2", "--skip-umap", "--kpc", "3:1-2"]) == 0
    return made, folder / "run"


@pytest.mark.slow
def test_the_conformation_has_its_own_analysis(analysed: tuple[sets.SmallSet, Path]) -> None:
    made, run = analysed
    hinge = np.load(made.folder / "labels.npz")["hinge"]
    labels = load_labels(run / "defanalyze.0" / "kmeans3" / "labels.pkl")
    middle = sorted(hinge[labels == k].mean() for k in range(3))
    assert middle[0] < -7 and middle[2] > 7  # classes are angles
    with (run / "defanalyze.0" / "dynamics.csv").open() as handle:
        rows = {row["series"]: row for row in csv.DictReader(handle)}
    assert {"all", "pc1", "pc2", "y1"} <= rows.keys()
    assert 25 < float(rows["pc1"]["swept_deg"]) < 45 and float(rows["pc1"]["coherence"]) > 0.9
    assert rows["pc1"]["moving"] == "body_small"
    assert cli.main(["report", str(run), "--clusters", "3"]) == 0
    page = (run / "report.html").read_text()
    assert "body_small against body_large" in page and "Along conformation 1" in page


@pytest.mark.slow
def test_maps_of_the_seeds_forms(analysed: tuple[sets.SmallSet, Path], capsys: pytest.CaptureFixture[str]) -> None:
    made, run = analysed
    bodies = str(made.folder / "bodies.star")
    line = ["eval_vol", str(run), "0", "dpc", "1", "22.5", "--masks", bodies, "--kmeans", "3", "--dfk", "1"]
    assert dsdsh.main(line) == 0
    maps = [read_volume(run / "defanalyze.0" / "pc1" / f"reference{i}.mrc")[0] for i in range(10)]
    opened = checkpoint.open_run(run)
    codes = np.loadtxt(run / "defanalyze.0" / "pc1" / "z_pc.txt")
    centre = np.loadtxt(run / "analyze.0" / "kmeans3" / "centers.txt", ndmin=2)[1]
    motion = torch.from_numpy(codes[:1]).float() @ opened.bodies.model.modes(4)[0].T
    expected = opened.bodies.model.bodies.move(torch.from_numpy(opened.decode(centre[None])), motion)[0].numpy()
    assert np.allclose(maps[0], expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(maps[0] - maps[-1]).max() > 0.1 * np.abs(expected).max()
    assert dsdsh.main(["analyze", str(run), "0", "1", "4", "--skip-umap", "--joint"]) == 0
    assert dsdsh.main(["eval_vol", str(run), "0", "joint", "4", "22.5"]) == 0
    assert (run / "jointanalyze.0" / "kmeans4" / "reference3.mrc").is_file()
    assert dsdsh.main(["eval_vol", str(run), "0", "pc", "1", "22.5", "--dfk", "1"]) == 2
    assert "--dfk: is for dpc" in capsys.readouterr().err
    assert dsdsh.main([*line[:6], "--kmeans", "3", "--dfk", "9"]) == 2
    assert "has classes 0 to 2" in capsys.readouterr().err
    assert dsdsh.main([*line[:6], "--masks", str(made.folder / "body_large.mrc")]) == 2
    assert "was trained with" in capsys.readouterr().err
    whole = ["volumes", str(run), "--codes", "conformation", "--kmeans", "3", "--from-data"]
    assert cli.main(whole) == 2
    assert "not averaged along them" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_round_is_of_its_classes_and_used_by_later_commands(
    analysed: tuple[sets.SmallSet, Path], tmp_path: Path
) -> None:
    made, run = analysed
    first = load_labels(run / "analyze.0" / "kmeans3" / "labels.pkl")
    labels = load_labels(run / "analyze.filter.0" / "kmeans2" / "labels.pkl", -1)
    assert np.array_equal(labels >= 0, first > 0)
    centre = np.loadtxt(run / "analyze.filter.0" / "kmeans2" / "centers_ind.txt", dtype=int)
    assert labels[centre].tolist() == [0, 1]
    assert dsdsh.main(["eval_vol", str(run), "filter.0", "kmeans", "2", "22.5"]) == 0
    assert (run / "analyze.filter.0" / "kmeans2" / "reference1.mrc").is_file()
    assert cli.main(["volumes", str(run), "--filtered", "--kmeans", "2", "--from-data"]) == 2
    star = str(made.star)
    assert dsdsh.main(["parse_pose", star, "24", str(sets.PIXEL), str(run), "filter.0", "2"]) == 0
    chosen = ["--run", str(run), "--filtered", "--kmeans", "2", "--corrected", "-o", str(tmp_path / "chosen")]
    assert cli.main(["select", star, *chosen]) == 0
    for folder in (run / "analyze.filter.0" / "kmeans2", tmp_path / "chosen"):
        counts = [(folder / f"pre{i}.star").read_text().count("subtomo/p") for i in (0, 1)]
        # image and CTF file of each
        assert counts == [2 * int((labels == i).sum()) for i in (0, 1)]


@pytest.mark.slow
def test_a_run_seen_by_some_particles_and_both_codes(analysed: tuple[sets.SmallSet, Path], finished_run: Path) -> None:
    run = checkpoint.open_run(analysed[1])
    joint = seen_as(run, "joint")
    used = len(run.weights["model"]["components"])
    assert joint.codes.shape == (60, used + 4) and joint.decode(joint.codes[:2]).shape[0] == 2
    still = joint.codes[:1].copy()
    still[:, used:] = 0  # no motion: the map of the composition
    expected = run.decode(run.codes[:1])
    change = joint.decode(still) - expected
    # reading it leaves out the planes at Nyquist, which are a fifth of a box of 16
    assert float((change**2).sum() / (expected**2).sum()) < 0.05
    few = some_of(joint, np.array([3, 5, 8]))
    assert np.array_equal(few.codes, joint.codes[[3, 5, 8]]) and few.typical.shape == (3,)
    with pytest.raises(UserError, match="no conformation code"):
        seen_as(checkpoint.open_run(finished_run), "conformation")
