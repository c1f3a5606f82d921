"""Symmetry expansion: a symmetric map cannot tell copies apart, an asymmetric one becomes its symmetrised self."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dialect_writers import IMAGES, VOLUMES, Subtomograms, write_every_dialect
from fake_run import FakeRun
from fourier_simulator import Array, Beads
from opustomo import cli
from opustomo.analysis.class_quality import class_subsets
from opustomo.analysis.made_from import particle_of_rows
from opustomo.analysis.selection import main as select
from opustomo.average import half_maps, half_sets, half_totals
from opustomo.config import InputOptions, SelectConfig
from opustomo.data.noise import estimate_noise
from opustomo.data.pickles import save_pickle
from opustomo.data.readers import read_particles
from opustomo.data.readers.source import read_source
from opustomo.data.split import make_split, split_rows
from opustomo.data.star import read_star
from opustomo.data.symmetry import point_group
from opustomo.errors import UserError
from opustomo.linear_fit import Plan, _parts
from opustomo.physics.grid import make_grid
from opustomo.physics.volume import fourier_shell_correlation, spherical_mask
from stack_writers import Set, two_states_set
from star_sets import relion31

GOLDEN = (1 + 5**0.5) / 2
# fold and axis of elements that make the group, as RELION's and XMIPP's tables state them
ELEMENTS: dict[str, tuple[int, list[tuple[int, tuple[float, float, float]]]]] = {
    "C5": (5, [(5, (0, 0, 1))]),
    "D3": (6, [(3, (0, 0, 1)), (2, (1, 0, 0))]),
    "T": (12, [(3, (0, 0, 1)), (2, (0, 0.816496, 0.577350))]),
    "O": (24, [(4, (0, 0, 1)), (3, (1, 1, 1))]),
    "I": (60, [(2, (0, 0, 1)), (5, (1, 0, GOLDEN)), (3, (0, 0.356822, 0.934172))]),
    "I1": (60, [(2, (1, 0, 0)), (5, (GOLDEN, 0, -1)), (5, (0, 1, GOLDEN)), (3, (0.934172, 0.356822, 0))]),
    "i2": (60, [(2, (0, 0, 1)), (5, (1, 0, GOLDEN)), (3, (0, 0.356822, 0.934172))]),
    "I3": (60, [(5, (0, 0, 1)), (2, (-1, 0, GOLDEN)), (5, (-2, 0, 1)), (3, (-0.491123, 0.356822, 0.794654))]),
    "I4": (60, [(5, (0, 0, 1)), (2, (1, 0, GOLDEN)), (5, (2, 0, 1)), (3, (0.491123, 0.356822, 0.794654))]),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_groups_have_relions_axes(name: str) -> None:
    order, elements = ELEMENTS[name]
    group = point_group(name)
    assert group.shape == (order, 3, 3) and np.allclose(group[0], np.eye(3))

    def places(matrices: Array) -> Array:
        """Which of the group each matrix is, -1 for none."""
        apart = np.abs(group - matrices[:, None]).max((2, 3))
        return np.where(apart.min(1) < 1e-5, apart.argmin(1), -1)

    for fold, axis in elements:
        turn = Rotation.from_rotvec(np.array(axis) / np.linalg.norm(axis) * 2 * np.pi / fold).as_matrix()
        assert places(turn[None])[0] > 0, (fold, axis)
        assert sorted(places(turn @ group)) == list(range(order))  # closed, every element once


def symmetric(beads: Beads, group: Array) -> Beads:
    """One bead for each operation."""
    centre = np.einsum("sij,bj->sbi", group, beads.centre).reshape(-1, 3)
    return Beads(centre, np.tile(beads.sigma, len(group)), np.tile(beads.height, len(group)) / len(group))


def seen(beads: Beads, rotation: Array | None = None, noise: float = 0.3) -> Set:
    """24 particles of these beads at random origins; rotation: (24, 3, 3), else random."""
    made = two_states_set(24, noise, box=24, step=12.0)
    rotation = made.rotation if rotation is None else rotation
    noises = np.random.default_rng(0).normal(0, noise, made.images.shape)
    images = np.stack([
        made.microscope.images_at(beads, made.turns @ a, made.turns @ o, d, n, False)
        for a, o, d, n in zip(rotation, made.origin, made.defocus, noises, strict=True)
    ])  # fmt: skip
    return replace(made, rotation=rotation, images=images)


def averaged(star: Path, box: int = 24) -> torch.Tensor:
    particles, mask = read_particles(star, InputOptions()), spherical_mask(box, 9.0, 2.0)
    grid = make_grid(box, 10.0, 1.0, box // 2)
    noise = estimate_noise(particles, grid, mask, contrast="white", normalisation="auto", workers=1)
    sums = half_totals(particles, grid, noise, torch.ones(1, len(particles)), half_sets(particles), 1)
    return half_maps(sums[0][0], sums[1][0], box, mask)[1] * mask


def expand(star: Path, group: str, out: Path) -> Path:
    assert cli.main(["expand", str(star), "--symmetry", group, "-o", str(out)]) == 0
    made = out.with_name(f"{out.stem}_optimisation_set.star")
    return made if made.exists() else out


def alike(a: torch.Tensor, b: torch.Tensor) -> float:
    """Least FSC of the shells that 24 particles fill well."""
    return float(fourier_shell_correlation(a, b)[1:8].min())


def test_a_symmetric_molecule_looks_the_same_after_expansion(tmp_path: Path) -> None:
    """Poses in one asymmetric unit, origins that are not zero: copies add nothing new, at the same place."""
    made = two_states_set(24, 1.0, box=24, step=12.0)
    group = point_group("D2")
    turned = made.rotation[:, None] @ group
    nearest = np.einsum("psii->ps", turned).argmax(1)
    one = seen(symmetric(made.states[0], group), turned[np.arange(24), nearest])
    assert np.abs(one.origin).mean() > 0.5
    truth = torch.from_numpy(symmetric(made.states[0], group).density(24)).float() * spherical_mask(24, 9.0, 2.0)
    for star in (one.write_set(tmp_path / "stacks"), Subtomograms(one, tmp_path / "volumes").relion31()):
        before, after = averaged(star), averaged(expand(star, "D2", star.parent / "e.star"))
        assert alike(after, before) > 0.9
        # copies see from more sides: nearer to the molecule, where a wrong turn or origin would blur it
        assert alike(after, truth) > alike(before, truth)


def test_an_asymmetric_molecule_becomes_its_symmetrised_self(tmp_path: Path) -> None:
    made = two_states_set(24, 1.0, box=24, step=12.0)
    beads, group = made.states[0], point_group("C3")
    star = seen(beads).write_set(tmp_path)
    found, mask = averaged(expand(star, "C3", tmp_path / "e.star")), spherical_mask(24, 9.0, 2.0)
    truth, plain = (torch.from_numpy(b.density(24)).float() * mask for b in (symmetric(beads, group), beads))
    assert alike(found, truth) > 0.9 and alike(found, plain) < 0.9
    assert alike(averaged(star), plain) > 0.9


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = two_states_set(4, 1.0, box=16, step=30.0, scattered=6000.0)
    return write_every_dialect(made, tmp_path_factory.mktemp("dialects"))


@pytest.mark.parametrize("name", [*IMAGES, *VOLUMES])
def test_every_dialect_keeps_all_but_the_angles(written: dict[str, Path], name: str) -> None:
    star, group = written[name], point_group("D3")
    new = expand(star, "d3", star.parent / "expanded.star")
    given, found = (read_particles(path, InputOptions()) for path in (star, new))
    assert len(found) == 24
    rows = np.repeat(np.arange(4), 6)
    assert np.allclose(found.rotation, given.rotation[rows] @ np.tile(group, (4, 1, 1)), atol=1e-6)
    same = given.subset(rows)
    assert np.allclose(found.origin, same.origin, atol=1e-5) and np.allclose(found.tilts, same.tilts, atol=1e-4)
    for field in ("names", "slices", "half", "tomogram", "image_files", "ctf_files"):
        assert np.array_equal(getattr(found, field), getattr(same, field)), field
    old, whole = read_source(star), read_source(new).whole
    kept = [column for column in old.whole.particles if not column.startswith("rlnAngle")]
    assert "rlnKept" in kept
    index = old.rows_of(rows)[0]
    assert whole.particles[kept].equals(old.whole.particles[kept].iloc[index].reset_index(drop=True))
    first = old.rows_of(np.array([0]))[0]  # as it was, to the letter
    assert whole.particles.iloc[: len(first)].equals(old.whole.particles.iloc[first].reset_index(drop=True))


def test_select_takes_the_copies_out_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    star = relion31(tmp_path).write()
    new, run = expand(star, "C2", tmp_path / "expanded.star"), tmp_path / "run"
    save_pickle(run / "analyze.0/kmeans2/labels.pkl", np.array([0, 0, 0, 1, 1, 0, 1, 1]))
    assert select(SelectConfig(new, run, tmp_path / "all", kmeans=2)) == 0
    assert len(read_star(tmp_path / "all/pre0.star").particles) == 4
    caplog.set_level("INFO", "opustomo")
    assert select(SelectConfig(new, run, tmp_path / "one", kmeans=2, unique=True)) == 0
    names = [read_star(tmp_path / f"one/pre{i}.star").particles["rlnImageName"].tolist() for i in (0, 1)]
    assert names == [["sub/p0.mrc", "sub/p1.mrc", "sub/p2.mrc"], ["sub/p1.mrc", "sub/p2.mrc", "sub/p3.mrc"]]
    assert "pre0.star: 1 copies of its 3 particles left out" in caplog.text
    select(SelectConfig(new, run, tmp_path / "both", kmeans=2, classes=(0, 1), unique=True))
    back = read_star(tmp_path / "both/selected.star").particles.drop(columns="rlnClassNumber")
    assert back.equals(read_star(star).particles)  # the file that was expanded


def test_what_to_do_next_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files are found from the next line, wherever the expanded one was written and from wherever it is typed."""
    star = relion31(tmp_path / "set").write()
    for out in (tmp_path / "set/e.star", tmp_path / "else where/e.star"):
        expand(star, "D2", out)
        [line] = [row for row in capsys.readouterr().err.splitlines() if row.startswith("next: opustomo ")]
        words = shlex.split(line)
        config, _ = cli.parse_verb(words[2:])
        assert config.star == out and ("--datadir" in words) == (out.parent != star.parent)
        assert len(read_particles(out, config.input)) == 16


