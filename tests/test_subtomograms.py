"""Tilt images prepared as subtomograms say the same as the images: ``B = W V``, one average, one pose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from fourier_simulator import Beads
from opustomo import cli
from opustomo.compat import dsd
from opustomo.config import InputOptions
from opustomo.data.mrc import read_volume
from opustomo.data.places import places_of
from opustomo.data.readers import poses_of, read_particles
from opustomo.data.readers.source import read_source
from opustomo.physics.fourier import irfft3, rfft3
from opustomo.physics.volume import fourier_shell_correlation, spherical_mask
from stack_writers import Set, native_turns, two_states_set
from star_sets import Set as Subtomograms
from star_sets import put_volume

TURNS = native_turns(np.arange(-60.0, 61.0, 4.0))
SUB = Rotation.random(4, random_state=2).as_matrix()


def prepared(folder: Path, star: Path, *options: str) -> Path:
    assert dsd.main(["prepare_subtomos", str(star), "-o", str(folder / "sub"), *options]) == 0
    return folder / "sub"


def turned_set(made: Set, folder: Path) -> Path:
    return made.write_set(folder, hidden=3, turn=SUB)


def series(made: Set, folder: Path) -> Path:
    return made.write_series(folder)


@pytest.mark.parametrize(("write", "twice"), [(turned_set, False), (turned_set, True), (series, False)])
def test_volume_is_weight_times_density(write: Callable[[Set, Path], Path], twice: bool, tmp_path: Path) -> None:
    """The criterion of METHOD section 3, in the tomogram's frame, with a density made by the independent simulator."""
    made = two_states_set(4, 0.0, turns=TURNS, twice=twice)
    star = write(made, tmp_path / "in")
    folder = prepared(tmp_path, star)
    given, found = read_particles(star, InputOptions()), read_particles(folder / "particles.star", InputOptions())
    assert found.dialect == "RELION 4" and found.premultiplied and found.transfer == "weight_volume"
    for name, atol in (("rotation", 1e-7), ("origin", 1e-6)):
        assert np.allclose(getattr(found, name), getattr(given, name), atol=atol), name
    for name in ("names", "tomogram", "half"):
        assert np.array_equal(getattr(found, name), getattr(given, name)), name
    assert found.pixel_size == given.pixel_size and found.box == 32
    for i in range(4):
        volume, _ = read_volume(found.image_files[i])
        weight = torch.from_numpy(mrcfile.read(found.ctf_files[i]).copy())
        assert weight.shape == (64, 32, 17) and float(weight[32:].min()) >= 0
        beads = made.states[made.state[i]]
        moved = Beads(beads.centre @ found.rotation[i].T - found.origin[i], beads.sigma, beads.height)
        density = moved.density(32)
        expected = irfft3(rfft3(torch.from_numpy(density).float()) * weight[:32]).numpy()
        z, y, x = np.ogrid[-16:16, -16:16, -16:16]
        inside = (np.sqrt(z**2 + y**2 + x**2) < 10) * 1.0
        expected, seen = expected * inside, volume * inside
        gain = (expected * seen).sum() / (expected**2).sum()
        residual = ((seen - gain * expected) ** 2).sum() / (seen**2).sum()
        assert residual < 0.02, f"{i}: {residual}"
        assert gain == pytest.approx(1.0, abs=0.08)  # the kernel of the weight is a voxel wide


def test_average_is_that_of_the_images(tmp_path: Path) -> None:
    made = two_states_set(24, 1.0)
    star = made.write_set(tmp_path / "in")
    folder = prepared(tmp_path, star)
    truth, mask = sum(beads.density(32) for beads in made.states), spherical_mask(32, 12.0, 3.0).numpy()
    put_volume(tmp_path / "mask.mrc", mask, made.microscope.pixel)
    maps = [torch.from_numpy(truth * mask).float()]
    for name, one in (("stacks", star), ("sub", folder / "particles_optimisation_set.star")):
        line = ["average", str(one), "-o", str(tmp_path / name), "-r", str(tmp_path / "mask.mrc"), "--workers", "1"]
        assert cli.main(line) == 0
        maps.append(torch.from_numpy(read_volume(tmp_path / name / "average.mrc")[0] * mask))
    seen = slice(1, 8)  # shells before the first zero of the CTF, which is one and the same for all particles
    assert float(fourier_shell_correlation(maps[1], maps[2])[seen].min()) > 0.95
    of_stacks, of_volumes = (fourier_shell_correlation(maps[0], one)[seen] for one in maps[1:])
    assert float((of_volumes - of_stacks).min()) > -0.01 and float(of_volumes.min()) > 0.97
    source, before = (read_source(path) for path in (folder / "particles_optimisation_set.star", star))
    pixel = made.microscope.pixel
    places = [places_of(one, *poses_of(one, pixel), pixel) for one in (source, before)]
    assert np.allclose(places[0].centre, places[1].centre, atol=1e-3)


def test_noisy_images_count_less(tmp_path: Path) -> None:
    """Along the tilt axis, which lies in every image, the weight is the sum of CTF^2 over the noise."""
    noise = np.where(np.arange(31) % 2, 60.0, 20.0)
    made = two_states_set(4, noise)
    folder = prepared(tmp_path, made.write_set(tmp_path / "in"))
    v = np.arange(16.0)
    contrast = made.microscope.contrast(np.zeros((1, 16)), v[None], made.defocus[0][:, None])
    expected = (contrast**2 * (20.0 / noise[:, None]) ** 2).sum(0)  # of the median image: 16 of 31
    found = mrcfile.read(folder / "subtomo/p000001_weight.mrc")[0, :16, 0]
    assert np.allclose(found[2:15], expected[2:15], rtol=0.15)
    even = (contrast**2).sum(0)
    assert not np.allclose(found[2:15], even[2:15], rtol=0.3)


def test_particles_and_tilts_can_be_chosen(tmp_path: Path) -> None:
    made = two_states_set(4, 0.0)
    star = made.write_set(tmp_path / "in")
    (tmp_path / "rows.txt").write_text("1\n3\n")
    folder = prepared(tmp_path, star, "--ind", str(tmp_path / "rows.txt"), "--tilt-limit", "10")
    found, given = read_particles(folder / "particles.star", InputOptions()), read_particles(star, InputOptions())
    assert found.names.tolist() == given.names[[1, 3]].tolist()
    multiplicity = mrcfile.read(found.ctf_files[0])[32:]
    assert multiplicity[0, 0, 10] > 0 and multiplicity[5, 0, 10] == 0  # 27 degrees


def test_what_prepare_subtomos_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    star = Subtomograms(tmp_path / "s").write()
    assert dsd.main(["prepare_subtomos", str(star), "-o", str(tmp_path / "out")]) == 2
    assert "has subtomograms already (RELION 3.0)" in capsys.readouterr().err and not (tmp_path / "out").exists()
    images = two_states_set(4, 0.0).write_set(tmp_path / "in")
    folder = prepared(tmp_path, images)
    before = (folder / "particles.star").read_bytes()
    assert dsd.main(["prepare_subtomos", str(images), "-o", str(folder)]) == 2
    assert "holds particles.star already" in capsys.readouterr().err
    assert (folder / "particles.star").read_bytes() == before
