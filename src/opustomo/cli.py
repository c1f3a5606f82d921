"""The ``opustomo`` command: verbs, help, and how every failure reaches the user as one line.

Owns: the table of verbs and ``run``, the wrapper that turns exceptions into messages and exit statuses.  A verb's
module is imported only when the verb runs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from opustomo import __version__
from opustomo.errors import Interrupted, ToldElsewhere, UserError
from opustomo.interruption import on_signal, stop_at_once


class Verb(NamedTuple):
    """Where a verb lives: its module, the config dataclass of its ``main``, and the example under its help.

    waits: for another process that writes into the same folder (others refuse, see ``monitor.RunLog``, or wait within).
    bare: has nothing to log, and works where not even torch can be loaded.
    """

    module: str
    config: str
    example: str
    waits: bool = False
    bare: bool = False


VERBS = {
    "doctor": Verb("doctor.verb", "DoctorConfig", "opustomo doctor\n  opustomo doctor /scratch/runs --json", bare=True),
    "check": Verb("data.check", "CheckConfig", "opustomo check particles.star -r mask.mrc"),
    "extract": Verb(
        "data.extract",
        "ExtractConfig",
        "opustomo extract picks.star -o extracted --tomogram tomograms/*.mrc --box 64 --tilt-range -60 60",
    ),
    "expand": Verb("data.symmetry", "ExpandConfig", "opustomo expand particles.star --symmetry D3 -o expanded.star"),
    "average": Verb("average", "AverageConfig", "opustomo average particles.star -o average"),
    "mask": Verb(
        "mask",
        "MaskConfig",
        "opustomo mask average/average.mrc -o mask\n"
        "  opustomo mask average/average.mrc -o mask --sigma 1.5 --dilate 15 --edge 25",
        waits=True,
    ),
    "linear": Verb("linear_stage", "LinearConfig", "opustomo linear particles.star -r mask.mrc -o linear"),
    "cache": Verb("preparation", "CacheConfig", "opustomo cache particles.star -r mask.mrc -o run/cache"),
    "train": Verb(
        "train",
        "TrainConfig",
        "opustomo train particles.star -r mask.mrc -o run -n 20 -b 8 --zdim 12\n"
        "  opustomo train --resume run                  continue an interrupted run exactly\n"
        "  opustomo train --resume run -n 40            go on to 40 epochs, schedules stretched",
    ),
    "status": Verb("status", "StatusConfig", "opustomo status run"),
    "encode": Verb("encode", "EncodeConfig", "opustomo encode run more_particles.star -o more"),
    "analyze": Verb("analysis.latents", "AnalyzeConfig", "opustomo analyze run --pcs 4 --clusters 16"),
    "volumes": Verb(
        "analysis.volumes",
        "VolumesConfig",
        "opustomo volumes run --kmeans 16 --angpix 4\n"
        "  opustomo volumes run --pc 1\n"
        "  opustomo volumes run --kmeans 16 --path 0 5 12",
    ),
    "movie": Verb(
        "analysis.movie", "MovieConfig", "opustomo movie run --pc 1\n  opustomo movie run/analyze.19/pc1 --level 0.02"
    ),
    "quality": Verb(
        "analysis.class_quality",
        "QualityConfig",
        "opustomo quality run --kmeans 16\n  opustomo quality run --kmeans 16 --difference 3 5",
    ),
    "select": Verb(
        "analysis.selection",
        "SelectConfig",
        "opustomo select particles.star --run run -o selected --kmeans 16 --classes 0 3 5",
        waits=True,
    ),
    "export": Verb(
        "analysis.export",
        "ExportConfig",
        "opustomo export run -o classes --kmeans 16\n"
        "  opustomo export run -o warp --kmeans 16 --corrected --format warp --coords-angpix 10",
        waits=True,
    ),
    "evaluate": Verb("analysis.evaluate", "EvaluateConfig", "opustomo evaluate run --truth simulated"),
    "simulate": Verb(
        "simulate.dataset",
        "SimulateConfig",
        "opustomo simulate -o simulated --preset two-state\n"
        "  opustomo simulate -o simulated --atoms closed.pdb open.pdb --snr 0.05",
        waits=True,
    ),
    "report": Verb("analysis.report", "ReportConfig", "opustomo report run"),
    "explore": Verb("explore.server", "ExploreConfig", "opustomo explore run"),
    "demo": Verb("demo", "DemoConfig", "opustomo demo -o demo"),
}

OVERVIEW = f"""\
opustomo {__version__}: structural heterogeneity of macromolecules from cryo-electron tomography

