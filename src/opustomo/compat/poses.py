"""Poses of a STAR file as the seed's pickle, and STAR files per class, with BOX and APIX as cross-checks.

Owns: what ``dsdsh prepare``, ``dsdsh parse_pose`` and ``dsd parse_pose_star`` do.
"""

from __future__ import annotations

import sys
from pathlib import Path

from opustomo.analysis.made_from import rows_of_run
from opustomo.analysis.selection import classes_of, write_classes
from opustomo.config import InputOptions
from opustomo.data.pickles import load_labels, save_poses
from opustomo.data.readers import DIALECTS, relion, sampling
from opustomo.data.readers.files import Locator
from opustomo.data.readers.source import Source, read_source
from opustomo.data.star import StarFile
from opustomo.errors import UserError


def checked_star(star: Path, options: InputOptions, names: tuple[str, str]) -> tuple[Source, int, float]:
    """The particles of a STAR file or a set, box N and pixel size in Angstrom, compared with what was given by hand.

    ``names`` is how the command calls box and pixel size.  The files of the particles need not be at hand: then box and
    pixel size are compared with the STAR alone, and a line on stderr says so.  Raises ``UserError`` on disagreement.
    """
    source = read_source(star, datadir=options.datadir)
    source.refuse_version(options.relion31)
    found = Locator(source.table.path, options.datadir).find(DIALECTS[source.format].image_files(source))
    try:
        if found is None:
            return source, *stated_sampling(source.table, options)
        images = [Path(name) for name in found]
        if options.damaged == "skip":
            images, _ = sampling.readable(images, source)
        box, angpix, _ = sampling.agreed(star, source, images, options)
    except UserError as error:
        # The checks speak of native options; here they are positional or spelt otherwise, and cannot be left out.
        text = str(error).replace(" or leave it out", "").replace("--angpix", names[1]).replace("-D ", f"{names[0]} ")
        raise UserError(text) from None
    return source, box, angpix


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


def write_poses(source: Source, box: int, angpix: float, path: Path) -> None:
    """Pose pickle: rotations (P, 3, 3) with ``x_particle = A x_consensus``, origins / N (P, 3), Euler degrees.

    One pose for each particle, as ``train`` has it: of tilt images that in the tomogram's frame, not the file's.
    """
    found = DIALECTS[source.format].poses(source, angpix)
    save_poses(path, found.rotation, found.origin / box, found.euler)
    print(f"{len(source)} poses written to {path}")


def write_label_stars(source: Source, labels: Path, outdir: Path, run: Path | None = None) -> None:
    """``outdir``/preI.star for every class I of ``labels``; ``run`` knows the rows it was trained on (``--ind``)."""
    rows = None if run is None else rows_of_run(run, source.table)
    paths = write_classes(classes_of(source, load_labels(labels, -1), rows), outdir)  # a second round leaves some out
    print(f"{len(paths)} STAR files written: {paths[0]} ... {paths[-1].name}")
