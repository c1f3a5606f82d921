"""One against several processes on CPUs: wall and CPU-seconds of an epoch.

    python benchmarks/ddp.py -o bench-ddp -n 400 --repeats 5

Several processes take batches of b each, as ``--multigpu`` does (throughput); one process with the same whole batch is
measured too (what the same steps gain).  Runs of all kinds take turns, so that what else the machine does hits all;
figures are medians, a ratio is the median of the ratios of neighbours.  One thread for each process.
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


def base(data: Path, run: Path, train: str) -> Path:
    """A run of one epoch, to be continued."""
    if not (run / "z.0.pkl").exists():
        star, mask = str(data / "particles.star"), str(data / "mask.mrc")
        opustomo("train", star, "-r", mask, "-o", str(run), "-n", "1", "--device", "cpu", *train.split())
    return run


def compare(
    output: Path, particles: int, processes: int, repeats: int, count: int, train: str
) -> tuple[list[float], list[float]]:
    """Ratios of neighbouring runs of ``count`` epochs, one process over several: with b particles for each process
    (throughput), and with the same batches; prints medians."""
    os.environ["OMP_NUM_THREADS"] = "1"
    data = output / "set"
    if not (data / "particles.star").exists():
        opustomo("simulate", "-o", str(data), "--preset", "two-state", "--n", str(particles))
    one = base(data, output / "one", train)
    several = base(data, output / f"each{processes}", f"{train} --multigpu --num-gpus {processes}")
    kinds = {
        "1, batch b": (one, 1), f"{processes}, b each": (several, processes),
        f"1, batch {processes} b": (several, 1),
    }  # fmt: skip
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind, (run, number) in kinds.items():
            seconds, cpu = epochs(run, number, 1 + count)
            found[kind].append((statistics.median(seconds), cpu))
            print(f"{kind}: epoch {found[kind][-1][0]:.2f} s, the whole run {cpu:.1f} CPU-s", flush=True)
    print("| processes | wall s per epoch, median | CPU-s of the run, median |\n|---|---|---|")
    for kind, times in found.items():
        wall, cpu_seconds = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {kind} | {wall:.2f} | {cpu_seconds:.1f} |")
    alone, together, large = ([wall for wall, _ in times] for times in found.values())
    ratios = tuple([a / b for a, b in zip(other, together, strict=True)] for other in (alone, large))
    for words, values in zip(("throughput", "the same batches"), ratios, strict=True):
        print(f"{words}: {statistics.median(values):.2f} times ({min(values):.2f} to {max(values):.2f})")
    return ratios[0], ratios[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-n", "--particles", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="measured in each repeat")
    parser.add_argument(
        "--train", default="-b 16 --width 0.25 --downfrac 1 --no-estpose --zdim 2", help="options of train"
    )
    options = parser.parse_args()
    compare(options.output, options.particles, options.processes, options.repeats, options.epochs, options.train)


if __name__ == "__main__":
    main()