def test_copies_stay_on_one_side(tmp_path: Path) -> None:
    """Held-out particles and halves of the FSC are particles, not rows."""
    particles = read_particles(expand(relion31(tmp_path, n=7).write(), "D3", tmp_path / "e.star"), InputOptions())
    for seed in range(5):
        order = make_split(particles.names, seed)
        assert sorted(order) == list(range(42))
        train, held = split_rows(order, 0.1, particles.names)
        assert len(held) == 6 and not set(particles.names[train]) & set(particles.names[held])
    half = half_sets(particles)
    assert half.reshape(7, 6).tolist() == [[i % 2] * 6 for i in range(7)]
    # without copies as ever
    names = np.array([f"p{i}" for i in range(95)], object)
    order = make_split(names, 3)
    assert np.array_equal(order, np.random.default_rng(3).permutation(95))
    for valfrac in (0.0, 0.1, 0.5, 0.99):
        assert np.array_equal(split_rows(order, valfrac, names)[1], split_rows(order, valfrac)[1])


@pytest.mark.parametrize(
    ("group", "out", "words"),
    [
        ("C1", "e.star", "has nothing to expand"),
        ("Cs", "e.star", "no point group of rotations"),
        ("D3", "particles.star", "which is read; give another name"),
        ("D3", "again.star", "occurs twice (rows 1 and 2); expanded already?"),
    ],
)
def test_what_cannot_be_expanded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], group: str, out: str, words: str
) -> None:
    star = relion31(tmp_path).write_star()
    before = star.read_bytes()
    given = expand(star, "C2", tmp_path / "twice.star") if out == "again.star" else star
    assert cli.main(["expand", str(given), "--symmetry", group, "-o", str(tmp_path / out)]) == 2
    assert words in capsys.readouterr().err
    assert star.read_bytes() == before and (out == "particles.star" or not (tmp_path / out).exists())


