#!/usr/bin/env python3
"""Make src/opustomo/simulate/beads_70s.json, the simulator's mini-ribosome, from the PDB entry 4V5D.

Usage (needs the extra `opustomo[atoms]`, about two minutes on one core):

    curl -O https://files.rcsb.org/download/4V5D.cif.gz
    python tools/build_bead_model.py 4V5D.cif.gz src/opustomo/simulate/beads_70s.json [--beads 500]

The entry holds one Thermus thermophilus 70S ribosome with mRNA and A-, P- and E-site tRNA (Voorhees et al. 2009);
PDB data are CC0.  Atoms of each group (RNA and protein of each subunit, each tRNA) are clustered by weighted k-means.
A bead has the electrons of its cluster as weight and the cluster's rms radius per axis as sigma, so the beads keep
the mass, the centre of mass and nearly the radius of gyration of the atoms.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

# Author chain names in the entry.  The three tRNAs lie in the order E, P, A along the subunit interface.
TRNA = {"tRNA_A": "AY", "tRNA_P": "AV", "tRNA_E": "AW"}
MRNA = "AX"


def read_groups(path: Path) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Atoms (J, 4) = x, y, z in Angstrom and electrons, keyed by (domain, kind); water and ions are left out."""
    groups: dict[tuple[str, str], list[list[float]]] = {}
    structure = gemmi.read_structure(str(path))
    structure.setup_entities()
    site = {chain: domain for domain, chain in TRNA.items()}
    for chain in structure[0]:
        polymer = chain.get_polymer()
        kind = "rna" if polymer.check_polymer_type() == gemmi.PolymerType.Rna else "protein"
        domain = site.get(chain.name) or ("50S" if chain.name.startswith("B") else "30S")
        atoms = groups.setdefault((domain, kind), [])
        atoms += [
            [*atom.pos.tolist(), atom.element.atomic_number * atom.occ]
            for residue in polymer
            for atom in residue.first_conformer()
        ]
    return {key: np.array(atoms) for key, atoms in groups.items()}


def model_frame(groups: dict[tuple[str, str], NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre (3,) of the 70S without tRNA and the rows (3, 3) of a right-handed frame.

    x points from the 30S to the 50S, y along the tRNAs from E to A, so that the middle z section cuts all of them.
    """

    def centre(*domains: str) -> NDArray[np.float64]:
        atoms = np.concatenate([a for (domain, _), a in groups.items() if domain in domains])
        return np.average(atoms[:, :3], axis=0, weights=atoms[:, 3])

    x = centre("50S") - centre("30S")
    x /= np.linalg.norm(x)
    y = centre("tRNA_A") - centre("tRNA_E")
    y -= x * (x @ y)
    y /= np.linalg.norm(y)
    return centre("50S", "30S"), np.stack([x, y, np.cross(x, y)])


def cluster(atoms: NDArray[np.float64], beads: int) -> NDArray[np.float64]:
    """Beads (beads, 5) = x, y, z, sigma (Angstrom), weight (electrons) of atoms (J, 4)."""
    xyz, weight = atoms[:, :3], atoms[:, 3]
    label = KMeans(beads, n_init=1, random_state=0).fit_predict(xyz, sample_weight=weight)
    rows = []
    for k in range(beads):
        x, w = xyz[label == k], weight[label == k]
        centre = np.average(x, axis=0, weights=w)
        sigma = np.sqrt(np.average(((x - centre) ** 2).sum(1), weights=w) / 3)
        rows.append([*centre, sigma, w.sum()])
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="4V5D mmCIF file, may be gzipped")
    parser.add_argument("output", type=Path, help="bead file to write")
    parser.add_argument("--beads", type=int, default=500, help="beads in total (default 500)")
    args = parser.parse_args()

    groups = read_groups(args.source)
    centre, frame = model_frame(groups)
    total = sum(atoms[:, 3].sum() for atoms in groups.values())
    domains: dict[str, list[list[float]]] = {name: [] for name in ("50S", "30S", *TRNA)}
    for (domain, _), atoms in groups.items():
        atoms[:, :3] = (atoms[:, :3] - centre) @ frame.T
        domains[domain] += cluster(atoms, max(1, round(args.beads * atoms[:, 3].sum() / total))).round(2).tolist()
    note = {
        "source": "PDB 4V5D (Thermus thermophilus 70S with mRNA and A-, P-, E-site tRNA), clustered by "
        "tools/build_bead_model.py",
        "licence": "PDB data are CC0 1.0; so is this file",
        "columns": "x y z sigma (Angstrom), weight (electrons, without hydrogens)",
        "frame": "origin: centre of the 70S without tRNA; x: 30S to 50S; y: E- to A-site tRNA",
    }
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in note.items()]
    for name, beads in domains.items():
        lines.append(f" {json.dumps(name)}: [\n  " + ",\n  ".join(json.dumps(bead) for bead in beads) + "]")
        print(f"{name}: {len(beads)} beads, {sum(b[4] for b in beads):.0f} electrons")
    args.output.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
