"""The quality of classes: no template, honest halves, and controls that know what chance can do."""

from __future__ import annotations

import csv
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fake_run import GRID, FakeRun, blob
from opustomo import checkpoint, cli
from opustomo.analysis import class_halves, class_quality, latents, report
from opustomo.analysis.class_halves import Sums, half_map_fsc, independent_voxels
from opustomo.analysis.class_quality import COLUMNS, ClassQuality, read_quality, relative_worth, seen_to, write_quality
from opustomo.data.pickles import save_pickle
from opustomo.errors import UserError
from opustomo.physics.fourier import band_frequencies, from_band, irfft3, rfft3, to_band
from opustomo.physics.observation import model_band, quadratic_form
from opustomo.physics.volume import centre_crop, fourier_shell_correlation, spherical_mask
from opustomo.reconstruct import mean_volume
from small_set import MemoryRows, SmallSet, copy_run, even_weights, gaussians, observed

SIZE, CROP = GRID.working_box, GRID.crop
MASK = spherical_mask(CROP, 6.0, 3.0)
BODY = gaussians(CROP, np.random.default_rng(1).normal(0, 2.2, (14, 3)), 1.3) * MASK
ARM = 1.5 * torch.from_numpy(blob(CROP, 3, 2, -1, 1.5)) * MASK


# ------------------------------------------------------------------------------------------ the mask's share of the FSC


