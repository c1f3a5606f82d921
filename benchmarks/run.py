"""The common benchmark set: simulate, linear stage, default training run, every metric; a table of all seeds.

    python benchmarks/run.py --simulator ../shared/tools/simulate_phantom.py -o bench --seeds 1 2 3

The simulator is independent of this program.  CPU-seconds are those of the child processes, wall seconds are printed
beside them; machines are noisy, so compare figures of one run only.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FIGURES = {
    "composition.auc": "AUC",
    "composition.gmm_ari": "GMM ARI",
    "composition.kmeans_ari": "k-means ARI",
    "composition.ica_auc": "one ICA axis AUC",
    "conformation.hinge.probe_corr": "hinge probe",
    "conformation.hinge.ica_corr": "one ICA axis hinge",
    "volumes.resolution_0.5_mean": "FSC 0.5 (A)",
    "volumes.difference_cc_mean": "difference cc",
    "volumes.particle_fsc_area": "particle FSC area",
    "poses.ratio.angle_median": "pose median ratio",
    "poses.ratio.angle_p90": "pose p90 ratio",
    "poses.ratio.shift_median": "shift median ratio",
    "invariance.max_r2": "invariance R2",
    "likelihood.val_elbo": "held-out bound",
    "likelihood.linear_val_elbo": "linear held-out",
    "likelihood.gain_over_linear": "gain over linear",
}


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command; CPU-seconds and wall seconds of it and its children."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.monotonic() - start


def lookup(table: dict[str, Any], dotted: str) -> float | None:
    """A figure of evaluation.json by its dotted name, or None."""
    value: Any = table
    names = dotted.split(".")
    while names and isinstance(value, dict):
        # keys may hold a dot themselves ("resolution_0.5_mean")
        for take in range(len(names), 0, -1):
            if (key := ".".join(names[:take])) in value:
                value, names = value[key], names[take:]
                break
        else:
            return None
    return float(value) if isinstance(value, int | float) else None


def one_seed(options: argparse.Namespace, seed: int, program: list[str]) -> dict[str, dict[str, float | None]]:
    """Figures of the linear stage and of the training run for one seed."""
    data = options.output / f"set{seed}"
    if not (data / "labels.npz").exists():
        extra = options.simulate.split()
        subprocess.run(
            [sys.executable, str(options.simulator), "-o", str(data), "--seed", str(seed), *extra], check=True
        )
    star, mask = str(data / "particles.star"), str(data / "mask.mrc")
    rows = {}
    for stage, arguments in (("linear", []), ("train", options.train.split())):
        run = options.output / f"{stage}{seed}"
        cpu, wall = timed([*program, stage, star, "-r", mask, "-o", str(run), "--seed", str(seed), *arguments])
        subprocess.run([*program, "evaluate", str(run), "--truth", str(data)], check=True, stdout=subprocess.DEVNULL)
        scores = json.loads((run / "evaluation.json").read_text())
        rows[stage] = {"CPU s": cpu, "wall s": wall} | {label: lookup(scores, name) for name, label in FIGURES.items()}
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulator", type=Path, default=Path("../shared/tools/simulate_phantom.py"))
    parser.add_argument("-o", "--output", type=Path, default=Path("bench"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--simulate", default="-n 800", help="arguments of the simulator")
    parser.add_argument("--train", default="", help="arguments of opustomo train")
    options = parser.parse_args()
    if not options.simulator.is_file():
        parser.error(f"--simulator {options.simulator}: no such file; give the path of simulate_phantom.py")
    program = [sys.executable, "-m", "opustomo"]
    table = {seed: one_seed(options, seed, program) for seed in options.seeds}
    (options.output / "figures.json").write_text(json.dumps(table, indent=1))
    columns = [(seed, stage) for seed in options.seeds for stage in ("linear", "train")]
    print(f"{'':22}" + "".join(f"{stage} {seed}".rjust(11) for seed, stage in columns))
    for label in ["CPU s", "wall s", *FIGURES.values()]:
        cells = (table[seed][stage][label] for seed, stage in columns)
        print(f"{label:22}" + "".join(("-" if v is None else f"{v:.3f}").rjust(11) for v in cells))


if __name__ == "__main__":
    main()
