"""Draw docs/images/conventions.png: tomogram, tilt, particle and consensus frames, with the program's own matrices.

    python tools/draw_conventions.py [docs/images/conventions.png]

Every direction that is drawn comes from ``physics.geometry.euler_to_matrix``, so a changed convention changes
the picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle
from numpy.typing import NDArray

from opustomo.physics.geometry import euler_to_matrix

Array = NDArray[np.float64]
PICTURE = Path(__file__).parents[1] / "docs/images/conventions.png"
BLUE, RED, GREY = "#20639b", "#c0392b", "#777777"
TILT, POSE = 30.0, (25.0, 0.0, 20.0)  # degrees
L_SHAPE = np.array([[-1.6, -1.6], [1.6, -1.6], [1.6, -0.4], [-0.4, -0.4], [-0.4, 2.4], [-1.6, 2.4]])


def matrix(*euler: float) -> Array:
    """(3, 3) of rot, tilt, psi in degrees."""
    return euler_to_matrix(torch.tensor(euler, dtype=torch.float64)).numpy()


def arrow(axes: Axes, start: Array, step: Array, colour: str, label: str = "", away: float = 1.12) -> None:
    axes.annotate("", start + step, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.8,
                  "shrinkA": 0, "shrinkB": 0})  # fmt: skip
    if label:
        axes.text(*(start + away * step), label, color=colour, ha="center", va="center", fontsize=9)


def frame(axes: Axes, at: tuple[float, float], names: tuple[str, str], into: str, size: float = 1.2) -> None:
    """Two axes of a right-handed frame in the plane of the paper; the third goes into it (x) or out of it (dot)."""
    corner = np.array(at)
    arrow(axes, corner, np.array([size, 0]), GREY, names[0], 1.25)
    arrow(axes, corner, np.array([0, size]), GREY, names[1], 1.25)
    axes.plot(*corner, marker="o", ms=8, mfc="white", mec=GREY)
    axes.plot(*corner, marker="x" if "into" in into else ".", ms=5, color=GREY)
    axes.text(corner[0] + 0.25, corner[1] - 0.5, into, color=GREY, fontsize=8, va="center")


def draw_tilt(axes: Axes) -> None:
    """Section of the tomogram across the tilt axis, with the image of one tilt."""
    u, _, normal = (row[[0, 2]] for row in matrix(0.0, TILT, 0.0))
    axes.add_patch(Rectangle((-4.5, -1.1), 9, 2.2, fc="#e8eef4", ec=GREY))
    frame(axes, (-5.4, -5.2), ("x", "z"), "y, the tilt axis, into the paper")
    place = np.array([2.8, 0.6])
    axes.plot(*place, "o", color="k", ms=7)
    axes.text(place[0] + 0.25, place[1] - 0.45, "particle", fontsize=9)
    axes.plot(0, 0, "+", color="k", ms=8)
    axes.text(-0.15, -0.55, "middle", fontsize=8, ha="right")
    arrow(axes, np.zeros(2), 4.3 * normal, RED, "normal: x sin t + z cos t", 1.1)
    arrow(axes, np.zeros(2), np.array([0, 4.0]), GREY)
    axes.text(-0.25, 3.6, "beam at t = 0", color=GREY, fontsize=9, ha="right")
    angle = np.deg2rad(np.linspace(90 - TILT, 90, 30))
    axes.plot(3.0 * np.cos(angle), 3.0 * np.sin(angle), color=RED, lw=1)
    axes.text(0.85, 3.2, f"t = +{TILT:.0f}°", color=RED, fontsize=9, ha="center")
    foot = -3.9 * normal
    axes.plot(*np.stack([foot - 4.2 * u, foot + 4.2 * u]).T, color=BLUE, lw=3)
    arrow(axes, foot, 4.2 * u, BLUE, "u = x cos t - z sin t", 1.16)
    axes.text(*(foot - 4.2 * u + np.array([-0.2, 0.5])), "image", color=BLUE, fontsize=9, ha="center")
    depth = normal * (place @ normal)
    axes.plot(*np.stack([place, depth]).T, ":", color=RED, lw=1)
    axes.plot(*np.stack([np.zeros(2), depth]).T, color=RED, lw=4, alpha=0.35)
    axes.plot(*np.stack([place, foot + u * (place @ u)]).T, ":", color=BLUE, lw=1)
    axes.text(2.9, 1.6, "depth: third row of $R_t$\ndefocus = middle's\n+ hand x depth", color=RED, fontsize=8)
    axes.set_title(
        "Tomogram and tilt: $R_t$ = (u, v, normal)\nRELION's sign of t; rlnTomoYTilt = -t (axis along y)", fontsize=10
    )


def draw_origin(axes: Axes) -> None:
    """A box of 8 voxels: its centre voxel, the coordinate, the origin."""
    size = 8
    for i in range(size + 1):
        axes.plot([i - 4.5, i - 4.5], [-4.5, 3.5], color="#cccccc", lw=0.6)
        axes.plot([-4.5, 3.5], [i - 4.5, i - 4.5], color="#cccccc", lw=0.6)
    axes.add_patch(Rectangle((-0.5, -0.5), 1, 1, fc="#d5dde6", ec=GREY))
    axes.plot(0, 0, "+", color="k", ms=9)
    axes.text(-0.2, -0.9, "voxel N//2 =\ncoordinate in the tomogram", fontsize=8, ha="center", va="top")
    origin = np.array([-1.9, -1.4])
    arrow(axes, np.zeros(2), -origin, RED, "", 1)
    axes.text(*(0.5 * -origin + np.array([-0.2, 0.3])), "- origin", color=RED, fontsize=9, ha="right")
    axes.plot(*-origin, "o", color="k", ms=7)
    axes.text(-origin[0] + 0.3, -origin[1] + 0.35, "particle", fontsize=9)
    frame(axes, (-5.4, -6.2), ("x", "y"), "z out of the paper")
    axes.set_title("Box: the particle lies at N//2 - origin,\nin the tomogram at coordinate - origin", fontsize=10)


def draw_euler(axes: Axes) -> None:
    """A density in the consensus and in the particle; turned about z alone, where the paper shows it."""
    a = matrix(*POSE)[:2, :2]
    for offset, shape, colour, label in ((-3.4, L_SHAPE, BLUE, "consensus"), (3.4, L_SHAPE @ a.T, RED, "particle")):
        axes.add_patch(Polygon(shape + np.array([offset, 1.0]), fc=colour, alpha=0.5, ec=colour))
        axes.plot(offset, 1.0, "+", color="k", ms=8)
        axes.text(offset, 4.4, label, color=colour, fontsize=10, ha="center")
    arrow(axes, np.array([-1.4, 2.8]), np.array([2.8, 0.0]), "k", "", 1)
    axes.text(0.0, 3.2, "A", fontsize=11, ha="center")
    point = np.array([-1.0, 2.4])
    axes.plot(*(point + np.array([-3.4, 1.0])), "o", color=BLUE, ms=5)
    axes.plot(*(a @ point + np.array([3.4, 1.0])), "o", color=RED, ms=5)
    frame(axes, (-5.4, -5.2), ("x", "y"), "z out of the paper")
    axes.text(0.6, -2.2, "$x_{particle} = A\\,x_{consensus}$\n$A = R_z(psi)\\,R_y(tilt)\\,R_z(rot)$", fontsize=9)
    axes.text(
        0.6, -4.2, f"here rot = {POSE[0]:.0f}°, tilt = 0, psi = {POSE[2]:.0f}°:\nclockwise on the paper", fontsize=8
    )
    axes.set_title("Pose: Euler angles take the consensus\nto the particle", fontsize=10)


def main() -> None:
    """Command line."""
    line = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    line.add_argument("picture", nargs="?", type=Path, default=PICTURE, help="the file to write")
    target = line.parse_args().picture
    figure, panels = plt.subplots(1, 3, figsize=(14.0, 5.0))
    for axes, draw in zip(panels, (draw_tilt, draw_origin, draw_euler), strict=True):
        draw(axes)
        axes.set(xlim=(-6.2, 6.6), ylim=(-6.9, 5.2), aspect="equal")
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(target, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