usage: opustomo VERB [options]        opustomo VERB --help: every option, with an example

Before training
  doctor     is this machine ready: packages, GPU, threads, memory, disk; and what to mend
  check      look at a data set in seconds and say what will be done about every finding
  extract    subtomograms from tomograms at the places of a particle list (Dynamo, PyTom, STOPGAP, M, ...)
  expand     particles of a symmetric molecule in every equivalent pose
  average    consensus map with half maps and FSC; proposes a solvent mask
  mask       solvent mask from a map by your own threshold, margin and edge
  linear     mean, components and the code of every particle in closed form, in about a minute
  cache      numerators and weights in the consensus frame (train makes them when missing)
Training
  train      train the network, started from the linear stage; writes a code for every particle
  status     what a run is doing, how far it is, or why it ended
  encode     codes and poses of other particles in a finished run, without fitting anything again
After training
  analyze    PCA, k-means and UMAP of the codes
  volumes    density maps at cluster centres, along components or at any list of codes
  movie      GIF, MP4 and a ChimeraX script of a series of maps, at one contour level
  quality    how good every class is, from half maps of the data, against random classes of its size
  select     STAR files of chosen classes, in the dialect that came in
  export     all classes as STAR files or lists for Warp, M and ArtiaX, with ChimeraX scripts that put them back
  report     one self-contained HTML page about a run
  explore    look at a run in the browser: turn the molecule at any code, pick particles, watch training
Known truth
  simulate   a data set with CTF, tilt scheme, noise and pose errors of which everything is known
  evaluate   compare a run with the truth of a simulated set
  demo       all of the above on a small simulated ribosome set, in minutes

The whole path:
  opustomo check particles.star
  opustomo average particles.star -o average              # look at average/average.png; gives average/mask.mrc
  opustomo train particles.star -r average/mask.mrc -o run
  opustomo analyze run --clusters 16
  opustomo volumes run --kmeans 16
  opustomo quality run --kmeans 16
  opustomo select particles.star --run run -o classes --kmeans 16
  opustomo report run                                     # open run/report.html

