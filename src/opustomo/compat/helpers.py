"""The converters and helpers that later versions of OPUS-TOMO brought (OPUS-ET), in the forms of their scripts.

Owns: argument forms and file names of ``dsdsh combine_star``, ``convert_*``, ``extract_tomo_cubes``, ``create_mask``
and ``dsd prepare_subtomos``.  What they do is in ``data`` and ``mask``.  Where a default of theirs belonged to one data
set (a binning of 4, 7.84 A, a factor of 2.132) there is none here.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from opustomo.compat.arguments import Command, Given, count, existing_file, note
from opustomo.errors import UserError


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' must be a number above 0")
    return value


def tell(*lines: str) -> None:
    """What was done, on stdout."""
    print("\n".join(lines))


def star_path(path: Path) -> Path:
    """An existing STAR file."""
    if path.suffix != ".star":
        raise UserError(f"{path}: must be a .star file, the name of the new one is made of it; rename it")
    return existing_file(path)


def other_file(option: str, out: Path, *read: Path) -> Path:
    """The file to write; UserError where it is one of those that are read, which it would replace."""
    if out.resolve() in {path.resolve() for path in read}:
        raise UserError(f"{option} {out}: is a file that is read here; give another name")
    return out


def kilovolts(text: str) -> float:
    """A voltage, for argparse."""
    value = positive(text)
    if not 10 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"'{text}' is no voltage of a microscope in kV, as 300 is")
    return value


def ctf_template(text: str) -> str:
    """A name with {ts_name} and {i}, for argparse."""
    left = text.replace("{ts_name}", "").replace("{i}", "")
    if "{" in left or "}" in left:
        raise argparse.ArgumentTypeError(f"'{text}' has braces other than {{ts_name}} and {{i}}")
    return text


def combine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stars", metavar="STAR", type=Path, nargs="+", help="STAR files to join, two or more")
    parser.add_argument("out", metavar="OUT", type=Path, help="STAR file to write")
    parser.add_argument("--common-columns", action="store_true", help="keep the columns that all have (else refused)")


def combine_star(arguments: argparse.Namespace, given: Given) -> None:
    from opustomo.data.combine import combine

    if len(arguments.stars) < 2:
        raise UserError("two STAR files are needed, then the one to write: dsdsh combine_star A.star B.star OUT.star")
    tell(*combine([existing_file(path) for path in arguments.stars], arguments.out, arguments.common_columns))


def warp_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("star", metavar="STAR", type=Path, help="particles of a species of M (wrpCoordinateX1, ...), or any other list")
    add("angpix", metavar="ANGPIX", type=positive, help="pixel size, in A, that the coordinates are to count")
    add("--kv", type=kilovolts, default=300.0, help="voltage written, in kV")
    add("--cs", type=positive, default=2.7, help="spherical aberration written, in mm")
    add("-o", dest="out", metavar="OUT", type=Path, help="file to write (default: <stem>_relion.star beside STAR)")


def convert_warp(arguments: argparse.Namespace, given: Given) -> None:
    from opustomo.data.convert import warp_to_relion

    star = star_path(arguments.star)
    out = arguments.out or star.with_name(f"{star.stem}_relion.star")
    tell(warp_to_relion(star, other_file("-o", out, star), arguments.angpix, arguments.kv, arguments.cs))


def tomogram_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("star", metavar="STAR", type=Path, help="particle list of all tomograms")
    parser.add_argument("mic", metavar="MIC", help="name of the tomogram, or what it begins with up to a _")
    parser.add_argument("-o", "--output", dest="out", metavar="OUT", type=Path, help=f"file to write (default: {name})")


def pytom_arguments(parser: argparse.ArgumentParser) -> None:
    tomogram_arguments(parser, "MIC_norm.star in the working folder, as ever")


def plain_name(mic: str) -> str:
    """MIC as a part of a file name."""
    if "/" in mic or mic in ("", ".", ".."):
        raise UserError(f"MIC {mic!r}: is to be a tomogram's name without folders, it names the new file; or give -o")
    return mic


def convert_pytom(arguments: argparse.Namespace, given: Given) -> None:
    from opustomo.data.convert import picks_of_tomogram

    out = arguments.out or Path(f"{plain_name(arguments.mic)}_norm.star")
    star = existing_file(arguments.star)
    tell(picks_of_tomogram(star, arguments.mic, other_file("-o", out, star)))


def xml_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", metavar="XML", type=Path, help="one particle list")
    add("--input-dir", metavar="DIR", type=Path, help="folder of particle lists, instead of --input")
    add("--pattern", metavar="GLOB", default="*.xml", help="which of the folder")
    add("--output", dest="out", metavar="STAR", type=Path, required=True, help="STAR file to write")
    add("--bin-size", type=positive, default=1.0, help="factor on coordinates and shifts: PyTom's binning")
    add("--pixel-size", metavar="A", type=positive, help="of the voxels that are then counted (default: not written)")
    add("--magnification", type=positive, default=10000.0, help="written with --pixel-size")
    named = "rlnCtfImage of each row; {ts_name}: its tomogram, {i}: the row, from 1"
    add("--ctf-template", metavar="NAME", type=ctf_template, help=named)
    add("--workers", type=count, default=1, help="accepted; lists are read one after the other, which takes seconds")


def convert_pytom_to_star(arguments: argparse.Namespace, given: Given) -> None:
    from opustomo.data.convert import lists_to_star

    if (arguments.input is None) == (arguments.input_dir is None):
        raise UserError("give --input XML or --input-dir DIR, one of the two")
    if "workers" in given:
        note("dsdsh convert_pytom_to_star", "--workers: lists are read one after the other, nothing to choose")
    if arguments.input is not None:
        paths = [existing_file(arguments.input)]
    elif not (paths := sorted(arguments.input_dir.glob(arguments.pattern))):
        raise UserError(f"--input-dir {arguments.input_dir}: has no file {arguments.pattern}; see --pattern")
    sizes = arguments.bin_size, arguments.pixel_size, arguments.magnification
    tell(lists_to_star(paths, other_file("--output", arguments.out, *paths), *sizes, arguments.ctf_template))
    if arguments.pixel_size is None:
        note("dsdsh convert_pytom_to_star", "no --pixel-size: none is written, and programs will ask for it")


def artiax_arguments(parser: argparse.ArgumentParser) -> None:
    tomogram_arguments(parser, "<stem>_MIC.star in the working folder, as ever")
    add = parser.add_argument
    add("--factor", type=positive, default=1.0, help="coordinates and origins, in voxels, are multiplied by it")
    add("--deduplicate", action="store_true", help="one particle for each rlnImageName, the first")
    add("--micrograph-col", metavar="COLUMN", help="names the tomogram (default: rlnTomoName, else rlnMicrographName)")
    add("--data-block", metavar="NAME", help="table of the particles (default: found)")


def convert_artiax(arguments: argparse.Namespace, given: Given) -> None:
    from opustomo.data.convert import artiax_of_tomogram

    star, mic = existing_file(arguments.star), arguments.mic
    out = arguments.out or Path(f"{star.stem}_{plain_name(mic)}.star")
    columns = arguments.micrograph_col, arguments.data_block
    tell(artiax_of_tomogram(star, mic, other_file("-o", out, star), arguments.factor, arguments.deduplicate, *columns))


def relion30_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("star", metavar="STAR", type=Path, help="RELION STAR of subtomograms")
    add("angpix", metavar="ANGPIX", type=positive, help="pixel size in A; cross-checked against the file")
    add("--subset-label", metavar="N", type=int, choices=(1, 2), help="also write half set N: <stem>30_subsetN.star")
    add("--remove-symexp", action="store_true", help="undo a symmetry expansion: one row for each rlnImageName")
    add("--rescale-angpix", metavar="A", type=positive, help="count coordinates and origins in pixels of A")


def convert_star(arguments: argparse.Namespace, given: Given) -> None:
    from opustomo.data.convert import star_to_relion30

    options = arguments.rescale_angpix, arguments.subset_label, arguments.remove_symexp
    paths, lines = star_to_relion30(star_path(arguments.star), arguments.angpix, *options)
    tell(*lines, *(f"written: {path}" for path in paths))


def cube_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tomo", metavar="TOMO", type=Path, help="tomogram (MRC)")
    add("star", metavar="STAR", type=Path, help="table with coordinates in its voxels")
    add("--box-size", type=count, required=True, metavar="N", help="edge of the cubes in voxels")
    add("-o", "--output-dir", dest="output", type=Path, required=True, metavar="DIR", help="folder for the cubes")
    add("--coord-cols", nargs=3, metavar=("X", "Y", "Z"), help="columns of the coordinates (default: rlnCoordinate*)")
    add("--data-block", metavar="NAME", help="table of the particles (default: found)")
    add("--tomo-col", metavar="COLUMN", help="with --tomo-id: take only rows with that value in this column")
    add("--tomo-id", metavar="NAME", help="see --tomo-col")
    add("--coord-scale", type=positive, default=1.0, help="coordinates are multiplied by it")
    add("--one-based", action="store_true", help="coordinates count voxels from 1 (after scaling)")
    add("--round-mode", choices=("round", "floor", "ceil"), default="round", help="to whole voxels")
    add("--pad-outside", action="store_true", help="zeros outside the tomogram (else such cubes are left out)")
    add("--out-star", type=Path, metavar="STAR", help="also the rows of the cubes written, as they were")
    add("--prefix", default="cube", help="cubes are DIR/PREFIX_000000.mrc, ...")
    add("--start-index", type=int, default=0, help="number of the first")
    add("--write-stack", type=Path, metavar="MRC", help="also all cubes as one stack of volumes")


def extract_tomo_cubes(arguments: argparse.Namespace, given: Given) -> None:
    from opustomo.data.cubes import Cubes, extract_cubes

    if arguments.start_index < 0:
        raise UserError(f"--start-index {arguments.start_index}: must be at least 0")
    a = arguments
    for option, path in (("--out-star", a.out_star), ("--write-stack", a.write_stack)):
        if path is not None:
            other_file(option, path, a.tomo, a.star)
    named = {} if a.coord_cols is None else {"columns": tuple(a.coord_cols)}
    wanted = Cubes(
        existing_file(a.tomo), existing_file(a.star), a.output, a.box_size, **named, block=a.data_block,
        tomogram_column=a.tomo_col, tomogram_name=a.tomo_id, scale=a.coord_scale, one_based=a.one_based,
        rounding=a.round_mode, pad=a.pad_outside, out_star=a.out_star, prefix=plain_name(a.prefix),
        first=a.start_index, stack=a.write_stack,
    )  # fmt: skip
    tell(*extract_cubes(wanted))


def mask_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", metavar="MAP", type=Path, help="map (MRC), protein bright")
    add("-o", "--output", dest="out", metavar="MRC", type=Path, required=True, help="mask to write")
    add("--threshold", type=float, help="grey value above which it is molecule")
    add("--percentile", type=float, default=99.0, help="the threshold as a percentile of all voxels")
    add("--use-abs", action="store_true", help="threshold the map's absolute values")
    add("--largest-component", action="store_true", help="keep only the largest connected part")
    add("--fill-holes", action="store_true", help="fill holes")
    for name, what in (("open", "openings"), ("close", "closings"), ("dilate", "dilations"), ("erode", "erosions")):
        add(f"--{name}", type=int, default=0, metavar="N", help=f"{what} by a voxel, in this order")
    add("--soft-edge", type=float, default=0.0, metavar="VOXELS", help="width of the cosine edge outside")
    add("--sphere-radius", type=positive, metavar="VOXELS", help="a sphere instead; MAP gives size and pixel size")
    add("--sphere-center", type=float, nargs=3, metavar=("CZ", "CY", "CX"), help="its middle (default: voxel N//2)")


def create_mask(arguments: argparse.Namespace, given: Given) -> None:
    from opustomo.mask import Recipe, voxel_mask

    a = arguments
    other_file("-o", a.out, existing_file(a.input))
    if a.threshold is not None and "percentile" in given:
        raise UserError("--threshold and --percentile are both thresholds; give one")
    for name in ("open", "close", "dilate", "erode", "soft_edge"):
        if not 0 <= getattr(a, name) < 1000:
            raise UserError(f"--{name.replace('_', '-')} {getattr(a, name):g}: must be a number of voxels, 0 or more")
    shaping = {
        "threshold",
        "percentile",
        "use_abs",
        "largest_component",
        "fill_holes",
        "open",
        "close",
        "dilate",
        "erode",
    }
    if a.sphere_radius is None and a.sphere_center is not None:
        raise UserError("--sphere-center needs --sphere-radius")
    if a.sphere_radius is not None and (other := sorted(shaping & given)):
        raise UserError(f"--{other[0].replace('_', '-')} does not act on a sphere; leave it out, or --sphere-radius")
    if not 0 < a.percentile < 100:
        raise UserError(f"--percentile {a.percentile:g}: must be between 0 and 100")
    percentile = None if a.threshold is not None else a.percentile
    recipe = Recipe(
        a.threshold, percentile=percentile, largest=a.largest_component, fill=a.fill_holes, opening=a.open,
        closing=a.close, dilate=a.dilate, edge=a.soft_edge, radius=a.sphere_radius,
    )  # fmt: skip
    centre = None if a.sphere_center is None else tuple(a.sphere_center)
    tell(voxel_mask(a.input, a.out, recipe, absolute=a.use_abs, erode=a.erode, centre=centre))


def subtomogram_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("particles", metavar="STAR", type=Path, help="optimisation set, or STAR file with one row for each tilt image")
    add("-o", "--outdir", dest="output", type=Path, required=True, metavar="DIR", help="folder for the subtomograms")
    add("--datadir", type=Path, metavar="DIR", help="folder in front of the file names in the STAR")
    add("--angpix", type=positive, metavar="A", help="pixel size of the images; cross-checked against the data")
    add("--relion31", action="store_true", help="the STAR is of RELION 3.1 or later; a cross-check")
    add("--ind", type=Path, metavar="PKL", help="prepare these particles only (row numbers, from 0)")
    add("--tilt-limit", type=float, metavar="DEG", help="use tilts up to this angle only (default: all)")
    add("--workers", type=int, default=0, help="threads (0: all cores)")
    add("--write-ctf", action="store_true", help="accepted; weight volumes are always written")


def prepare_subtomos(arguments: argparse.Namespace, given: Given) -> None:
    from opustomo.config import InputOptions
    from opustomo.data.atomic import exclusive
    from opustomo.data.pickles import load_indices
    from opustomo.data.readers import particles_of
    from opustomo.data.readers.source import read_source
    from opustomo.data.subtomograms import prepare
    from opustomo.monitor import progress
    from opustomo.preparation import prepare_process

    if arguments.write_ctf:
        note("dsd prepare_subtomos", "--write-ctf: weight volumes are always written, nothing to choose")
    prepare_process(arguments.workers)
    a, star = arguments, existing_file(arguments.particles)
    source = read_source(star, datadir=a.datadir)
    options = InputOptions(a.datadir, a.angpix, None, a.relion31, tilt_limit=a.tilt_limit)
    particles = particles_of(source, star, options)
    if a.ind is not None:
        rows = load_indices(a.ind, len(particles))
        particles, source = particles.subset(rows), source.subset(rows)
    with exclusive(a.output):
        for _ in progress(prepare(particles, source, a.output, a.workers), len(particles), "subtomograms"):
            pass
    tell(
        *particles.notes,
        f"{len(particles)} subtomograms of {particles.box} voxels of {particles.pixel_size:g} A with their weights, "
        f"CTF-premultiplied: {a.output / 'particles.star'}",
        f"next: opustomo check {shlex.quote(str(a.output / 'particles.star'))}",
    )


COMMANDS = {
    "combine_star": Command(
        "STAR files of several tomograms or classes as one: columns in any order, optics groups numbered anew",
        combine_arguments,
        combine_star,
        "dsdsh combine_star pre0.star pre3.star combined.star",
    ),
    "convert_warp": Command(
        "particles of M (Warp) as a RELION 3.0 STAR, coordinates in pixels",
        warp_arguments,
        convert_warp,
        "dsdsh convert_warp species_particles.star 1.35 --kv 300 --cs 2.7",
    ),
    "convert_pytom": Command(
        "particles of one tomogram from a particle list (PyTom's STAR, XML or any other) as picks for Warp",
        pytom_arguments,
        convert_pytom,
        "dsdsh convert_pytom TS_026.star TS_026",
    ),
    "convert_pytom_to_star": Command(
        "particle lists of PyTom (XML) as one RELION 3.0 STAR: ZXZ to ZYZ angles, shifts added to coordinates",
        xml_arguments,
        convert_pytom_to_star,
        "dsdsh convert_pytom_to_star --input-dir picked --pattern '*_ribo.xml' --output ribo.star --bin-size 4",
    ),
    "convert_artiax": Command(
        "particles of one tomogram as a STAR for ArtiaX, origins added to coordinates",
        artiax_arguments,
        convert_artiax,
        "dsdsh convert_artiax particles.star TS_026 --factor 0.5 -o TS_026_artiax.star",
    ),
    "convert_star": Command(
        "a RELION 3.1 STAR as 3.0, <stem>30.star: optics in the rows, origins in pixels, half sets 1 and 2",
        relion30_arguments,
        convert_star,
        "dsdsh convert_star selected.star 3.37 --subset-label 1",
    ),
    "extract_tomo_cubes": Command(
        "cubes from one tomogram at the coordinates of a STAR, to look at (opustomo extract makes a set to work with)",
        cube_arguments,
        extract_tomo_cubes,
        "dsdsh extract_tomo_cubes TS_026.mrc picks.star --box-size 64 -o cubes --tomo-col rlnMicrographName \\\n"
        "      --tomo-id TS_026.tomostar",
    ),
    "create_mask": Command(
        "a mask from a map, or a sphere, lengths in voxels (opustomo mask: in Angstrom, with picture and checks)",
        mask_arguments,
        create_mask,
        "dsdsh create_mask average.mrc -o mask.mrc --percentile 97 --largest-component --dilate 3 --soft-edge 5",
    ),
}

PREPARE_SUBTOMOS = Command(
    "tilt images as subtomograms with weights (numerator and CTF^2, as RELION 4's pseudo-subtomograms)",
    subtomogram_arguments,
    prepare_subtomos,
    "dsd prepare_subtomos run_optimisation_set.star -o subtomograms",
)
