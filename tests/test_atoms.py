"""``simulate --atoms``: the density is that of the atoms, the path goes through the files, and the hinge is told."""

from __future__ import annotations

import sys
from pathlib import Path

import gemmi
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from atom_files import ATOMS, AXIS, MOVING, NAMES, POINT, RESIDUES, pdb, places, two_models, written
from opustomo.analysis.truth import read_truth
from opustomo.config import SimulateConfig
from opustomo.data.bodies import mask_files
from opustomo.data.mrc import read_volume
from opustomo.errors import UserError
from opustomo.simulate import dataset
from opustomo.simulate.atoms import read_atoms
from opustomo.simulate.molecule import Beads, Molecule, gaussian_volume

BOX, PIXEL, ANGLE = 40, 4.0, 32.0
ELSEWHERE = np.array([30.0, -12.0, 5.0])


def molecule_of(*files: Path, align: bool = True) -> tuple[Molecule, float]:
    return read_atoms(files, PIXEL, 2.0, align)


def apart(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Largest distance of two sets of places but for one rotation and shift."""
    turn, _ = Rotation.align_vectors(b - b.mean(0), a - a.mean(0))
    return float(np.linalg.norm(turn.apply(a - a.mean(0)) + b.mean(0) - b, axis=1).max())


def shifted(path: Path, angle: float) -> Path:
    """A conformation that lies elsewhere, as files do."""
    turn = Rotation.from_rotvec([0.4, -1.0, 0.7])
    path.write_text(pdb(turn.apply(places(angle)) + ELSEWHERE, chain="B"))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of two conformations."""
    folder = tmp_path_factory.mktemp("atoms")
    files = (written(folder / "closed.pdb"), shifted(folder / "open.pdb", ANGLE))
    dataset.main(SimulateConfig(output=folder / "set", atoms=files, n=12))
    return folder / "set"


def gemmi_density(path: Path, box: int, pixel: float) -> NDArray[np.float64]:
    """What gemmi makes of the file on a fine grid, cut to the band of (box, pixel) and not of its Nyquist."""
    structure = gemmi.read_structure(str(path))
    edge, fine = box * pixel, 4
    for site in structure[0].all():
        site.atom.pos += gemmi.Position(edge / 2, edge / 2, edge / 2)
    calculator = gemmi.DensityCalculatorE()
    calculator.grid.unit_cell = gemmi.UnitCell(edge, edge, edge, 90, 90, 90)
    calculator.grid.spacegroup = gemmi.SpaceGroup("P1")
    calculator.grid.set_size(fine * box, fine * box, fine * box)
    calculator.add_model_density_to_grid(structure[0])
    spectrum = np.fft.fftn(np.array(calculator.grid, copy=False).astype(np.float64)) / fine**3
    keep = np.r_[0 : box // 2, -(box // 2) : 0]
    spectrum = spectrum[np.ix_(keep, keep, keep)]
    for axis in range(3):
        np.moveaxis(spectrum, axis, 0)[box // 2] = 0
    return np.fft.ifftn(spectrum).real.transpose(2, 1, 0)


def test_density_is_that_of_gemmi(tmp_path: Path) -> None:
    """An independent calculation: five Gaussians for each atom, summed on a grid of 1 Angstrom."""
    path = written(tmp_path / "a.pdb")
    molecule, _ = molecule_of(path)
    centred = molecule.at(0, 0.0).centre
    (tmp_path / "centred.pdb").write_text(pdb(centred))
    ours = gaussian_volume(molecule.at(0, 0.0), BOX, PIXEL)
    theirs = gemmi_density(tmp_path / "centred.pdb", BOX, PIXEL)
    assert np.square(ours - theirs).sum() < 1e-4 * np.square(theirs).sum()


def test_density_lies_where_the_atoms_are(tmp_path: Path) -> None:
    """Centre of mass, orientation and integral of the voxels against the places in the file."""
    atoms = Rotation.from_rotvec([0.3, 0.9, -0.7]).apply(places(0.0))
    (tmp_path / "a.pdb").write_text(pdb(atoms))
    molecule, _ = molecule_of(tmp_path / "a.pdb")
    volume = gaussian_volume(molecule.at(0, 0.0), BOX, PIXEL).astype(np.float64)
    # the factors at rest in Angstrom, from the International Tables C, 4.3.1.1
    weight = np.tile([{"N": 2.211, "C": 2.509, "O": 1.983, "S": 5.161}[name[0]] for name in NAMES], RESIDUES)
    assert volume.sum() * PIXEL**3 == pytest.approx(weight.sum(), rel=0.01)
    atoms -= np.average(atoms, axis=0, weights=weight)
    axis = (np.arange(BOX) - BOX // 2) * PIXEL
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij")[::-1], -1)  # x, y, z of volume[z, y, x]
    assert np.abs(np.einsum("zyx,zyxc->c", volume, grid) / volume.sum()).max() < 0.2
    ball = np.linalg.norm(grid, axis=-1) < 60
    spread = np.einsum("zyx,zyxi,zyxj->ij", volume * ball, grid, grid) / volume.sum()
    expected = np.cov(atoms.T, aweights=weight, bias=True)
    print(expected, spread)
    assert np.abs(spread - expected).max() < 0.03 * np.trace(expected)
    assert np.abs(expected - np.diag(np.diag(expected))).max() > 0.15 * np.trace(expected)  # orientation does show


def test_path_goes_through_the_files(tmp_path: Path) -> None:
    angles = (0.0, 20.0, ANGLE)
    files = [written(tmp_path / "0.pdb"), *(shifted(tmp_path / f"{a}.pdb", a) for a in angles[1:])]
    molecule, length = molecule_of(*files)
    lengths = [0.0, molecule_of(*files[:2])[1], length]
    for value, angle in zip(lengths, angles, strict=True):
        assert apart(molecule.at(0, value).centre, places(angle)) < 0.01
    halfway = (molecule.at(0, lengths[0]).centre + molecule.at(0, lengths[1]).centre) / 2
    assert np.abs(molecule.at(0, lengths[1] / 2).centre - halfway).max() < 1e-9
    still = np.linalg.norm(molecule.at(0, length).centre - molecule.at(0, 0.0).centre, axis=1)
    assert still[: -MOVING * len(NAMES)].max() < 0.01 < 5 < still[-MOVING * len(NAMES) :].max()


def test_conformations_stay_as_given_where_that_is_asked(tmp_path: Path) -> None:
    files = written(tmp_path / "a.pdb"), shifted(tmp_path / "b.pdb", ANGLE)
    molecule, length = molecule_of(*files, align=False)
    moved = molecule.at(0, length).centre - molecule.at(0, 0.0).centre
    given = Rotation.from_rotvec([0.4, -1.0, 0.7]).apply(places(ANGLE)) + ELSEWHERE - places(0.0)
    assert np.abs(moved - given).max() < 0.01


def test_hinge_is_told(made: Path) -> None:
    labels = np.load(made / "labels.npz")
    molecule, length = molecule_of(made.parent / "closed.pdb", made.parent / "open.pdb")
    angles = molecule.known(np.array([0.0, length]))["hinge"]
    assert angles == pytest.approx([0.0, ANGLE], abs=0.1)
    assert np.corrcoef(labels["path"], labels["hinge"])[0, 1] > 0.99 and np.ptp(labels["hinge"]) > ANGLE / 2
    axis, point = labels["hinge_axis"]
    assert axis @ AXIS > np.cos(np.deg2rad(0.2))
    origin = places(0.0).mean(0) - molecule.at(0, 0.0).centre.mean(0)  # of the molecule, in the file's frame
    away = point + origin - POINT
    assert np.linalg.norm(away - (away @ AXIS) * AXIS) < 0.1


def test_evaluate_reads_the_truth(made: Path) -> None:
    truth = read_truth(made, 12)
    assert truth.hinge is not None and truth.hinge.axis is not None
    assert set(truth.coordinates) == {"path", "hinge"} and len(truth.maps) == 5
    assert np.array_equal(truth.shown, truth.coordinates["path"])
    ends = [truth.nearest_map(0, value) for value in (0.0, 99.0)]
    molecule, length = molecule_of(made.parent / "closed.pdb", made.parent / "open.pdb")
    for found, value in zip(ends, (0.0, length), strict=True):
        assert found is not None and found.value == pytest.approx(value, abs=0.05)
        expected = gaussian_volume(molecule.at(0, value), BOX, PIXEL)
        assert np.allclose(read_volume(found.path)[0], expected, atol=1e-6)


def test_masks_hold_the_molecule_and_its_bodies(made: Path) -> None:
    mask, _ = read_volume(made / "mask.mrc")
    assert mask[0].max() == mask[:, 0].max() == mask[:, :, 0].max() == 0 and mask.max() == 1
    molecule, length = molecule_of(made.parent / "closed.pdb", made.parent / "open.pdb")
    voxels = np.round(molecule.at(0, length / 2).centre / PIXEL).astype(int) + BOX // 2
    held = {
        path.stem: read_volume(path)[0][tuple(voxels.T[::-1])] for path in mask_files(str(made / "bodies.star")).files
    }
    moving = np.arange(ATOMS) >= ATOMS - MOVING * len(NAMES)
    assert list(held) == ["body_core", "body_part1"]
    assert held["body_core"][~moving].min() > 0.5 and held["body_part1"][moving].min() > 0.5
    assert mask[tuple(voxels.T[::-1])].min() == 1


def test_one_conformation_is_rigid(tmp_path: Path) -> None:
    dataset.main(SimulateConfig(output=tmp_path / "set", atoms=(written(tmp_path / "a.pdb"),), n=2))
    labels = np.load(tmp_path / "set" / "labels.npz")
    assert np.isnan(labels["path"]).all() and "hinge" not in labels
    assert [path.name for path in (tmp_path / "set" / "gt").iterdir()] == ["state0_path+0.0.mrc"]
    assert not (tmp_path / "set" / "bodies.star").exists()


def test_models_of_a_file_are_conformations(tmp_path: Path) -> None:
    (tmp_path / "both.pdb").write_text(two_models(0.0, ANGLE))
    files = written(tmp_path / "a.pdb"), written(tmp_path / "b.pdb", ANGLE)
    assert molecule_of(tmp_path / "both.pdb")[1] == pytest.approx(molecule_of(*files)[1])


def test_mmcif_says_the_same(tmp_path: Path) -> None:
    structure = gemmi.read_structure(str(written(tmp_path / "a.pdb")))
    structure.make_mmcif_document().write_file(str(tmp_path / "a.cif"))
    ours, other = (molecule_of(tmp_path / name)[0].at(0, 0.0) for name in ("a.pdb", "a.cif"))
    assert all(np.allclose(a, b) for a, b in zip(ours, other, strict=True))


def test_names_of_molecular_dynamics_are_not_metals(tmp_path: Path) -> None:
    """Without elements "CA" in the first column of the name is calcium to readers, and "SG" seaborgium."""
    files = [written(tmp_path / f"{elements}.pdb", elements=elements) for elements in (True, False)]
    assert gemmi.read_structure(str(files[1]))[0][0][0].find_atom("CA", "*").element.name == "Ca"
    good, bare = (molecule_of(path)[0].at(0, 0.0) for path in files)
    assert np.array_equal(good.weight, bare.weight) and np.array_equal(good.sigma, bare.sigma)


def test_bfactors_widen_the_atoms(tmp_path: Path) -> None:
    sharp, soft = (written(tmp_path / f"{b}.pdb", bfactor=b) for b in (0.0, 200.0))
    beads: list[Beads] = [molecule_of(path)[0].at(0, 0.0) for path in (sharp, soft)]
    assert np.allclose(beads[1].sigma ** 2 - beads[0].sigma ** 2, 200 / (8 * np.pi**2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": 24}, "needs 1[0-9][0-9] A; raise --box"),
        ({"preset": "hinge"}, "presets are ribosomes"),
        ({"atoms": (), "align": False}, "--no-align"),
    ],
)
def test_senseless_options_are_refused_before_anything_is_written(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    atoms = (written(tmp_path / "a.pdb"), written(tmp_path / "b.pdb", ANGLE))
    with pytest.raises(UserError, match=message):
        dataset.main(SimulateConfig(output=tmp_path / "set", **({"atoms": atoms} | options)))  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()


def test_files_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    first = written(tmp_path / "a.pdb")
    (tmp_path / "fewer.pdb").write_text(pdb(places(0.0)[: -len(NAMES)]))
    (tmp_path / "few.pdb").write_text(pdb(places(0.0)[: 3 * len(NAMES)]))
    with pytest.raises(UserError, match=rf"fewer.pdb: has {ATOMS - 6} atoms, .*a.pdb has {ATOMS}"):
        molecule_of(first, tmp_path / "fewer.pdb")
    with pytest.raises(UserError, match=r"same.pdb: is the conformation of .*a.pdb"):
        molecule_of(first, shifted(tmp_path / "same.pdb", 0.0))
    with pytest.raises(UserError, match="has 3 atoms to lay conformations on"):
        molecule_of(tmp_path / "few.pdb", tmp_path / "few.pdb")


def test_gemmi_is_asked_for_where_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(UserError, match="pip install gemmi"):
        molecule_of(written(tmp_path / "a.pdb"))
