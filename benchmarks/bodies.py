"""Rigid bodies on simulated sets with a known hinge: angle of every particle, axis, swept angle, leakage, poses.

    python benchmarks/bodies.py -o bench/bodies [--sets hinge noisy auto ...] [--seeds 1 2 3] [--markdown FILE]

Every set is fitted twice from the same particles: with bodies and without (the linear stage), so that what the bodies
add to the held-out evidence stands beside what they find.  The phantom's simulator is independent of this program;
``ribosome`` and ``adk``, the adenylate kinase between its closed and its open form, are the project's own (see
``adk.py``).  Finished runs in the output folder are kept.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import adk
import numpy as np
from numpy.typing import NDArray
from run import lookup, timed
from scale import put

from opustomo.data.mrc import write_volume
from opustomo.simulate.truth import solvent_mask

MARKS = ("<!-- bodies -->", "<!-- end of bodies -->")
PROGRAM = [sys.executable, "-m", "opustomo"]


@dataclass(frozen=True)
class Set:
    """A set, who simulates it, what is given as bodies, and arguments of the run."""

    title: str
    simulate: str
    masks: str = "body_large.mrc,body_small.mrc"  # of the set's folder; "": no bodies
    ours: bool = False
    stages: str = ""
    of: str = ""  # the data of another set


HINGE = "-n 400 --hinge 20"
ADK = f"--n 400 --atoms {adk.PATH}"
SETS = {
    "hinge": Set("Phantom, hinge of ±20 degrees and a factor in half, SNR 0.1, masks of both bodies", HINGE),
    "alike": Set("The same without masks: `--masks auto:2`", "", "auto:2", of="hinge"),
    "three": Set("The same in three parts: `--masks auto:3`", "", "auto:3", of="hinge"),
    "noisy": Set("Phantom at SNR 0.02, poses wrong by 4 degrees and 1 px, 800 particles",
                 "-n 800 --hinge 20 --snr 0.02 --rot-err 4 --shift-err 1"),
    "small": Set("Phantom with a hinge of ±10 degrees, the common set", "-n 800"),
    "plain": Set("The same without bodies: composition alone", "", "", of="hinge"),
    "full": Set("The hinge at full resolution: working box 64", "", stages="--downfrac 1", of="hinge"),
    "ribosome": Set("Mini-ribosome: 30S turns by 0 to 8 degrees, four compositions, SNR 1", "--preset demo --n 400",
                    "bodies.star", ours=True),
    "adk": Set("Adenylate kinase (24 kDa) from closed to open, SNR 0.1, three bodies: core, LID, NMP",
               f"{ADK} --snr 0.1", "bodies.star", ours=True),
    "adk-two": Set("The same without masks: `--masks auto:2`", "", "auto:2", of="adk"),
    "adk-plain": Set("The same without bodies: composition alone", "", "", of="adk"),
    "adk-noisy": Set("Adenylate kinase at SNR 0.03, three bodies", f"{ADK} --snr 0.03", "bodies.star", ours=True),
    "adk-noisy-two": Set("The same without masks: `--masks auto:2`", "", "auto:2", of="adk-noisy"),
    "adk-noisy-plain": Set("The same without bodies: composition alone", "", "", of="adk-noisy"),
}  # fmt: skip
FIGURES = {
    "motion.angle_corr": "angle",
    "motion.code_corr": "best code",
    "motion.slope": "slope of the angles",
    "motion.swept": "swept angle over the true one",
    "motion.axis_degrees": "axis (degrees)",
    "motion.axis_voxels": "axis (voxels)",
    "motion.angle_from_composition_r2": "R2 angle from composition",
    "motion.state_from_conformation_r2": "R2 state from conformation",
    "conformation.path.probe_corr": "path from composition",
    "composition.auc": "AUC",
    "composition.kmeans_ari": "k-means ARI",
    "composition.groups_ari": "groups ARI",
    "volumes.particle_fsc_area": "particle FSC area",
    "poses.ratio.angle_median": "pose median ratio",
    "poses.ratio.shift_median": "shift median ratio",
    "likelihood.gain_over_linear": "network over linear (nats)",
}


def simulated(which: Set, folder: Path, seed: int, simulator: Path) -> Path:
    """The set's folder with masks of its bodies and labels that tell where the axis is."""
    data = folder / f"set{seed}"
    if (data / "done").exists():
        return data
    arguments = ["-o", str(data), "--seed", str(seed), *which.simulate.split()]
    if adk.PATH in arguments:
        adk.write_path(simulator.parents[1] / "data/models/adk", folder / adk.PATH)
        arguments[arguments.index(adk.PATH)] = str(folder / adk.PATH)
    if which.ours:
        subprocess.run([*PROGRAM, "simulate", *arguments], check=True)
    else:
        subprocess.run([sys.executable, str(simulator), *arguments], check=True)
        _phantom_bodies(data, simulator)
    (data / "done").touch()
    return data


