"""What it costs that threads wait for each other: training with two threads, alone and beside other programs.

    python benchmarks/waiting.py -o bench-waiting --repeats 3

"own": the program's setting (``cli.let_others_work``), "OpenMP's": 300,000 turns of a loop before a thread gives its
core away.  Runs of both kinds take turns; medians.  The other programs are two loops that do nothing else.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ddp import opustomo

SETTINGS = {"own": None, "OpenMP's": "300000", "one thread": None}
LOOP = "while True: pass"


def train(data: Path, run: Path, setting: str) -> tuple[float, float]:
    """Wall and CPU-seconds of a whole run."""
    shutil.rmtree(run, ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    if (turns := SETTINGS[setting]) is not None:
        environment["GOMP_SPINCOUNT"] = turns
    threads = "1" if setting == "one thread" else "2"
    options = ["-n", "2", "--workers", threads, "--device", "cpu"]
    words = ["train", str(data / "particles.star"), "-r", str(data / "mask.mrc"), "-o", str(run), *options]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    command = [sys.executable, "-m", "opustomo", *words]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    wall, after = time.time() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    data = options.output / "set"
    if not (data / "particles.star").exists():
        opustomo("simulate", "-o", str(data), "--preset", "two-state", "--n", "300", "--snr", "0.1")
    print("| other programs | setting | wall s, median | CPU s | wall over own |\n|---|---|---|---|---|")
    for others in (0, 2):
        loops = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(others)]
        try:
            found = {setting: list[tuple[float, float]]() for setting in SETTINGS}
            for _ in range(options.repeats):
                for setting, times in found.items():
                    times.append(train(data, options.output / "run", setting))
        finally:
            for loop in loops:
                loop.kill()
        for setting, times in found.items():
            wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(a[0] / b[0] for a, b in zip(times, found["own"], strict=True))
            print(f"| {others} | {setting} | {wall:.1f} | {cpu:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
