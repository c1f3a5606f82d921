"""The project's own simulated sets: distinct factors on distinct axes, decoys found, few particles.

    python benchmarks/presets.py -o bench/presets [--sets demo junk few] [--seeds 1 2 3] [--markdown FILE]

``demo``: four compositions and a rotation of the mini-ribosome; absolute correlation of every independent axis with
every known factor.  ``junk``: AUC with which decoys and misplaced particles are told from ribosomes.  ``few``:
resolution of the class maps from 263 particles over that from 2,000.  All through ``opustomo linear``, defaults.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from opustomo.analysis.axes import axes_of
from opustomo.checkpoint import open_run
from opustomo.simulate.bead_model import STATES

PROGRAM = [sys.executable, "-m", "opustomo"]


def fitted(folder: Path, preset: str, seed: int, *more: str) -> tuple[Path, dict[str, NDArray[Any]], dict[str, Any]]:
    """Run folder, truth and scores of a preset; finished parts are kept."""
    data, run = folder / f"set{seed}", folder / f"linear{seed}"
    if not (data / "labels.npz").exists():
        subprocess.run(
            [*PROGRAM, "simulate", "--preset", preset, "--seed", str(seed), "-o", str(data), *more], check=True
        )
    if not (run / "evaluation.json").exists():
        stated = ["-r", str(data / "mask.mrc"), "-o", str(run), "--seed", str(seed)]
        subprocess.run([*PROGRAM, "linear", str(data / "particles.star"), *stated], check=True)
        subprocess.run([*PROGRAM, "evaluate", str(run), "--truth", str(data)], check=True, stdout=subprocess.DEVNULL)
    with np.load(data / "labels.npz") as labels:
        truth = {name: labels[name] for name in labels.files}
    return run, truth, json.loads((run / "evaluation.json").read_text())


def factors(truth: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """What varies in a set of mini-ribosomes: which domains are there, and the rotation (NaN where nothing turns)."""
    found: dict[str, NDArray[np.float64]] = {}
    for domain in sorted({name for state in STATES for name in state}):
        present = np.array([float(domain in STATES[s]) for s in truth["state"]])
        if np.ptp(present) > 0 and not any(np.array_equal(present, other) for other in found.values()):
            found[domain] = present
    return found | {"rotation": truth["hinge"].astype(float)}


def demo(folder: Path, seed: int) -> list[str]:
    """Rows of |correlation| between axes and factors."""
    run, truth, scores = fitted(folder, "demo", seed, "--n", "800")
    axes, known = axes_of(open_run(run)), factors(truth)
    lines = [f"Seed {seed}: {scores['composition']['groups']} groups, ARI {scores['composition']['groups_ari']:.2f}, "
             f"AUC {scores['composition']['auc']:.3f}", "",
             "| axis | found to be | " + " | ".join(known) + " |", "|---" * (len(known) + 2) + "|"]  # fmt: skip
    for number, axis in enumerate(axes, 1):
        cells = []
        for value in known.values():
            seen = np.isfinite(value)
            cells.append(f"{abs(np.corrcoef(axis.place[seen], value[seen])[0, 1]):.2f}")
        kind = f"{len(axis.groups.share)} groups" if axis.discrete else "continuous"
        lines.append(f"| {number} | {kind} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def junk(folder: Path, seed: int) -> list[str]:
    """AUC of the outlier score and of the evidence, for each kind of junk."""
    run, truth, scores = fitted(folder, "junk", seed, "--n", "800")
    with (run / "linear" / "particles.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    kind = truth["junk_kind"]
    cells = []
    for column, sign in (("outlier_score", 1), ("evidence_nats", -1)):
        score = sign * np.array([float(row[column]) for row in rows])
        for which in (1, 2, 3):
            seen = (kind == 0) | (kind == which)
            cells.append(f"{roc_auc_score(kind[seen] > 0, score[seen]):.3f}")
        cells.append(f"{roc_auc_score(kind > 0, score):.3f}")
    return [f"| {seed} | " + " | ".join(cells) + f" | {scores.get('junk', {}).get('outlier_auc', float('nan')):.3f} |"]


def few(folder: Path, seed: int) -> list[str]:
    """Resolution of class maps at FSC 0.5 against the truth, 263 and 2,000 particles."""
    values = []
    for n in ("263", "2000"):
        _, _, scores = fitted(folder / n, "few", seed, "--n", n)
        values += [scores["volumes"]["resolution_0.5_mean"], scores["composition"]["groups_ari"]]
    cells = (
        f"{values[0]:.1f}",
        f"{values[2]:.1f}",
        f"{values[0] / values[2]:.2f}",
        f"{values[1]:.2f}",
        f"{values[3]:.2f}",
    )
    return [f"| {seed} | " + " | ".join(cells) + " |"]


HEADS = {
    "demo": ["## Mini-ribosome: axes against known factors (absolute correlation)", ""],
    "junk": ["## Junk: AUC of telling decoys", "",
             "| seed | outlier score: blobs | empty | misplaced | all | low evidence: blobs | empty | misplaced | all "
             "| distance in code |", "|---" * 10 + "|"],
    "few": ["## Few particles: FSC 0.5 of class maps", "",
            "| seed | 263 particles (A) | 2,000 (A) | ratio | groups ARI, 263 | 2,000 |", "|---" * 6 + "|"],
}  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    lines: list[str] = []
    for name in options.sets:
        lines += HEADS[name]
        for seed in options.seeds:
            (options.output / name).mkdir(parents=True, exist_ok=True)
            lines += {"demo": demo, "junk": junk, "few": few}[name](options.output / name, seed)
        lines.append("")
        print("\n".join(lines), flush=True)
    if options.markdown is not None:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