def _phantom_bodies(data: Path, simulator: Path) -> None:
    """Masks of the phantom's two rigid parts, and its axis, as the program's own simulator writes them."""
    tool: dict[str, Any] = runpy.run_path(str(simulator))
    phantom, settings = tool["make_phantom"](), json.loads((data / "sim.json").read_text())
    box, pixel = int(settings["D"]), float(settings["apix"])
    for name, parts in (("large", ("large", "factor")), ("small", ("small",))):
        beads = [np.concatenate([phantom[part][i] for part in parts]) for i in range(3)]
        volume: NDArray[np.float32] = tool["gauss_volume"](*beads, box, pixel).astype(np.float32)
        write_volume(data / f"body_{name}.mrc", solvent_mask([volume], pixel, margin=0.0), pixel)
    with np.load(data / "labels.npz") as stored:
        labels = dict(stored)
    np.savez(data / "labels.npz", **labels, hinge_axis=np.stack([phantom["hinge_axis"], phantom["hinge_point"]]))


def one_seed(name: str, seed: int, output: Path, simulator: Path) -> dict[str, float | None]:
    """Figures of one seed; kept in ``output``/NAME/figuresN.json."""
    which, folder = SETS[name], output / name
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"figures{seed}.json"
    if kept.exists():
        stored: dict[str, float | None] = json.loads(kept.read_text())
        return stored
    data = simulated(SETS[which.of or name], output / (which.of or name), seed, simulator)
    masks = which.masks if which.masks.startswith("auto") else ",".join(str(data / m) for m in which.masks.split(","))
    run = folder / f"run{seed}"
    stated = ["-r", str(data / "mask.mrc"), "-o", str(run), "--seed", str(seed), "-n", "1"]
    stated += ["--masks", masks] if which.masks else []
    cpu = wall = None
    if not (run / "z.0.pkl").exists():
        cpu, wall = timed([*PROGRAM, "train", str(data / "particles.star"), *stated, *which.stages.split()])
    subprocess.run([*PROGRAM, "evaluate", str(run), "--truth", str(data)], check=True, stdout=subprocess.DEVNULL)
    scores = json.loads((run / "evaluation.json").read_text())
    said = re.search(r"bodies: evidence .* \(([+-][\d.]+)\)", (run / "run.log").read_text())
    figures = {label: lookup(scores, dotted) for dotted, label in FIGURES.items()}
    figures |= {"over linear without bodies (nats)": float(said[1]) if said else None, "CPU s": cpu, "wall s": wall}
    if adk.PATH in SETS[which.of or name].simulate:
        figures |= adk.figures(data, run)
    kept.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def table(title: str, seeds: list[int], found: list[dict[str, float | None]]) -> list[str]:
    """Markdown: a line per figure, a column per seed, the median last."""
    lines = [f"### {title}", "", "| | " + " | ".join(f"seed {s}" for s in seeds) + " | median |",
             "|---" * (len(seeds) + 2) + "|"]  # fmt: skip
    for label in found[0]:
        values = [figures[label] for figures in found]
        if all(value is None for value in values):
            continue
        known = [value for value in values if value is not None]
        cells = ["" if value is None else f"{value:.3g}" for value in values]
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {median(known):.3g} |")
    return [*lines, ""]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--simulator", type=Path, default=Path("../shared/tools/simulate_phantom.py"))
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    lines: list[str] = []
    for name in options.sets:
        found = [one_seed(name, seed, options.output.resolve(), options.simulator) for seed in options.seeds]
        lines += table(SETS[name].title, options.seeds, found)
        print("\n".join(lines[-len(found[0]) - 6 :]), flush=True)
    if options.markdown is not None:
        put(options.markdown, "\n".join(lines), MARKS)


if __name__ == "__main__":
    main()
