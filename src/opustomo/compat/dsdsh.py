"""``dsdsh``: the seed's preparation and analysis commands on opustomo's own verbs.

Owns: the positional argument forms of ``dsdsh prepare``, ``analyze``, ``eval_vol`` and ``parse_pose``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from opustomo import cli
from opustomo.compat import helpers
from opustomo.compat.arguments import Command, Given, box_and_pixel, count, damaged_argument, epoch_number
from opustomo.compat.arguments import main as run_command
from opustomo.config import AnalyzeConfig, InputOptions, VolumesConfig
from opustomo.errors import UserError

STAR_NAMES = ("BOX", "APIX")


def star_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("star", metavar="STAR", type=Path, help="STAR file or optimisation set of all particles")
    parser.add_argument("box", metavar="BOX", type=float, help="box size; cross-checked against the data")
    parser.add_argument("angpix", metavar="APIX", type=float, help="pixel size in A; cross-checked against the data")
    parser.add_argument("--relion31", action="store_true", help="the STAR is of RELION 3.1 or later; a cross-check")
    parser.add_argument("--datadir", type=Path, metavar="DIR", help="folder in front of the file names in the STAR")
    damaged_argument(parser)


def input_options(arguments: argparse.Namespace) -> InputOptions:
    """BOX, APIX and the other cross-checks of a STAR file; raises ``UserError`` for impossible ones."""
    box_and_pixel(arguments.box, arguments.angpix, STAR_NAMES)
    return InputOptions(
        arguments.datadir, arguments.angpix, int(arguments.box), arguments.relion31, damaged=arguments.damaged
    )


def run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="OUT", type=Path, help="output folder of the training")
    parser.add_argument(
        "epoch", metavar="EPOCH", type=epoch_number, help="epoch, counted from 0 as in weights.EPOCH.pkl"
    )


def analysis_folder(arguments: argparse.Namespace) -> Path:
    """OUT/analyze.EPOCH."""
    return Path(arguments.run) / f"analyze.{arguments.epoch}"


def epochs_of(run: Path) -> list[int]:
    """Epochs of the weights in OUT, ascending; read from the names alone, without loading torch."""
    found = (re.fullmatch(r"weights\.(\d+)\.pkl", path.name) for path in run.glob("weights.*.pkl"))
    return sorted(int(match[1]) for match in found if match)


def not_analysed(arguments: argparse.Namespace, path: Path, pcs: int, clusters: int) -> UserError:
    """What to say when ``path`` of an analysis is not there: the epochs there are, or the command that makes it."""
    epochs = epochs_of(arguments.run)
    if epochs and arguments.epoch not in epochs:
        present = ", ".join(map(str, epochs))
        return UserError(f"{arguments.run}: no epoch {arguments.epoch}; present are {present} (counted from 0)")
    command = f"dsdsh analyze {arguments.run} {arguments.epoch} {pcs} {clusters}"
    return UserError(f"{path}: no such file; make it with: {command}")


def prepare(arguments: argparse.Namespace, given: Given) -> None:
    """Write the pose pickle beside the STAR file."""
    from opustomo.compat import poses

    source, box, angpix = poses.checked_star(arguments.star, input_options(arguments), STAR_NAMES)
    poses.write_poses(source, box, angpix, arguments.star.with_name(f"{arguments.star.stem}_pose_euler.pkl"))


def multi_arguments(parser: argparse.ArgumentParser) -> None:
    star_arguments(parser)
    parser.add_argument("masks", metavar="MASKS.star", type=Path, help="RELION's STAR file of multi-body masks")
    parser.add_argument(
        "bodies", metavar="NBODIES", type=count, help="number of bodies; cross-checked against the STAR"
    )


def prepare_multi(arguments: argparse.Namespace, given: Given) -> None:
    """The pose pickle and, beside the STAR file too, the bodies of a multi-body STAR."""
    from opustomo.compat.bodies import save_bodies
    from opustomo.compat.poses import checked_star
    from opustomo.data.bodies import multibody_star

    bodies = multibody_star(arguments.masks)
    if len(bodies.files) != arguments.bodies:
        raise UserError(f"NBODIES {arguments.bodies}: {arguments.masks} names {len(bodies.files)} bodies; give that")
    _, box, angpix = checked_star(arguments.star, input_options(arguments), STAR_NAMES)
    path = arguments.star.with_name("mask_params.pkl")
    save_bodies(path, bodies, box, angpix)
    prepare(arguments, given)
    print(f"bodies: {path}; give it to train_tomo or opustomo train with --masks")


def analyze_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("pcs", metavar="NPC", type=count, help="number of principal components to traverse")
    parser.add_argument("clusters", metavar="K", type=count, help="number of k-means clusters")
    parser.add_argument("--skip-umap", action="store_true", help="do not embed again; a stored umap.pkl is read")


def analyze(arguments: argparse.Namespace, given: Given) -> int:
    """Translate to ``AnalyzeConfig``."""
    config = AnalyzeConfig(
        run=arguments.run,
        epoch=arguments.epoch,
        pcs=arguments.pcs,
        clusters=arguments.clusters,
        skip_umap=arguments.skip_umap,
    )
    return cli.call("analyze", config, given)


def volume_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("kind", metavar="kmeans|pc", choices=("kmeans", "pc"), help="cluster centres or a traversal")
    parser.add_argument("number", metavar="K", type=count, help="number of clusters (kmeans), or of the component (pc)")
    parser.add_argument("angpix", metavar="APIX", type=float, help="pixel size of the volumes written")
    parser.add_argument("--flip", action="store_true", help="mirror the volumes (other hand)")


def eval_vol(arguments: argparse.Namespace, given: Given) -> int:
    """Translate to ``VolumesConfig``: volumes go into the folder of that analysis."""
    kind, number = arguments.kind, arguments.number
    codes = Path(f"{kind}{number}") / ("centers.txt" if kind == "kmeans" else "z_pc.txt")
    path = analysis_folder(arguments) / codes
    if not path.is_file() and arguments.epoch in epochs_of(arguments.run):
        pcs, clusters = (4, number) if kind == "kmeans" else (number, 16)
        raise not_analysed(arguments, path, pcs, clusters)
    config = VolumesConfig(
        run=arguments.run,
        epoch=arguments.epoch,
        kmeans=number if kind == "kmeans" else 0,
        pc=number if kind == "pc" else 0,
        angpix=arguments.angpix,
        flip=arguments.flip,
    )
    return cli.call("volumes", config, given)


def selection_arguments(parser: argparse.ArgumentParser) -> None:
    star_arguments(parser)
    run_arguments(parser)
    parser.add_argument("clusters", metavar="K", type=count, help="K of the k-means analysis")


def parse_pose(arguments: argparse.Namespace, given: Given) -> None:
    """One STAR file per k-means class, beside the labels."""
    from opustomo.compat import poses

    options = input_options(arguments)
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
        "dsdsh eval_vol run 16 kmeans 16 2.2\n  dsdsh eval_vol run 16 pc 1 2.2",
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
