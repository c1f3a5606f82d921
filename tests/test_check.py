"""``check`` names every seeded fault, stays quiet on a sound set, and says with its exit status which of both it is."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from opustomo import cli
from opustomo.config import CheckConfig, GridOptions, InputOptions, SimulateConfig
from opustomo.data import check
from opustomo.data.cache import row_bytes
from opustomo.data.checks import crop, headers, images, signal, transfer, wedge
from opustomo.data.checks import particles as table
from opustomo.data.findings import Finding, Report, listed
from opustomo.data.mrc import read_volume
from opustomo.data.particles import TILT_COLUMNS, Particles
from opustomo.data.readers import read_particles
from opustomo.physics.grid import make_grid
from opustomo.physics.volume import spherical_mask
from opustomo.simulate.dataset import main as simulate
from star_sets import PIXEL, REAL_SETS, Set, put_volume, real_star

N, COUNT, APIX = 32, 24, 12.0


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated set: real-space back-projection with a true wedge, written without the project's insertion."""
    folder = tmp_path_factory.mktemp("sound")
    simulate(SimulateConfig(folder, preset="two-state", n=COUNT, box=N, angpix=APIX))
    return folder


@pytest.fixture
def copied(sound: Path, tmp_path: Path) -> Path:
    """Its own copy for a test that damages files."""
    return Path(shutil.copytree(sound, tmp_path / "set"))


def examine(folder: Path, sample: int = 16, **options: object) -> Report:
    grid = GridOptions(folder / "mask.mrc")
    read = InputOptions(**options)  # type: ignore[arg-type]
    return check.examine(CheckConfig(folder / "particles.star", read, grid, sample))


def find(report: Report, topic: str) -> Finding:
    [found] = [f for section in report.sections.values() for f in section if f.topic == topic]
    return found


def one(findings: list[Finding], topic: str) -> Finding:
    [found] = [f for f in findings if f.topic == topic]
    return found


def change(path: Path, edit: Callable[[np.ndarray], np.ndarray], pixel: float = APIX) -> None:
    put_volume(path, np.ascontiguousarray(edit(read_volume(path)[0])), pixel)


def volumes(folder: Path) -> list[Path]:
    return sorted((folder / "subtomo").glob("*.mrc"))


def particles_of(folder: Path) -> Particles:
    return read_particles(folder / "particles.star", InputOptions())


# ------------------------------------------------------------------------------------------------ whole report


def test_a_sound_set_has_no_errors_and_its_facts_are_right(sound: Path) -> None:
    report = examine(sound)
    assert report.failure is None and report.count("error") == 0
    assert find(report, "count").values["particles"] == COUNT
    assert find(report, "box").values["box"] == N and find(report, "pixel size").values["pixel_size"] == APIX
    assert find(report, "tilts").values == {"min": 41, "median": 41.0, "max": 41, "excluded": 0}
    assert find(report, "tilt angles").values == {"low": -60.0, "high": 60.0, "step": 3.0}
    assert find(report, "contrast").values["contrast"] == "white"
    assert find(report, "normalisation").values == {"normalisation": "sum"}
    for topic in ("wedge", "CTF and power", "signal", "defocus", "microscope", "dose", "origins", "box"):
        assert find(report, topic).level == "ok", find(report, topic).line()
    assert find(report, "wedge").values["leak"] < 0.05 and find(report, "CTF and power").values["correlation"] > 0.8
    # +-60 degrees: the sign of the tilts cannot be known from power, and is not claimed to be
    assert find(report, "tilt sign").level == "note"