def halves(signal: torch.Tensor, noise: float, seed: int) -> Sums:
    """Two half sets with one even weight: band (n,) of the signal, white noise of that standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    weight = even_weights(20, SIZE, seed).sum(0)
    numerators = []
    for _ in range(2):
        hidden = noise * to_band(rfft3(torch.randn((SIZE, SIZE, SIZE), generator=generator)))
        band = weight * signal + weight.sqrt() * hidden
        numerators.append(centre_crop(irfft3(from_band(band, SIZE)), CROP))
    return Sums(torch.stack([weight, weight]), torch.stack(numerators), 20)


def corrected(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    """FSC of the masked half maps as it comes and with noise substituted."""
    maps = [mean_volume(w, b, MASK, GRID)[0] for w, b in zip(sums.weight, sums.numerator, strict=True)]
    generator = torch.Generator().manual_seed(0)
    return fourier_shell_correlation(*maps).numpy(), half_map_fsc(sums, MASK, GRID, generator).numpy()


def test_beyond_a_low_passed_signal_the_mask_makes_correlation_that_is_taken_away() -> None:
    signal = torch.where(band_frequencies(SIZE).norm(dim=-1) <= 4, model_band(BODY, SIZE), 0.0)
    pairs = [corrected(halves(signal, 0.1, seed)) for seed in range(4)]
    before, after = (np.mean([pair[i] for pair in pairs], 0) for i in (0, 1))
    beyond = slice(6, 10)  # of the crop's shells; the signal ends at 3.3
    assert before[beyond].mean() > 0.3
    assert abs(after[beyond]).mean() < 0.1
    np.testing.assert_allclose(after[1:4], before[1:4])


def test_half_maps_of_noise_have_no_resolution() -> None:
    empty = torch.zeros(len(band_frequencies(SIZE)), dtype=torch.complex64)
    curves = np.stack([corrected(halves(empty, 1.0, seed))[1] for seed in range(6)])
    assert abs(curves[:, 3:].mean(0)).max() < 0.2
    voxels = independent_voxels(MASK)
    assert all(math.isnan(seen_to(curve, 0.143, voxels, 200.0)) for curve in curves)


def test_a_signal_in_every_shell_is_left_alone() -> None:
    before, after = corrected(halves(model_band(BODY, SIZE), 1e-3, 0))
    assert after[1:].min() > 0.98
    np.testing.assert_array_equal(after, before)


def test_independent_voxels_are_the_share_of_the_mask() -> None:
    whole, half = torch.ones(16, 16, 16), torch.zeros(16, 16, 16)
    half[:8] = 1
    np.testing.assert_allclose(independent_voxels(half)[1:], independent_voxels(whole)[1:] / 2)
    assert independent_voxels(whole)[2] == pytest.approx(62)


# ------------------------------------------------------------------------------------------------------------ classes


def run_of(rows: MemoryRows, folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    count = len(rows)
    monkeypatch.setattr(class_quality, "open_rows", lambda run: rows)
    codes = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)
    return FakeRun(folder, codes, np.tile(np.eye(3), (count, 1, 1)), mask=MASK, sigma=0.1 * np.ones_like(codes))


def two_states(junk: int, seed: int = 0, states: tuple[int, int] = (60, 60)) -> tuple[MemoryRows, np.ndarray]:
    """Particles without and with an arm, then some that show nothing; their true class 0, 1, 2."""
    kind = np.repeat([0, 1, 2], [*states, junk])
    volumes = torch.stack([BODY * (k < 2) + ARM * (k == 1) for k in kind])
    weights = even_weights(len(kind), SIZE, seed, 4.0)
    return observed(volumes, weights, SIZE, seed), kind


def test_true_states_differ_more_than_chance_and_random_classes_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, kind = two_states(junk=0)
    run = run_of(rows, tmp_path, monkeypatch)
    for row in write_quality(run, kind, tmp_path / "true"):
        assert row.distinct == "yes" and row.nats > 3 * row.nats_chance
        assert row.difference_cc > 0.8 > row.difference_cc_random + 0.3
        assert row.nats_random < row.nats_chance
    shuffled = np.random.default_rng(3).permutation(kind)
    for row in write_quality(run, shuffled, tmp_path / "random"):
        assert row.distinct == "no" and row.nats < 0.5
        assert abs(row.difference_cc) < 0.6
        assert row.worth_low < 1.2 and row.worth_high > 0.8


@pytest.mark.usefixtures("drawn")
def test_junk_is_ranked_last_and_tiny_classes_are_said_to_be_tiny(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, labels = two_states(junk=24, states=(60, 63))
    labels[:1], labels[60:62] = 3, 4  # classes of one and of two particles
    labels[labels == 0] = 5
    run = run_of(rows, tmp_path, monkeypatch)
    found = write_quality(run, labels, tmp_path)
    assert [row.number for row in found][2:] == [2, 3, 4]
    junk, one, two = found[2:]
    assert junk.worth_high < 0.4 < 0.8 < found[1].worth
    assert math.isnan(junk.resolution) and found[1].resolution < 60
    # junk differs from the average as surely as a state does: which is why it is not what ranks classes
    assert junk.distinct == "yes"
    assert one.note == two.note == "fewer than 4 particles: no halves"
    assert all(math.isnan(value) for value in (one.worth, one.resolution, two.nats))
    text = (tmp_path / "quality.csv").read_text()
    assert "nan" not in text and "inf" not in text
    assert read_quality(tmp_path / "quality.csv")[2].particles == 24
    assert {path.name for path in tmp_path.glob("quality*")} == {
        "quality.csv", "quality.png", "quality_fsc.csv", "quality_fsc.png"
    }  # fmt: skip


def test_a_class_chosen_by_its_noise_reproduces_but_gains_no_more_than_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal particles those whose noise looks like an arm: disjoint halves do not see through it."""
    weights, same = even_weights(480, SIZE, 0), BODY.expand(480, -1, -1, -1)
    rows = observed(same, weights, SIZE, 0)
    noise = rows.numerators - observed(same, weights, SIZE, None).numerators
    look = torch.from_numpy(blob(CROP, 1, 1, 0, 3.0)) * MASK
    alike = (noise * look).sum((1, 2, 3)) / quadratic_form(model_band(look, SIZE), weights, SIZE).sqrt()
    labels = (alike > alike.quantile(0.75)).long().numpy()
    run = run_of(rows, tmp_path, monkeypatch)
    chosen = next(row for row in write_quality(run, labels, tmp_path) if row.number == 1)
    assert chosen.difference_cc > chosen.difference_cc_random + 0.2
    assert 0 < chosen.nats < chosen.nats_chance == pytest.approx(math.log(4), rel=1e-3)
    assert chosen.distinct == "no"


def test_one_class_of_everything_has_nothing_to_differ_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, kind = two_states(junk=0, states=(10, 10))
    [row] = write_quality(run_of(rows, tmp_path, monkeypatch), np.zeros_like(kind), tmp_path)
    assert row.worth == pytest.approx(1.0, abs=0.1) and row.distinct == "" and "nothing to differ from" in row.note


