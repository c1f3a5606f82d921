"""Side by side with RECOVAR: the same simulated tilt images, the same mask and poses, the same metrics.

    python benchmarks/recovar.py --recovar ENV/bin/python -o bench-recovar
    python benchmarks/recovar.py --recovar ENV/bin/python -o bench-noisy --simulate="--snr 0.3"

RECOVAR (1.0.5 was measured; academic licence) lives in an environment of its own and is no dependency.  It gets the
tilt images, opustomo the subtomograms made of them.  Both run on one thread.  Finished runs in the output folder are
kept, with what they cost in cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import starfile
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.analysis import score_codes, score_maps, score_poses
from opustomo.analysis.truth import Truth, read_truth
from opustomo.checkpoint import Run, open_run
from opustomo.data.mrc import read_volume
from opustomo.physics.fourier import fourier_resize
from opustomo.physics.volume import centre_crop, fourier_shell_correlation

ZDIMS = (4, 10)  # of RECOVAR's codes
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1") | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
OPUSTOMO = {"linear": ["linear"], "linear, poses as given": ["linear", "--no-estpose"], "train": ["train"]}
# by default RECOVAR damps by RELION 5's dose filter; from_star: by the simulator's B-factors, as opustomo does
RECOVAR = {"RECOVAR": [], "RECOVAR, true damping": ["--tilt-series-ctf", "from_star"]}
# 1.0.5 without a GPU: back-projection into the doubled grid does not double the frequencies, so the mean comes out
# enlarged by two; without doubling it has the right scale
LAUNCH = """
import functools
from recovar.command_line import main_commands
from recovar.reconstruction import homogeneous
usual = homogeneous.get_mean_conformation_relion
homogeneous.get_mean_conformation_relion = functools.partial(usual, upsampling_factor=1)
main_commands()
"""
COST = ("CPU s", "wall s", "peak GB")
Figures = dict[str, float]
Decoder = Callable[[NDArray[np.floating[Any]]], NDArray[np.float32]]


def tilt_rows(particle: Any, tomogram: Any, tilts: pd.DataFrame) -> pd.DataFrame:
    """One row for every visible image of a particle, as a single-particle STAR file has it."""
    seen = tilts[[flag == "1" for flag in particle.rlnTomoVisibleFrames.strip("[]").split(",")]]
    matrix = np.array([[np.fromstring(t.strip("[]"), sep=",") for t in seen[f"rlnTomoProj{a}"]] for a in "XYZ"])
    turn = matrix.transpose(1, 0, 2)[:, :, :3]  # (T, 3, 3)
    euler = [particle.rlnAngleRot, particle.rlnAngleTilt, particle.rlnAnglePsi]
    pose = turn @ Rotation.from_euler("ZYZ", euler, degrees=True).as_matrix().T
    angles = Rotation.from_matrix(pose.swapaxes(1, 2)).as_euler("ZYZ", degrees=True)
    origin = turn @ np.array([particle[f"rlnOrigin{axis}Angst"] for axis in "XYZ"])
    from_middle = [particle[f"rlnCoordinate{axis}"] - tomogram[f"rlnTomoSize{axis}"] / 2 for axis in "XYZ"]
    depth = turn[:, 2] @ np.array(from_middle) * tomogram.rlnTomoTiltSeriesPixelSize * tomogram.rlnTomoHand
    dose = seen.rlnMicrographPreExposure + tomogram.rlnTomoImportFractionalDose / 2
    return pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@{particle.rlnImageName}" for i in range(len(seen))],
            "rlnGroupName": f"{particle.rlnTomoParticleId:06d}",  # RECOVAR sorts particles by this name
            **dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), angles.T, strict=True)),
            "rlnOriginXAngst": origin[:, 0],
            "rlnOriginYAngst": origin[:, 1],
            "rlnDefocusU": seen.rlnDefocusU + depth,
            "rlnDefocusV": seen.rlnDefocusV + depth,
            "rlnDefocusAngle": seen.rlnDefocusAngle,
            "rlnCtfScalefactor": seen.rlnCtfScalefactor,
            "rlnCtfBfactor": -tomogram.rlnCtfBfactorPerElectronDose * dose,  # Warp's sign
            "rlnMicrographPreExposure": seen.rlnMicrographPreExposure,
            "rlnOpticsGroup": 1,
        }
    )


def write_flat_star(stacks: Path) -> Path:
    """The optimisation set as one row per image: RECOVAR's own converter reads another dialect and drops origins."""
    particles = starfile.read(stacks / "particles.star")
    tomograms = starfile.read(stacks / "tomograms.star")
    known = tomograms["global"].set_index("rlnTomoName", drop=False)
    rows = [
        tilt_rows(row, known.loc[row.rlnTomoName], tomograms[row.rlnTomoName])
        for _, row in particles["particles"].iterrows()
    ]
    path = stacks / "flat.star"
    starfile.write({"optics": particles["optics"], "particles": pd.concat(rows)}, path)
    return path


