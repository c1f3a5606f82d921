"""``dsdsh``: the seed's preparation and analysis commands on opustomo's own verbs.

Owns: the positional argument forms of ``dsdsh prepare``, ``analyze``, ``eval_vol`` and ``parse_pose``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opustomo import cli
from opustomo.compat.arguments import Command, Given, box_and_pixel
from opustomo.compat.arguments import main as run_command
from opustomo.config import AnalyzeConfig, InputOptions, VolumesConfig
from opustomo.errors import UserError

STAR_NAMES = ("BOX", "APIX")


def star_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("star", metavar="STAR", type=Path, help="RELION STAR file of all subtomograms")
    parser.add_argument("box", metavar="BOX", type=float, help="box size; cross-checked against the data")
    parser.add_argument("angpix", metavar="APIX", type=float, help="pixel size in A; cross-checked against the data")
    parser.add_argument("--relion31", action="store_true", help="the STAR is of RELION 3.1 or later; a cross-check")
    parser.add_argument("--datadir", type=Path, metavar="DIR", help="folder in front of the file names in the STAR")


def input_options(arguments: argparse.Namespace) -> InputOptions:
    """BOX, APIX and the other cross-checks of a STAR file; raises ``UserError`` for impossible ones."""
    box_and_pixel(arguments.box, arguments.angpix, STAR_NAMES)
    return InputOptions(arguments.datadir, arguments.angpix, int(arguments.box), arguments.relion31)


def run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="OUT", type=Path, help="output folder of the training")
    parser.add_argument("epoch", metavar="EPOCH", type=int, help="epoch, counted from 0 as in weights.EPOCH.pkl")


def prepare(arguments: argparse.Namespace, given: Given) -> None:
    """Write the pose pickle beside the STAR file."""
    from opustomo.compat import poses

    star, box, angpix = poses.checked_star(arguments.star, input_options(arguments), STAR_NAMES)
    poses.write_poses(star, box, angpix, arguments.star.with_name(f"{arguments.star.stem}_pose_euler.pkl"))


def analyze_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("pcs", metavar="NPC", type=int, help="number of principal components to traverse")
    parser.add_argument("clusters", metavar="K", type=int, help="number of k-means clusters")
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
    parser.add_argument("number", metavar="K", type=int, help="number of clusters (kmeans), or of the component (pc)")
    parser.add_argument("angpix", metavar="APIX", type=float, help="pixel size of the volumes written")
    parser.add_argument("--flip", action="store_true", help="mirror the volumes (other hand)")


def eval_vol(arguments: argparse.Namespace, given: Given) -> int:
    """Translate to ``VolumesConfig``: volumes go into the folder of that analysis."""
    config = VolumesConfig(
        run=arguments.run,
        epoch=arguments.epoch,
        kmeans=arguments.number if arguments.kind == "kmeans" else 0,
        pc=arguments.number if arguments.kind == "pc" else 0,
        angpix=arguments.angpix,
        flip=arguments.flip,
    )
    return cli.call("volumes", config, given)


def selection_arguments(parser: argparse.ArgumentParser) -> None:
    star_arguments(parser)
    run_arguments(parser)
    parser.add_argument("clusters", metavar="K", type=int, help="K of the k-means analysis")


def parse_pose(arguments: argparse.Namespace, given: Given) -> None:
    """One STAR file per k-means class, beside the labels."""
    from opustomo.compat import poses

    options = input_options(arguments)
    folder = arguments.run / f"analyze.{arguments.epoch}" / f"kmeans{arguments.clusters}"
    labels = folder / "labels.pkl"
    if not labels.is_file():
        command = f"dsdsh analyze {arguments.run} {arguments.epoch} 4 {arguments.clusters}"
        raise UserError(f"{labels}: no such file; make it with: {command}")
    star, _, _ = poses.checked_star(arguments.star, options, STAR_NAMES)
    poses.write_label_stars(star, labels, folder)


COMMANDS = {
    "prepare": Command(
        "poses of a STAR file as <stem>_pose_euler.pkl beside it",
        star_arguments,
        prepare,
        "dsdsh prepare consensus.star 236 2.1 --relion31",
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
}


def main(argv: Sequence[str] | None = None) -> int:
    """Console script ``dsdsh``."""
    return run_command("dsdsh", "preparation and analysis in the forms of OPUS-TOMO, on opustomo", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
