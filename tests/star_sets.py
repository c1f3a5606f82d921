"""Small RELION sets written by the tests themselves (box 16), and the real sets where they are at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import mrcfile
import numpy as np
import pytest

BOX, PIXEL = 16, 3.5
SHARED = Path(__file__).parents[2] / "shared" / "data"
REAL_SETS = ("real_70S_empiar10499", "real_70S_warptools/subtomograms_3d")


def real_star(name: str) -> Path:
    star = SHARED / name / "particles.star"
    if not star.exists():
        pytest.skip("the shared data sets are not here")
    return star


def put_volume(path: Path, array: np.ndarray, pixel: float = PIXEL) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(array)
        mrc.voxel_size = pixel


def put_loop(path: Path, block: str, columns: dict[str, list[str]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["", f"data_{block}", "", "loop_", *(f"_{name} #{i}" for i, name in enumerate(columns, 1))]
    lines += [" ".join(row) for row in zip(*columns.values(), strict=True)]
    with path.open(mode) as file:
        file.write("\n".join(lines) + "\n")


def tilt_columns(angles: list[float], bfactor_sign: int = 1) -> dict[str, list[str]]:
    n = len(angles)
    return {
        "rlnDefocusU": ["21000"] * n,
        "rlnVoltage": ["300"] * n,
        "rlnSphericalAberration": ["2.7"] * n,
        "rlnAmplitudeContrast": ["0.07"] * n,
        "rlnAngleRot": ["0"] * n,
        "rlnAngleTilt": [f"{a}" for a in angles],
        "rlnAnglePsi": ["0"] * n,
        "rlnCtfBfactor": [f"{bfactor_sign * 4 * (3 + 2 * i)}" for i in range(n)],
        "rlnCtfScalefactor": [f"{np.cos(np.deg2rad(a)):.5f}" for a in angles],
    }


@dataclass
class Set:
    """A set of ``n`` subtomograms; change ``columns`` or ``optics``, then ``write``."""

    folder: Path
    n: int = 4
    block: str = ""
    optics: dict[str, list[str]] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    header_pixel: float = PIXEL

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self.columns = {
            "rlnMicrographName": [f"TS_{i % 2}.tomostar" for i in range(self.n)],
            "rlnImageName": [f"sub/p{i}.mrc" for i in range(self.n)],
            "rlnCtfImage": [f"sub/p{i}_ctf.mrc" for i in range(self.n)],
            **{f"rlnAngle{name}": [f"{a:.3f}" for a in rng.uniform(0, 170, self.n)] for name in ("Rot", "Tilt", "Psi")},
            **{f"rlnOrigin{axis}": [f"{a:.4f}" for a in rng.normal(size=self.n)] for axis in "XYZ"},
            "rlnMagnification": ["10000"] * self.n,
            "rlnDetectorPixelSize": [f"{PIXEL}"] * self.n,
        }

    @property
    def star(self) -> Path:
        return self.folder / "particles.star"

    def write(self, ctf: bool = True) -> Path:
        rng = np.random.default_rng(1)
        for i, name in enumerate(self.columns["rlnImageName"]):
            put_volume(self.folder / name, rng.normal(size=(BOX,) * 3).astype(np.float32), self.header_pixel)
            if ctf:
                put_loop(self.folder / f"sub/p{i}_ctf.star", "images", tilt_columns([-40.0, 0.0, 40.0]))
        self.write_star()
        return self.star

    def write_star(self) -> Path:
        if self.optics:
            put_loop(self.star, "optics", self.optics)
        put_loop(self.star, self.block, self.columns, "a" if self.optics else "w")
        return self.star


def relion31(folder: Path, n: int = 4, groups: int = 1) -> Set:
    """The same set in RELION 3.1 style: optics table, origins in Angstrom."""
    made = Set(folder, n, "particles")
    made.optics = {
        "rlnOpticsGroup": [str(g + 1) for g in range(groups)],
        "rlnOpticsGroupName": [f"opticsGroup{g + 1}" for g in range(groups)],
        "rlnImagePixelSize": [f"{PIXEL:.6f}"] * groups,
        "rlnImageSize": [str(BOX)] * groups,
        "rlnVoltage": ["300.000000"] * groups,
    }
    for axis in "XYZ":
        pixels = made.columns.pop(f"rlnOrigin{axis}")
        made.columns[f"rlnOrigin{axis}Angst"] = [f"{float(value) * PIXEL:.6f}" for value in pixels]
    del made.columns["rlnMagnification"], made.columns["rlnDetectorPixelSize"]
    made.columns["rlnOpticsGroup"] = [str(1 + i % groups) for i in range(n)]
    return made
