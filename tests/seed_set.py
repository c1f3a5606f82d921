"""The command lines printed in the seed's README, and a small RELION 3.0 set with its 3.1 twin to run them on."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from opustomo.compat import dsd, dsdsh
from opustomo.config import InputOptions, SimulateConfig
from opustomo.data.readers import read_particles
from opustomo.data.star import read_star
from opustomo.simulate.dataset import main as simulate

PREPARE31 = "dsdsh prepare /work/consensus_data.star 236 2.1 --relion31"
PARSE_POSE_STAR = "dsd parse_pose_star /work/consensus_data.star -D 236 --Apix 2.1 -o ribo-pose-euler.pkl"
TRAIN = (
    "dsd train_tomo /work/ribo.star --poses ./ribo_pose_euler.pkl -n 40 -b 8 --zdim 12 --lr 5.e-5 --num-gpus 4 "
    "--multigpu --beta-control 0.8 --beta cos -o /work/ribo -r ./mask.mrc --downfrac 0.65 --valfrac 0.1 --lamb 0.8 "
    "--split ribo-split.pkl --bfactor 4. --templateres 160 --angpix 2.1 --estpose --tmp-prefix ref --datadir /work/"
)
RESUME = (
    "dsd train_tomo /work/ribo.star --poses ./ribo_pose_euler.pkl --lazy-single -n 20 --pe-type vanilla "
    "--encode-mode grad --template-type conv -b 12 --zdim 12 --lr 1.e-4  --num-gpus 4 --multigpu --beta-control 2. "
    "--beta cos -o /work/ribo -r ./mask.mrc --downfrac 0.75 --lamb 1. --valfrac 0.25 --load /work/ribo/weights.0.pkl "
    "--latents /work/sp/z.0.pkl --split ribo-split.pkl --bfactor 4. --templateres 160"
)
ANALYZE = "dsdsh analyze /work/sp 16 4 16"
KMEANS_VOLUMES = "dsdsh eval_vol /work/sp 16 kmeans 16 2.2"
PC_VOLUMES = "dsdsh eval_vol /work/sp 16 pc 1 2.2"
PARSE_POSE31 = "dsdsh parse_pose /work/consensus_data.star 320 1.699 /work/sp 16 16 --relion31"
PRINTED = (PREPARE31, PARSE_POSE_STAR, TRAIN, RESUME, ANALYZE, KMEANS_VOLUMES, PC_VOLUMES, PARSE_POSE31)
README = sorted((Path(__file__).parents[2] / "shared" / "seed").glob("*.txt"))

COUNT, BOX, APIX, TARGET = 48, 24, 15.5, 12.5
WORKING = 14  # 2 floor(24 * 0.65 / 2)


@dataclass(frozen=True)
class Place:
    """``work`` has the data set in both dialects, ``cwd`` what the training lines expect to find there."""

    work: Path
    cwd: Path

    @property
    def run(self) -> Path:
        return self.work / "ribo"

    def typed(self, line: str, *changes: tuple[str, str]) -> str:
        """A printed line with ``changes`` and its /work/ leading to this place."""
        for printed, here in changes:
            assert printed in line, printed
            line = line.replace(printed, here)
        return re.sub(r"(?<= )/work/", f"{self.work}/", line)


def call(line: str) -> int:
    """Run a line in this process; its exit status."""
    program, *argv = shlex.split(line)
    return {"dsd": dsd, "dsdsh": dsdsh}[program].main(argv)


def process(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program, *argv = shlex.split(line)
    command = [sys.executable, "-m", f"opustomo.compat.{program}", *argv]
    quiet = {k: v for k, v in os.environ.items() if k != "DISPLAY"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=quiet, capture_output=True, text=True, timeout=600)


def write_relion31(star: Path, path: Path) -> None:
    """The same particles as RELION 3.1 writes them: optics table, origins in Angstrom."""
    table = read_star(star).particles.drop(columns=["rlnMagnification", "rlnDetectorPixelSize"])
    for axis in "XYZ":
        pixels = table.pop(f"rlnOrigin{axis}").astype(float)
        table[f"rlnOrigin{axis}Angst"] = [f"{value * APIX:.6f}" for value in pixels]
    table["rlnOpticsGroup"] = "1"
    names = "".join(f"_{name} #{i}\n" for i, name in enumerate(table.columns, 1))
    rows = "\n".join(" ".join(row) for row in table.astype(str).to_numpy())
    optics = f"loop_\n_rlnOpticsGroup #1\n_rlnImagePixelSize #2\n_rlnImageSize #3\n1 {APIX} {BOX}\n"
    path.write_text(f"data_optics\n\n{optics}\n\ndata_particles\n\nloop_\n{names}{rows}\n")


def make_place(root: Path) -> Place:
    """The set (two states, tilt series, noise) and a working folder with mask and pose pickle."""
    found = Place(root / "work", root / "cwd")
    simulate(SimulateConfig(found.work, preset="two-state", n=COUNT, box=BOX, angpix=APIX))
    (found.work / "particles.star").rename(found.work / "ribo.star")
    write_relion31(found.work / "ribo.star", found.work / "consensus_data.star")
    found.cwd.mkdir()
    shutil.copy(found.work / "mask.mrc", found.cwd)
    assert call(f"dsdsh prepare {found.work}/ribo.star {BOX} {APIX}") == 0
    shutil.move(found.work / "ribo_pose_euler.pkl", found.cwd)
    return found


def poses_of(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A pose pickle after a check of its layout: three float32 arrays, matrices that are those of the angles."""
    with path.open("rb") as file:
        found = pickle.load(file)
    assert type(found) is tuple and [type(value) for value in found] == [np.ndarray] * 3
    rotation, origin, euler = found
    assert [value.dtype for value in found] == [np.float32] * 3
    assert (rotation.shape, origin.shape, euler.shape) == ((COUNT, 3, 3), (COUNT, 3), (COUNT, 3))
    expected = Rotation.from_euler("ZYZ", euler, degrees=True).as_matrix().swapaxes(1, 2)
    np.testing.assert_allclose(rotation, expected, atol=2e-5)
    return rotation, origin, euler


def check_classes(folder: Path, star: Path, rows: np.ndarray, labels: np.ndarray) -> None:
    """preI.star of every class: together the ``rows`` of ``star``, each readable, with the poses it had."""
    whole = read_particles(star, InputOptions())
    assert {path.name for path in folder.glob("*.star")} == {f"pre{label}.star" for label in labels}
    for label in np.unique(labels):
        part = read_particles(folder / f"pre{label}.star", InputOptions(datadir=star.parent))
        members = rows[labels == label]
        assert (part.dialect, part.pixel_size) == (whole.dialect, APIX)
        assert list(part.names) == [whole.names[i] for i in members]
        np.testing.assert_allclose(part.origin, whole.origin[members], atol=1e-5)
        assert list(part.star.particles.columns) == list(whole.star.particles.columns)
