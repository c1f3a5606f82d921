"""One against several processes on CPUs: wall and CPU-seconds of an epoch at the same global batch.

    OMP_NUM_THREADS=1 python benchmarks/ddp.py -o bench-ddp -n 400 --repeats 5

Runs of both kinds take turns, so that what else the machine does hits both; figures are medians, the ratio is the
median of the ratios of neighbours.  One thread for each process.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

PYTHON = sys.executable


def opustomo(*words: str) -> None:
    subprocess.run([PYTHON, "-m", "opustomo", *words], check=True)


def epochs(run: Path, processes: int, last: int) -> tuple[list[float], float]:
    """Continue a copy of ``run`` to ``last`` epochs: wall seconds of its steps in each, and CPU-seconds of it all."""
    copy = run.with_name(f"{run.name}-{processes}")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["-m", "opustomo", "train", "--resume", str(copy), "-n", str(last)]
    subprocess.run([PYTHON, *(launcher if processes > 1 else []), *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (copy / "metrics.csv").open(newline="") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file) if row["seconds"]][1:]
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(output: Path, particles: int, processes: int, repeats: int, count: int, train: str) -> list[float]:
    """Speed-ups of ``count`` epochs in neighbouring runs of one and of several processes; prints medians."""
    os.environ["OMP_NUM_THREADS"] = "1"
    data, run = output / "set", output / "run"
    if not (run / "z.0.pkl").exists():
        opustomo("simulate", "-o", str(data), "--preset", "two-state", "--n", str(particles))
        star, mask = str(data / "particles.star"), str(data / "mask.mrc")
        opustomo("train", star, "-r", mask, "-o", str(run), "-n", "1", "--device", "cpu", *train.split())
    found: dict[int, list[tuple[float, float]]] = {1: [], processes: []}
    for _ in range(repeats):
        for number, results in found.items():
            seconds, cpu = epochs(run, number, 1 + count)
            results.append((statistics.median(seconds), cpu))
            print(f"{number} process(es): epoch {results[-1][0]:.2f} s, the whole run {cpu:.1f} CPU-s", flush=True)
    one, several = (list(zip(*results, strict=True)) for results in found.values())
    print("| processes | wall s per epoch, median | CPU-s of the run, median |\n|---|---|---|")
    for number, (wall, cpu_seconds) in zip(found, (one, several), strict=True):
        print(f"| {number} | {statistics.median(wall):.2f} | {statistics.median(cpu_seconds):.1f} |")
    ratios = [a / b for a, b in zip(one[0], several[0], strict=True)]
    print(f"speed-up, median of {len(ratios)} neighbours: {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-n", "--particles", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="measured in each repeat")
    parser.add_argument("--train", default="-b 16 --width 0.25", help="options of train")
    options = parser.parse_args()
    compare(options.output, options.particles, options.processes, options.repeats, options.epochs, options.train)


if __name__ == "__main__":
    main()
