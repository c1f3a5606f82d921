"""Real picks: do the best classes reproduce better than as many random particles, and where do the others go?

    python benchmarks/real.py -o bench/real [--star FILE] [--clusters 8]

From a STAR file of in-situ subtomograms alone: ``average`` proposes the mask, ``linear`` gives the codes, ``quality``
compares half maps of every class with those of as many particles drawn at random.  Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

PICKS = Path("../shared/data/real_70S_empiar10499/particles.star")
COLUMNS = {
    "class": "class",
    "particles": "particles",
    "worth": "worth",
    "fsc_area": "FSC area",
    "fsc_area_random": "random",
    "resolution_0.143": "FSC 0.143 (A)",
    "resolution_random": "random (A)",
    "outlier": "outlier score",
    "distinct": "distinct",
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--star", type=Path, default=PICKS)
    parser.add_argument("-o", "--output", type=Path, default=Path("bench/real"))
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--downfrac", type=float, default=2 / 3)
    options = parser.parse_args()
    mean, run, k = options.output / "average", options.output / "linear", str(options.clusters)
    star, mask, epoch = str(options.star), str(mean / "mask.mrc"), ("--epoch", "0")
    lines = [
        ["average", star, "-o", str(mean)],
        ["linear", star, "-r", mask, "-o", str(run), "--downfrac", f"{options.downfrac:.4f}"],
        ["analyze", str(run), "--clusters", k, *epoch],
        ["quality", str(run), "--kmeans", k, *epoch],
    ]
    for line in lines:
        subprocess.run([sys.executable, "-m", "opustomo", *line], check=True)
    with (run / "analyze.0" / f"kmeans{k}" / "quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    print("| " + " | ".join(COLUMNS.values()) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in rows:
        values = (row[name] for name in COLUMNS)
        print("| " + " | ".join(v if v.isalpha() or v.isdigit() or not v else f"{float(v):.2f}" for v in values) + " |")


if __name__ == "__main__":
    main()
