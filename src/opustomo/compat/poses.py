"""Poses of a STAR file as the seed's pickle, and STAR files per class, with BOX and APIX as cross-checks.

Owns: what ``dsdsh prepare``, ``dsdsh parse_pose`` and ``dsd parse_pose_star`` do.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from opustomo.analysis.selection import trained_rows, write_classes
from opustomo.compat.legacy_files import load_labels, save_poses
from opustomo.config import InputOptions
from opustomo.data.readers import relion, sampling
from opustomo.data.readers.files import Locator
from opustomo.data.readers.source import read_source
from opustomo.data.star import StarFile, read_star
from opustomo.errors import UserError
from opustomo.physics.geometry import euler_to_matrix


def checked_star(star: Path, options: InputOptions, names: tuple[str, str]) -> tuple[StarFile, int, float]:
    """The STAR file, box N and pixel size in Angstrom, after comparing them with what was given by hand.

    ``names`` is how the command calls box and pixel size.  The files of the particles need not be at hand: then box and
    pixel size are compared with the STAR alone, and a line on stderr says so.  Raises ``UserError`` on disagreement.
    """
    table = read_star(star)
    dialect = relion.dialect(table)
    if options.relion31 and dialect == "RELION 3.0":
        raise UserError(f"--relion31: {star} has no data_optics table, it is RELION 3.0; leave --relion31 out")
    found = Locator(star, options.datadir).find([str(name) for name in relion.image_names(table)])
    try:
        if found is None:
            return table, *stated_sampling(table, options)
        images = [Path(name) for name in found]
        box, _ = sampling.box_size(images, star, relion.image_size(table), options)
        angpix, _ = sampling.pixel_size(images, star, relion.pixel_size(table), options)
    except UserError as error:
        # The checks speak of native options; here they are positional or spelt otherwise, and cannot be left out.
        text = str(error).replace(" or leave it out", "").replace("--angpix", names[1]).replace("-D ", f"{names[0]} ")
        raise UserError(text) from None
    return table, box, angpix


def stated_sampling(table: StarFile, options: InputOptions) -> tuple[int, float]:
    """Box and pixel size of a STAR whose subtomograms are elsewhere: what was given, compared with its columns."""
    assert options.box is not None and options.angpix is not None
    box, stated = relion.image_size(table), relion.pixel_size(table)
    if box is not None and box != options.box:
        raise UserError(f"-D {options.box}: {table.path} says rlnImageSize {box}; give -D {box}")
    if stated is not None and sampling.differ(options.angpix, stated[0]):
        raise UserError(f"--angpix {options.angpix:g}: {table.path} says {stated[0]:g} A; give --angpix {stated[0]:g}")
    print(
        f"note: the subtomograms of {table.path} were not found, so box {options.box} was not compared with them "
        "(--datadir gives their folder)",
        file=sys.stderr,
    )
    return options.box, options.angpix


def write_poses(star: StarFile, box: int, angpix: float, path: Path) -> None:
    """Pose pickle: rotations (P, 3, 3) with ``x_particle = A x_consensus``, origins / N (P, 3), Euler degrees."""
    euler = relion.eulers(star)
    origin, _ = relion.origins(star, angpix)
    save_poses(path, euler_to_matrix(torch.from_numpy(euler)).numpy(), origin / box, euler)
    print(f"{len(euler)} poses written to {path}")


def write_label_stars(star: StarFile, labels: Path, outdir: Path, run: Path | None = None) -> None:
    """``outdir``/preI.star for every class I of ``labels``; ``run`` knows the rows it was trained on (``--ind``)."""
    rows = None if run is None else trained_rows(run, star)
    paths = write_classes(read_source(star.path), load_labels(labels), outdir, rows)
    print(f"{len(paths)} STAR files written: {paths[0]} ... {paths[-1].name}")
