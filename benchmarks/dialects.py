"""One set in every dialect, and real particles as images and as subtomograms: the same map, the same codes?

    python benchmarks/dialects.py -o bench/dialects [--count 200] [--noise 4] [--real FOLDER]

Simulated: two states, two tilt series of different defocus, tilt images by the tests' simulator and written by the
tests' own writers (``tests/dialect_writers.py``), which share no code with the readers.  Each dialect goes through
``average`` and through ``train`` of two epochs with one component.  Every dialect is compared with the first one: the
lowest FSC of the two averages over the shells in which the first's half maps agree by 0.5 or better, and the
correlation of the codes up to sign.  AUC: with which the code tells the states.  Real: the FSC between the averages of
the same particles as tilt images and as subtomograms, and that of each one's half maps, in one mask.  Prints Markdown.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from opustomo.checkpoint import open_run
from opustomo.data.mrc import read_volume
from opustomo.physics.fourier import fourier_resize
from opustomo.physics.volume import fourier_shell_correlation

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from dialect_writers import write_every_dialect
from stack_writers import two_states_set

PROGRAM = [sys.executable, "-m", "opustomo"]
REAL = Path("../shared/data/real_70S_warptools")
DOWNFRAC = ("--downfrac", "0.75")


def run(folder: Path, done: str, *words: object) -> Path:
    """A verb into ``folder``, unless it is finished."""
    if not (folder / done).exists():
        line = [*PROGRAM, *(str(word) for word in words), "-o", str(folder)]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def curve(folder: Path) -> NDArray[np.float64]:
    """FSC of the half maps in the mask, by shell."""
    return np.loadtxt(folder / "fsc.csv", delimiter=",", skiprows=1)[:, 2]


def reached(halves: NDArray[np.float64], threshold: float) -> int:
    """The first shell from 2 on in which the half maps agree by less."""
    below = np.flatnonzero(halves[2:] < threshold)
    return int(below[0]) + 2 if len(below) else len(halves)


def between(one: Path, other: Path, mask: Path) -> NDArray[np.float64]:
    """FSC of two averages in a mask, by shell."""
    maps = [torch.from_numpy(read_volume(folder / "average.mrc")[0]) for folder in (one, other)]
    soft = fourier_resize(torch.from_numpy(read_volume(mask)[0]), len(maps[0]))
    return fourier_shell_correlation(*(volume * soft for volume in maps)).double().numpy()


def simulated(folder: Path, count: int, noise: float) -> list[str]:
    """Rows of the table of dialects."""
    made = two_states_set(count, noise, step=6.0, scattered=6000.0)
    stars = write_every_dialect(made, folder / "sets")
    rows, first = [], None
    for number, (name, star) in enumerate(stars.items()):
        place = folder / f"{number}"
        # the first dialect's average proposes the mask of all
        given = () if first is None else ("-r", first[0] / "mask.mrc")
        mean = run(place / "average", "fsc.png", "average", star, *given, *DOWNFRAC)
        mask = (mean if first is None else first[0]) / "mask.mrc"
        short = ("-n", 2, "--zdim", 1, "--no-estpose")
        trained = run(place / "train", "z.1.pkl", "train", star, "-r", mask, *DOWNFRAC, *short)
        codes = np.asarray(open_run(trained).codes)[:, 0]
        first = first or (mean, codes)
        limit = reached(curve(first[0]), 0.5)
        auc = roc_auc_score(made.state, codes)
        figures = (
            between(mean, first[0], mask)[1:limit].min(), abs(np.corrcoef(codes, first[1])[0, 1]), max(auc, 1 - auc),
        )  # fmt: skip
        own = reached(curve(mean), 0.5)
        rows.append(f"| {name} | {240 / own:.0f} | " + " | ".join(f"{value:.3f}" for value in figures) + " |")
    return rows


def real(folder: Path, data: Path) -> list[str]:
    """Rows of FSC by shell: images against subtomograms, and the half maps of each."""
    [images] = (data / "stacks_2d").glob("*_optimisation_set.star")
    volumes = run(folder / "volumes", "fsc.png", "average", data / "subtomograms_3d/particles.star", "--downfrac", 1)
    mask = volumes / "mask.mrc"
    stacks = run(folder / "images", "fsc.png", "average", images, "--downfrac", 1, "-r", mask)
    table = np.stack([between(stacks, volumes, mask), curve(stacks), curve(volumes)], 1)
    return [
        f"| {384 / shell:.0f} | " + " | ".join(f"{value:.3f}" for value in table[shell]) + " |"
        for shell in range(2, len(table))
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("bench/dialects"))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--noise", type=float, default=4.0)
    parser.add_argument("--real", type=Path, default=REAL)
    options = parser.parse_args()
    print("| dialect | half maps 0.5 (A) | FSC of averages, lowest | code correlation | AUC |\n|---|---|---|---|---|")
    print("\n".join(simulated(options.output / "simulated", options.count, options.noise)))
    if options.real.exists():
        print("\n| A | images : subtomograms | halves of images | halves of subtomograms |\n|---|---|---|---|")
        print("\n".join(real(options.output / "real", options.real)))


if __name__ == "__main__":
    main()
