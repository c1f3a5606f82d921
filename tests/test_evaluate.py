"""``evaluate``: every metric on codes, maps and poses whose scores are known beforehand."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.analysis import evaluate, score_codes, score_maps, score_poses
from opustomo.analysis.truth import read_truth
from opustomo.config import EvaluateConfig
from opustomo.data.mrc import read_volume
from opustomo.errors import UserError
from opustomo.monitor import METRIC_COLUMNS
from opustomo.physics.fourier import fourier_resize
from opustomo.physics.grid import Grid
from opustomo.physics.volume import centre_crop, spherical_mask
from opustomo.simulate import dataset
from opustomo.simulate.plan import Plan, Preset, make_plan
from opustomo.simulate.tilt_series import TiltSeries
from opustomo.simulate.truth import write_truth

GRID = Grid(box=36, pixel_size=10.0, working_box=24, crop=22, templateres=32)


@dataclass
class FakeRun:
    """The parts of a run that evaluate reads; ``maps`` decodes particle codes by their first number."""

    path: Path
    codes: NDArray[np.float32]
    star: Path
    rotation: NDArray[np.float64]
    origin: NDArray[np.float64]
    maps: Any = None
    kind: str = "network"
    epoch: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    grid: Grid = GRID
    conformation: None = None
    mask: torch.Tensor = field(default_factory=lambda: spherical_mask(22, 7.0, 3.0))

    def linear_stage(self) -> None:
        """A linear run has none."""

    @property
    def gram(self) -> NDArray[np.float64]:
        return np.eye(self.codes.shape[1])

    def linear_results(self) -> None:
        return None

    def decode(self, codes: NDArray[np.float32], batch: int = 8) -> NDArray[np.float32]:
        return np.stack([self.maps(code) for code in codes])


@dataclass
class Simulated:
    folder: Path
    plan: Plan


def write_set(folder: Path, preset: Preset, seed: int = 1) -> Simulated:
    """Labels, true maps and STAR of a set, without its subtomograms: evaluate reads none."""
    plan = make_plan(preset, seed)
    write_truth(folder, preset, plan, TiltSeries(preset.box, preset.pixel_size))
    dataset.write_star(folder, preset, plan)
    return Simulated(folder, plan)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    preset = Preset(n=160, box=36, states=(0, 1, 3), rotation=(0.0, 8.0), rot_err=3.0, shift_err=0.5)
    return write_set(tmp_path_factory.mktemp("states"), preset)


def true_map(folder: Path, state: int, hinge: float) -> torch.Tensor:
    volume, _ = read_volume(folder / "gt" / f"state{state}_hinge{hinge:+.1f}.mrc")
    return centre_crop(fourier_resize(torch.from_numpy(volume), 24), 22)


def perfect_run(simulated: Simulated, path: Path, noise: float = 0.02) -> FakeRun:
    """Codes = one-hot state and the hinge; poses exact; the decoder returns the true map of the state."""
    plan = simulated.plan
    rng = np.random.default_rng(0)
    values = np.unique(plan.state)
    one_hot = 3.0 * (plan.state[:, None] == values)
    hinge = np.nan_to_num(plan.coordinate, nan=4.0)[:, None] / 8
    codes = np.hstack([one_hot, hinge]) + noise * rng.normal(size=(len(plan.state), len(values) + 1))

    def decode(code: NDArray[np.float32]) -> NDArray[np.float32]:
        state = int(values[code[:-1].argmax()])
        angle = 0.0 if state == 0 else 2.0 * np.clip(np.round(4 * code[-1]), 0, 4)
        return true_map(simulated.folder, state, angle).numpy()

    star = simulated.folder / "particles.star"
    return FakeRun(path, codes.astype(np.float32), star, plan.rotation, plan.origin, decode)


# -------------------------------------------------------------------------------------- composition, conformation


def test_perfect_codes_score_one(states: Simulated, tmp_path: Path) -> None:
    scores = evaluate.evaluate(perfect_run(states, tmp_path), states.folder)  # type: ignore[arg-type]
    for name in ("auc", "kmeans_ari", "gmm_ari", "ica_auc"):
        assert scores["composition"][name] == pytest.approx(1.0, abs=0.02), name
    assert scores["conformation"]["hinge"]["probe_corr"] > 0.98
    assert scores["invariance"]["max_r2"] < 0.1


def test_codes_of_nothing_score_nothing(states: Simulated, tmp_path: Path) -> None:
    run = perfect_run(states, tmp_path)
    codes = np.random.default_rng(3).normal(size=(160, 6)).astype(np.float32)
    state, hinge = states.plan.state, states.plan.coordinate
    scores = score_codes.composition(codes, state)
    assert scores["auc"] == pytest.approx(0.5, abs=0.1)
    assert abs(scores["kmeans_ari"]) < 0.05 and abs(scores["gmm_ari"]) < 0.05
    rows = np.isfinite(hinge)
    assert abs(score_codes.conformation(codes[rows], hinge[rows])["probe_corr"]) < 0.3
    run.codes, run.maps = codes, lambda code: np.zeros((22,) * 3, np.float32)
    assert evaluate.evaluate(run, states.folder)["invariance"]["max_r2"] < 0.1  # type: ignore[arg-type]


def test_one_component_that_is_the_coordinate_is_found() -> None:
    rng = np.random.default_rng(0)
    hinge = rng.uniform(-1, 1, 300)
    codes = np.column_stack([5 * hinge, rng.normal(size=(300, 3))])
    scores = score_codes.conformation(codes, hinge)
    assert scores["pc_spearman"] > 0.99 and scores["ica_corr"] > 0.95


def test_independent_components_undo_a_rotation_of_the_code() -> None:
    rng = np.random.default_rng(1)
    factor, hinge = rng.integers(0, 2, 600), rng.uniform(-1, 1, 600)
    mixed = np.column_stack([factor - 0.5, hinge * 0.87]) @ np.array([[0.7, -0.7], [0.7, 0.7]])
    assert score_codes.composition(mixed, factor)["ica_auc"] > 0.97
    assert score_codes.conformation(mixed, hinge)["ica_corr"] > 0.95
    assert score_codes.conformation(mixed, hinge)["pc_spearman"] < 0.9


def test_collapsed_codes_do_not_break_any_metric() -> None:
    codes = np.zeros((60, 4), np.float32)
    state = np.arange(60) % 2
    with np.errstate(all="raise"):
        assert score_codes.conformation(codes, np.linspace(0, 1, 60))["pc_spearman"] == 0
        assert score_codes.composition(codes, state)["auc"] == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------- invariance


@pytest.mark.parametrize(
    ("what", "name"), [("beam", "beam_ridge"), ("in_plane", "in_plane_ridge"), ("beam_even", "beam_even_ridge")]
)
def test_orientation_in_the_code_is_seen(states: Simulated, what: str, name: str) -> None:
    directions = score_poses.directions(states.plan.rotation)
    rng = np.random.default_rng(0)
    codes = directions[what] + 0.05 * rng.normal(size=directions[what].shape)
    scores = score_codes.invariance(codes, directions)
    assert scores[name] > 0.9
    assert (scores["max_r2"] > 0.9) == (what != "beam_even")
    assert what != "beam_even" or scores["max_r2_even"] > 0.9


def test_defocus_in_the_code_is_seen_and_constants_are_skipped() -> None:
    rng = np.random.default_rng(0)
    defocus = rng.uniform(20000, 40000, 200)
    codes = np.column_stack([defocus / 1e4, rng.normal(size=(200, 2))])
    scores = score_codes.invariance(codes, {"defocus": defocus, "tilt_count": np.full(200, 41.0)})
    assert scores["defocus_ridge"] > 0.99
    assert not any(key.startswith("tilt_count") for key in scores)


def test_directions_are_beam_and_tilt_axis_in_the_consensus_frame() -> None:
    a = Rotation.random(5, rng=0).as_matrix()
    found = score_poses.directions(a)
    assert np.allclose(found["beam"], a.swapaxes(1, 2) @ [0, 0, 1])
    assert np.allclose(found["tilt_axis"], a.swapaxes(1, 2) @ [0, 1, 0])


# ----------------------------------------------------------------------------------------------------- volumes


def test_true_maps_score_best_and_shifted_maps_are_off_centre(states: Simulated, tmp_path: Path) -> None:
    run = perfect_run(states, tmp_path)
    scores = evaluate.evaluate(run, states.folder)["volumes"]  # type: ignore[arg-type]
    nyquist = 2 * GRID.working_pixel
    assert scores["states_found"] == 3
    assert scores["resolution_0.5_mean"] == pytest.approx(nyquist, rel=1e-3)
    assert scores["fsc_area_mean"] > 0.99 and scores["off_centre_mean"] < 0.03
    assert scores["difference_cc_min"] > 0.95 and scores["particle_fsc_area"] > 0.99
    assert sorted(scores[f"class{k}"]["state"] for k in range(3)) == [0, 1, 3]
    assert all(scores[f"class{k}"]["purity"] == 1 for k in range(3))

    decode = run.maps
    run.maps = lambda code: np.roll(decode(code), 1, axis=2)
    worse = evaluate.evaluate(run, states.folder)["volumes"]  # type: ignore[arg-type]
    assert worse["off_centre_mean"] == pytest.approx(1.0, abs=0.15)
    assert worse["resolution_0.5_mean"] > nyquist * 1.2 and worse["fsc_area_mean"] < 0.9


def test_an_added_constant_and_a_factor_change_no_score(states: Simulated, tmp_path: Path) -> None:
    run = perfect_run(states, tmp_path)
    decode = run.maps
    run.maps = lambda code: 3 * decode(code) + 5
    scores = evaluate.evaluate(run, states.folder)["volumes"]  # type: ignore[arg-type]
    assert scores["fsc_area_mean"] > 0.99 and scores["difference_cc_min"] > 0.95


def test_the_same_map_for_every_state_has_no_difference(states: Simulated, tmp_path: Path) -> None:
    run = perfect_run(states, tmp_path)
    run.maps = lambda code: true_map(states.folder, 1, 4.0).numpy()
    assert evaluate.evaluate(run, states.folder)["volumes"]["difference_cc_mean"] == 0  # type: ignore[arg-type]


def test_resolution_is_interpolated_in_angstrom() -> None:
    curve = np.array([1.0, 0.9, 0.8, 0.4, 0.1, 0.0])
    assert score_maps.resolution(curve, 0.5, 100.0) == pytest.approx(100 / 2.75)
    assert score_maps.resolution(np.ones(6), 0.5, 100.0) == 20.0
    assert score_maps.resolution(np.zeros(6), 0.5, 100.0) == 100.0


# ------------------------------------------------------------------------------------------------------- poses


def test_given_poses_are_scored_before_and_the_runs_poses_after(states: Simulated, tmp_path: Path) -> None:
    run = perfect_run(states, tmp_path)
    scores = evaluate.evaluate(run, states.folder)["poses"]  # type: ignore[arg-type]
    assert scores["before"]["angle_median"] == pytest.approx(3.0 * 0.6745, rel=0.2)
    assert scores["before"]["angle_p90"] == pytest.approx(3.0 * 1.645, rel=0.2)
    assert scores["before"]["shift_median"] == pytest.approx(0.5 * 1.538, rel=0.15)  # Maxwell
    assert max(scores["after"].values()) < 1e-3
    assert scores["ratio"]["angle_median"] < 1e-3


def test_a_common_rotation_and_shift_of_the_frame_is_no_error() -> None:
    rng = np.random.default_rng(0)
    true = Rotation.random(50, rng=rng).as_matrix()
    origin = rng.uniform(-2, 2, (50, 3))
    common = Rotation.from_rotvec([0.2, -0.3, 0.1]).as_matrix()
    shift = np.array([1.0, -2.0, 0.5])
    errors = score_poses.pose_errors(true @ common, origin - true @ shift, true, origin)
    assert max(errors.values()) < 1e-6
    wrong_side = score_poses.pose_errors(common @ true, origin - shift, true, origin)
    assert wrong_side["angle_median"] > 10 and wrong_side["shift_median"] > 1


def test_outliers_do_not_turn_the_frame() -> None:
    rng = np.random.default_rng(0)
    true = Rotation.random(100, rng=rng).as_matrix()
    given = true.copy()
    given[:20] = true[:20] @ Rotation.from_rotvec([1.5, 0, 0]).as_matrix()
    errors = score_poses.pose_errors(given, np.zeros((100, 3)), true, np.zeros((100, 3)))
    assert errors["angle_median"] < 1e-6 and errors["angle_p90"] == pytest.approx(np.rad2deg(1.5))


# ------------------------------------------------------------------------------------- junk, cost, the verb itself


def test_decoys_are_scored_as_outliers_and_left_out_elsewhere(tmp_path: Path) -> None:
    preset = Preset(n=80, box=36, states=(1, 3), junk=0.1, rot_err=1.0)
    simulated = write_set(tmp_path, preset)
    run = perfect_run(simulated, tmp_path)
    junk = simulated.plan.junk_kind > 0
    run.codes[junk] = 20 * np.random.default_rng(0).normal(size=run.codes[junk].shape)
    run.maps = lambda code: true_map(tmp_path, 1, 0.0).numpy()
    scores = evaluate.evaluate(run, tmp_path)  # type: ignore[arg-type]
    assert scores["junk"]["outlier_auc"] == 1.0
    assert scores["composition"]["gmm_ari"] == 1.0
    assert scores["poses"]["before"]["angle_p90"] < 5
    assert "conformation" not in scores  # the rotation is constant in this set


def test_a_set_of_one_state_has_no_composition(tmp_path: Path) -> None:
    simulated = write_set(tmp_path, Preset(n=40, box=36, rotation=(-10.0, 10.0)))
    run = perfect_run(simulated, tmp_path)
    run.maps = lambda code: true_map(tmp_path, 1, 0.0).numpy()
    scores = evaluate.evaluate(run, tmp_path)  # type: ignore[arg-type]
    assert "composition" not in scores and "hinge" in scores["conformation"]
    assert scores["volumes"]["states_found"] == 1 and "difference_cc_mean" not in scores["volumes"]


def write_metrics(path: Path, rows: list[dict[str, str]]) -> None:
    lines = [",".join(METRIC_COLUMNS), *(",".join(row.get(name, "") for name in METRIC_COLUMNS) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def test_verb_prints_a_table_or_json_and_writes_the_scores(
    states: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = perfect_run(states, tmp_path)
    row = {"epoch": "0", "val_elbo": "-99.5", "linear_val_elbo": "-101", "seconds": "60", "particles_per_second": "7"}
    write_metrics(tmp_path / "metrics.csv", [row, {"epoch": "0", "seconds": "70"}, {"epoch": "1", "seconds": "500"}])
    monkeypatch.setitem(sys.modules, "opustomo.checkpoint", SimpleNamespace(open_run=lambda path, epoch: run))

    evaluate.main(EvaluateConfig(run=tmp_path, truth=states.folder, json=True))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "evaluation.json").read_text())
    assert printed["likelihood"] == {"val_elbo": -99.5, "linear_val_elbo": -101.0, "gain_over_linear": 1.5}
    assert printed["cost"]["seconds"] == 70  # later epochs than the one scored do not count

    evaluate.main(EvaluateConfig(run=tmp_path, truth=states.folder))
    table = capsys.readouterr().out
    assert "composition\n  auc " in table and "before angle_median" in table
    curve = printed["volumes"]["class0"]["fsc"]
    assert len(curve) == GRID.crop // 2 + 1 and min(curve[1:]) > 0.9


def test_json_has_no_nan() -> None:
    assert json.loads(evaluate.json_text({"a": {"b": float("nan")}, "c": 1.0})) == {"a": {"b": None}, "c": 1.0}


def test_the_benchmarks_own_labels_are_read(tmp_path: Path) -> None:
    pose = np.zeros((20, 7))
    labels = {"present": np.arange(20) % 2, "hinge": np.linspace(-10, 10, 20), "bend": np.arange(20.0)}
    np.savez(tmp_path / "labels.npz", true_pose=pose, tilts=np.zeros(20), bfac=np.zeros(20), **labels)
    truth = read_truth(tmp_path, 20)
    assert truth.state is not None and truth.state.tolist() == (np.arange(20) % 2).tolist()
    assert set(truth.coordinates) == {"hinge", "bend"} and truth.maps == ()


def test_truth_of_another_set_is_refused(states: Simulated, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="160 rows but the run has 99 codes"):
        read_truth(states.folder, 99)
    with pytest.raises(UserError, match=r"has no labels\.npz"):
        read_truth(tmp_path, 99)
