"""Export: classes go back to the program they came from, to others, and to the place in the tomogram they lie at."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import mrcfile
import numpy as np
import pandas as pd
import pytest
import yaml
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo import cli
from opustomo.analysis.export import main
from opustomo.config import ExportConfig, InputOptions
from opustomo.data.export import fingerprint_of
from opustomo.data.lists import read_list
from opustomo.data.pickles import save_pickle
from opustomo.data.places import places_of
from opustomo.data.readers import poses_of, read_particles
from opustomo.data.readers.source import read_source
from opustomo.data.star import read_star
from opustomo.errors import UserError
from stack_writers import SIZE, native_turns, two_states_set
from star_sets import BOX, PIXEL, Set, put_volume, real_star, relion31

Array = NDArray[np.float64]
LABELS = np.array([1, 0, 3, 1, 0, 1])  # class 2 has no particle
COORDINATE_PIXEL = 1.75


def run_of(folder: Path, made: Set, maps: bool = True, **more: object) -> Path:
    """A run of a set of 6 particles in two tomograms, with coordinates."""
    place = np.random.default_rng(2).uniform(50, 400, (made.n, 3))
    for axis, values in zip("XYZ", place.T, strict=True):
        made.columns[f"rlnCoordinate{axis}"] = [f"{value:.3f}" for value in values]
    star, run = made.write(), folder / "run"
    found = read_particles(star, InputOptions())
    values = {"star": str(star), "identity": fingerprint_of(found.names), "particles": made.n, "box": BOX,
              "pixel_size": PIXEL, "kind": "network"} | more  # fmt: skip
    save_pickle(run / "analyze.4/kmeans4/labels.pkl", LABELS)
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    for label in np.unique(LABELS) if maps else ():
        spot = np.zeros((10, 10, 10), np.float32)
        spot[2 + label, 5, 6] = 1
        path = run / f"analyze.4/kmeans4/reference{label}.mrc"
        put_volume(path, spot, 4.2)
        with mrcfile.open(path, "r+") as mrc:  # its voxel 5 over voxel BOX // 2 of the average
            mrc.header.origin = (BOX // 2 * PIXEL - 5 * 4.2,) * 3
    return run


def true_places(made: Set, unit: float = COORDINATE_PIXEL) -> tuple[Array, Array]:
    """Angstrom, of the centre of each particle in its tomogram, and A, from the text of the set."""
    columns = {
        name: np.array(made.columns[name], float) for name in made.columns if re.search("Coord|Angle|Orig", name)
    }
    angles = np.stack([columns[f"rlnAngle{name}"] for name in ("Rot", "Tilt", "Psi")], 1)
    turn = Rotation.from_euler("ZYZ", angles, degrees=True).inv().as_matrix()
    coordinates = np.stack([columns[f"rlnCoordinate{axis}"] for axis in "XYZ"], 1)
    angstrom = "rlnOriginXAngst" in columns
    origin = np.stack([columns[f"rlnOrigin{axis}{'Angst' * angstrom}"] for axis in "XYZ"], 1) * (
        1 if angstrom else PIXEL
    )
    return coordinates * unit - origin, turn


def config(run: Path, output: Path, **more: object) -> ExportConfig:
    return ExportConfig(run, output, kmeans=4, coords_angpix=COORDINATE_PIXEL, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["3.0", "3.1"])
def test_scripts_put_every_class_map_where_its_particle_is(version: str, tmp_path: Path) -> None:
    """A point of the map, moved by the script's matrix, lies at coordinate + A point - origin."""
    made = Set(tmp_path, n=6) if version == "3.0" else relion31(tmp_path, n=6)
    run = run_of(tmp_path, made)
    assert main(config(run, tmp_path / "out")) == 0
    centre, turn = true_places(made)
    seen: list[int] = []
    for script in sorted((tmp_path / "out/mapback").glob("*.cxc")):
        lines = script.read_text().splitlines()
        members = [i for i in range(6) if made.columns["rlnMicrographName"][i] == f"{script.stem}.tomostar"]
        members.sort(key=lambda i: (LABELS[i], i))
        opened = [re.fullmatch(r'open "(class(\d)\.mrc)"', line) for line in lines if line.startswith("open")]
        moves = [re.fullmatch(r"view matrix models #(\d+),(.*)", line) for line in lines if "view matrix" in line]
        assert len(opened) == len(moves) == len(members) and lines[1] == "close session"
        for number, (i, name, move) in enumerate(zip(members, opened, moves, strict=True), 1):
            assert name and move and int(name[2]) == LABELS[i] and int(move[1]) == number
            matrix = np.array(move[2].split(","), float).reshape(3, 4)
            with mrcfile.open(script.parent / name[1]) as mrc:
                at = np.argwhere(mrc.data == 1)[0][::-1]
                point = np.array([float(mrc.header.origin[axis]) for axis in "xyz"]) + at * 4.2
            expected = centre[i] + turn[i] @ ((at - 5) * 4.2)
            assert np.abs(matrix[:, :3] @ point + matrix[:, 3] - expected).max() < 1e-3
        shown = [re.fullmatch(r"volume #(\d+)-(\d+) .* color (#\w{6})", line) for line in lines if line[:6] == "volume"]
        ranges = [n for one in shown if one for n in range(int(one[1]), int(one[2]) + 1)]
        assert ranges == list(range(1, len(members) + 1)) and len(shown) == len({LABELS[i] for i in members})
        seen += members
    assert sorted(seen) == list(range(6))


