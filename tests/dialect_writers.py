"""One set in every dialect that is read, 2-D and 3-D: the tilt images of a ``stack_writers.Set`` and what is made of
them by ``fourier_simulator``, with the names, units and signs of each program (no reader's formulas).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fourier_simulator import Array
from stack_writers import Set, put_stack, relion_angles
from star_sets import put_loop, put_volume


def texts(columns: Array) -> list[list[str]]:
    """Rows of numbers (P, c) as c columns of words."""
    return [[f"{value:.6f}" for value in column] for column in np.asarray(columns).T]


class Subtomograms:
    """3-D dialects of a set whose tilts are about y and whose images are raw."""

    def __init__(self, made: Set, folder: Path) -> None:
        assert not made.twice
        self.made, self.folder, self.count = made, folder, len(made.state)
        self.box, self.pixel = made.microscope.box, made.microscope.pixel
        self.tomograms = made.tomograms

    def columns(self, angstrom: bool, **more: list[str]) -> dict[str, list[str]]:
        """The particle table; origins in Angstrom or pixels."""
        angles, origin = relion_angles(self.made.rotation), self.made.origin * (self.pixel if angstrom else 1)
        unit = "Angst" if angstrom else ""
        return {
            "rlnMicrographName": [f"{name}.tomostar" for name in self.tomograms],
            "rlnImageName": [f"sub/p{i}.mrc" for i in range(self.count)],
            "rlnCtfImage": [f"sub/p{i}_ctf.mrc" for i in range(self.count)],
            **dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), texts(angles), strict=True)),
            **dict(zip([f"rlnOrigin{axis}{unit}" for axis in "XYZ"], texts(origin), strict=True)),
            "rlnRandomSubset": [str(1 + i % 2) for i in range(self.count)],
            "rlnKept": [f"0{i}.50" for i in range(self.count)],
        } | more

    def old_columns(self) -> dict[str, list[str]]:
        """Of RELION 3.0, with Warp's way of saying the pixel size."""
        size = {"rlnMagnification": "10000", "rlnDetectorPixelSize": f"{self.pixel}"}
        return self.columns(False, **{name: [value] * self.count for name, value in size.items()})

    def contrast(self, i: int) -> Array:
        """(T, N, N//2 + 1) CTF with envelope of particle i, as ``numpy.fft.rfft2`` orders it."""
        n = self.box
        u, v = np.meshgrid(np.fft.rfftfreq(n) * n, np.fft.fftfreq(n) * n)
        return self.made.microscope.contrast(u[None], v[None], self.made.defocus[i][:, None, None])

    def images(self, i: int, twice: bool) -> Array:
        images = self.made.images[i]
        if twice:  # noise and signal alike, as the programs do it
            images = np.fft.irfft2(np.fft.rfft2(images) * self.contrast(i), s=(self.box,) * 2)
        return images

    def put_volumes(self, twice: bool, mean: bool) -> None:
        for i in range(self.count):
            volume = self.made.microscope.mean_volume(self.images(i, twice), mean=mean)
            put_volume(self.folder / f"sub/p{i}.mrc", volume, self.pixel)

    def transfer(self, i: int, power: int, mean: bool) -> Array:
        """(N, N, N) of CTF^power with its origin at voxel N//2."""
        return self.made.microscope.mean_transfer(self.made.defocus[i][:, None, None, None], power, mean)

    def put_star(self, columns: dict[str, list[str]], premultiplied: bool | None) -> Path:
        """One table, or with optics where it says whether the data are premultiplied."""
        star = self.folder / "particles.star"
        if premultiplied is None:
            put_loop(star, "", columns)
            return star
        optics = self.made.optics(3) | {"rlnCtfDataAreCtfPremultiplied": [f"{int(premultiplied)}"]}
        put_loop(star, "optics", optics)
        put_loop(star, "particles", columns | {"rlnOpticsGroup": ["1"] * self.count}, "a")
        return star

    def put_ctf_stars(self, bfactor_sign: int) -> None:
        m = self.made.microscope
        tilts = len(m.tilts)
        for i in range(self.count):
            constant = {"rlnVoltage": "300", "rlnSphericalAberration": "2.7", "rlnAmplitudeContrast": "0.07",
                        "rlnAngleRot": "0", "rlnAnglePsi": "0"}  # fmt: skip
            varying = {"rlnDefocusU": self.made.defocus[i], "rlnAngleTilt": m.tilts,
                       "rlnCtfBfactor": bfactor_sign * m.bfactor, "rlnCtfScalefactor": m.scale}  # fmt: skip
            columns = {name: [value] * tilts for name, value in constant.items()}
            columns |= {name: [f"{v:.7f}" for v in values] for name, values in varying.items()}
            put_loop(self.folder / f"sub/p{i}_ctf.star", "images", columns)

    def put_ctf_tables(self) -> None:
        """SI units; the B-factor is Warp's own, -4 x dose."""
        m = self.made.microscope
        for i in range(self.count):
            lines = ["TiltAngle, Defocus, Voltage, Cs, Amplitude, Bfactor, Scale, DefocusDelta, AstigmatismAngle"]
            lines += [
                f"{t:.6f}, {-d * 1e-10:.9e}, 300000, 0.0027, 0.07, {-b * 1e-20:.9e}, {s:.7f}, 0, 0"
                for t, d, b, s in zip(m.tilts, self.made.defocus[i], m.bfactor, m.scale, strict=True)
            ]
            (self.folder / f"sub/p{i}_ctf.csv").write_text("\n".join(lines) + "\n")

    def relion30(self) -> Path:
        """Sums over tilts and a CTF STAR each, as ``relion_prepare_subtomograms`` leaves them."""
        self.put_volumes(twice=False, mean=False)
        self.put_ctf_stars(1)
        return self.put_star(self.old_columns(), None)

    def relion31(self) -> Path:
        """Means over tilts, optics, origins in Angstrom; the B-factors have Warp 1's sign."""
        self.put_volumes(twice=False, mean=True)
        self.put_ctf_stars(-1)
        return self.put_star(self.columns(True), False)

    def warp_csv(self) -> Path:
        """OPUS-TOMO's fork of Warp: raw volumes with a table of the tilts each."""
        self.put_volumes(twice=False, mean=True)
        self.put_ctf_tables()
        return self.put_star(self.old_columns(), None)

    def ctf_volumes(self) -> Path:
        """Raw means with the mean CTF as a cubic volume."""
        self.put_volumes(twice=False, mean=True)
        for i in range(self.count):
            put_volume(self.folder / f"sub/p{i}_ctf.mrc", self.transfer(i, 1, True), self.pixel)
        return self.put_star(self.columns(True), False)

    def warp_3d(self) -> Path:
        """Stock Warp: premultiplied means with CTF^2 volumes, half-Fourier with the origin at the corner."""
        self.put_volumes(twice=True, mean=True)
        for i in range(self.count):
            half = np.fft.ifftshift(self.transfer(i, 2, True))[..., : self.box // 2 + 1]
            put_volume(self.folder / f"sub/p{i}_ctf.mrc", half, self.pixel)
        return self.put_star(self.columns(True), True)

    def relion4(self) -> Path:
        """Pseudo-subtomograms: sums, CTF^2 and multiplicity one behind the other; an optimisation set names them."""
        self.put_volumes(twice=True, mean=False)
        for i in range(self.count):
            halves = [np.fft.ifftshift(self.transfer(i, p, False))[..., : self.box // 2 + 1] for p in (2, 0)]
            put_stack(self.folder / f"sub/p{i}_ctf.mrc", np.concatenate(halves), 1 / self.pixel)
        names = {
            "rlnTomoName": self.tomograms,
            "rlnTomoParticleName": [f"{name}/{i}" for i, name in enumerate(self.tomograms)],
        }
        # the pose is in the subtomogram's own frame, whatever these say
        turn = {f"rlnTomoSubtomogram{name}": ["30.0"] * self.count for name in ("Rot", "Tilt", "Psi")}
        self.put_star(self.columns(True, **names, **turn), True)
        put_loop(self.folder / "optimisation_set.star", "", {"rlnTomoParticlesFile": ["particles.star"]})
        return self.folder / "optimisation_set.star"


VOLUMES = {
    "RELION 3.0, CTF STAR": Subtomograms.relion30,
    "RELION 3.1, CTF STAR": Subtomograms.relion31,
    "Warp fork, CTF table": Subtomograms.warp_csv,
    "RELION 3.1, CTF volume": Subtomograms.ctf_volumes,
    "Warp 3-D, weight volume": Subtomograms.warp_3d,
    "RELION 4 pseudo-subtomograms": Subtomograms.relion4,
}
IMAGES: dict[str, Callable[[Set, Path], Path]] = {
    "RELION 5, native": lambda made, folder: made.write_set(folder, native=True),
    "RELION 5, projections": lambda made, folder: made.write_set(folder),
    "WarpTools, projections": lambda made, folder: made.write_set(folder, warp=True, hidden=0),
    "cryoDRGN-ET flat table": lambda made, folder: made.write_series(folder),
    "Warp 1 image series": lambda made, folder: made.write_series(folder, warp1=True),
}


def write_every_dialect(made: Set, folder: Path) -> dict[str, Path]:
    """The set in a folder of its own for each dialect: name -> the file to give to the program."""
    found = {}
    for number, (name, image) in enumerate(IMAGES.items()):
        found[name] = image(made, folder / f"images{number}")
    for number, (name, volume) in enumerate(VOLUMES.items()):
        found[name] = volume(Subtomograms(made, folder / f"volumes{number}"))
    return found
