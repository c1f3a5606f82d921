"""Sets of tilt images in every dialect, written from formulas of their own and an independent simulator (no reader's).

``two_states_set`` makes images of two known states by ``fourier_simulator``; ``Set`` writes the same particles as an
optimisation set of RELION 5 (native tilt series or rlnTomoProj*), as a flat table, and as Warp 1 image series.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
from scipy.spatial.transform import Rotation

from fourier_simulator import Array, Beads, Microscope, random_poses, two_states
from star_sets import put_loop

SIZE = np.array([400.0, 420.0, 160.0])  # of the tomogram, pixels
ZROT = 85.0  # tilt axis of the native sets, degrees from y


def put_stack(path: Path, images: Array, pixel: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(images.astype(np.float32))
        mrc.set_image_stack()
        mrc.voxel_size = pixel


def relion_angles(rotation: Array) -> Array:
    """RELION's Euler angles: its matrix is the transpose of intrinsic ZYZ."""
    return Rotation.from_matrix(np.swapaxes(rotation, -1, -2)).as_euler("ZYZ", degrees=True)


@dataclass
class Set:
    """P particles with images (P, T, N, N) seen at ``turns`` (T, 3, 3), defocus (P, T), half sets 1 and 2."""

    microscope: Microscope
    state: Array
    states: tuple[Beads, Beads]
    rotation: Array  # (P, 3, 3)
    origin: Array  # (P, 3) pixels
    turns: Array  # (T, 3, 3)
    position: Array  # (P, 3) pixels from the tomogram's middle
    defocus: Array  # (P, T)
    images: Array
    twice: bool = False  # CTF-premultiplied
    series: Array | None = None  # (P,) tilt series 0 or 1, each with its defocus; None: in turns, both the same

    @property
    def tomograms(self) -> list[str]:
        """(P,) TS_2 (0) or TS_1 (1)."""
        number = np.arange(len(self.state)) % 2 if self.series is None else self.series
        return [("TS_2", "TS_1")[n] for n in number]

    @property
    def angles(self) -> Array:
        """(P, T, 3, 3) of every image."""
        return np.einsum("tij,pjk->ptik", self.turns, self.rotation)

    def optics(self, dimensions: int = 2) -> dict[str, list[str]]:
        return {
            "rlnOpticsGroup": ["1"], "rlnOpticsGroupName": ["a"], "rlnVoltage": ["300"],
            "rlnSphericalAberration": ["2.7"], "rlnAmplitudeContrast": ["0.07"],
            "rlnTomoTiltSeriesPixelSize": [f"{self.microscope.pixel}"], "rlnTomoSubtomogramBinning": ["1"],
            "rlnImagePixelSize": [f"{self.microscope.pixel}"], "rlnImageSize": [f"{self.microscope.box}"],
            "rlnImageDimensionality": [f"{dimensions}"], "rlnCtfDataAreCtfPremultiplied": [f"{int(self.twice)}"],
        }  # fmt: skip

    def poses(self, rotation: Array | None = None, origin: Array | None = None) -> dict[str, list[str]]:
        """Columns of poses in RELION 3.1's units."""
        angles = relion_angles(self.rotation if rotation is None else rotation)
        shifts = (self.origin if origin is None else origin) * self.microscope.pixel
        named = dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), angles.T, strict=True))
        named |= {f"rlnOrigin{axis}Angst": shifts[:, i] for i, axis in enumerate("XYZ")}
        return {name: [f"{value:.6f}" for value in column] for name, column in named.items()}

    def write_set(self, folder: Path, native: bool = False, hidden: int | None = None, warp: bool = False,
                  turn: Array | None = None) -> Path:  # fmt: skip
        """An optimisation set.  native: a STAR for each tilt series, centred coordinates; hidden: a frame that is not
        visible and absent from the stacks (``warp``: there, but empty); turn: (P, 3, 3) orientation of subtomograms."""
        count, tilts = len(self.state), len(self.turns)
        flags = np.ones(tilts, bool)
        if hidden is not None:
            flags[hidden] = False
        for i, images in enumerate(self.images):
            shown = images * flags[:, None, None] if warp else images[flags]
            put_stack(folder / f"stacks/{i}.mrcs", shown, self.microscope.pixel)
        names = self.tomograms
        columns = {
            "rlnTomoName": names,
            "rlnTomoParticleName": [f"{name}/{i}" for i, name in enumerate(names)],
            "rlnImageName": [f"stacks/{i}.mrcs" for i in range(count)],
            "rlnRandomSubset": [str(1 + i % 2) for i in range(count)],
            "rlnOpticsGroup": ["1"] * count,
            "rlnTomoVisibleFrames": ["[" + ",".join(str(int(flag)) for flag in flags) + "]"] * count,
            "rlnKept": [f"0{i}.50" for i in range(count)],
        }
        if turn is None:
            columns |= self.poses()
        else:
            columns |= self.poses(turn.swapaxes(1, 2) @ self.rotation, np.einsum("pji,pj->pi", turn, self.origin))
            for name, values in zip(("Rot", "Tilt", "Psi"), relion_angles(turn).T, strict=True):
                columns[f"rlnTomoSubtomogram{name}"] = [f"{value:.6f}" for value in values]
        # the coordinate is the middle of the box: the particle lies at coordinate - origin
        middle = self.position + self.origin
        if native:
            columns |= {f"rlnCenteredCoordinate{axis}Angst": [f"{v:.5f}" for v in middle[:, i] * self.microscope.pixel]
                        for i, axis in enumerate("XYZ")}  # fmt: skip
        else:
            columns |= {f"rlnCoordinate{axis}": [f"{v:.5f}" for v in (middle + SIZE / 2)[:, i]]
                        for i, axis in enumerate("XYZ")}  # fmt: skip
        path = folder / "particles.star"
        put_loop(path, "optics", self.optics())
        put_loop(path, "particles", columns, "a")
        path.write_text("\ndata_general\n\n_rlnTomoSubTomosAre2DStacks 1\n" + path.read_text())
        self._write_tomograms(folder, native)
        (folder / "set.star").write_text(
            "\ndata_\n\n_rlnTomoParticlesFile particles.star\n_rlnTomoTomogramsFile tomograms.star\n_rlnKept 7\n"
        )
        return folder / "set.star"

    def _write_tomograms(self, folder: Path, native: bool) -> None:
        names = ["TS_1", "TS_2"]
        table = {
            "rlnTomoName": names, "rlnTomoHand": ["-1.0"] * 2, "rlnTomoFrameCount": [str(len(self.turns))] * 2,
            **{f"rlnTomoSize{axis}": [f"{SIZE[i]:.0f}"] * 2 for i, axis in enumerate("XYZ")},
            "rlnTomoTiltSeriesPixelSize": [f"{self.microscope.pixel}"] * 2, "rlnVoltage": ["300"] * 2,
            "rlnSphericalAberration": ["2.7"] * 2, "rlnAmplitudeContrast": ["0.07"] * 2,
        }  # fmt: skip
        if native:
            table["rlnTomoTiltSeriesStarFile"] = [f"tilt_series/{name}.star" for name in names]
        put_loop(folder / "tomograms.star", "global", table)
        for name in names:
            if native:
                put_loop(folder / f"tilt_series/{name}.star", name, self._tilts(native, name))
            else:
                put_loop(folder / "tomograms.star", name, self._tilts(native, name), "a")

    def _tilts(self, native: bool, name: str) -> dict[str, list[str]]:
        if native:
            z, y, x = Rotation.from_matrix(self.turns).as_euler("ZYX", degrees=True).T
            geometry = {"rlnTomoXTilt": x, "rlnTomoYTilt": y, "rlnTomoZRot": z, "rlnTomoXShiftAngst": 3 * x,
                        "rlnTomoYShiftAngst": 2 * y}  # fmt: skip
            columns = {name: [f"{value:.7f}" for value in values] for name, values in geometry.items()}
        else:
            shift = SIZE / 2 - self.turns @ (SIZE / 2)
            rows = np.concatenate([self.turns, shift[..., None]], 2)
            columns = {f"rlnTomoProj{axis}": [",".join(f"{v:.9f}" for v in row).join("[]") for row in rows[:, i]]
                       for i, axis in enumerate("XYZ")}  # fmt: skip
            columns["rlnTomoProjW"] = ["[0,0,0,1]"] * len(rows)
        # hand -1: less defocus at larger depth
        depth = np.einsum("tj,pj->pt", self.turns[:, 2], self.position) * self.microscope.pixel
        # of a tomogram without particles any
        middle = (self.defocus + depth)[self.tomograms.index(name) if name in self.tomograms else 0]
        return columns | {
            "rlnDefocusU": [f"{v:.3f}" for v in middle], "rlnDefocusV": [f"{v:.3f}" for v in middle],
            "rlnDefocusAngle": ["0"] * len(middle), "rlnCtfBfactor": [f"{v:.3f}" for v in self.microscope.bfactor],
            "rlnCtfScalefactor": [f"{v:.6f}" for v in self.microscope.scale],
        }  # fmt: skip

    def write_series(self, folder: Path, warp1: bool = False) -> Path:
        """A flat table, rows of particles mixed; warp1: Warp 1's columns, one stack each, else one stack for all."""
        count, tilts = self.images.shape[:2]
        if warp1:
            for i, images in enumerate(self.images):
                put_stack(folder / f"series/{i}.mrcs", images, self.microscope.pixel)
        else:
            put_stack(folder / "all.mrcs", self.images.reshape(-1, *self.images.shape[2:]), self.microscope.pixel)
        p, t = (a.ravel() for a in np.meshgrid(np.arange(count), np.arange(tilts), indexing="ij"))
        order = np.argsort(t, kind="stable")  # the first image of every particle, then the second ...
        p, t = p[order], t[order]
        turn = self.angles[p, t]
        shift = np.einsum("tij,pj->pti", self.turns, self.origin)[p, t]
        angles = relion_angles(turn)
        columns = {
            "rlnImageName": [f"{b + 1}@series/{a}.mrcs" if warp1 else f"{a * tilts + b + 1}@all.mrcs"
                             for a, b in zip(p, t, strict=True)],
            "rlnGroupName": [f"TS_{1 + a % 2}_{a:03d}" for a in p],
            "rlnMicrographName": [f"TS_{1 + a % 2}.tomostar" for a in p],
            **{f"rlnAngle{name}": [f"{v:.6f}" for v in angles[:, i]] for i, name in enumerate(("Rot", "Tilt", "Psi"))},
            "rlnDefocusU": [f"{v:.3f}" for v in self.defocus[p, t]],
            "rlnDefocusV": [f"{v:.3f}" for v in self.defocus[p, t]],
            "rlnDefocusAngle": ["0"] * len(p),
            "rlnCtfBfactor": [f"{-v if warp1 else v:.3f}" for v in self.microscope.bfactor[t]],
            "rlnCtfScalefactor": [f"{v:.6f}" for v in self.microscope.scale[t]],
            "rlnRandomSubset": [str(1 + a % 2) for a in p],
            "rlnKept": [f"0{a}.{b}0" for a, b in zip(p, t, strict=True)],
        }  # fmt: skip
        star = folder / ("warp.star" if warp1 else "flat.star")
        if warp1:
            columns |= {f"rlnOrigin{axis}": [f"{v:.6f}" for v in shift[:, i]] for i, axis in enumerate("XY")}
            constant = {"rlnMagnification": "10000", "rlnDetectorPixelSize": f"{self.microscope.pixel}"}
            constant |= {"rlnVoltage": "300", "rlnSphericalAberration": "2.7", "rlnAmplitudeContrast": "0.07"}
            columns |= {name: [value] * len(p) for name, value in constant.items()}
            put_loop(star, "", columns)
        else:
            columns |= {f"rlnOrigin{axis}Angst": [f"{v * self.microscope.pixel:.6f}" for v in shift[:, i]]
                        for i, axis in enumerate("XY")}  # fmt: skip
            columns["rlnOpticsGroup"] = ["1"] * len(p)
            put_loop(star, "optics", self.optics())
            put_loop(star, "particles", columns, "a")
        return star