def timed(command: list[str], folder: Path) -> Figures:
    """Run a command that fills ``folder``, unless it has; CPU-seconds, wall seconds and peak memory of its tree."""
    kept = folder / "cost.json"
    if not kept.exists():
        start = time.monotonic()
        child = subprocess.Popen(command, env=os.environ | ONE_THREAD)
        _, status, used = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)}: ended with status {os.waitstatus_to_exitcode(status)}")
        figures = (used.ru_utime + used.ru_stime, time.monotonic() - start, used.ru_maxrss / 2**20)
        kept.write_text(json.dumps(dict(zip(COST, figures, strict=True))))
    found: Figures = json.loads(kept.read_text())
    return found


def score(codes: NDArray[np.float32], decode: Decoder, like: Run, truth: Truth) -> Figures:
    """Every metric, by its heading in the table; volumes are compared on the grid and in the mask of ``like``."""
    assert truth.state is not None and truth.euler is not None and truth.defocus is not None
    hinge, active = truth.coordinates["hinge"], score_codes.active(codes)
    turning = np.isfinite(hinge)
    composition = score_codes.composition(active, truth.state)
    seen = score_poses.directions(score_poses.rotation_matrices(truth.euler)) | {"defocus": truth.defocus}
    nuisances = score_codes.invariance(codes, seen)
    return {
        "dimensions in use": float(active.shape[1]),
        "AUC": composition["auc"],
        "k-means ARI": composition["kmeans_ari"],
        "GMM ARI": composition["gmm_ari"],
        "hinge probe": score_codes.conformation(active[turning], hinge[turning])["probe_corr"],
        "invariance R2": nuisances["max_r2"],
        "invariance R2, up to sign": nuisances["max_r2_even"],
    } | map_scores(codes, decode, like, truth)


def map_scores(codes: NDArray[np.float32], decode: Decoder, like: Run, truth: Truth) -> Figures:
    """Volumes at the mean codes of the true states against the map of their median rotation, and their differences."""
    assert truth.state is not None
    states = np.unique(truth.state)
    medians = [np.nanmedian(np.nan_to_num(truth.coordinates["hinge"][truth.state == s])) for s in states]
    targets = [truth.nearest_map(int(s), hinge) for s, hinge in zip(states, medians, strict=True)]
    true = [score_maps.true_volume(target, like) for target in targets if target is not None]
    volumes = torch.from_numpy(decode(np.stack([codes[truth.state == s].mean(0) for s in states])))
    found = [score_maps.masked(volume, like) for volume in volumes]
    curves = [fourier_shell_correlation(a, b).numpy() for a, b in zip(found, true, strict=True)]
    differences = [
        np.corrcoef((found[i] - found[j]).ravel(), (true[i] - true[j]).ravel())[0, 1]
        for i, j in combinations(range(len(states)), 2)
    ]
    extent = like.grid.working_pixel * like.grid.crop
    return {
        "FSC 0.5 (A)": float(np.mean([score_maps.resolution(curve, 0.5, extent) for curve in curves])),
        "FSC area": float(np.mean([curve[1:].mean() for curve in curves])),
        "difference cc": float(np.mean(differences)),
    }


