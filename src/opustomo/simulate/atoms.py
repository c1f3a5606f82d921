"""A molecule to be simulated from atoms: conformations in PDB or mmCIF files, and the path through them.

Owns: what is asked of these files, an atom's scattering, and the truth about the motion.  Needs gemmi (the extra
``atoms``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from opustomo.errors import UserError, reading
from opustomo.simulate.molecule import Beads, Molecule
from opustomo.simulate.rigid_parts import FEWEST, Part, membership, rigid_core, rigid_parts, superposition, turned

Floats = NDArray[np.float64]

ORGANIC = {"H", "D", "C", "N", "O", "P", "S", "Se"}
TRACE = {"CA", "P"}  # one atom of every residue, by which conformations are compared
MOST_ATOMS = 30_000
ALIKE = 0.1  # Angstrom root mean square: conformations nearer than this are one
RADIUS = 2.0  # Angstrom, of an atom
MARGIN = RADIUS + 30.0  # Angstrom around the outermost atom, as wide as the mask
STEPS = 64  # along the path, at which angles are told


@dataclass(frozen=True)
class Conformation:
    """J atoms: names ("CA 12"), elements, places (J, 3) in Angstrom, B factors (J,) in square Angstrom."""

    source: str
    names: list[str]
    elements: list[str]
    places: Floats
    bfactor: Floats


@dataclass(frozen=True)
class Path3D:
    """The way through K conformations (K, J, 3): straight from one to the next, in Angstrom of root mean square.

    trace: the atoms by which they are compared; core: those of them that stand still, None where nothing moves.
    """

    places: Floats
    trace: NDArray[np.int64]
    core: NDArray[np.int64] | None

    @cached_property
    def knots(self) -> Floats:
        """(K,) the coordinate of each conformation, from 0."""
        steps = np.sqrt(np.square(np.diff(self.places, axis=0)).sum(2).mean(1))
        return np.concatenate([[0.0], np.cumsum(steps)])

    def at(self, value: float) -> Floats:
        """Places (J, 3) at a value of the coordinate."""
        where = np.interp(value, self.knots, np.arange(len(self.knots)))
        below = min(int(where), max(len(self.places) - 2, 0))
        above = min(below + 1, len(self.places) - 1)
        part = where - below
        return (1 - part) * self.places[below] + part * self.places[above]

    @cached_property
    def parts(self) -> list[Part]:
        """The bodies that turn from the first conformation to the last."""
        if self.core is None:
            return []
        first, last = self.on_core(self.places[0]), self.on_core(self.places[-1])
        return rigid_parts(first[self.trace], last[self.trace], self.core)

    def on_core(self, places: Floats) -> Floats:
        """Places (J, 3) laid on the core of the first conformation."""
        chosen = self.trace[self.core]
        rotation, shift = superposition(places[chosen], self.places[0][chosen])
        return places @ rotation.T + shift

    def known(self, values: Floats) -> dict[str, Floats]:
        """Of every part: ``hinge`` (P,) degrees and ``hinge_axis`` (2, 3), ``hinge2`` and ``hinge2_axis``, ..."""
        grid = np.linspace(0, self.knots[-1], STEPS + 1)
        labels: dict[str, Floats] = {}
        for number, part in enumerate(self.parts, 1):
            name = "hinge" if number == 1 else f"hinge{number}"
            first = self.places[0][self.trace]
            angles = [turned(part, first, self.on_core(self.at(value))[self.trace]) for value in grid]
            labels[name] = np.interp(values, grid, angles)
            labels[f"{name}_axis"] = np.stack([part.axis, part.point])
        return labels


def read_atoms(files: tuple[Path, ...], pixel_size: float, shift: float, align: bool) -> tuple[Molecule, float]:
    """The molecule, and how far its coordinate goes (Angstrom; 0: one conformation, which is rigid).

    shift: largest origin in pixels; align: lay all on the rigid core of the first and last.  Raises UserError where
    gemmi is not installed, and for files that cannot be read, have no or too many atoms, or not the same ones.
    """
    found = [conformation for path in files for conformation in read_conformations(path)]
    for other in found[1:]:
        _same_atoms(found[0], other)
    path = _path(found, align)
    width, weight = scattering(found[0].elements, pixel_size)
    blur = np.mean([conformation.bfactor for conformation in found], axis=0)
    sigma = np.sqrt((width + blur) / (8 * np.pi**2))
    return _molecule(path, sigma, weight, pixel_size, shift), float(path.knots[-1])


def read_conformations(path: Path) -> list[Conformation]:
    """Every model of a PDB or mmCIF file, waters and alternative places left out; UserError: no atoms, no element."""
    try:
        import gemmi
    except ImportError:
        raise UserError("--atoms: gemmi is not installed; `pip install gemmi` brings it") from None
    fix = "give a PDB or mmCIF file"
    if not path.is_file():
        raise UserError(f"{path}: no such file; {fix} with --atoms")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty; {fix}")
    with reading(path, fix):
        structure = gemmi.read_structure(str(path), format=gemmi.CoorFormat.Detect)
        structure.remove_alternative_conformations()
        structure.remove_waters()
        structure.remove_empty_chains()
    if len(structure) == 0 or structure[0].count_atom_sites() == 0:
        raise UserError(f"{path}: has no atoms; {fix}")
    names = [f"{path}, model {model.num}" if len(structure) > 1 else str(path) for model in structure]
    with reading(path, fix):  # a name is bytes until it is looked at
        return [_conformation(model, name) for model, name in zip(structure, names, strict=True)]


def _conformation(model: Any, source: str) -> Conformation:
    sites = list(model.all())
    if len(sites) > MOST_ATOMS:
        raise UserError(f"{source}: has {len(sites)} atoms; give at most {MOST_ATOMS}: a part, or without hydrogens")
    elements = [_element(site, source) for site in sites]
    names = [f"{site.atom.name} {site.residue.seqid}" for site in sites]
    places = np.array([site.atom.pos.tolist() for site in sites])
    if not np.isfinite(places).all():
        raise UserError(f"{source}: has atoms at no finite place; make the file again")
    return Conformation(source, names, elements, places, np.array([max(site.atom.b_iso, 0.0) for site in sites]))


def _element(site: Any, source: str) -> str:
    """The element's symbol.

    Without columns 77-78 readers go by the column in which a name begins, and programs of molecular dynamics write
    names from the first: "CA" is then calcium, "HG1" mercury.  In a residue of several atoms it is the first letter.
    """
    element, name = str(site.atom.element.name), str(site.atom.name)
    if element not in ORGANIC and site.residue.het_flag != "H" and len(site.residue) > 1:
        element = name.lstrip("0123456789'\"")[:1].upper()
    if element not in ORGANIC and (element != site.atom.element.name or element == "X"):
        raise UserError(f"{source}: atom {name} of {site.residue} has no element; state it in columns 77-78")
    return element


def _same_atoms(first: Conformation, other: Conformation) -> None:
    fix = "give conformations of the same atoms"
    if len(first.names) != len(other.names):
        raise UserError(f"{other.source}: has {len(other.names)} atoms, {first.source} has {len(first.names)}; {fix}")
    for number, (a, b) in enumerate(zip(first.names, other.names, strict=True), 1):
        if a != b:
            raise UserError(f"{other.source}: atom {number} is {b}, in {first.source} it is {a}; {fix} in one order")


def _path(found: list[Conformation], align: bool) -> Path3D:
    """The conformations on the core of the first and last, or as they are."""
    places = np.stack([conformation.places for conformation in found])
    trace = np.array([i for i, name in enumerate(found[0].names) if name.split()[0] in TRACE], np.int64)
    if len(trace) < 3:
        trace = np.arange(places.shape[1])
    if len(found) == 1:
        return Path3D(places, trace, None)
    if len(trace) < FEWEST:
        raise UserError(f"{found[0].source}: has {len(trace)} atoms to lay conformations on; give at least {FEWEST}")
    core = rigid_core(places[0][trace], places[-1][trace], np.arange(len(trace)))
    path = Path3D(places, trace, core if len(core) else np.arange(len(trace)))
    if align:
        path = Path3D(np.stack([path.on_core(one) for one in places]), trace, path.core)
    for i, length in enumerate(np.diff(path.knots)):
        if length < ALIKE:
            raise UserError(
                f"{found[i + 1].source}: is the conformation of {found[i].source} ({length:.2f} A apart); "
                "give conformations that differ"
            )
    return path


def scattering(elements: list[str], pixel_size: float) -> tuple[Floats, Floats]:
    """B factor (J,) and weight (J,) of one Gaussian for each atom at rest: its scattering of electrons.

    The factors are sums of five Gaussians; one that agrees at frequency 0 and at Nyquist (1/Angstrom) differs from
    them in between by less than a hundredth of the weight.
    """
    import gemmi

    nyquist = 0.5 / pixel_size
    table: dict[str, tuple[float, float]] = {}
    for name in set(elements):
        factor = gemmi.Element(name).c4322
        whole, outer = factor.calculate_sf(0.0), factor.calculate_sf(nyquist**2 / 4)
        table[name] = (4 * np.log(whole / outer) / nyquist**2, whole)
    rows = np.array([table[name] for name in elements])
    return rows[:, 0], rows[:, 1]


def _molecule(path: Path3D, sigma: Floats, weight: Floats, pixel_size: float, shift: float) -> Molecule:
    """Its origin is the middle of the atoms over the whole path, each by its weight."""
    centre = np.average(path.places.mean(0), axis=0, weights=weight)
    path = Path3D(path.places - centre, path.trace, path.core)
    reach = float(np.linalg.norm(path.places, axis=2).max())

    def at(_: int, value: float) -> Beads:
        return Beads(path.at(value), sigma, weight)

    def bodies() -> dict[str, Beads]:
        owner = _owners(path)
        middle = at(0, path.knots[-1] / 2)
        names = ["core", *(f"part{i}" for i in range(1, len(path.parts) + 1))]
        return {name: Beads(*(column[owner == b] for column in middle)) for b, name in enumerate(names)}

    width = 2 * (reach + MARGIN + shift * pixel_size)
    return Molecule(("whole",), (len(path.places) > 1,), at, bodies, path.known, width, "path", RADIUS)


def _owners(path: Path3D) -> NDArray[np.int64]:
    """(J,) the body of every atom: that of the nearest atom of the trace in the first conformation."""
    first, last = path.on_core(path.places[0])[path.trace], path.on_core(path.places[-1])[path.trace]
    of_trace = membership(first, last, path.parts)
    nearest = KDTree(first).query(path.places[0])[1]
    return of_trace[nearest]
