"""``dsdsh``: the seed's preparation and analysis commands on opustomo's own verbs.

Owns: the positional argument forms of ``dsdsh prepare``, ``analyze``, ``eval_vol`` and ``parse_pose``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from opustomo import cli
from opustomo.analysis.places import stem
from opustomo.compat import helpers
from opustomo.compat.arguments import Command, Given, count, damaged_argument, epoch_number, input_options, note
from opustomo.compat.arguments import main as run_command
from opustomo.config import AnalyzeConfig, VolumesConfig
from opustomo.config_analysis import Codes
from opustomo.errors import UserError

if TYPE_CHECKING:
    from opustomo.data.readers.source import Source

STAR_NAMES = ("BOX", "APIX")


def star_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("star", metavar="STAR", type=Path, help="STAR file or optimisation set of all particles")
    parser.add_argument("box", metavar="BOX", type=float, help="box size; cross-checked against the data")
    parser.add_argument("angpix", metavar="APIX", type=float, help="pixel size in A; cross-checked against the data")
    parser.add_argument("--relion31", action="store_true", help="the STAR is of RELION 3.1 or later; a cross-check")
    parser.add_argument("--datadir", type=Path, metavar="DIR", help="folder in front of the file names in the STAR")
    damaged_argument(parser)


def checked(arguments: argparse.Namespace) -> tuple[Source, int, float]:
    """The particles of STAR, their box and pixel size, compared with BOX and APIX."""
    from opustomo.compat.poses import checked_star

    options = input_options(arguments, arguments.box, arguments.angpix, STAR_NAMES)
    return checked_star(arguments.star, options, STAR_NAMES)


class Round(NamedTuple):
    """An epoch as in weights.EPOCH.pkl, and whether the second round of its analysis is meant."""

    epoch: int
    filtered: bool


def round_of(text: str) -> Round:
    """EPOCH or filter.EPOCH, for argparse."""
    return Round(epoch_number(text.removeprefix("filter.")), text.startswith("filter."))


def run_arguments(parser: argparse.ArgumentParser, rounds: bool = False) -> None:
    """rounds: EPOCH may be filter.EPOCH."""
    parser.add_argument("run", metavar="OUT", type=Path, help="output folder of the training")
    words = "epoch, counted from 0 as in weights.EPOCH.pkl"
    if rounds:
        words += "; filter.EPOCH: the second round of analyze --kpc"
    parser.add_argument("epoch", metavar="EPOCH", type=round_of if rounds else epoch_number, help=words)


def analysis_folder(arguments: argparse.Namespace, codes: Codes = "composition") -> Path:
    """OUT/analyze.EPOCH, or that of other codes or of the second round."""
    epoch, filtered = arguments.epoch
    return Path(arguments.run) / f"{stem(codes, filtered)}.{epoch}"


def epochs_of(run: Path) -> list[int]:
    """Epochs of the weights in OUT, ascending; read from the names alone, without loading torch."""
    found = (re.fullmatch(r"weights\.(\d+)\.pkl", path.name) for path in run.glob("weights.*.pkl"))
    return sorted(int(match[1]) for match in found if match)


def not_analysed(arguments: argparse.Namespace, path: Path, pcs: int, clusters: int) -> UserError:
    """What to say when ``path`` of an analysis is not there: the epochs there are, or the command that makes it."""
    epochs, (epoch, filtered) = epochs_of(arguments.run), arguments.epoch
    if epochs and epoch not in epochs:
        present = ", ".join(map(str, epochs))
        return UserError(f"{arguments.run}: no epoch {epoch}; present are {present} (counted from 0)")
    command = f"dsdsh analyze {arguments.run} {epoch} {pcs} {clusters}" + " --kpc K:CLASSES" * filtered
    command += " --joint" * ("jointanalyze" in str(path))
    return UserError(f"{path}: no such file; make it with: {command}")


def prepare(arguments: argparse.Namespace, given: Given) -> None:
    """Write the pose pickle beside the STAR file."""
    from opustomo.compat import poses

    source, box, angpix = checked(arguments)
    poses.write_poses(source, box, angpix, arguments.star.with_name(f"{arguments.star.stem}_pose_euler.pkl"))


def multi_arguments(parser: argparse.ArgumentParser) -> None:
    star_arguments(parser)
    parser.add_argument("masks", metavar="MASKS.star", type=Path, help="RELION's STAR file of multi-body masks")
    parser.add_argument(
        "bodies", metavar="NBODIES", type=count, help="number of bodies; cross-checked against the STAR"
    )


def prepare_multi(arguments: argparse.Namespace, given: Given) -> None:
    """The pose pickle and, beside the STAR file too, the bodies of a multi-body STAR."""
    from opustomo.data.bodies import multibody_star, save_bodies

    bodies = multibody_star(arguments.masks)
    if len(bodies.files) != arguments.bodies:
        raise UserError(f"NBODIES {arguments.bodies}: {arguments.masks} names {len(bodies.files)} bodies; give that")
    _, box, angpix = checked(arguments)
    path = arguments.star.with_name("mask_params.pkl")
    save_bodies(path, bodies, box, angpix)
    prepare(arguments, given)
    print(f"bodies: {path}; give it to train_tomo or opustomo train with --masks")


def analyze_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("pcs", metavar="NPC", type=count, help="number of principal components to traverse")
    parser.add_argument("clusters", metavar="K", type=count, help="number of k-means clusters")
    parser.add_argument("--skip-umap", action="store_true", help="do not embed again; a stored umap.pkl is read")
    parser.add_argument("--kpc", metavar="K:2-5,8", help="these classes of kmeansK again: OUT/analyze.filter.EPOCH")
    parser.add_argument("--joint", action="store_true", help="composition and conformation as one code (--masks)")


def analyze(arguments: argparse.Namespace, given: Given) -> int:
    """Translate to ``AnalyzeConfig``."""
    config = AnalyzeConfig(
        run=arguments.run,
        epoch=arguments.epoch,
        pcs=arguments.pcs,
        clusters=arguments.clusters,
        skip_umap=arguments.skip_umap,
        within=arguments.kpc,
        codes="joint" if arguments.joint else "all",
    )
    return cli.call("analyze", config, given)


def volume_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser, rounds=True)
    add = parser.add_argument
    kinds = ("kmeans", "pc", "dpc", "joint")
    add("kind", metavar="kmeans|pc|dpc|joint", choices=kinds,
        help="cluster centres, a traversal, one of the conformation, or centres of analyze --joint")  # fmt: skip
    add("number", metavar="K", type=count, help="number of clusters (kmeans, joint), or of the component (pc, dpc)")
    add("angpix", metavar="APIX", type=float, help="pixel size of the volumes written")
    add("--masks", type=Path, metavar="PKL", help="dpc: the bodies; cross-checked, the run knows its own")
    add("--kmeans", type=count, metavar="K", help="dpc: with --dfk, the composition shown is a centre of kmeansK")
    add("--dfk", type=int, metavar="J", help="dpc: number of that centre, from 0 (default: the mean composition)")
    add("--num-bodies", type=int, metavar="N", help="accepted; the run knows its bodies")
    parser.add_argument("--flip", action="store_true", help="mirror the volumes (other hand)")


def eval_vol(arguments: argparse.Namespace, given: Given) -> int:
    """Translate to ``VolumesConfig``: volumes go into the folder of that analysis."""
    kind, number, (epoch, filtered) = arguments.kind, arguments.number, arguments.epoch
    kinds: dict[str, Codes] = {"dpc": "conformation", "joint": "joint"}
    codes = kinds.get(kind, "composition")
    centres, along = (number, 0) if kind in ("kmeans", "joint") else (0, number)
    path = analysis_folder(arguments, codes) / (f"kmeans{number}/centers.txt" if centres else f"pc{number}/z_pc.txt")
    if not path.is_file() and epoch in epochs_of(arguments.run):
        raise not_analysed(arguments, path, along or 4, centres or 16)
    if kind != "dpc" and (other := sorted({"masks", "kmeans", "dfk"} & given)):
        raise UserError(f"--{other[0]}: is for dpc; leave it out")
    if (arguments.kmeans is None) != (arguments.dfk is None):
        raise UserError("--kmeans K and --dfk J: the composition at centre J of kmeansK; give both or neither")
    if arguments.masks is not None:
        _same_bodies(arguments.run, arguments.masks)
    if "num_bodies" in given:
        note("dsdsh eval_vol", "--num-bodies: no effect, the run knows its bodies")
    config = VolumesConfig(
        run=arguments.run,
        epoch=epoch,
        codes=codes,
        filtered=filtered,
        kmeans=centres,
        pc=along,
        state=() if arguments.dfk is None else (arguments.kmeans, arguments.dfk),
        angpix=arguments.angpix,
        flip=arguments.flip,
    )
    return cli.call("volumes", config, given - {"num_bodies"})


def _same_bodies(run: Path, given: Path) -> None:
    """Raises UserError where ``--masks`` are not the bodies that the run was trained with."""
    from opustomo.data.bodies import mask_files
    from opustomo.stored import read_config

    def files(asked: str) -> list[str]:
        return [file.name for file in mask_files(asked).files]

    trained = read_config(run).get("masks")
    if trained is None:
        raise UserError(f"--masks {given}: {run} was trained without bodies; train with --masks for dpc")
    if trained.startswith("auto:") or files(str(given)) != files(trained):
        raise UserError(f"--masks {given}: {run} was trained with {trained}; give that or leave --masks out")


def selection_arguments(parser: argparse.ArgumentParser) -> None:
    star_arguments(parser)
    run_arguments(parser, rounds=True)
    parser.add_argument("clusters", metavar="K", type=count, help="K of the k-means analysis")


def parse_pose(arguments: argparse.Namespace, given: Given) -> None:
    """One STAR file per k-means class, beside the labels."""
    from opustomo.compat import poses

    options = input_options(arguments, arguments.box, arguments.angpix, STAR_NAMES)
    folder = analysis_folder(arguments) / f"kmeans{arguments.clusters}"
    labels = folder / "labels.pkl"
    if not labels.is_file():
        raise not_analysed(arguments, labels, 4, arguments.clusters)
    source, _, _ = poses.checked_star(arguments.star, options, STAR_NAMES)
    poses.write_label_stars(source, labels, folder, arguments.run)


COMMANDS = {
    "prepare": Command(
        "poses of a STAR file as <stem>_pose_euler.pkl beside it",
        star_arguments,
        prepare,
        "dsdsh prepare consensus.star 236 2.1 --relion31",
    ),
    "prepare_multi": Command(
        "the same with rigid bodies: mask_params.pkl for --masks",
        multi_arguments,
        prepare_multi,
        "dsdsh prepare_multi consensus.star 236 2.1 masks.star 2",
    ),
    "analyze": Command(
        "PCA, k-means and UMAP of the codes into OUT/analyze.EPOCH (opustomo analyze)",
        analyze_arguments,
        analyze,
        "dsdsh analyze run 16 4 16",
    ),
    "eval_vol": Command(
        "density maps at cluster centres or along a component (opustomo volumes)",
        volume_arguments,
        eval_vol,
        "dsdsh eval_vol run 16 kmeans 16 2.2\n  dsdsh eval_vol run 16 pc 1 2.2\n"
        "  dsdsh eval_vol run 16 dpc 1 2.2 --kmeans 16 --dfk 3",
    ),
    "parse_pose": Command(
        "one STAR file per k-means class, OUT/analyze.EPOCH/kmeansK/preI.star",
        selection_arguments,
        parse_pose,
        "dsdsh parse_pose consensus.star 320 1.699 run 16 16 --relion31",
    ),
    **helpers.COMMANDS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Console script ``dsdsh``."""
    return run_command("dsdsh", "preparation and analysis in the forms of OPUS-TOMO, on opustomo", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