def recovar_decoder(folder: Path, like: Run) -> Decoder:
    """RECOVAR's linear model, mean + eigenvolumes x code, on the grid of ``like``.

    Its kernel regression (``compute_state``) needs minutes for each volume on a CPU.
    """

    def read(name: str) -> NDArray[np.float32]:
        volume = torch.from_numpy(read_volume(folder / "output" / "volumes" / f"{name}.mrc")[0])
        return centre_crop(fourier_resize(volume, like.grid.working_box), like.grid.crop).numpy()

    def decode(codes: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        eigenvolumes = np.stack([read(f"eigen_pos{i:04d}") for i in range(codes.shape[1])])
        return (read("mean") + np.tensordot(codes, eigenvolumes, 1)).astype(np.float32)

    return decode


def folder_name(column: str) -> str:
    """Name of the folder of a run."""
    return column.replace(",", "").replace(" ", "-")


def measure(options: argparse.Namespace) -> dict[str, Figures]:
    """Make the set, run both programs, score: figures by column."""
    data, program = options.output / "data", [sys.executable, "-m", "opustomo"]
    recovar = [str(options.recovar), "-c", LAUNCH]
    timed([*program, "simulate", "-o", str(data), "--stacks", *options.simulate.split()], data)
    star, mask, flat = str(data / "particles.star"), str(data / "mask.mrc"), write_flat_star(data / "stacks")
    truth = read_truth(data, len(starfile.read(star)))
    columns: dict[str, Figures] = {}
    for name, (verb, *arguments) in OPUSTOMO.items():
        folder = options.output / folder_name(name)
        stated = [verb, star, "-r", mask, "-o", str(folder), "--downfrac", str(options.downfrac), *arguments]
        cost = timed([*program, *stated], folder)
        run = open_run(folder, -1)
        columns[name] = cost | score(run.codes, run.decode, run, truth)
    size = ["--downsample", str(run.grid.working_box)] if run.grid.working_box < run.grid.box else []
    for name in options.variants:
        folder = options.output / folder_name(name)
        stated = [str(flat), "-o", str(folder), "--mask", mask, "--zdim", ",".join(map(str, ZDIMS)), *size]
        fixed = ["--tilt-series", "--accept-cpu", "--gpu-budget-gb", options.memory]
        cost = timed([*recovar, "pipeline", *stated, *fixed, *RECOVAR[name]], folder)
        for zdim in ZDIMS:
            codes = np.load(folder / "model" / f"zdim_{zdim}" / "latent_coords.npy").astype(np.float32)
            columns[f"{name}, {zdim} dimensions"] = cost | score(codes, recovar_decoder(folder, run), run, truth)
    return columns


def markdown(columns: dict[str, Figures]) -> str:
    """A row for every figure, a column for every run."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for label in next(iter(columns.values())):
        whole = label.endswith(" s") or label == "dimensions in use"
        form = ".0f" if whole else ".1f" if label.endswith(("GB", "(A)")) else ".3f"
        cells = [format(figures[label], form) for figures in columns.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recovar", type=Path, required=True, help="python of the environment with RECOVAR in it")
    parser.add_argument("-o", "--output", type=Path, default=Path("bench-recovar"))
    parser.add_argument("--simulate", default="", help="arguments of opustomo simulate")
    parser.add_argument("--downfrac", type=float, default=0.5, help="working box of both, as a fraction of the box")
    parser.add_argument("--memory", default="1.5", help="RECOVAR's --gpu-budget-gb: it sizes its batches by it")
    parser.add_argument("--variants", nargs="*", choices=RECOVAR, default=["RECOVAR"], help="runs of RECOVAR")
    options = parser.parse_args()
    if not options.recovar.is_file():
        parser.error(f"--recovar {options.recovar}: no such file; give the python of RECOVAR's environment")
    options.output.mkdir(parents=True, exist_ok=True)
    print(markdown(measure(options)))


if __name__ == "__main__":
    main()
