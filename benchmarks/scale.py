"""Start-up, cache and memory against the number of particles and the size of the box (make bench-scale).

    python benchmarks/scale.py -o scale --markdown docs/scaling.md

A set of many particles is 64 simulated ones under many names: hard links, so that it takes no space, while every name
has to be found, every CTF STAR read and every row written as in a real set.  In the runs that are only there to be
continued the rows of copies are computed once; what is timed never is.  CPU-seconds do not depend on what else a
machine does as much as wall seconds do; both are given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SOURCES = 64
COUNTS = (500, 5_000, 50_000)
BOXES = (32, 64, 96)
CACHED = {32: 400, 64: 100, 96: 40}  # particles whose rows are made
OPTIONS = ("--no-estpose", "--zdim", "1", "--workers", "1")

# What runs in the process that is measured; the last line of its output is JSON.
CHILD = """
import json, sys, threading, time
began = time.time()
def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
mode, *argv = sys.argv[1:]
from opustomo import cli, train
class Stop(BaseException): pass
if mode == "make":
    from opustomo.data import filling, noise
    from opustomo.data.observe import observe
    made = {}
    def copies(particles, rows, grid, model, workers=0, crop=None, then=None):
        for i in rows:
            key = (i % SOURCES, crop, id(model))
            if key not in made:
                made[key] = (model, *observe(particles, i, grid, model, crop))
            row = (i, *made[key][1:])
            if then is not None:
                then(*row)
            yield row
    filling.observe_all = noise.observe_all = copies
figures = {}
if mode == "rows":
    from opustomo.data import cache
    fill = cache.fill
    def timed(*values):
        cpu, wall = time.process_time(), time.time()
        filled = fill(*values)
        figures.update(rows_cpu=time.process_time() - cpu, rows_wall=time.time() - wall)
        return filled
    cache.fill = timed
if mode == "first":
    step = train.train_step
    def first(*values):
        step(*values)
        raise Stop
    train.train_step = first
try:
    code = cli.main(argv)
    assert code == 0, code
except Stop:
    pass
print(json.dumps(figures | {"wall": time.time() - began, "cpu": time.process_time(), "peak": peak[0]}))
""".replace("SOURCES", str(SOURCES))


def child(mode: str, *argv: str | Path) -> dict[str, float]:
    """Wall and CPU seconds and the largest anonymous memory of a command line."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, mode, *map(str, argv)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, argv))}: {done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    figures["told"] = next(map(float, re.findall(r"memory: about ([\d.]+) GB", done.stderr)), float("nan"))
    return figures


def simulate(folder: Path, box: int) -> Path:
    """64 particles of one box."""
    if not (folder / "particles.star").exists():
        angpix = str(384 / box)
        sizes = ("--n", str(SOURCES), "--box", str(box), "--angpix", angpix)
        child("run", "simulate", "-o", folder, "--preset", "two-state", *sizes)
    return folder


def copies(source: Path, folder: Path, count: int) -> Path:
    """The particles of ``source`` under ``count`` names."""
    if (folder / "particles.star").exists():
        return folder
    lines = (source / "particles.star").read_text().splitlines()
    rows = [line for line in lines if "subtomo/" in line]
    (folder / "subtomo").mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "mask.mrc", folder / "mask.mrc")
    table = [line for line in lines if line not in set(rows)]
    for i in range(count):
        old, new = f"subtomo/p{i % SOURCES:05d}", f"subtomo/q{i:06d}"
        for suffix in (".mrc", "_ctf.star"):
            os.link(source / (old + suffix), folder / (new + suffix))
        table.append(rows[i % SOURCES].replace(old, new))
    (folder / "particles.star").write_text("\n".join(table) + "\n")
    return folder


