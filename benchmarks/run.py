"""Quality on simulated sets with known truth: linear stage and default training run, every metric, all seeds.

    python benchmarks/run.py -o bench                              the common set, three seeds (make bench-common)
    python benchmarks/run.py -o bench --sets all --markdown docs/benchmarks.md   every set (make bench-quality)

The simulator is independent of this program.  CPU-seconds are those of the child processes, wall seconds are printed
beside them; machines are noisy, so compare figures of one run only.  Finished runs in the output folder are kept.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale import put

MARKS = "<!-- quality -->", "<!-- end of quality -->"
Figures = dict[str, float | None]


@dataclass(frozen=True)
class Set:
    """A simulated set: arguments of the simulator, seeds, and arguments of both stages."""

    title: str
    simulate: str = "-n 800"
    seeds: tuple[int, ...] = (1, 2, 3)
    stages: str = ""


SETS = {
    "common": Set("Common set: 800 particles, SNR 0.1, poses wrong by |N(0, 2 degrees)| and N(0, 0.5 px), hinge ±10"),
    "hard": Set(
        "Hard set: SNR 0.02, poses wrong by |N(0, 4 degrees)| and N(0, 1 px), hinge ±20",
        "-n 800 --snr 0.02 --rot-err 4 --shift-err 1 --hinge 20", (2, 3, 4),
    ),
    "motion": Set("Large motion: common set, hinge ±30", "-n 800 --hinge 30"),
    "few": Set("Few: 263 particles of the common set", "-n 263"),
    "minority": Set("Minority: the factor in 10 % of the particles", "-n 800 --minority 0.1"),
    "object8": Set("Another object (phantom seed 8)", "-n 800 --phantom-seed 8", (1,)),
    "object9": Set("Another object (phantom seed 9)", "-n 800 --phantom-seed 9", (1,)),
    "full": Set("Full resolution: common set on a working box of 64", "-n 800", (1, 2, 3), "--downfrac 1"),
}  # fmt: skip

FIGURES = {
    "composition.auc": "AUC",
    "composition.groups_ari": "groups ARI, no labels",
    "composition.gmm_ari": "GMM ARI",
    "composition.kmeans_ari": "k-means ARI",
    "composition.ica_auc": "one ICA axis AUC",
    "conformation.hinge.probe_corr": "hinge probe",
    "conformation.hinge.ica_corr": "one ICA axis hinge",
    "volumes.resolution_0.5_mean": "FSC 0.5 (A)",
    "volumes.difference_cc_mean": "difference cc",
    "volumes.centre_difference_cc_mean": "difference cc, mean codes",
    "volumes.particle_fsc_area": "particle FSC area",
    "poses.ratio.angle_median": "pose median ratio",
    "poses.ratio.angle_p90": "pose p90 ratio",
    "poses.ratio.shift_median": "shift median ratio",
    "invariance.max_r2": "invariance R2",
    "likelihood.val_elbo": "held-out bound",
    "likelihood.linear_val_elbo": "linear held-out",
    "likelihood.gain_over_linear": "gain over linear",
}
LABELS = ["CPU s", "wall s", *FIGURES.values()]


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


def one_seed(which: Set, seed: int, folder: Path, simulator: Path, train: str, verbs: list[str]) -> dict[str, Figures]:
    """Figures of the linear stage and of the training run for one seed; kept in ``folder/figuresN.json``."""
    kept = folder / f"figures{seed}.json"
    if kept.exists():
        stored: dict[str, Figures] = json.loads(kept.read_text())
        return stored
    data, program = folder / f"set{seed}", [sys.executable, "-m", "opustomo"]
    if not (data / "labels.npz").exists():
        simulated = ["-o", str(data), "--seed", str(seed), *which.simulate.split()]
        subprocess.run([sys.executable, str(simulator), *simulated], check=True)
    star, mask = str(data / "particles.star"), str(data / "mask.mrc")
    rows: dict[str, Figures] = {}
    for stage, arguments in (("linear", []), ("train", train.split())):
        if stage not in verbs:
            continue
        run = folder / f"{stage}{seed}"
        stated = ["-r", mask, "-o", str(run), "--seed", str(seed), *which.stages.split(), *arguments]
        cpu, wall = timed([*program, stage, star, *stated])
        subprocess.run([*program, "evaluate", str(run), "--truth", str(data)], check=True, stdout=subprocess.DEVNULL)
        scores = json.loads((run / "evaluation.json").read_text())
        spent: Figures = {"CPU s": cpu, "wall s": wall}
        rows[stage] = spent | {label: lookup(scores, name) for name, label in FIGURES.items()}
        if stage == "train":  # on the same particles: `linear` has those that train holds out
            begun = scores["linear_stage"]
            rows["start"] = {label: lookup(begun, name) for name, label in FIGURES.items()}
    kept.write_text(json.dumps(rows, indent=1))
    return rows


def markdown(which: Set, table: dict[int, dict[str, Figures]]) -> str:
    """One table: a row for every figure; for every seed `linear`, the linear stage `train` starts from, and `train`."""
    columns = [(seed, stage) for seed in table for stage in ("linear", "start", "train") if stage in table[seed]]
    # without dashes: they are the simulator's arguments, not this program's
    words = ", ".join(part.strip() for part in re.split(r"(?:^| )--?", which.simulate) if part)
    lines = [
        f"## {which.title}",
        "",
        f"Simulator: {words}" + (f"; both stages with `{which.stages}`" if which.stages else ""),
        "",
    ]
    lines.append("| | " + " | ".join(f"{stage} {seed}" for seed, stage in columns) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    for label in LABELS:
        cells = (table[seed][stage].get(label) for seed, stage in columns)
        digits = 0 if label.endswith(" s") else 3
        lines.append(f"| {label} | " + " | ".join("" if v is None else f"{v:.{digits}f}" for v in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulator", type=Path, default=Path("../shared/tools/simulate_phantom.py"))
    parser.add_argument("-o", "--output", type=Path, default=Path("bench"))
    parser.add_argument("--sets", nargs="+", default=["common"], choices=[*SETS, "all"])
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the set's own")
    parser.add_argument("--verbs", nargs="+", default=["linear", "train"], choices=["linear", "train"])
    parser.add_argument("--train", default="", help="arguments of opustomo train")
    parser.add_argument("--markdown", type=Path, help="page that receives the tables")
    options = parser.parse_args()
    if not options.simulator.is_file():
        parser.error(f"--simulator {options.simulator}: no such file; give the path of simulate_phantom.py")
    parts = []
    for name in SETS if "all" in options.sets else options.sets:
        folder = options.output / name
        folder.mkdir(parents=True, exist_ok=True)
        seeds = options.seeds or SETS[name].seeds
        table = {seed: one_seed(SETS[name], seed, folder, options.simulator, options.train, options.verbs)
                 for seed in seeds}  # fmt: skip
        parts.append(markdown(SETS[name], table))
        print(parts[-1], flush=True)
        if options.markdown is not None:
            put(options.markdown, "\n".join(parts).strip(), MARKS)


if __name__ == "__main__":
    main()
