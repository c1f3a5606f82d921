"""Maps that the data make at a code: the neighbours' state, honest half maps, and the molecule at full resolution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from fake_run import CENTRES, ZDIM, FakeRun, fake_run
from opustomo import checkpoint
from opustomo.analysis import data_maps, made_from, plots
from opustomo.analysis.volumes import MapFiles
from opustomo.config import VolumesConfig
from opustomo.data.mrc import read_volume
from opustomo.data.observe import Noise
from opustomo.errors import UserError
from opustomo.physics.fourier import band_frequencies, from_band, irfft3
from opustomo.physics.observation import model_band
from opustomo.physics.volume import centre_crop, fourier_shell_correlation, spherical_mask
from small_set import PIXEL, SmallSet


def test_kernel_covers_the_nearest_particles() -> None:
    codes = np.random.default_rng(0).normal(size=(500, 3))
    weight = data_maps.kernel(codes, codes[7], 50)
    distance = np.linalg.norm(codes - codes[7], axis=1)
    assert (weight > 0).sum() == 50
    assert weight[7] == 1 and (np.diff(weight[np.argsort(distance)]) <= 0).all()
    assert weight[np.argsort(distance)[49]] == pytest.approx(np.exp(-2))
    # equal codes and fewer particles than asked for
    assert (data_maps.kernel(np.zeros((5, 3)), np.zeros(3), 50) == 1).all()


class Rows:
    """Numerators and weights of particles that show what the decoder says at their code, in the stated noise."""

    def __init__(self, run: FakeRun, noise: float) -> None:
        self.grid = run.grid
        size, rng = run.grid.working_box, torch.Generator().manual_seed(0)
        signal = model_band(torch.from_numpy(run.decode(run.codes)), size)
        hidden = torch.randn(signal.shape, dtype=torch.complex64, generator=rng) * noise
        self.weights = torch.rand(signal.shape, generator=rng) / noise**2
        self.numerators = self.weights * (signal + hidden)

    def __len__(self) -> int:
        return len(self.weights)

    def weight(self, index: torch.Tensor) -> torch.Tensor:
        return self.weights[index]

    def numerator(self, index: torch.Tensor) -> torch.Tensor:
        return centre_crop(irfft3(from_band(self.numerators[index], self.grid.working_box)), self.grid.crop)


def test_data_volumes_show_the_state_of_the_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = fake_run(tmp_path, particles=90)
    run.mask = spherical_mask(20, 7.5, 2.0)
    monkeypatch.setattr(made_from, "open_cache", lambda folder: Rows(run, noise=0.1))
    codes = CENTRES[:2]
    monkeypatch.setattr(data_maps, "usual_neighbours", lambda particles: 25)
    paths = data_maps.write_data_volumes(run, codes, MapFiles(tmp_path / "out"))
    maps = [mrcfile.read(path).ravel() for path in paths]
    truth = (run.decode(codes) * run.mask.numpy()).reshape(2, -1)
    difference = np.corrcoef(maps[0] - maps[1], truth[0] - truth[1])[0, 1]
    assert difference > 0.9
    with mrcfile.open(paths[0]) as mrc:
        assert float(mrc.voxel_size.x) == pytest.approx(10.0)
    frequency, curves = data_maps.read_fsc(tmp_path / "out" / "fsc_data.csv")
    assert list(curves) == ["reference0", "reference1", "random"]
    assert frequency[-1] == pytest.approx(1 / 20)
    # the neighbours agree with each other better than random particles, which mix three states, do
    fine = slice(3, 6)
    assert curves["reference0"][fine].mean() > 0.9
    assert curves["reference0"][fine].mean() > curves["random"][fine].mean()


@pytest.mark.usefixtures("drawn")
def test_legend_of_many_curves_names_their_particles_beside_them() -> None:
    names = [f"reference{i}" for i in range(25)]
    codes = np.random.default_rng(0).normal(size=(400, 3))
    counts = data_maps.contributing(codes, codes[:25], [*names, "random"])
    fig = plots.fsc_curves(np.arange(9) / 90, {name: np.ones(9) for name in [*names, "random"]}, "FSC", counts)
    plots.png(fig)
    axes = fig.axes[0]
    legend = axes.get_legend()
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
    assert legend.get_window_extent().x1 <= fig.bbox.x1 and legend.get_window_extent().y0 >= fig.bbox.y0
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[0] == "reference0 (40)" and texts[-1] == "random (40)"
    control = next(line for line in axes.lines if str(line.get_label()).startswith("random"))
    assert control.get_linestyle() == "--" and control.get_color() == plots.MUTED


def test_half_maps_of_noise_do_not_correlate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = fake_run(tmp_path, particles=60)
    monkeypatch.setattr(made_from, "open_cache", lambda folder: Rows(run, noise=300.0))
    data_maps.write_data_volumes(run, CENTRES[:1], MapFiles(tmp_path / "out"))
    _, curves = data_maps.read_fsc(tmp_path / "out" / "fsc_data.csv")
    assert abs(curves["reference0"][4:].mean()) < 0.15


def test_from_data_without_a_fitting_cache_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = fake_run(tmp_path)
    with pytest.raises(UserError, match=r"cache: no cache here; make it with `opustomo cache"):
        data_maps.write_data_volumes(run, np.zeros((1, ZDIM)), MapFiles(tmp_path / "out"))
    other, _ = fake_run(tmp_path, particles=30)
    monkeypatch.setattr(made_from, "open_cache", lambda folder: Rows(other, noise=1.0))
    with pytest.raises(UserError, match=r"is of other particles.*opustomo cache"):
        data_maps.write_data_volumes(run, np.zeros((1, ZDIM)), MapFiles(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_full_maps_show_each_state_at_the_subtomograms_own_pixel(
    small_set: SmallSet, finished_run: Path, tmp_path: Path
) -> None:
    """Two codes, two states: the maps of the data correlate with their own true map more than with the other."""
    from opustomo.analysis.volumes import main

    run = checkpoint.open_run(finished_run)
    codes = np.stack([np.median(run.codes[small_set.state == s], 0) for s in (0, 1)])
    np.savetxt(tmp_path / "codes.txt", codes)
    main(VolumesConfig(finished_run, zfile=tmp_path / "codes.txt", output=tmp_path / "out", full=True))
    mask = torch.from_numpy(read_volume(small_set.mask)[0])
    truth = [torch.from_numpy(read_volume(small_set.folder / "gt" / f"state{s}_hinge+0.0.mrc")[0]) for s in (0, 1)]
    found = []
    for i in (0, 1):
        for kind in ("data", "half1", "half2"):
            path = tmp_path / "out" / f"reference{i}_{kind}.mrc"
            with mrcfile.open(path) as mrc:
                assert mrc.data.shape == (24, 24, 24)
                assert float(mrc.voxel_size.x) == pytest.approx(PIXEL)
            assert mrcfile.validate(str(path))
        found.append(torch.from_numpy(read_volume(tmp_path / "out" / f"reference{i}_data.mrc")[0]))
    # the difference tells: what all states share correlates with either
    change, expected = ((pair[1] - pair[0]) * mask for pair in (found, truth))
    assert np.corrcoef(change.flatten(), expected.flatten())[0, 1] > 0.7
    assert float(fourier_shell_correlation(found[1] * mask, truth[1] * mask)[1:8].min()) > 0.7
    frequency, curves = data_maps.read_fsc(tmp_path / "out" / "fsc_data.csv")
    assert list(curves) == ["reference0", "reference1", "random"]
    assert frequency[-1] == pytest.approx(0.5 / PIXEL, abs=1e-6)
    assert curves["reference0"][1:4].min() > 0.5


def test_full_maps_come_in_passes_that_fit_the_memory(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = checkpoint.open_run(finished_run)
    codes = run.codes[[0, 30]]
    white = Noise(torch.ones(len(band_frequencies(24))), 1.0, False, torch.zeros(13))
    monkeypatch.setattr(data_maps, "estimate_noise", lambda *_, **__: white)
    monkeypatch.setattr(data_maps, "usual_neighbours", lambda particles: 6)
    at_once = data_maps.write_full_volumes(run, codes, MapFiles(tmp_path / "a", "v"))
    monkeypatch.setattr(data_maps, "MEMORY", 1.0)
    one_by_one = data_maps.write_full_volumes(run, codes, MapFiles(tmp_path / "b", "v"))
    assert [p.name for p in at_once] == [p.name for p in one_by_one]
    for first, second in zip(at_once, one_by_one, strict=True):
        np.testing.assert_allclose(read_volume(first)[0], read_volume(second)[0], atol=1e-4)


def test_full_maps_of_another_star_file_are_refused(small_set: SmallSet, finished_run: Path, tmp_path: Path) -> None:
    run = checkpoint.open_run(finished_run)
    fewer = replace(run, codes=run.codes[:50])
    with pytest.raises(UserError, match=r"60 particles where .* has 50"):
        data_maps.write_full_volumes(fewer, run.codes[:1], MapFiles(tmp_path / "out", "v"))
    assert not (tmp_path / "out").exists()