def starts(folder: Path) -> list[list[str]]:
    """First step of a continued run, and of one that must read its CTF STARs, per number of particles."""
    table = []
    source = simulate(folder / "box32", 32)
    for count in COUNTS:
        data, run = copies(source, folder / f"set{count}", count), folder / f"run{count}"
        if not (run / "z.0.pkl").exists():
            shutil.rmtree(run, ignore_errors=True)
            mask = ("-r", data / "mask.mrc", "-o", run, "-n", "1", "-b", "256")
            made = child("make", "train", data / "particles.star", *mask, *OPTIONS)
            (folder / f"made{count}.json").write_text(json.dumps(made))
        made = json.loads((folder / f"made{count}.json").read_text())
        child("first", "train", "--resume", run, "-n", "2")  # so that every file is in the system's memory
        packed = child("first", "train", "--resume", run, "-n", "2")
        (run / "cache" / "ctf.npy").unlink(missing_ok=True)
        parsed = child("first", "train", "--resume", run, "-n", "2")
        table.append([
            f"{count:,}", seconds(packed), seconds(parsed), f"{packed['peak'] / 1e9:.2f}",
            f"{made['peak'] / 1e9:.2f}", f"{made['told']:.1f}", f"{made['cpu'] / count * 1e3:.1f}",
        ])  # fmt: skip
    return table


def boxes(folder: Path) -> list[list[str]]:
    """Rows that are made and a cache that is copied, per box, at full resolution."""
    table = []
    for box in BOXES:
        source, count = simulate(folder / f"box{box}", box), CACHED[box]
        data, cache = copies(source, folder / f"cached{box}", count), folder / f"cache{box}"
        shutil.rmtree(cache, ignore_errors=True)
        made = child("rows", "cache", data / "particles.star", "-r", data / "mask.mrc", "-o", cache, "--downfrac", "1")
        size = sum(path.stat().st_size for path in cache.iterdir())
        began = time.time()
        shutil.copytree(cache, folder / "copy")
        subprocess.run(["sync", *map(str, (folder / "copy").iterdir())], check=True)
        copied = time.time() - began
        shutil.rmtree(folder / "copy")
        table.append([
            f"{box}", f"{count}", f"{size / count / 1e6:.2f}", f"{made['rows_cpu'] / count * 1e3:.0f}",
            f"{size / made['rows_wall'] / 1e6:.1f}", f"{size / copied / 1e6:.0f}", f"{made['peak'] / 1e9:.2f}",
        ])  # fmt: skip
    return table


def seconds(figures: dict[str, float]) -> str:
    """CPU and wall."""
    return f"{figures['cpu']:.1f} ({figures['wall']:.1f})"


def helps() -> str:
    """``opustomo train --help``: the best of five, since nothing but the machine makes it slower."""
    best = float("inf")
    for _ in range(5):
        began = time.time()
        subprocess.run([sys.executable, "-m", "opustomo", "train", "--help"], capture_output=True, check=True)
        best = min(best, time.time() - began)
    return f"{best:.2f}"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def put(page: Path, text: str, marks: tuple[str, str]) -> None:
    """Replace what is between two marks of a page."""
    head, rest = page.read_text().split(marks[0])
    page.write_text(f"{head}{marks[0]}\n\n{text}\n\n{marks[1]}{rest.split(marks[1])[1]}")


def main() -> None:
    """Measure, print, and put the tables between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("scale"), help="working folder (kept)")
    parser.add_argument("--markdown", type=Path, help="page that receives the tables")
    arguments: Any = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    text = "\n\n".join([
        f"`python benchmarks/scale.py`, {cores} cores, load of the machine {load:.1f} when it began. "
        f"`opustomo train --help`: {helps()} s.",
        markdown(
            ["particles", "first step of a continued run, CPU-s (wall)", "the same, CTF STARs not packed yet",
             "its memory, GB", "whole run: memory, GB", "estimated, GB", "CPU-ms per particle"],
            starts(arguments.output),
        ),
        markdown(
            ["box", "particles", "MB per row", "CPU-ms per row", "cache written, MB/s", "plain copy of it, MB/s",
             "memory, GB"],
            boxes(arguments.output),
        ),
    ])  # fmt: skip
    print(text)
    if arguments.markdown:
        put(arguments.markdown, text, ("<!-- measured -->", "<!-- end -->"))


if __name__ == "__main__":
    main()
