"""Copies of particles for each operation of a point group; the verb ``expand``.

Owns: how point groups lie in the box (as RELION has them), and that a copy is told by its pose alone: it keeps the
name, the images and every other column of its particle, as relion_particle_symmetry_expand writes it.
"""

from __future__ import annotations

import logging
import re
import shlex

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.config import ExpandConfig
from opustomo.data.angles import to_euler, to_matrix
from opustomo.data.export import refuse_repeated, write_rows, written_paths
from opustomo.data.readers import relion
from opustomo.data.readers.source import Source, read_source
from opustomo.data.star import number_columns
from opustomo.errors import UserError

log = logging.getLogger(__name__)

# degrees about the fixed axes z, y, z by which SciPy's groups are turned: there all 2-folds of T are along the axes,
# and I has its front-most 5-folds in the yz plane
_DIAGONAL, _FIVE = float(np.degrees(np.arctan(2**0.5))), float(np.degrees(np.arctan(2 / (1 + 5**0.5))))
_TURNS = {
    "T": (-45.0, -_DIAGONAL, -90.0),
    "O": (0.0, 0.0, 0.0),
    "I": (90.0, 0.0, 0.0),
    "I1": (0.0, 0.0, 0.0),
    "I2": (90.0, 0.0, 0.0),
    "I3": (90.0, -_FIVE, 0.0),
    "I4": (90.0, _FIVE, 0.0),
}


def main(config: ExpandConfig) -> int:
    """``opustomo expand``."""
    operations = point_group(config.symmetry)
    if len(operations) == 1:
        raise UserError(f"--symmetry {config.symmetry}: has nothing to expand; leave this step out")
    source = read_source(config.star, datadir=config.datadir)
    read = [config.star, source.whole.path, *([] if source.tomograms is None else [source.tomograms])]
    if taken := {path.resolve() for path in read} & {path.resolve() for path in written_paths(source, config.output)}:
        raise UserError(f"-o {config.output}: would replace {taken.pop()}, which is read; give another name")
    table = expanded(source, operations)
    paths = write_rows(source, table, config.output)
    log.info("%d particles, each in the %d poses of %s", len(source), len(operations), config.symmetry.upper())
    for path in paths:
        log.info("wrote %s", path)
    given, out = (
        f"{shlex.quote(str(paths[-1]))}{_datadir(config, source)}",
        shlex.quote(f"average_{config.output.stem}"),
    )
    log.info("next: opustomo average %s -o %s", given, out)
    return 0


def _datadir(config: ExpandConfig, source: Source) -> str:
    """The option that what was written needs to find its files: it lies elsewhere, or one was given."""
    folder = source.whole.path.parent
    if config.datadir is None and config.output.absolute().parent == folder.absolute():
        return ""
    return f" --datadir {shlex.quote(str(config.datadir or folder))}"


def point_group(name: str) -> NDArray[np.float64]:
    """(n, 3, 3) rotations S of a point group, the identity first, about the axes of the consensus map; V(S x) = V(x).

    As RELION has them: Cn and Dn along z, the 2-fold of Dn along x; T with a 3-fold along z and a 2-fold in the yz
    plane; O with 4-folds along x, y, z; I1 and I2 with 2-folds along x, y, z and the front-most 5-folds in the yz (I1)
    or xz plane (I2, also called I); I3 and I4 with a 5-fold along z and the next one in the xz plane, at -x or +x.
    UserError: no such group.
    """
    given = name.upper()
    if given in _TURNS:
        group = Rotation.create_group(given[0])
    elif re.fullmatch(r"C[1-9]\d{0,2}|D([2-9]|[1-9]\d{1,2})", given):
        group = Rotation.create_group(given)
    else:
        raise UserError(
            f"--symmetry {name}: is no point group of rotations; give C2, C3, ..., D2, ..., T, O or I1 to I4 (I is I2)"
        )
    turn = Rotation.from_euler("zyz", _TURNS.get(given, (0.0, 0.0, 0.0)), degrees=True)
    turned = turn * group * turn.inv()
    return np.roll(turned.as_matrix(), -int(turned.magnitude().argmin()), axis=0)


def expanded(source: Source, operations: NDArray[np.float64]) -> pd.DataFrame:
    """The rows of ``source.whole`` with each particle once for every operation S (n, 3, 3), copies one after another.

    A symmetric map V(S x) = V(x) explains a particle at A S as it does at A.  Origins stay, being in the frame of the
    particle, and so do turns on the left of A (tilts of images, subtomograms turned in the tomogram): every row's own A
    becomes A S.  The first copy is the particle's rows as they were.  UserError: a particle that is there twice
    already, columns missing.
    """
    refuse_repeated(source.table, "expanded already? Give the file it was made from, or remove the copies")
    star, count = source.whole, len(operations)
    rows, member = source.rows_of(np.repeat(np.arange(len(source)), count))
    operation = member % count
    table = star.particles.iloc[rows].reset_index(drop=True)
    turned = to_euler(to_matrix(relion.eulers(star))[rows] @ operations[operation])
    for name, column in number_columns(relion.ANGLES, turned, 6).items():
        kept = star.spelt(name)
        table[kept] = np.where(operation == 0, table[kept].to_numpy(object), np.array(column, object))
    return table