def native_turns(tilts: Array) -> Array:
    """A tilt series whose axis is not y, with a levelled volume: every Euler angle and X tilt is at work."""
    angles = np.stack([np.full_like(tilts, ZROT), tilts, np.full_like(tilts, 4.0)], 1)
    return Rotation.from_euler("ZYX", angles, degrees=True).as_matrix()


def two_states_set(
    count: int, noise: float | Array, box: int = 32, turns: Array | None = None, step: float = 4.0, twice: bool = False,
    scattered: float = 0.0, seed: int = 5, reach: float = 40.0,
) -> Set:  # fmt: skip
    """Images of two states at random poses; noise: standard deviation, of all or of each tilt; turns: (T, 3, 3),
    default tilts about y in RELION's sign; scattered: half the difference in defocus between two tilt series, whose
    particles then lie at places of their own, reach pixels from the middle, in depth half as far again."""
    rng = np.random.default_rng(seed)
    microscope = Microscope(box, 240.0 / box, np.arange(-60.0, 61.0, step))
    tilts = len(microscope.tilts)
    if turns is None:
        turns = Rotation.from_euler("y", -microscope.tilts[:, None], degrees=True).as_matrix()
    states = two_states(box, 3)
    rotation, origin = random_poses(count, rng)
    state = rng.permutation(np.arange(count) % 2)
    position = np.tile(rng.uniform(-40, 40, 3) * [1, 1, 1.5], (count, 1))
    series = np.arange(count) // 2 % 2 if scattered else None  # both half sets have both
    if scattered:
        position = rng.uniform(-reach, reach, (count, 3)) * [1, 1, 1.5]
    depth = np.einsum("tj,pj->pt", turns[:, 2], position) * microscope.pixel
    defocus = 27000.0 - depth
    if series is not None:
        defocus += scattered * np.where(series == 1, 1.0, -1.0)[:, None]
    images = np.stack([
        microscope.images_at(states[state[i]], turns @ rotation[i], turns @ origin[i], defocus[i],
                             rng.normal(0, 1, (tilts, box, box)) * np.broadcast_to(noise, tilts)[:, None, None], twice)
        for i in range(count)
    ])  # fmt: skip
    return Set(microscope, state, states, rotation, origin, turns, position, defocus, images, twice, series)