The shell completes verbs and options after: source <(opustomo --completion bash), or zsh, or fish.
dsd and dsdsh accept the command lines of OPUS-TOMO on the same functions: dsd -h, dsdsh -h.
OPUSTOMO_DEBUG=1 in the environment prints the traceback of a failure.
"""

# Failures of the machine that the user can mend, in words.
OS_MESSAGES = {
    errno.ENOENT: "not found",
    errno.ENOSPC: "disk full; free space or choose another folder with -o",
    errno.EDQUOT: "disk quota used up; free space or choose another folder with -o",
    errno.EACCES: "permission denied; choose another folder with -o or change its permissions",
    errno.EPERM: "not permitted; choose another folder with -o",
    errno.EROFS: "the file system is read-only; choose another folder with -o",
    errno.EEXIST: "a file stands where a folder is expected; remove it or choose another folder with -o",
    errno.ENOTDIR: "part of the path is a file, not a folder",
    errno.EISDIR: "a folder stands where a file is expected",
}
INTERRUPTED = 128  # exit status of a program that a signal has ended: this and the signal's number
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``opustomo``; returns the exit status (0 done, 1 failed, 2 mistake in input or options, 130
    interrupted, 128 + N ended by signal N)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(OVERVIEW, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"opustomo {__version__}")
        return 0
    if argv[0] == "--completion":
        return run("opustomo", partial(print_completion, argv[1:]))
    verb = argv[0]
    if verb not in VERBS:
        return run("opustomo", partial(unknown_command, "opustomo", verb, list(VERBS)))
    if "-h" in argv or "--help" in argv:
        return run(f"opustomo {verb}", partial(print_verb_help, verb))
    try:
        config, given = parse_verb(argv)
    except UserError as error:
        return fail(f"opustomo {verb}", f"{error} (opustomo {verb} --help lists the options)", 2)
    status = run(f"opustomo {verb}", partial(call, verb, config, given), output_folder(config))
    ended_well = status == 0 or status > INTERRUPTED
    if verb == "train" and ended_well and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        from opustomo.parallel import leave

        leave(status)
    return status


def dispatch(argv: Sequence[str]) -> int:
    """Run one verb's command line without the wrapper: exceptions reach the caller (the demo's stages)."""
    return call(argv[0], *parse_verb(argv))


def parse_verb(argv: Sequence[str]) -> tuple[Any, frozenset[str]]:
    """Config object of ``VERB options...`` and the names of the fields given explicitly; raises ``UserError``.

    Among those names ``resume`` stands for ``--resume``, which is no field: messages speak of what was typed.
    """
    from opustomo import config, options

    verb, arguments = argv[0], list(argv[1:])
    resumed = verb == "train" and "--resume" in arguments
    if resumed:
        arguments = resume_arguments(arguments)
    chosen, given = options.parse(getattr(config, VERBS[verb].config), arguments, f"opustomo {verb}")
    return chosen, given | {"resume"} if resumed else given


def resume_arguments(arguments: list[str]) -> list[str]:
    """``--resume RUN`` as what it stands for: the run's own STAR file, ``-o RUN --load latest``."""
    from opustomo.stored import read_config

    at = arguments.index("--resume")
    if at + 1 == len(arguments):
        raise UserError("--resume needs the run folder to continue, e.g. --resume run")
    folder = arguments[at + 1]
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        if (path.parent / "run.log").is_file():  # interrupted before the data were read
            raise UserError(f"--resume {folder}: not begun (no config.yaml yet); repeat the original command (run.log "
                            "begins with it)")  # fmt: skip
        raise UserError(f"--resume {folder}: no config.yaml there, so it is not a run folder of train")
    stored = read_config(Path(folder))
    if "star" not in stored:
        raise UserError(f"{path}: names no STAR file; use opustomo train STAR -o {folder} --load latest")
    return [str(stored["star"]), "-o", folder, "--load", "latest", *arguments[:at], *arguments[at + 2 :]]


def call(verb: str, config: Any, given: frozenset[str]) -> int:
    """Import the verb's module and run its ``main``; train is also told which options were typed."""
    from opustomo.data.atomic import exclusive

    # a lost connection is told in one line; torch's own C++ adds pages (read when it is imported)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    output: Path | None = getattr(config, "output", None)
    if verb not in ("report", "expand") and output is not None and output.is_file():
        raise UserError(f"-o {output}: is a file; give a folder")
    if not VERBS[verb].bare and not logging.getLogger("opustomo").handlers:
        from opustomo.monitor import setup_log

        setup_log(None, getattr(config, "verbose", False))
    function = importlib.import_module(f"opustomo.{VERBS[verb].module}").main
    with exclusive(config.output) if VERBS[verb].waits else nullcontext():
        status = _train(function, config, given) if verb == "train" else int(function(config) or 0)
    if status == 0:
        end_log(f"opustomo {verb}: done")
    return status


def _train(function: Callable[..., int], config: Any, given: frozenset[str]) -> int:
    from opustomo import parallel
    from opustomo.training import job

    count = job.processes(config, given)
    return parallel.launch(count, partial(member, config, given)) if count > 1 else int(function(config, given) or 0)


def end_log(line: str) -> None:
    """What went wrong on the way once more, and the last line of a log that ends as it should."""
    logger = logging.getLogger("opustomo")
    for handler in logger.handlers:
        if (repeat := getattr(handler, "repeat", None)) is not None:
            repeat()
    to_file(logging.INFO, line)


def close_log() -> None:
    """Close the run's log, which this process holds as long as it is open."""
    logger = logging.getLogger("opustomo")
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
            handler.close()


def to_file(level: int, line: str) -> None:
    """A line of the run's log that is not shown."""
    logger = logging.getLogger("opustomo")
    if logger.handlers:
        logger.log(level, "%s", line, extra={"file_only": True})


def member(config: Any, given: frozenset[str]) -> int:
    """One of the processes of ``train`` on several GPUs."""
    return run("opustomo train", partial(call, "train", config, given), config.output)


def print_completion(words: list[str]) -> int:
    """The script that completes the commands in the shell that is named."""
    from opustomo.completion import print_script

    return print_script(words)