def test_halves_and_random_classes_of_quality_are_of_particles() -> None:
    """40 particles of D3 in classes that part their copies, and in such that do not."""
    particle = np.repeat(np.arange(40), 6)
    rng = np.random.default_rng(0)
    for labels in (rng.permutation(240) % 5, rng.integers(0, 4, 40)[particle]):
        subsets, half = class_subsets(labels, particle, np.ones(240, bool), 0)
        assert set(subsets) == set(labels)
        assert not set(particle[half]) & set(particle[~half])
        for members, *random in subsets.values():
            sides = [len(np.unique(particle[members & side])) for side in (half, ~half)]
            assert abs(sides[0] - sides[1]) <= 0.2 * sum(sides)
            copies = sorted(np.unique(particle[members], return_counts=True)[1])
            for one in random:
                assert sorted(np.unique(particle[one], return_counts=True)[1]) == copies
    # four rows of two particles cannot be halved
    few = np.where(np.isin(np.arange(240), (0, 1, 6, 7)), 1, 0)
    assert set(class_subsets(few, particle, np.ones(240, bool), 0)[0]) == {0}


def test_an_image_that_is_there_twice_is_no_copy(tmp_path: Path) -> None:
    made = two_states_set(3, 1.0, box=16, step=30.0, scattered=6000.0)
    star = made.write_series(tmp_path)
    lines = star.read_text().splitlines()
    star.write_text("\n".join([*lines, lines[-1]]) + "\n")
    with pytest.raises(UserError, match=r"row 16: image .* is there twice, other images of this particle are not"):
        read_source(star)