def test_status_and_output_of_the_command(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    star, mask = str(sound / "particles.star"), str(sound / "mask.mrc")
    threads = torch.get_num_threads()
    assert cli.main(["check", star, "--mask", mask, "--sample", "8"]) == 0
    assert torch.get_num_threads() == threads
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line and not line.startswith(" ")][1:7] == [
        "particles", "geometry", "images", "transfer", "mask and crop", "cost",
    ]  # fmt: skip
    assert f"next: opustomo train {star} --mask {mask}" in text
    # what was typed is repeated, or the next command would read other files or another resolution
    here = ["--datadir", str(sound), "--downfrac", "0.75"]
    assert cli.main(["check", star, "--mask", mask, "--sample", "8", *here]) == 0
    step = f"next: opustomo train {star} --datadir {sound} --mask {mask} --downfrac 0.75 -o run"
    assert step in capsys.readouterr().out
    assert cli.main(["check", star, "--sample", "8", *here]) == 0
    assert f"next: opustomo average {star} --datadir {sound} --downfrac 0.75 -o average" in capsys.readouterr().out
    assert cli.main(["check", star, "--json", "--sample", "4"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["errors"] == 0 and document["failure"] is None
    assert {"section", "level", "topic", "found", "action", "values"} == set(document["findings"][0])


def test_all_faults_of_files_are_listed_at_once(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = volumes(copied)
    # rows the reader does not look at: it reads eight headers, check all of them
    for i in (1, 2, 4, 5, 7, 8):
        put_volume(files[i], np.ones((16, 16, 16), np.float32), APIX)
    change(files[10], lambda v: v, pixel=12.5)
    change(files[11], lambda v: np.full_like(v, 3.0))
    with mrcfile.mmap(files[12], mode="r+") as mrc:
        mrc.data[3, 4, 5] = np.nan
    files[14].write_bytes(files[14].read_bytes()[:5000])
    assert cli.main(["check", str(copied / "particles.star")]) == 1
    lines = capsys.readouterr().out.splitlines()

    def error(topic: str) -> str:
        [line] = [line for line in lines if line.split()[:2] == ["error", topic.split()[0]]]
        return line

    assert "6 of 24" in error("box") and "p00001.mrc (16^3)" in error("box") and "and 1 more" in error("box")
    assert "1 of 23 headers" in error("pixel size") and "p00010.mrc (12.5 A)" in error("pixel size")
    assert "1 of 17 read" in error("empty") and "p00011.mrc (row 12)" in error("empty")
    assert "p00012.mrc (row 13)" in error("NaN")
    assert "1 of 24" in error("files") and "truncated" in error("files") and "p00014" in error("files")
    assert "mend the errors" in lines[-1]


def test_a_set_that_cannot_be_read_still_lists_what_is_wrong(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = volumes(copied)
    for i in (0, 5, 7):
        files[i].unlink()
    put_volume(files[3], np.ones((16, 16, 16), np.float32))
    assert cli.main(["check", str(copied / "particles.star")]) == 2
    found = capsys.readouterr()
    assert "3 of 24 subtomograms missing" in found.out and "p00007.mrc (row 8)" in found.out
    assert "1 of 21 subtomograms are not 32^3" in found.out
    assert "3 of 24 subtomograms missing" in found.err and found.err.count("\n") == 1
    assert cli.main(["check", str(copied / "particles.star"), "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert "3 of 24" in document["failure"] and document["errors"] == 3


def test_no_star_file_and_no_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(tmp_path / "none.star")]) == 2
    found = capsys.readouterr()
    assert found.out == "" and "no such STAR file" in found.err
    assert cli.main(["check", str(tmp_path / "none.star"), "--sample", "0"]) == 2
    assert "--sample 0" in capsys.readouterr().err


def test_dark_protein_is_seen_and_a_wrong_option_is_pointed_out(copied: Path) -> None:
    for path in volumes(copied):
        change(path, np.negative)
    dark = find(examine(copied, 8), "contrast")
    assert (dark.level, dark.values["contrast"]) == ("ok", "black") and "inverted" in dark.action
    wrong = examine(copied, 4, contrast="white", normalisation="mean")
    assert find(wrong, "contrast").level == "warning" and "--contrast white" in find(wrong, "contrast").found
    assert find(wrong, "normalisation").level == "warning"


def test_volumes_in_another_frame_than_their_tilts(copied: Path) -> None:
    for path in volumes(copied):
        change(path, lambda v: v.transpose(1, 0, 2))  # z and y exchanged: not rotated after reconstruction
    report = examine(copied, 8)
    assert find(report, "wedge").level == "error" and "y and z exchanged" in find(report, "wedge").found


def test_orientations_of_other_particles_bring_out_no_signal(sound: Path) -> None:
    particles = particles_of(sound)
    grid = make_grid(N, APIX, 1.0, N / 2)
    noise = signal.noise_model(particles, grid)
    assert not isinstance(noise, Exception)
    right = one(signal.signal_findings(noise, particles, grid, InputOptions()), "signal")
    mixed = replace(particles, rotation=particles.rotation[np.random.default_rng(0).permutation(COUNT)])
    wrong = one(signal.signal_findings(noise, mixed, grid, InputOptions()), "signal")
    assert (right.level, wrong.level) == ("ok", "warning")


@pytest.mark.parametrize("name", REAL_SETS)
def test_real_sets(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    star = real_star(name)
    start = time.monotonic()
    report = check.examine(CheckConfig(star, sample=48))
    with capsys.disabled():
        print(f" check {name}: {time.monotonic() - start:.1f} s", end="")
    assert report.failure is None and report.count("error") == 0
    expected = {"particles": 412, "tomograms": 1} if "10499" in name else {"particles": 40, "tomograms": 4}
    assert find(report, "count").values == expected
    assert find(report, "contrast").values == {"contrast": "white", "sure": True}
    for topic in ("wedge", "CTF and power", "signal", "duplicates", "orientations", "pixel size"):
        assert find(report, topic).level == "ok", find(report, topic).line()
    # the Warp set's tilt range is lopsided, and its volumes agree with the sign of its weights
    assert find(report, "tilt sign").level == ("note" if "10499" in name else "ok")


# ------------------------------------------------------------------------------------------------ grey values


def test_cut_off_masked_and_outlying_boxes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = rng.normal(size=(12, 16, 16, 16)).astype(np.float32)
    cut, masked, loud = data.copy(), data.copy(), data.copy()
    cut[3, :, :4] = 0
    masked *= spherical_mask(16, 6, 1).numpy()
    loud[5] *= 8

    def greys(stack: np.ndarray) -> list[Finding]:
        for i, volume in enumerate(stack):
            put_volume(tmp_path / f"{i}.mrc", volume)
        found = [images._greys(tmp_path / f"{i}.mrc") for i in range(len(stack))]
        return images.grey_findings(images.Sample(np.arange(12), found, [f"{i}.mrc" for i in range(12)]), 12)

    assert [f.topic for f in greys(data)] == ["grey values"]
    assert "1 of all 12" in one(greys(cut), "cut off").found and "3.mrc (row 4)" in one(greys(cut), "cut off").found
    assert "12 of all 12" in one(greys(masked), "masked").found
    assert "5.mrc (row 6)" in one(greys(loud), "outliers").found and "1 of" in one(greys(loud), "outliers").found


# ------------------------------------------------------------------------------------------------ tilts and CTF


@pytest.mark.parametrize(
    ("column", "factor", "topic", "words"),
    [
        ("defocus", 1e-4, "defocus", "micrometres"),
        ("defocus", 0.02, "defocus", "nanometres"),
        ("defocus", -1.0, "defocus", "negative"),
        ("voltage", 1e3, "microscope", "voltage"),
        ("cs", 1e7, "microscope", "Cs"),
    ],
)
def test_units_that_cannot_be(sound: Path, column: str, factor: float, topic: str, words: str) -> None:
    particles = particles_of(sound)
    scaled = [name.startswith(column) and name != "defocus_angle" for name in TILT_COLUMNS]
    wrong = replace(particles, tilts=particles.tilts * np.where(scaled, factor, 1.0))
    found = one(transfer.transfer_findings(wrong), topic)
    assert found.level == "error" and words in found.line()


def test_a_few_bad_defocus_values_dose_and_flat_tilt_range(sound: Path) -> None:
    particles = particles_of(sound)
    tilts = particles.tilts.copy()
    tilts[:5, TILT_COLUMNS.index("defocus_u")] = tilts[:5, TILT_COLUMNS.index("defocus_v")] = 100.0
    tilts[:, TILT_COLUMNS.index("bfactor")] *= 10
    tilts[:, TILT_COLUMNS.index("tilt")] /= 3
    found = transfer.transfer_findings(replace(particles, tilts=tilts))
    assert {f.topic for f in found if f.level == "warning"} == {"defocus", "dose", "tilt angles"}
    assert not [f for f in found if f.level == "error"]


def test_ragged_and_excluded_tilts_are_counted(sound: Path) -> None:
    particles = particles_of(sound)
    tilts = particles.tilts.copy()
    tilts[:38, TILT_COLUMNS.index("scale")] = 0  # of the first particle's 41
    found = one(transfer.transfer_findings(replace(particles, tilts=tilts)), "tilts")
    assert found.level == "warning" and found.values["min"] == 3 and found.values["excluded"] == 38


def cubes(tilts: tuple[float, float], fill: float = 0.0) -> wedge.Power:
    """Measured and predicted power of a wedge in closed form: tilts about y, the plane of tilt t holds (cos t, -sin t).

    The direction of a point (kx, kz) in the plane of tilt t is kz / kx = -tan t.
    """
    axis = np.arange(-15, 16)
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    angle = np.rad2deg(np.arctan2(-z * np.sign(x + 0.5), np.abs(x)))
    inside = (angle >= tilts[0]) & (angle <= tilts[1]) | (np.hypot(x, z) < 1.5)
    shell = np.sqrt(x**2 + y**2 + z**2).round().astype(np.int64)
    shell[shell > 15] = 0
    noise = np.random.default_rng(0).gamma(20, 1 / 20, shell.shape)
    return wedge.Power(np.where(inside, 1.0, fill) * noise, inside.astype(float), inside, shell)


def test_tilt_sign_shows_where_the_range_is_lopsided() -> None:
    right = wedge.wedge_findings(cubes((-30, 60)))
    assert {f.level for f in right} == {"ok"} and one(right, "tilt sign").level == "ok"
    power = cubes((-30, 60))
    mirrored = wedge.wedge_findings(power._replace(measured=power.measured[..., ::-1]))
    assert one(mirrored, "tilt sign").level == "warning" and "opposite" in one(mirrored, "tilt sign").found
    assert one(wedge.wedge_findings(cubes((-60, 60))), "tilt sign").level == "note"


@pytest.mark.parametrize(("axes", "words"), [((0, 2, 1), "along x"), ((2, 1, 0), "x and z exchanged")])
def test_turned_wedges_are_named(axes: tuple[int, int, int], words: str) -> None:
    power = cubes((-60, 60))
    [found] = wedge.wedge_findings(power._replace(measured=power.measured.transpose(axes)))
    assert found.level == "error" and words in found.found


def test_power_in_the_wedge_is_a_warning() -> None:
    assert one(wedge.wedge_findings(cubes((-60, 60), fill=0.02)), "wedge").level == "ok"
    filled = one(wedge.wedge_findings(cubes((-60, 60), fill=0.5)), "wedge")
    assert filled.level == "warning" and filled.values["leak"] == pytest.approx(0.5, rel=0.1)
    white = wedge.wedge_findings(cubes((-60, 60), fill=1.0))
    assert one(white, "CTF and power").level == "warning"


# ------------------------------------------------------------------------------------------------ particle table


def angles(count: int, seed: int = 0) -> np.ndarray:
    """Uniform random orientations as RELION Euler angles."""
    return Rotation.random(count, random_state=seed).as_euler("ZYZ", degrees=True)


def symmetry(sound: Path, euler: np.ndarray) -> Finding:
    particles = particles_of(sound).subset(np.arange(len(euler)) % COUNT)
    [found] = table.orientation_findings(replace(particles, euler=euler))
    return found


@pytest.mark.parametrize("count", [60, 400])
def test_all_orientations_are_no_symmetry(sound: Path, count: int) -> None:
    for seed in range(20):
        assert symmetry(sound, angles(count, seed)).level == "ok"


@pytest.mark.parametrize(("fold", "dihedral"), [(2, False), (3, False), (6, False), (2, True), (4, True)])
def test_an_asymmetric_unit_is_recognised(sound: Path, fold: int, dihedral: bool) -> None:
    euler = angles(300)
    euler[:, 0] = euler[:, 0] / fold + 15
    if dihedral:
        euler[:, 1] = np.minimum(euler[:, 1], 180 - euler[:, 1])
    found = symmetry(sound, euler)
    group = f"{'D' if dihedral else 'C'}{fold}"
    assert found.level == "warning" and found.values["symmetry"] == group
    assert f"opustomo expand {sound}/particles.star --symmetry {group} -o expanded.star" in found.action


def test_preferred_views_are_not_called_a_symmetry(sound: Path) -> None:
    euler = angles(400)
    euler[:, 1] = np.abs(np.random.default_rng(0).normal(0, 12, 400))
    found = symmetry(sound, euler)
    assert found.level == "warning" and "symmetry" not in found.values and found.values["filled"] < 0.4
    assert symmetry(sound, np.zeros((60, 3))).level == "warning"


def test_duplicates(sound: Path) -> None:
    particles = particles_of(sound)
    [none] = table.duplicate_findings(particles)
    assert none.level == "ok"
    assert particles.coordinates is not None
    [twice] = table.duplicate_findings(particles.subset(np.array([*range(COUNT), 4])))
    assert twice.level == "warning" and "p00004.mrc" in twice.found
    [expanded] = table.duplicate_findings(particles.subset(np.tile(np.arange(COUNT), 3)))
    assert expanded.level == "note" and expanded.values["times"] == 3
    moved = particles.coordinates.copy()
    other = int(np.flatnonzero(particles.tomogram[1:] == particles.tomogram[0])[0]) + 1
    moved[other] = moved[0] + 0.5
    [close] = table.duplicate_findings(replace(particles, coordinates=moved))
    assert close.level == "warning" and f"row 1, row {other + 1}" in close.found
    apart = particles.tomogram.copy()
    apart[other] = "another"
    [elsewhere] = table.duplicate_findings(replace(particles, coordinates=moved, tomogram=apart))
    assert elsewhere.level == "ok"


def test_origins_far_from_the_centre(sound: Path) -> None:
    particles = particles_of(sound)
    origin = particles.origin.copy()
    origin[7] = (0, N / 4 + 1, 0)
    [found] = table.origin_findings(replace(particles, origin=origin))
    assert found.level == "warning" and found.values["far"] == 1 and "row 8" in found.found


def test_uneven_half_sets(sound: Path) -> None:
    particles = particles_of(sound)
    even = replace(particles, half=np.arange(COUNT) % 2 + 1)
    assert one(table.count_findings(even), "half sets").level == "ok"
    assert one(table.count_findings(replace(even, half=np.minimum(even.half * 9, 2))), "half sets").level == "warning"


def test_binning_that_contradicts_the_pixel_size(tmp_path: Path) -> None:
    made = Set(tmp_path)
    made.columns |= {"rlnTomoTiltSeriesPixelSize": ["1.0"] * made.n, "rlnTomoSubtomogramBinning": ["4"] * made.n}
    particles = read_particles(made.write(), InputOptions())
    survey = headers.survey_headers(particles.image_files, [str(name) for name in particles.names])
    found = one(headers.pixel_findings(survey, particles.star, particles.pixel_size), "binning")
    assert found.level == "warning" and "4 A, not 3.5 A" in found.found and PIXEL == 3.5


# ------------------------------------------------------------------------------------------------ mask, crop, cost


def mask_lines(path: Path, mask: np.ndarray, pixel: float = APIX) -> list[Finding]:
    put_volume(path, mask.astype(np.float32), pixel)
    return crop.mask_findings(GridOptions(path), N, APIX)[0]


def test_masks(tmp_path: Path) -> None:
    path = tmp_path / "mask.mrc"
    soft = spherical_mask(N, 8, 4).numpy()
    [good] = mask_lines(path, soft)
    assert good.level == "ok" and 3 <= good.values["edge_voxels"] <= 6 and good.values["reach_voxels"] == 11
    assert good.values["fraction"] == pytest.approx(4 / 3 * math.pi * 10**3 / N**3, rel=0.1)
    assert one(mask_lines(path, spherical_mask(N, 8, 0).numpy()), "mask edge").found == "hard"
    assert "touches" in one(mask_lines(path, spherical_mask(N, 14, 4).numpy()), "mask edge").found
    assert one(mask_lines(path, np.roll(soft, 4, 2)), "mask centre").found.startswith("its centre is 48, 0, 0 A")
    for wrong in (np.zeros((N,) * 3), soft[:16, :16, :16], soft * 100):
        assert [f.level for f in mask_lines(path, wrong)] == ["error"]
    assert [f.level for f in mask_lines(path, soft, pixel=8.0)] == ["error"]
    [none] = crop.mask_findings(GridOptions(), N, APIX)[0]
    assert none.level == "note" and "opustomo average" in none.action


def test_an_unfit_mask_is_an_error_among_the_other_findings(sound: Path, tmp_path: Path) -> None:
    put_volume(tmp_path / "mask.mrc", np.ones((16, 16, 16), np.float32), APIX)
    config = CheckConfig(sound / "particles.star", grid=GridOptions(tmp_path / "mask.mrc"), sample=4)
    report = check.examine(config)
    assert find(report, "mask").level == "error" and find(report, "count").level == "ok"


def test_crop_and_cost_follow_from_the_mask(sound: Path) -> None:
    particles = particles_of(sound)
    findings, grid = crop.grid_findings(GridOptions(downfrac=1.0), spherical_mask(N, 5, 2), APIX)
    assert grid is not None and grid.crop == 2 * (6 + 4)  # reaches 6 voxels, margin 4
    assert one(findings, "working box").values["crop"] == grid.crop
    cost = crop.cost_findings(particles, grid)
    assert one(cost, "disk").values["cache_bytes"] == COUNT * row_bytes(grid)
    # large enough that whole seconds are precise
    large, larger = (crop.cost_findings(particles.subset(np.tile(np.arange(COUNT), k)), grid) for k in (20, 200))
    seconds = [one(found, "disk").values["train_cpu_seconds"] for found in (large, larger)]
    assert seconds[1] == pytest.approx(10 * seconds[0], rel=0.05)
    [wrong], none = crop.grid_findings(GridOptions(downfrac=0.1), spherical_mask(N, 5, 2), APIX)
    assert wrong.level == "error" and none is None


# ------------------------------------------------------------------------------------------------ wording


def test_reports_fold_for_a_terminal_and_not_for_a_pipe() -> None:
    finding = Finding("warning", "topic", "word " * 40 + "end", "do this " * 20 + "last")
    report = Report(Path("p.star"), {"images": [finding], "cost": []}, 1.23)
    folded, whole = report.text(100).splitlines(), report.text().splitlines()
    assert folded[:3] == whole[:3] == ["p.star", "", "images"] and "cost" not in whole
    assert len(whole) == 6 and whole[3].startswith("  warning  topic") and whole[3].endswith("end -> " + finding.action)
    assert " ".join(folded[3:-2]).split() == whole[3].split() and max(map(len, folded)) <= 100
    assert {len(line) - len(line.lstrip()) for line in folded[4:-2]} == {whole[3].index("word")}
    assert whole[-1] == "no errors, 1 warning, no notes; looked at in 1.2 s"


def test_long_lists_are_cut() -> None:
    assert listed(["a", "b"]) == "a, b" and listed(list("abcdefg")) == "a, b, c, d, e and 2 more"