def test_without_maps_there_are_markers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Set(tmp_path, n=6)
    run = run_of(tmp_path, made, maps=False)
    with caplog.at_level("INFO"):
        main(config(run, tmp_path / "out"))
    assert "`opustomo volumes" in caplog.text and "--kmeans 4" in caplog.text
    places, colours = {}, {}
    for script in (tmp_path / "out/mapback").glob("*.cxc"):
        assert f'open "{script.stem}.cmm"' in script.read_text()
        for marker in ElementTree.parse(script.with_suffix(".cmm")).getroot():
            place = tuple(float(marker.get(axis, "")) for axis in "xyz")
            places[place] = int(marker.get("note", "").removeprefix("class "))
            colours[places[place]] = tuple(marker.get(c) for c in "rgb")
    for centre, label in zip(true_places(made)[0], LABELS, strict=True):
        assert places[tuple(np.round(centre, 3))] == label
    assert len(set(colours.values())) == 3


def test_star_files_members_and_manifest(tmp_path: Path) -> None:
    made = relion31(tmp_path, n=6)
    made.columns["rlnKept"] = ["1.50", "007", "-0.0", "1e5", "x", "y"]
    run = run_of(tmp_path, made)
    assert cli.main(["export", str(run), "-o", str(tmp_path / "out"), "--kmeans", "4"]) == 0
    whole = read_star(tmp_path / "out/particles.star")
    assert whole.particles["rlnClassNumber"].astype(int).tolist() == (LABELS + 1).tolist()
    assert whole.particles["rlnKept"].tolist() == made.columns["rlnKept"]
    assert read_star(tmp_path / "out/pre3.star").particles["rlnKept"].tolist() == ["-0.0"]
    table = pd.read_csv(tmp_path / "out/particles.csv")
    assert table["class"].tolist() == LABELS.tolist() and table["row"].tolist() == [1, 2, 3, 4, 5, 6]
    assert table["particle"].tolist() == made.columns["rlnImageName"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["counts"] == {"0": 2, "1": 3, "3": 1} and manifest["format"] == "same" and manifest["epoch"] == 4
    assert manifest["sha256"] == {str(made.star): hashlib.sha256(made.star.read_bytes()).hexdigest()}
    assert manifest["coordinate_pixel_size"] == PIXEL  # nothing states another
    assert {name for name in manifest["files"] if "/" not in name} == {
        "particles.csv", "particles.star", "pre0.star", "pre1.star", "pre3.star"
    }  # fmt: skip
    assert all((tmp_path / "out" / name).is_file() for name in manifest["files"])


def test_classes_along_an_axis_or_a_traversal(tmp_path: Path) -> None:
    """Each particle is of the map of ``volumes --axis`` or ``--pc`` that is nearest; the same files as of k-means."""
    run = run_of(tmp_path, relion31(tmp_path, n=6), maps=False)
    with pytest.raises(UserError, match=r"axis2/labels.pkl; run `opustomo analyze .*run`, see its axes.csv"):
        main(config(run, tmp_path / "a", axis=2))
    with pytest.raises(UserError, match=r"pc3/labels.pkl; run `opustomo analyze .*run --pcs 3`"):
        main(config(run, tmp_path / "a", pc=3))
    with pytest.raises(UserError, match="--groups and --axis: give one of"):
        main(config(run, tmp_path / "a", axis=2, groups=True))
    with pytest.raises(UserError, match="--pc -1: is counted from 1"):
        main(config(run, tmp_path / "a", pc=-1))
    for name, labels in (("axis2", [9, 0, 0, 4, 9, 9]), ("pc3", [1, 1, 0, 1, 1, 0])):
        save_pickle(run / f"analyze.4/{name}/labels.pkl", np.array(labels))
        put_volume(run / f"analyze.4/{name}/reference0.mrc", np.ones((8, 8, 8), np.float32), 4.0)
        for label in set(labels):
            put_volume(run / f"analyze.4/{name}/reference{label}.mrc", np.ones((8, 8, 8), np.float32), 4.0)
        output = tmp_path / name
        assert main(config(run, output, **{name[:-1]: int(name[-1])})) == 0
        assert {path.name for path in output.glob("pre*.star")} == {f"pre{label}.star" for label in labels}
        assert read_star(output / "particles.star").particles["rlnClassNumber"].tolist() == [
            str(label + 1) for label in labels
        ]
        manifest = json.loads((output / "manifest.json").read_text())
        assert manifest["classes"] == name and manifest["kmeans"] is None
        assert (output / f"mapback/class{labels[0]}.mrc").is_file() and not list(output.glob("mapback/*.cmm"))


@pytest.mark.parametrize("kind", ["artiax", "warp", "m"])
def test_lists_for_other_programs(kind: str, tmp_path: Path) -> None:
    made = Set(tmp_path, n=6)
    run = run_of(tmp_path, made)
    source = tmp_path / "a.source"
    files = "".join(f'<File Hash="h{i}" Name="TS_{i}.tomostar"/>' for i in (0, 1))
    source.write_text(f"<DataSource><Files>{files}</Files></DataSource>")
    more = {"m_source": source} if kind == "m" else {}
    main(config(run, tmp_path / "out", format=kind, **more))
    centre, turn = true_places(made)
    for name, members in {"particles": np.arange(6), "pre1": np.flatnonzero(LABELS == 1)}.items():
        found = read_list(tmp_path / f"out/{name}.star")
        voxels = found.voxels(np.arange(len(found)), 1.0, np.zeros(3, int), COORDINATE_PIXEL)
        assert np.abs(voxels - centre[members]).max() < 1e-3
        assert np.abs(found.rotation - turn[members]).max() < 1e-5


def test_corrected_poses_go_into_every_output(tmp_path: Path) -> None:
    made = Set(tmp_path, n=6)
    run = run_of(tmp_path, made, estpose=True)
    euler, origin = np.array([[10.0 * i, 20 + i, 30] for i in range(6)]), np.full((6, 3), 0.25)
    save_pickle(run / "pose.4.pkl", (np.tile(np.eye(3), (6, 1, 1)), origin, euler))
    main(config(run, tmp_path / "warp", format="warp", corrected=True))
    main(config(run, tmp_path / "same", corrected=True))
    turn = Rotation.from_euler("ZYZ", euler, degrees=True).inv().as_matrix()
    moved = true_places(made)[0]
    given = np.stack([np.array(made.columns[f"rlnOrigin{axis}"], float) for axis in "XYZ"], 1) * PIXEL
    expected = moved + given - 0.25 * BOX * PIXEL
    found = read_list(tmp_path / "warp/particles.star")
    assert np.abs(found.position * COORDINATE_PIXEL - expected).max() < 1e-3
    assert np.abs(found.rotation - turn).max() < 1e-5
    assert np.allclose(read_particles(tmp_path / "same/particles.star", InputOptions(datadir=tmp_path)).euler, euler)
    script = (tmp_path / "same/mapback/TS_1.cxc").read_text()
    matrix = np.array(re.findall(r"#1,(.*)", script)[0].split(","), float).reshape(3, 4)
    first = next(i for i in (1, 3, 5) if LABELS[i] == LABELS[[1, 3, 5]].min())
    assert np.abs(matrix[:, :3] - turn[first]).max() < 1e-5


@pytest.mark.parametrize("form", ["plain", "native", "turned"])
def test_places_of_a_relion_5_set(form: str, tmp_path: Path) -> None:
    """Coordinates in pixels from the corner or in Angstrom from the middle, poses in a frame of their own or not."""
    turns = native_turns(np.arange(-60.0, 61.0, 40.0)) if form == "native" else None
    truth = two_states_set(4, 5.0, turns=turns, step=40.0)
    turn = Rotation.random(4, random_state=1).as_matrix() if form == "turned" else None
    source = read_source(truth.write_set(tmp_path, native=form == "native", turn=turn))
    pixel = truth.microscope.pixel
    found = places_of(source, *poses_of(source, pixel), pixel)
    assert np.abs(found.centre - (truth.position + SIZE / 2) * pixel).max() < 1e-3
    assert np.abs(found.rotation - truth.rotation).max() < 1e-6
    assert found.tomogram.tolist() == ["TS_2", "TS_1"] * 2 and found.pixel_size == pytest.approx(pixel)


def test_a_class_of_a_relion_5_set_is_a_set(tmp_path: Path) -> None:
    truth = two_states_set(4, 5.0, step=40.0)
    star, run = truth.write_set(tmp_path / "set"), tmp_path / "run"
    save_pickle(run / "analyze.0/groups/labels.pkl", np.array([0, 1, 1, 0]))
    values = {"star": str(star), "particles": 4, "box": 32, "pixel_size": truth.microscope.pixel, "kind": "linear"}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(ExportConfig(run, tmp_path / "out", groups=True)) == 0
    for name, members in {"particles": [0, 1, 2, 3], "pre1": [1, 2]}.items():
        found = read_particles(tmp_path / f"out/{name}_optimisation_set.star", InputOptions(datadir=star.parent))
        assert np.abs(found.rotation - truth.rotation[members]).max() < 1e-6
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert {Path(name).name for name in manifest["sha256"]} == {"set.star", "particles.star", "tomograms.star"}
    assert {"pre0_optimisation_set.star", "mapback/TS_1.cxc"} <= set(manifest["files"])
    assert not list((tmp_path / "out").glob("**/.*"))  # nothing half-written


def test_a_run_of_one_map_is_one_class(tmp_path: Path) -> None:
    made = Set(tmp_path, n=6)
    run = run_of(tmp_path, made, maps=False, kind="map")
    put_volume(run / "average.mrc", np.ones((8, 8, 8), np.float32), 7.0)
    main(config(run, tmp_path / "out"))
    assert pd.read_csv(tmp_path / "out/particles.csv")["class"].tolist() == [0] * 6
    assert (tmp_path / "out/mapback/TS_0.cxc").read_text().count('open "class0.mrc"') == 3


def test_pseudo_subtomograms_are_placed_in_the_tomograms_frame(tmp_path: Path) -> None:
    truth = two_states_set(4, 5.0, step=40.0)
    turn = Rotation.random(4, random_state=1).as_matrix()
    source = read_source(truth.write_set(tmp_path, turn=turn), "relion4")
    pixel = truth.microscope.pixel
    found = places_of(source, *poses_of(source, pixel), pixel)
    assert np.abs(found.centre - (truth.position + SIZE / 2) * pixel).max() < 1e-3
    assert np.abs(found.rotation - truth.rotation).max() < 1e-6


def test_real_images_and_subtomograms_of_the_same_particles_are_in_the_same_places() -> None:
    """WarpTools exported both: other files and columns, one place and orientation in the tomogram."""
    volumes = real_star("real_70S_warptools/subtomograms_3d")
    images = next((volumes.parents[1] / "stacks_2d").glob("*_optimisation_set.star"))
    found = []
    for source in map(read_source, (volumes, images)):
        places = places_of(source, *poses_of(source, 12.0), 12.0)
        assert places.pixel_size == pytest.approx(12.0)
        found.append(places.at(np.lexsort(np.round(places.centre.T, 1))))
    assert np.abs(found[0].centre - found[1].centre).max() < 0.05
    assert np.abs(found[0].rotation - found[1].rotation).max() < 1e-6
    assert np.array_equal(found[0].tomogram, found[1].tomogram)


def test_what_cannot_be_exported_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Set(tmp_path, n=6)
    run = run_of(tmp_path, made)
    with pytest.raises(UserError, match="--format m: needs --m-source"):
        main(config(run, tmp_path / "a", format="m"))
    with pytest.raises(UserError, match="--format warp: does without --m-source"):
        main(config(run, tmp_path / "a", format="warp", m_source=tmp_path / "a.source"))
    with pytest.raises(UserError, match="no run folder of train"):
        main(config(tmp_path / "nothing", tmp_path / "a"))
    with pytest.raises(UserError, match="has no tilt series TS_0"):
        source = tmp_path / "a.source"
        source.write_text('<DataSource><Files><File Hash="h" Name="TS_9.tomostar"/></Files></DataSource>')
        main(config(run, tmp_path / "a", format="m", m_source=source))
    del made.columns["rlnCoordinateZ"]
    made.write_star()
    with pytest.raises(UserError, match="has no coordinates"):
        main(config(run, tmp_path / "a", format="warp"))
    assert not (tmp_path / "a").exists()
    with caplog.at_level("INFO"):
        assert main(config(run, tmp_path / "b")) == 0
    assert "no map-back scripts" in caplog.text and not (tmp_path / "b/mapback").exists()