def test_a_run_knows_which_rows_are_of_one_particle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    star, run = relion31(tmp_path, n=3).write_star(), FakeRun(tmp_path / "run", np.zeros((6, 1)), np.zeros((6, 3, 3)))
    run.path.mkdir()
    assert particle_of_rows(run).tolist() == list(range(6)) and "taken as without" in caplog.text
    expand(star, "C2", run.star)
    assert particle_of_rows(run).tolist() == [0, 0, 1, 1, 2, 2]


def test_neither_the_set_nor_the_tomograms_are_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    star = two_states_set(2, 1.0, box=16, step=60.0).write_set(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.star")}
    given = star.rename(tmp_path / "e_optimisation_set.star")
    for out in ("e.star", "tomograms.star"):
        assert cli.main(["expand", str(given), "--symmetry", "C2", "-o", str(tmp_path / out)]) == 2
        assert "which is read; give another name" in capsys.readouterr().err
    assert given.read_bytes() == before.pop(star) and all(path.read_bytes() == text for path, text in before.items())


def test_without_held_out_particles_the_number_of_components_is_not_chosen_by_copies() -> None:
    particle, everyone = np.repeat(np.arange(60), 4), torch.ones(240, dtype=torch.bool)
    order = torch.from_numpy(make_split(particle.astype(object), 0))
    plan = Plan(order, order[:0], estpose=False, seed=0)
    train, fitted, probe = _parts(plan, everyone, particle)
    assert len(train) == 240 and len(probe) == 24 and len(fitted) == 216
    assert not set(particle[fitted]) & set(particle[probe])
    # without copies every tenth, as ever
    assert torch.equal(_parts(plan, everyone, np.arange(240))[2], order[::10])
