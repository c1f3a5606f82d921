"""``dsd``: the seed's training commands on opustomo's own verbs.

Owns: the argument forms of ``dsd parse_pose_star``, ``train_tomo`` and ``eval_vol``; everything they do is done by the
verbs ``train``, ``volumes`` and ``select``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from opustomo import cli
from opustomo.compat.arguments import Command, Given, damaged_argument, existing_file, input_options, note, to_config
from opustomo.compat.arguments import main as run_command
from opustomo.compat.helpers import PREPARE_SUBTOMOS
from opustomo.config import GridOptions, TrainConfig, VolumesConfig
from opustomo.errors import UserError

NATIVE = TrainConfig(star=Path(), output=Path())
NATIVE_GRID = GridOptions()
PLOT_INTERVAL = 1000  # particles between pictures where --plot is given alone
# Arguments of the seed that name the one way this program works: the accepted value, and the flag.
ONLY_MODE = {"lazy_single": True, "pe_type": "vanilla", "template_type": "conv"}
# Powers of the CTF that its later versions (OPUS-ET) give the data and the reconstruction: the only one here (their
# default, too), why, and what to do for another.
CTF_POWERS = {
    "ctfalpha": (0.0, "the data stay as they are", "the correction is part of the fit; leave --ctfalpha out"),
    "ctfbeta": (
        1.0,
        "the reconstruction gets the whole CTF that the files state",
        "data that have no CTF state it: rlnPhaseShift 90 and rlnDefocusU, rlnSphericalAberration and "
        "rlnAmplitudeContrast 0 in the CTF STAR files; else leave --ctfbeta out",
    ),
}


def pose_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("star", metavar="STAR", type=Path, help="STAR file or optimisation set")
    parser.add_argument("-D", dest="box", type=float, required=True, help="box size; cross-checked against the data")
    parser.add_argument("--Apix", type=float, required=True, help="pixel size in A; cross-checked against the data")
    parser.add_argument("--relion31", action="store_true", help="the STAR is of RELION 3.1 or later; a cross-check")
    parser.add_argument("--datadir", type=Path, metavar="DIR", help="folder in front of the file names in the STAR")
    parser.add_argument("-o", dest="output", type=Path, metavar="PKL", help="pose pickle to write")
    parser.add_argument("--labels", type=Path, metavar="PKL", help="class of every particle (labels.pkl of analyze)")
    parser.add_argument("--outdir", type=Path, metavar="DIR", help="with --labels: folder for preI.star of class I")
    damaged_argument(parser)


def parse_pose_star(arguments: argparse.Namespace, given: Given) -> None:
    """Write the pose pickle, or one STAR file per label."""
    from opustomo.compat import poses

    wants_classes = arguments.labels is not None or arguments.outdir is not None
    if wants_classes and (arguments.labels is None or arguments.outdir is None):
        raise UserError("--labels and --outdir belong together: the labels, and the folder for one STAR file per label")
    if not wants_classes and arguments.output is None:
        raise UserError("missing: -o, the pose pickle to write (or --labels L.pkl --outdir DIR for STAR files)")
    names = ("-D", "--Apix")
    options = input_options(arguments, arguments.box, arguments.Apix, names)
    source, box, angpix = poses.checked_star(arguments.star, options, names)
    if arguments.output is not None:
        poses.write_poses(source, box, angpix, arguments.output)
    if wants_classes:
        poses.write_label_stars(source, arguments.labels, arguments.outdir)


def train_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("star", metavar="STAR", type=Path, help="STAR file or optimisation set")
    add("--poses", type=Path, metavar="PKL", help="pose pickle of `dsdsh prepare` (default: poses of the STAR)")
    add("-o", dest="output", type=Path, required=True, metavar="DIR", help="run folder for all results")
    add("-r", dest="mask", type=Path, metavar="MRC", help="solvent mask of the consensus map (default: a sphere)")
    add("--datadir", type=Path, metavar="DIR", help="folder in front of the file names in the STAR")
    add("--angpix", type=float, metavar="A", help="pixel size of the subtomograms; cross-checked against the data")
    add("--relion31", action="store_true", help="the STAR is of RELION 3.1 or later; a cross-check")
    add("--ind", type=Path, metavar="PKL", help="train on these row numbers only")
    damaged_argument(parser)
    add("--warp", action="store_true", help="the CTFs are tables (CSV) of Warp; a cross-check")
    add("--tilt-range", type=float, metavar="DEG", help="use tilts up to this angle, and half of --tilt-step beyond")
    add("--tilt-step", type=float, metavar="DEG", help="angle between tilts; for --tilt-range alone, angles are read")
    add("--tilt-limit", type=float, metavar="DEG", help="use tilts up to this angle only (default: all)")
    sign = parser.add_mutually_exclusive_group()
    sign.add_argument(
        "--uninvert-data", dest="contrast", action="store_const", const="white", default="auto",
        help="protein is bright in the subtomograms (default: detected)",
    )  # fmt: skip
    sign.add_argument(
        "--invert-data", dest="contrast", action="store_const", const="black", default="auto",
        help="protein is dark in the subtomograms (default: detected)",
    )  # fmt: skip
    schedule_arguments(parser)
    network_arguments(parser)
    output_arguments(parser)


def schedule_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-n", dest="epochs", type=int, default=NATIVE.epochs, help="number of epochs in total")
    add("-b", dest="batch", type=int, default=NATIVE.batch, help="subtomograms per step on each GPU")
    add("--lr", type=float, default=NATIVE.lr, help="initial learning rate")
    add("--wd", type=float, default=NATIVE.wd, help="weight decay")
    add("--accum-step", type=int, default=NATIVE.accum_step, help="steps over which gradients are accumulated")
    add("--beta", choices=("cos", "constant"), default="cos", help="schedule of the prior's strength")
    add("--beta-control", type=float, default=NATIVE.beta_control, help="strength of the beta-VAE prior, 0.5-4")
    add("--lamb", type=float, default=NATIVE.lamb, help="strength of the structural disentanglement prior, 0.1-3")
    add("--bfactor", type=float, default=NATIVE.bfactor, help="decaying envelope on the reconstruction, 3-5")
    add("--valfrac", type=float, default=NATIVE.valfrac, help="fraction of subtomograms held out for validation")
    add("--split", type=Path, metavar="PKL", help="train/validation split (read when it exists, else made in DIR)")
    add("--seed", type=int, default=NATIVE.seed, help="random seed")
    add("--num-gpus", type=int, default=NATIVE.num_gpus, help="GPUs asked for, one process each; fewer present: those")
    add("--multigpu", action="store_true", help="use several GPUs")
    add("--load", metavar="latest|PKL", help="continue exactly (latest), or start from this weights.N.pkl")
    add("--latents", type=Path, metavar="PKL", help="z.N.pkl that belongs to --load")


def network_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--zdim", type=int, default=NATIVE.zdim, help="dimension of the composition code")
    add("--masks", metavar="PKL|STAR|FILES", help="rigid bodies: of prepare_multi, a multi-body STAR, or masks (a,b)")
    add("--zaffinedim", type=int, default=NATIVE.zaffinedim, help="dimension of the conformation code; needs --masks")
    add("--downfrac", type=float, default=NATIVE_GRID.downfrac, help="working box as a fraction of the subtomogram's")
    add("--templateres", type=int, default=192, help="size of the network's volume, a multiple of 16")
    add("--encoderres", type=int, default=NATIVE.encoderres, help="size of the encoder's features (0: by --lamb)")
    add("--estpose", action="store_true", help="correct every subtomogram's pose (without it they are kept)")
    add("--lazy-single", action="store_true", help="accepted; subtomograms are always read as needed")
    add("--pe-type", default="vanilla", help="accepted; only vanilla exists")
    add(
        "--encode-mode", choices=("grad", "fixed"), default="grad",
        help="fixed: no codes, one map of all subtomograms with half maps",
    )  # fmt: skip
    add("--template-type", default="conv", help="accepted; only conv exists")
    add("--ctfalpha", type=float, metavar="X", help="only 0: the data stay as they are")
    add("--ctfbeta", type=float, metavar="X", help="only 1: the CTF is in the model as the files state it")
    add("--float16", action="store_true", help="accepted; numerators and weights are kept as float16 in any case")


def output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--plot", action="store_true", help="write picture rows into the run folder at every log interval")
    add("--tmp-prefix", default=NATIVE.tmp_prefix, help="prefix of the running reconstruction in the run folder")
    add(
        "--log-interval", type=int, metavar="N",
        help=f"particles between lines of metrics (default: once per epoch; with --plot {PLOT_INTERVAL})",
    )  # fmt: skip
    add("--checkpoint", type=int, default=NATIVE.checkpoint, help="epochs between two checkpoints")
    add("-v", "--verbose", action="store_true", help="more lines in the log")


def train_tomo(arguments: argparse.Namespace, given: Given) -> int:
    """Translate to ``TrainConfig`` and train."""
    config, fields = train_config(arguments, given)
    return cli.call("train", config, fields)


def train_config(arguments: argparse.Namespace, given: Given) -> tuple[TrainConfig, Given]:
    """The config, and the names of its fields that were typed; notes on stderr what changes nothing."""
    values = vars(arguments)
    for name, accepted in ONLY_MODE.items():
        if name in given and values[name] != accepted:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {values[name]}: only '{accepted}' exists here; leave {flag} out")
    typed = ["--" + name.replace("_", "-") for name in ONLY_MODE if name in given]
    if typed:
        note("dsd train_tomo", f"{', '.join(typed)}: this is the only mode, nothing to choose")
    for name in sorted(given & set(CTF_POWERS)):
        accepted, why, otherwise = CTF_POWERS[name]
        if values[name] != accepted:
            raise UserError(f"--{name} {values[name]:g}: only {accepted:g} exists here, {why}; {otherwise}")
        note("dsd train_tomo", f"--{name} {accepted:g}: as always here, {why}")
    if "float16" in given:
        note("dsd train_tomo", "--float16: no effect, numerators and weights are kept as float16 in any case")
    if arguments.masks is None:
        if "zaffinedim" in given:
            note(
                "dsd train_tomo", f"--zaffinedim {arguments.zaffinedim}: without --masks there is no conformation code"
            )
        values, given = values | {"zaffinedim": NATIVE.zaffinedim}, given - {"zaffinedim"}
    if arguments.multigpu != (arguments.num_gpus > 1):
        alone, other = ("--multigpu", "--num-gpus N") if arguments.multigpu else ("--num-gpus", "--multigpu")
        note("dsd train_tomo", f"{alone} without {other}: one GPU, and -b {arguments.batch} in all for a step")
    if arguments.log_interval is None:
        values = values | {"log_interval": PLOT_INTERVAL if arguments.plot else NATIVE.log_interval}
    if arguments.warp:
        require_tables(arguments.star, arguments.datadir)
    fields = given - {*ONLY_MODE, *CTF_POWERS, "float16", "warp", "tilt_range", "tilt_step"}
    limit = tilt_limit(arguments)
    if limit is not None:
        values, fields = values | {"tilt_limit": limit}, fields | {"tilt_limit"}
    return to_config(TrainConfig, values), fields


def tilt_limit(arguments: argparse.Namespace) -> float | None:
    """The largest tilt to use: the narrower of ``--tilt-limit`` and ``--tilt-range`` with half a step to spare.

    OPUS-TOMO laid tilts on a grid of that range and step, each on the grid's nearest; here the real angles are used.
    """
    if arguments.tilt_range is None:
        if arguments.tilt_step is not None:
            note("dsd train_tomo", f"--tilt-step {arguments.tilt_step:g}: the angles are read from the CTF files")
        return arguments.tilt_limit
    reach = min(90.0, arguments.tilt_range + (arguments.tilt_step or 0.0) / 2)
    return reach if arguments.tilt_limit is None else min(reach, arguments.tilt_limit)


def require_tables(star: Path, datadir: Path | None) -> None:
    """UserError where the CTFs of the subtomograms would not be read from tables of Warp."""
    from opustomo.data.readers import subtomograms, transfer
    from opustomo.data.readers.files import Locator
    from opustomo.data.readers.source import read_source

    source = read_source(star, datadir=datadir)
    table = source.table
    if source.stacks:
        raise UserError(f"--warp: {star} has tilt images, not subtomograms; leave --warp out")
    locator = Locator(table.path, datadir)
    images = locator.require(subtomograms.image_files(source), source.files_are)
    found = transfer.find_tables(table, images, locator)
    if found is None or found[1] != ".csv":
        other = "no CTF tables (.csv in place of the ending in rlnCtfImage)" if found is None else "CTF STAR files"
        raise UserError(f"--warp: {star} has {other}; export with --output_ctf_csv, or leave --warp out")


def volume_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="PKL", help="weights.N.pkl of the run")
    add("-c", dest="config", type=Path, metavar="PKL", help="config.pkl beside the weights (a cross-check)")
    add("--zfile", type=Path, required=True, metavar="TXT", help="text file, one code per line")
    add("--Apix", type=float, metavar="A", help="pixel size of the volumes (default: the working pixel size)")
    add("-o", dest="output", type=Path, required=True, metavar="DIR", help="folder for the volumes")
    add("--prefix", default="reference", help="volumes are named PREFIX0.mrc, PREFIX1.mrc, ...")
    add("--flip", action="store_true", help="mirror the volumes (other hand)")


def eval_vol(arguments: argparse.Namespace, given: Given) -> int:
    """Translate to ``VolumesConfig``: the run is the folder of the weights, the epoch is in their name."""
    weights = existing_file(arguments.load)
    name = re.fullmatch(r"weights\.(\d+)\.pkl", weights.name)
    if name is None:
        raise UserError(f"--load {weights}: the epoch is read from the name weights.N.pkl; give that file of the run")
    if arguments.config is not None and existing_file(arguments.config).resolve().parent != weights.resolve().parent:
        raise UserError(f"-c {arguments.config}: does not lie beside {weights}; give the config.pkl of the same run")
    config = VolumesConfig(
        run=weights.parent,
        epoch=int(name[1]),
        zfile=existing_file(arguments.zfile),
        output=arguments.output,
        prefix=arguments.prefix,
        angpix=arguments.Apix,
        flip=arguments.flip,
    )
    return cli.call("volumes", config, frozenset())


COMMANDS = {
    "parse_pose_star": Command(
        "poses of a STAR file as a pickle, or one STAR file per class label",
        pose_arguments,
        parse_pose_star,
        "dsd parse_pose_star consensus.star -D 236 --Apix 2.1 -o poses.pkl",
    ),
    "train_tomo": Command(
        "train the network on subtomograms (opustomo train)",
        train_arguments,
        train_tomo,
        "dsd train_tomo consensus.star --poses consensus_pose_euler.pkl -n 40 -b 8 --zdim 12 --lr 5.e-5 \\\n"
        "      --beta-control 0.8 --beta cos -o run -r mask.mrc --downfrac 0.65 --lamb 0.8 --bfactor 4. \\\n"
        "      --templateres 160 --angpix 2.1 --estpose --datadir data/\n"
        "  dsd train_tomo consensus.star -o run --load latest        continue an interrupted run",
    ),
    "eval_vol": Command(
        "density maps for a list of codes (opustomo volumes)",
        volume_arguments,
        eval_vol,
        "dsd eval_vol --load run/weights.19.pkl -c run/config.pkl --zfile codes.txt --Apix 2.2 -o volumes",
    ),
    "prepare_subtomos": PREPARE_SUBTOMOS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Console script ``dsd``."""
    return run_command("dsd", "training commands in the forms of OPUS-TOMO, on opustomo", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