def print_verb_help(verb: str) -> None:
    """Options of one verb, then its example."""
    from opustomo import config, options

    options.print_help(getattr(config, VERBS[verb].config), f"opustomo {verb}")
    if verb == "train":
        print("to continue a run:\n  --resume RUN   in place of STAR and -o: the run's own options hold\n")
    print(f"example:\n  {VERBS[verb].example}")


def unknown_command(command: str, word: str, known: Sequence[str]) -> int:
    """Raise the ``UserError`` for a verb or subcommand that does not exist."""
    from opustomo.options import closest

    raise UserError(f"there is no '{word}'{closest(word, known)} (available: {', '.join(known)}; see {command} -h)")


def output_folder(config: Any) -> Path | None:
    """The folder a verb writes to (its output, else its run folder), where an error log may go; it may not exist."""
    output: Path | None = getattr(config, "output", None)
    return output if output is not None and output.suffix != ".html" else getattr(config, "run", None)


def run(command: str, function: Callable[[], int | None], output: Path | None = None) -> int:
    """Call ``function`` and return an exit status; every failure becomes one line on stderr.

    ``command`` is what the line starts with (``opustomo train``, ``dsdsh analyze``); ``output`` the folder that
    receives ``error.log`` with the traceback of an internal error (the system's temporary folder when None).
    """
    let_others_work()
    try:
        with on_signal(stop_at_once):
            status = function() or 0
            sys.stdout.flush()
            return status
    except Interrupted as signalled:
        return fail(command, str(signalled), INTERRUPTED + signalled.number, told=signalled.told)
    except KeyboardInterrupt:
        return fail(command, "interrupted", 130)
    except BrokenPipeError:
        drop_unwritten()  # the reader of a pipe left (`opustomo check ... | head`)
        return 141
    except Exception as error:
        drop_unwritten()
        if os.environ.get("OPUSTOMO_DEBUG") == "1":
            traceback.print_exc()
        return fail(command, *explain(error, output), told=isinstance(error, ToldElsewhere))
    finally:
        close_log()


def let_others_work() -> None:
    """Threads that wait for each other give their core away after some microseconds (before torch is loaded).

    OpenMP's own setting is 300,000 turns of a loop, 14 ms: where other programs need the cores, threads hold them to
    wait for one that has none.  Training beside such took twice as long (benchmarks/waiting.py).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def drop_unwritten() -> None:
    """What stdout holds and cannot write: Python would complain again at exit, with a status of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):  # no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: Exception, output: Path | None) -> tuple[str, int]:
    """Message and exit status for an exception."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, OSError) and error.errno in OS_MESSAGES and (error.filename or error.errno != errno.ENOENT):
        where = f"{error.filename}: " if error.filename else ""
        return where + OS_MESSAGES[error.errno], 2
    text = str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text.lower() for words in OUT_OF_MEMORY)
    ):
        return "out of memory; use a smaller batch (-b), a smaller --downfrac or fewer --workers", 1
    reason = " ".join(f"{type(error).__name__}: {text}".split())
    return f"internal error: {reason}; the traceback is in {write_traceback(output)}, please report it", 1


def write_traceback(output: Path | None) -> Path:
    """Write the traceback being handled to ``output``/error.log or, failing that, to the temporary folder."""
    from opustomo.data.atomic import write_text

    text = traceback.format_exc()
    if output is not None and output.is_dir():
        try:
            path = output / "error.log"
            write_text(path, text)
            return path
        except UserError:
            pass
    try:
        with tempfile.NamedTemporaryFile("w", prefix="opustomo-", suffix="-error.log", delete=False) as file:
            file.write(text)
    except OSError:  # this disk is full as well
        return Path(os.devnull)
    return Path(file.name)


def fail(command: str, message: str, status: int, *, told: bool = False) -> int:
    """One line on stderr and at the end of the run's log, so that a log read later ends with the reason.

    told: not on stderr, where another process has said it.
    """
    line = f"{command}: {message}" if status > INTERRUPTED else f"{command}: error: {message}"
    if not told:
        print(line, file=sys.stderr)
    to_file(logging.ERROR, line)
    return status


if __name__ == "__main__":
    sys.exit(main())
