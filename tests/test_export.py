"""Subsets and classes are STAR files that load again as exactly those particles, with nothing lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from opustomo.analysis.selection import classes_of, write_classes
from opustomo.analysis.selection import main as select
from opustomo.config import InputOptions, SelectConfig
from opustomo.data.export import CorrectedPoses, fingerprint_of, write_subset
from opustomo.data.particles import Particles
from opustomo.data.pickles import save_pickle
from opustomo.data.readers import read_particles
from opustomo.data.readers.source import Source, read_source
from opustomo.data.star import read_star
from opustomo.errors import UserError
from star_sets import REAL_SETS, Set, real_star, relion31


def assert_same_particles(a: Particles, b: Particles) -> None:
    for field in dataclasses.fields(Particles):
        if field.name not in ("source", "star", "notes"):
            left, right = getattr(a, field.name), getattr(b, field.name)
            assert np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right, field.name


@pytest.mark.parametrize("name", REAL_SETS)
def test_subset_of_a_real_set_loads_again(name: str, tmp_path: Path) -> None:
    star = real_star(name)
    whole = read_particles(star, InputOptions())
    rows = np.random.default_rng(0).permutation(len(whole))[:17]
    write_subset(read_source(star), rows, tmp_path / "some.star")
    again = read_particles(tmp_path / "some.star", InputOptions(datadir=star.parent))
    assert_same_particles(again, whole.subset(rows))


def test_every_block_column_and_value_is_kept(tmp_path: Path) -> None:
    made = relion31(tmp_path, groups=2)
    made.columns["rlnUnknown"] = ["1.50", "007", "-0.0", "1e5"]
    star = read_star(made.write_star())
    star.blocks["general"] = {"rlnTomoSubTomosAre2DStacks": "0"}
    write_subset(Source("relion3", "", star, star), np.array([3, 1]), tmp_path / "out.star", np.array([7, 0]))
    again = read_star(tmp_path / "out.star")
    assert list(again.blocks) == list(star.blocks)
    assert again.table("optics").equals(star.table("optics"))
    kept = again.particles
    assert list(kept.columns) == [*star.particles.columns, "rlnClassNumber"]
    assert kept["rlnUnknown"].tolist() == ["1e5", "007"] and kept["rlnClassNumber"].tolist() == ["8", "1"]
    assert "rlnClassNumber" not in star.particles.columns


def test_ambiguous_identities_and_empty_selections_are_refused(tmp_path: Path) -> None:
    made = Set(tmp_path)
    for name in ("rlnImageName", "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"):  # in other poses: test_expand
        made.columns[name][3] = made.columns[name][1]
    source = read_source(made.write_star())
    with pytest.raises(UserError, match=r"sub/p1.mrc occurs twice \(rows 2 and 4\)"):
        write_subset(source, np.array([0]), tmp_path / "out.star")
    made.columns["rlnTomoParticleName"] = ["a", "b", "c", "d"]  # these tell them apart
    write_subset(read_source(made.write_star()), np.array([0]), tmp_path / "out.star")
    with pytest.raises(UserError, match="no particles selected"):
        write_subset(source, np.array([], np.int64), tmp_path / "none.star")
    assert not (tmp_path / "none.star").exists()


def test_classes_partition_the_set(tmp_path: Path) -> None:
    star = Set(tmp_path, n=6).write_star()
    labels = np.array([1, 0, 3, 1, 0, 1])  # class 2 has no particle
    paths = write_classes(classes_of(read_source(star), labels), tmp_path / "out")
    assert [path.name for path in paths] == ["pre0.star", "pre1.star", "pre3.star"]
    assert read_star(paths[1]).particles["rlnImageName"].tolist() == ["sub/p0.mrc", "sub/p3.mrc", "sub/p5.mrc"]
    with pytest.raises(UserError, match="6 particles but there are 5 labels"):
        write_classes(classes_of(read_source(star), labels[:5]), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_select_writes_classes_or_their_union_and_a_manifest(tmp_path: Path) -> None:
    star = Set(tmp_path, n=6).write()
    run = tmp_path / "run"
    with pytest.raises(UserError, match="no such run folder"):
        select(SelectConfig(star, run, tmp_path / "a"))
    for epoch in (9, 10):
        save_pickle(run / f"analyze.{epoch}/kmeans3/labels.pkl", (np.arange(6, dtype=np.int32) + epoch) % 3)
    with pytest.raises(UserError, match=r"opustomo analyze .* --clusters 16"):
        select(SelectConfig(star, run, tmp_path / "a"))
    assert select(SelectConfig(star, run, tmp_path / "a", kmeans=3)) == 0
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert manifest["epoch"] == 10 and manifest["counts"] == {"0": 2, "1": 2, "2": 2}
    assert manifest["files"] == ["pre0.star", "pre1.star", "pre2.star"] and manifest["source"] == str(star)
    # names in a class are relative to the folder of the file that it is of: the manifest leads there
    assert manifest["folders"][0] == str(tmp_path)
    classes = [read_particles(tmp_path / f"a/pre{i}.star", InputOptions()) for i in range(3)]
    assert [list(one.names) for one in classes] == [
        [f"sub/p{i}.mrc" for i in rows] for rows in ((2, 5), (0, 3), (1, 4))
    ]
    for broken in ("{", "[]", '{"folders": 3}', '{"folders": [1, "gone"]}'):
        (tmp_path / "a/manifest.json").write_text(broken)
        with pytest.raises(UserError, match=r"2 of 2 subtomograms missing"):
            read_particles(tmp_path / "a/pre1.star", InputOptions())
    select(SelectConfig(star, run, tmp_path / "b", epoch=9, kmeans=3, classes=(0, 2)))
    union = read_star(tmp_path / "b/selected.star").particles
    assert union["rlnImageName"].tolist() == ["sub/p0.mrc", "sub/p2.mrc", "sub/p3.mrc", "sub/p5.mrc"]
    assert union["rlnClassNumber"].tolist() == ["1", "3", "1", "3"]
    with pytest.raises(UserError, match="--classes 5"):
        select(SelectConfig(star, run, tmp_path / "c", kmeans=3, classes=(5,)))
    assert not (tmp_path / "c").exists()


def test_select_takes_the_groups_along_discrete_axes(tmp_path: Path) -> None:
    star = Set(tmp_path, n=6).write_star()
    run = tmp_path / "run"
    save_pickle(run / "analyze.4/kmeans3/labels.pkl", np.arange(6) % 3)
    with pytest.raises(UserError, match=r"groups/labels.pkl; run `opustomo analyze .*`, which writes groups where"):
        select(SelectConfig(star, run, tmp_path / "a", groups=True))
    save_pickle(run / "analyze.4/groups/labels.pkl", np.array([0, 1, 1, 1, 0, 1]))
    assert select(SelectConfig(star, run, tmp_path / "a", groups=True, classes=(1,))) == 0
    chosen = read_star(tmp_path / "a/selected.star").particles["rlnImageName"].tolist()
    assert chosen == ["sub/p1.mrc", "sub/p2.mrc", "sub/p3.mrc", "sub/p5.mrc"]
    assert json.loads((tmp_path / "a/manifest.json").read_text())["kmeans"] is None


@pytest.mark.parametrize("version", ["3.0", "3.1"])
def test_corrected_poses_are_written_in_the_units_of_the_file(version: str, tmp_path: Path) -> None:
    """Read again they are the poses given; every other column is as it was."""
    star = (Set(tmp_path, n=6) if version == "3.0" else relion31(tmp_path, n=6)).write()
    before = read_particles(star, InputOptions())
    euler = np.array([[10.0, 20, 30], [170, 90, -60], [0, 1e-3, 5]])
    poses = CorrectedPoses(euler, np.array([[0.5, -1, 2], [0, 0, 0.25], [3, 4, 5.0]]), before.pixel_size)
    rows = np.array([4, 0, 2])
    write_subset(read_source(star), rows, tmp_path / "moved.star", poses=poses)
    after = read_particles(tmp_path / "moved.star", InputOptions())
    assert np.allclose(after.euler, euler, atol=1e-5) and np.allclose(after.origin, poses.origin, atol=1e-5)
    assert after.dialect == before.dialect
    plain, moved = (read_star(path).particles for path in (star, tmp_path / "moved.star"))
    kept = [name for name in plain if not name.startswith(("rlnAngle", "rlnOrigin"))]
    assert kept and plain.iloc[rows][kept].to_numpy().tolist() == moved[kept].to_numpy().tolist()


def test_select_refuses_other_particles_and_the_same_in_another_order(tmp_path: Path) -> None:
    star = Set(tmp_path, n=6).write()
    run = tmp_path / "run"
    save_pickle(run / "analyze.0/kmeans2/labels.pkl", np.arange(6, dtype=np.int32) % 2)
    identity = fingerprint_of(read_particles(star, InputOptions()).names)
    (run / "config.yaml").write_text(yaml.safe_dump({"star": str(star), "identity": identity, "particles": 6}))
    assert select(SelectConfig(star, run, tmp_path / "a", kmeans=2)) == 0
    write_subset(read_source(star), np.arange(6)[::-1], tmp_path / "sorted.star")
    with pytest.raises(UserError, match=r"in another order.*give .*particles\.star"):
        select(SelectConfig(tmp_path / "sorted.star", run, tmp_path / "b", kmeans=2))
    with pytest.raises(UserError, match="--corrected"):
        select(SelectConfig(star, run, tmp_path / "b", kmeans=2, corrected=True))
    assert not (tmp_path / "b").exists()
