"""``opustomo status``: what a run is doing, or why it ended.

Owns: reading a run's log, metrics and checkpoints for that; nothing is written, and a run that is going on is not
disturbed.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from opustomo import checkpoint
from opustomo.config import StatusConfig
from opustomo.data.atomic import is_held
from opustomo.errors import UserError, printable
from opustomo.monitor import duration, read_rows
from opustomo.stored import read_config

LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (DEBUG|INFO|WARNING|ERROR) +(.*)")
BEGINS = re.compile(r"opustomo \S+, Python \S+: (.*)")
TAIL = 1 << 20  # bytes of a log that are read


@dataclass(frozen=True)
class Status:
    """state: running, done, interrupted, failed, or died (without a word); times as in the log."""

    state: str
    since: str  # when the last command began
    command: str
    last: str  # line of the log
    at: str
    warnings: list[str]
    epoch: int | None = None  # 0-based, that is being trained or was last
    epochs: int | None = None
    particles_per_second: float | None = None
    seconds_left: float | None = None  # of training, at this rate
    held_out: float | None = None  # nats per particle, after the last epoch
    linear: float | None = None
    best_epoch: int | None = None
    checkpoints: list[int] | None = None
    kept_minutes_ago: float | None = None  # the last file to go on from
    next: str = ""


def main(config: StatusConfig) -> int:
    """Print the status."""
    found = status_of(config.run)
    print(json.dumps(asdict(found), indent=1) if config.json else in_words(config.run, found))
    return 0


def status_of(run: Path) -> Status:
    """Read it.  Raises UserError where there is no run."""
    path = run / "run.log"
    if not path.is_file():
        found = "is no folder" if not run.is_dir() else "has no run.log"
        raise UserError(f"{run}: {found}; give the folder that `train -o` or `linear -o` wrote")
    lines = _last_session(path)
    since, command = lines[0][0], lines[0][2]
    at, level, last = lines[-1]
    held = is_held(path)
    if held:
        state = "running"
    elif last.endswith(": done"):
        state = "done"
    elif level == "ERROR":
        state = "interrupted" if re.match(r"\S+ \S+: interrupted", last) else "failed"
    else:
        state = "died"
    warnings = list(dict.fromkeys(text for _, kind, text in lines if kind == "WARNING"))
    states = checkpoint.states_of(run)
    kept = (time.time() - max(path.stat().st_mtime for path in states)) / 60.0 if states else None
    return Status(
        state, since, command, last, at, warnings, **_progress(run),  # type: ignore[arg-type]
        checkpoints=checkpoint.epochs_of(run), kept_minutes_ago=kept,
        next=_next(run, command) if state in ("interrupted", "failed", "died") else "",
    )  # fmt: skip


def _next(run: Path, command: str) -> str:
    if (run / "config.yaml").is_file() and read_config(run).get("kind") == "network":
        return f"opustomo train --resume {run}"
    return f"the same again: {command}"


def _last_session(path: Path) -> list[tuple[str, str, str]]:
    """Time, level and text of the lines since the last command began."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        text = file.read().decode("utf-8", "replace")
    lines = [(m[1], m[2], printable(m[3])) for m in map(LINE.fullmatch, text.splitlines()) if m]
    starts = [i for i, (_, _, words) in enumerate(lines) if BEGINS.match(words)]
    if not lines:
        raise UserError(f"{path}: has no line of this program; the run is in its first second, or the file is damaged")
    session = lines[starts[-1] if starts else 0 :]
    if command := BEGINS.match(session[0][2]):
        session[0] = (session[0][0], session[0][1], command[1])
    return session


def _progress(run: Path) -> dict[str, float | int | None]:
    """How far training is, from metrics.csv and config.yaml; {} where it has not begun."""
    rows = read_rows(run / "metrics.csv")
    if not rows:
        return {}
    config = read_config(run)
    epochs = int(config.get("epochs", 0))
    ended = [row for row in rows if row.get("val_elbo")]
    rates = [float(row["particles_per_second"]) for row in rows if row.get("particles_per_second")]
    found: dict[str, float | int | None] = {"epoch": int(rows[-1]["epoch"]), "epochs": epochs}
    if ended:
        bounds = {int(row["epoch"]): float(row["val_elbo"]) for row in ended}
        found |= {
            "held_out": float(ended[-1]["val_elbo"]), "linear": float(ended[-1]["linear_val_elbo"]),
            "best_epoch": max(bounds, key=lambda epoch: bounds[epoch]),
        }  # fmt: skip
    if rates:
        each = int(config["particles"]) * (1.0 - float(config.get("valfrac", 0.0)))
        left = max(0.0, epochs * each - float(rows[-1]["particles"]))
        found |= {"particles_per_second": rates[-1], "seconds_left": left / rates[-1]}
    return found


def in_words(run: Path, found: Status) -> str:
    """A few lines for a person."""
    words = {
        "running": "running", "done": "done", "interrupted": "interrupted", "failed": "failed",
        "died": "ended without a word: killed, out of memory, or the machine failed (the system's log may tell)",
    }  # fmt: skip
    lines = [f"{run}: {words[found.state]}", f"  command   {found.command} (begun {found.since})"]
    lines.append(f"  last line {found.last} ({found.at})")
    if found.epoch is not None:
        text = f"  training  epoch {found.epoch} of {found.epochs} (0-based)"
        if found.state == "running" and found.particles_per_second and found.seconds_left is not None:
            text += f", {found.particles_per_second:.3g} particles/s, about {duration(found.seconds_left)} left"
        lines.append(text)
    if found.held_out is not None and found.linear is not None:
        lines.append(
            f"  held out  {found.held_out:.2f} nats per particle after the last epoch, linear stage "
            f"{found.linear:.2f}; best after epoch {found.best_epoch}"
        )
    if found.kept_minutes_ago is not None:
        epochs = ", ".join(map(str, found.checkpoints or [])) or "none yet"
        lines.append(f"  kept      {duration(60 * found.kept_minutes_ago)} ago; epochs with codes: {epochs}")
    lines += [f"  warning   {text}" for text in found.warnings]
    if found.next:
        lines.append(f"  go on     {found.next}")
    return "\n".join(lines)