def test_no_class_that_can_be_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = two_states(junk=0, states=(3, 3))
    found = write_quality(run_of(rows, tmp_path, monkeypatch), np.arange(6) // 2, tmp_path)
    assert all(math.isnan(row.worth) for row in found)
    assert [path.name for path in tmp_path.glob("quality*")] == ["quality.csv"]


def test_worth_is_the_ratio_of_signal_to_noise() -> None:
    ratio = np.array([50.0, 10.0, 3.0, 1.0, 0.5, 0.1])
    voxels = np.array([0.0, 20, 60, 120, 200, 300])
    for true in (0.25, 1.0, 3.0):
        worth, low, high = relative_worth(true * ratio / (1 + true * ratio), ratio / (1 + ratio), voxels)
        assert worth == pytest.approx(true, rel=0.05) and low < true < high
    # nothing to be seen: the prior
    assert relative_worth(np.zeros(6), np.zeros(6), voxels)[0] == pytest.approx(1.0)


def test_sums_come_in_passes_that_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, kind = two_states(junk=0, states=(8, 8))
    half = class_halves.deal(kind, np.arange(16), np.random.default_rng(0))
    subsets = [kind == 0, kind == 1, kind < 2]
    at_once = list(class_halves.half_sums(rows, subsets, half, GRID))
    monkeypatch.setattr(class_halves, "MEMORY", 1.0)
    for one, other in zip(class_halves.half_sums(rows, subsets, half, GRID), at_once, strict=True):
        torch.testing.assert_close(one.weight, other.weight)
        torch.testing.assert_close(one.numerator, other.numerator)
    torch.testing.assert_close(at_once[0].weight + at_once[1].weight, at_once[2].weight)
    assert [(half & subset).sum() for subset in subsets] == [4, 4, 8]


def test_probability_of_the_class_is_that_of_the_code() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    codes = np.stack([rng.uniform(-1, 0, 400) + labels, np.zeros(400)], 1)
    probability = latents.class_probability(codes, np.full((400, 2), 0.1), labels)
    border = np.abs(codes[:, 0]) < 0.03
    assert probability[np.abs(codes[:, 0]) > 0.3].min() > 0.95
    assert 0.5 < probability[border].mean() < 0.7
    assert (latents.class_probability(np.zeros((5, 2)), np.ones((5, 2)), np.zeros(5, int)) == 1).all()


def test_entropy_counts_tomograms() -> None:
    assert class_quality.entropy(np.array(["a"] * 5)) == 0
    assert class_quality.entropy(np.array(["a", "b", "a", "b"])) == pytest.approx(math.log(2))


# ----------------------------------------------------------------------------------------------------------- the verb


def test_quality_of_the_true_states_of_a_run(small_set: SmallSet, finished_run: Path, tmp_path: Path) -> None:
    save_pickle(tmp_path / "states.pkl", small_set.state)
    arguments = ["quality", str(finished_run), "--labels", str(tmp_path / "states.pkl"), "-o", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    with (tmp_path / "out" / "quality.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert [row["distinct"] for row in table] == ["yes", "yes"]
    assert all(float(row["certain"]) <= 1 and float(row["sigma"]) > 0 and row["outlier"] for row in table)


def test_the_report_shows_the_quality_of_its_classes_only(finished_run: Path, tmp_path: Path) -> None:
    folder = copy_run(finished_run, tmp_path / "run", 2)
    run = checkpoint.open_run(folder)
    analysis = latents.analyze(run, pcs=1, clusters=2, skip_umap=True)
    assert list(report._quality(analysis)) == []
    assert cli.main(["quality", str(folder), "--kmeans", "2"]) == 0
    [section] = report._quality(analysis)
    told = re.sub(r"data:image/png;base64,[^\"]*", "", section.body)  # letters of a picture may spell anything
    assert "From quality_fsc.csv" in told and told.count("<tr><td>") >= 2 and "nan" not in told
    assert "of the particles are certain of their class" in report._certainty(run, analysis)
    made = (analysis.clusters_folder / "quality.csv").stat().st_mtime
    os.utime(analysis.clusters_folder / "labels.pkl", (made + 5, made + 5))
    assert list(report._quality(analysis)) == []


def test_mistakes_are_one_line(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pickle(tmp_path / "labels.pkl", np.zeros(7, int))
    labels = ["--labels", str(tmp_path / "labels.pkl")]
    for more, message in (
        ([], "give either --kmeans K or --labels FILE"),
        (["--kmeans", "3", *labels], "give either --kmeans K or --labels FILE"),
        (labels, "has 7 labels where"),
        (["--kmeans", "7"], "opustomo analyze"),
    ):
        assert cli.main(["quality", str(finished_run), *more]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "quality.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is not a table of `opustomo quality`"):
        read_quality(tmp_path / "quality.csv")


def test_words_for_the_log() -> None:
    row = ClassQuality(3, 40, 0.1, worth=1.2, worth_low=1.0, worth_high=1.4, note="x")
    assert (
        class_quality.in_words(row)
        == "class 3: 40 particles, each worth 1.20 (1.00 to 1.40) typical ones, no resolution"
    )
    assert class_quality.in_words(replace(row, worth=math.nan)) == "class 3: 40 particles, x"
