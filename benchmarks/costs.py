"""Every aim of speed in one table: figure, aim, reached or not (make bench).

    python benchmarks/costs.py -o scale --markdown docs/benchmarks.md

The parts are benchmarks/step.py, cost.py, scale.py and ddp.py; their own tables are on docs/scaling.md.  The working
folder is that of scale.py; it keeps what was measured last of every part.  CPU-seconds are steadier than wall seconds
where other jobs run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ddp
import step as steps
import torch
from cost import cost, decode_rate, full
from scale import BOXES, COUNTS, boxes, helps, markdown, put, starts

MARKS = "<!-- costs -->", "<!-- end of costs -->"
BEFORE = {"step": 3.3, "decode": 3.2}  # CPU-s of the earlier program: of a particle's step, of a volume of 160^3


@dataclasses.dataclass(frozen=True)
class Line:
    """A figure and its aim; ``most``: a figure may not be above it, else not below; no aim: for orientation."""

    what: str
    figure: float
    unit: str = ""
    aim: float | None = None
    most: bool = True
    digits: int = 2

    def cells(self) -> list[str]:
        """What, figure, aim, reached."""
        number = f"{self.figure:,.{self.digits}f} {self.unit}".strip()
        if self.aim is None:
            return [self.what, number, "", ""]
        met = self.figure <= self.aim if self.most else self.figure >= self.aim
        return [
            self.what,
            number,
            f"{'<=' if self.most else '>='} {self.aim:g} {self.unit}".strip(),
            "yes" if met else "no",
        ]


def of_a_step(_: Path) -> Iterator[Line]:
    """A step over the bare network, and its cost at the earlier program's configuration."""
    for number in (0, 1, 3, 4):
        row = steps.ROWS[number]
        title = row.title.replace("the same", steps.ROWS[number - 1].title)
        for poses, aim in ((False, steps.AIM_WITHOUT), (True, steps.AIM)):
            own, _bare, ratio = steps.measure(dataclasses.replace(row, poses=poses), 15 if row.width < 1 else 3)
            words = "pose errors integrated out" if poses else "without pose errors"
            yield Line(f"step over its bare network, {title}; {words}", ratio, "", aim)
        if number >= 3:
            less = BEFORE["step"] / own
            words = "the earlier program's CPU-s per particle-step over this one's"
            yield Line(f"{words} ({own:.2f}): {title}", less, "", 3.0, most=False, digits=1)
    kept = cost(full(128)).particle.kept / 1e6
    yield Line("saved activations per particle-step, 128^3, template 160, float32", kept, "MB", 150.0, digits=0)
    yield Line("one volume of 160^3, width 1", decode_rate(), "CPU-s", BEFORE["decode"])


def of_a_start(folder: Path) -> Iterator[Line]:
    """Start-up and growth with the number of particles."""
    yield Line("`opustomo train --help`", float(helps()), "s", 0.5)
    table = starts(folder)
    cpu, wall = ([float(line[1].strip(")").split(" (")[i]) for line in table] for i in (0, 1))
    most = f"{COUNTS[-1]:,}"
    yield Line(f"first step of a continued run, {most} particles", wall[-1], "s", 5.0, digits=1)
    yield Line("the same in CPU-seconds", cpu[-1], "CPU-s", digits=1)
    growth = f"from {COUNTS[0]:,} to {most} particles, {COUNTS[-1] / COUNTS[0]:.0f} times as many"
    yield Line(f"the same, {growth}: times as long", cpu[-1] / cpu[0], digits=1)
    memory = [float(line[4]) for line in table]
    yield Line(f"memory of a whole run {growth}: times as much", memory[-1] / memory[0], digits=1)


def of_a_cache(folder: Path) -> Iterator[Line]:
    """Rows that are made, and growth with the box."""
    table = boxes(folder)
    for line in table:
        yield Line(f"cache made, {line[0]}^3 (a plain copy of it: {line[5]} MB/s)", float(line[4]), "MB/s", digits=1)
    times, voxels = float(table[-1][3]) / float(table[0][3]), (BOXES[-1] / BOXES[0]) ** 3
    words = f"CPU-time of a row from {BOXES[0]}^3 to {BOXES[-1]}^3, {voxels:.0f} times as many voxels: times as long"
    yield Line(words, times, "", voxels, digits=1)


def of_two(folder: Path) -> Iterator[Line]:
    """Throughput of two processes over that of one."""
    options = "-b 16 --width 0.25 --downfrac 1 --no-estpose --zdim 2"
    throughput, same = (statistics.median(values) for values in ddp.compare(folder / "ddp", 400, 2, 5, 6, options))
    yield Line(
        "throughput of 2 processes over that of 1, b particles each, working box 40", throughput, "", 1.7, most=False
    )
    yield Line("the same at the same whole batch, 16 particles each against 32", same)


PARTS = {"step": of_a_step, "start": of_a_start, "cache": of_a_cache, "two": of_two}


def main() -> None:
    """Measure, print, and put the table between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("scale"), help="working folder (kept)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="measured now, not read")
    parser.add_argument("--markdown", type=Path, help="page that receives the table")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in options.parts:
        stamp = f"{time.strftime('%Y-%m-%d')}, {os.getloadavg()[0]:.1f}"
        lines = [dataclasses.asdict(line) for line in PARTS[name](options.output)]
        (options.output / f"costs-{name}.json").write_text(json.dumps({"stamp": stamp, "lines": lines}))
    rows: list[list[str]] = []
    for name in PARTS:
        path = options.output / f"costs-{name}.json"
        kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"stamp": "", "lines": []}
        rows += [[*Line(**line).cells(), kept["stamp"]] for line in kept["lines"]]
    rows.append(
        ["a particle's step on a GPU of the H200's class, 128^3, template 160", "not measured", "<= 2 ms", "", ""]
    )
    machine = f"{os.cpu_count()} cores, one thread, torch {torch.__version__}"
    table = markdown(["what", "figure", "aim", "reached", "date, load at the beginning"], rows)
    text = f"`python benchmarks/costs.py`, {machine}.\n\n{table}"
    print(text)
    if options.markdown is not None:
        put(options.markdown, text, MARKS)


if __name__ == "__main__":
    main()
