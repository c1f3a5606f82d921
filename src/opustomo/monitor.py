"""What a running program tells: the log, progress with rate and time left, the table of metrics, peak memory.

Owns: run.log and metrics.csv of a run folder and the lines on stderr.  Results for machines go to stdout, never here.
"""

from __future__ import annotations

import csv
import logging
import math
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from opustomo import __version__
from opustomo.data.atomic import atomic, hold, remove_leftovers
from opustomo.errors import UserError, printable

Item = TypeVar("Item")

METRIC_COLUMNS = (
    "epoch", "particles", "loss", "nll", "kl", "prior", "regulariser", "disentanglement",
    "val_nll", "val_kl", "val_elbo", "linear_val_elbo", "beta", "lr", "seconds", "particles_per_second",
)  # fmt: skip
# by stages that log into a folder, which is theirs alone meanwhile
WRITTEN = ("weights", "z", "pose", "state", "start", "split", "config", "metrics", "mask", "tmp")
SECONDS_BETWEEN_LINES = 10.0
SCROLLED = 8  # lines
FILE_ONLY = {"file_only": True}  # extra of a record that is not for stderr
NOTABLE = 0.05  # nats per held-out particle: smaller differences are not worth a word


class StderrHandler(logging.Handler):
    """Plain lines on stderr that do not tear a progress bar apart; warnings are marked as such."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []
        self.since = 0  # lines after the first of them

    def repeat(self) -> None:
        """Say the warnings again, at the end, where they have scrolled away meanwhile."""
        warnings, self.warnings = self.warnings, []
        if self.since > SCROLLED:
            logging.getLogger("opustomo").info("%d warning(s), once more:", len(warnings))
            for text in warnings:
                logging.getLogger("opustomo").info("- %s", text)

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        if record.levelno == logging.WARNING:
            self.warnings.append(record.getMessage())
        self.since = self.since + 1 if self.warnings else 0
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(printable(mark + record.getMessage()), file=sys.stderr)


class RunLog(logging.FileHandler):
    """run.log: held by this process while it is open; a line that finds the disk full is lost, the work goes on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "run.log", encoding="utf-8", errors="backslashreplace")
        try:
            assert self.stream is not None
            hold(self.stream, folder)
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """Also with the disk full: what the stream still holds is lost."""
        with suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: logging's own would print a traceback."""


def setup_log(output: Path | None, verbose: bool) -> logging.Logger:
    """The program's logger, writing plain lines to stderr and dated ones to ``output``/run.log (appended).

    Makes ``output`` where it is missing; None: no file.  ``verbose`` also shows debug lines.  Raises ``UserError``
    when the folder cannot be made or written.
    """
    logger = logging.getLogger("opustomo")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.addHandler(StderrHandler())
    if output is None:
        return logger
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = RunLog(output)
    except OSError as error:
        raise UserError(f"-o {output}: cannot be written ({error.strerror}); choose another folder with -o") from None
    for name in WRITTEN:
        remove_leftovers(output, name)
    remove_leftovers(output / "linear", "*")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(file)
    command = f"opustomo {__version__}, Python {sys.version.split()[0]}: {shlex.join(sys.argv)}"
    file.handle(logger.makeRecord(logger.name, logging.INFO, __file__, 0, command, (), None))
    return logger


def progress(
    iterable: Iterable[Item],
    total: int,
    what: str,
    unit: str = "particles",
    size: Callable[[Item], int] | None = None,
) -> Iterator[Item]:
    """Pass ``iterable`` through while telling how far it is, at which rate, and how long it will take.

    ``total`` counts ``unit``; an item counts as one, or as ``size(item)`` (a batch of particles: ``size=len``).
    A bar on a terminal; a line of the log every 10 seconds, which a terminal does not show, and a last one if there was
    any; nothing in a process whose log is quiet.
    """
    weight = size or (lambda item: 1)
    logger, shown = logging.getLogger("opustomo"), sys.stderr.isatty()
    if not logger.isEnabledFor(logging.INFO):
        yield from iterable
        return
    extra = FILE_ONLY if shown else {}
    start = told = time.monotonic()
    done = 0
    with tqdm(total=total, desc=what, unit=f" {unit}", dynamic_ncols=True, leave=False, disable=not shown) as bar:
        for item in iterable:
            yield item
            bar.update(weight(item))
            done += weight(item)
            now = time.monotonic()
            if now - told >= SECONDS_BETWEEN_LINES and done < total:
                told = now
                rate = done / (now - start)
                left = duration((total - done) / rate)
                text = f"{what}: {done}/{total} {unit} ({done / total:.0%}), {rate:.3g} {unit}/s, {left} left"
                logger.info("%s", text, extra=extra)
    if told != start:
        spent = time.monotonic() - start
        text = f"{what}: {done} {unit} in {duration(spent)} ({done / spent:.3g} {unit}/s)"
        logger.info("%s", text, extra=extra)


def duration(seconds: float) -> str:
    """A time in words: ``4.2 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Metrics:
    """metrics.csv: one row per log interval, written at once, so that a killed run keeps what it had.

    ``epoch`` is the first epoch this process will train, from ``seen`` particles on; rows after that, left by an
    interrupted attempt, are dropped, and so is a row that was cut off.
    """

    def __init__(self, path: Path, epoch: int = 0, seen: int = 0) -> None:
        kept = [row for row in read_rows(path) if _is_before(row, epoch, seen)]
        with atomic(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, METRIC_COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        self.path = path

    def append(self, **values: float | None) -> None:
        """Add a row; a column left out or None stays empty.  Raises ``ValueError`` for a column that does not exist."""
        cells = {name: "" if value is None else f"{value:.8g}" for name, value in values.items()}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, METRIC_COLUMNS).writerow(cells)


def _is_before(row: dict[str, str], epoch: int, seen: int) -> bool:
    ended = bool(row.get("val_elbo"))  # the line of a whole epoch
    return int(row["epoch"]) < epoch or (int(row["epoch"]) == epoch and not ended and _number(row) <= seen)


def _number(row: dict[str, str]) -> float:
    try:
        return float(row["particles"])
    except (KeyError, ValueError):
        return math.inf


def read_rows(path: Path) -> list[dict[str, str]]:
    """The complete rows of a metrics file, [] when there is none."""
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as file:
        rows = list(csv.DictReader(line.replace("\0", "") for line in file))
    return [row for row in rows if None not in row.values() and row.get("epoch", "").lstrip("-").isdigit()]


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in GB (10^9 bytes); workers are not counted."""
    try:
        # not getrusage where this exists: a process started by a large one inherits its parent's peak there
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
