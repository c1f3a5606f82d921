"""Drawing only: arrays in, a matplotlib ``Figure`` out; nothing is read, pyplot's global state is left alone.

Owns: colours (safe for the colour-blind), one style of axes and every figure of the analysis and the report.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from opustomo.analysis.surface import FRONT, SIDE, Image, contour, render
from opustomo.data.atomic import atomic

Array = NDArray[Any]
INK, MUTED, GRID, BLUE, ORANGE = "#22262b", "#6b7280", "#e5e7eb", "#0072b2", "#d55e00"
SERIES = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a6f00", "#4d4d4d")  # Okabe and Ito
RAINBOW = LinearSegmentedColormap.from_list(  # P. Tol's smooth rainbow: ordered, readable without red-green vision
    "classes",
    ["#6f4c9b", "#5568b8", "#4d8ac6", "#54b0b3", "#6aba8e", "#a6be54", "#d1b541", "#e49c39", "#e67932", "#b8221e"],
)
MANY = 20_000  # more points than this are drawn as densities


def save(fig: Figure, path: Path) -> Path:
    """Write ``fig`` as PNG at ``path``, atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(png(fig))
    return path


def png(fig: Figure) -> bytes:
    """``fig`` as PNG bytes on a white ground."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


def class_colours(k: int) -> NDArray[np.float64]:
    """(k, 3) RGB 0..1, one per class: Okabe-Ito up to eight classes, an ordered rainbow beyond."""
    if k <= len(SERIES):
        return np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in SERIES[:k]]).reshape(k, 3)
    return np.asarray(RAINBOW(np.linspace(0, 1, k)))[:, :3]


def direction_colours(direction: Array) -> NDArray[np.float64]:
    """(P, 3) RGB of unit vectors (P, 3) in (x, y, z): hue is the azimuth, light to dark runs from +z to -z."""
    x, y, z = np.asarray(direction, np.float64).T
    hue = (np.arctan2(y, x) / (2 * np.pi)) % 1
    side = np.sqrt(np.clip(1 - z**2, 0, 1))
    colours: NDArray[np.float64] = hsv_to_rgb(np.stack([hue, 0.85 * side, 0.5 + 0.28 * z + 0.35 * side], axis=-1))
    return colours


def panel(fig: Figure, title: str = "", xlabel: str = "", ylabel: str = "", place: Any = 111) -> Axes:
    """Axes in the style of all our figures; place: as ``Figure.add_subplot`` takes it."""
    axes = fig.add_subplot(*place) if isinstance(place, tuple) else fig.add_subplot(place)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=9, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=9, color=MUTED)
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def figure(width: float = 5.6, height: float = 4.2) -> Figure:
    """An empty figure; inches."""
    return Figure(figsize=(width, height), layout="constrained")


def line(x: tuple[float, float], y: float, width: float) -> Line2D:
    """A horizontal bar in fractions of a figure."""
    return Line2D(x, (y, y), color=INK, linewidth=width)


def scatter(xy: Array, names: tuple[str, str] = ("PC1", "PC2"), title: str = "") -> Figure:
    """Codes in two coordinates ``xy`` (P, 2): points, or densities when there are very many."""
    fig = figure()
    axes = panel(fig, title, *names)
    if len(xy) > MANY:
        axes.hexbin(xy[:, 0], xy[:, 1], gridsize=60, mincnt=1, bins="log", cmap="GnBu", linewidths=0.1)
    else:
        _points(axes, xy, np.tile(class_colours(1), (len(xy), 1)))
    return fig


def _points(axes: Axes, xy: Array, colours: Array) -> None:
    size = float(np.clip(6000 / max(len(xy), 1), 1.0, 14.0))
    order = np.random.default_rng(0).permutation(len(xy))  # no class is drawn on top of another
    axes.scatter(xy[order, 0], xy[order, 1], s=size, c=colours[order], alpha=0.75, linewidths=0)


def hexbin(xy: Array, names: tuple[str, str] = ("UMAP1", "UMAP2"), title: str = "") -> Figure:
    """Particles per hexagonal cell (logarithmic) of coordinates ``xy`` (P, 2)."""
    fig = figure()
    axes = panel(fig, title, *names)
    cells = axes.hexbin(xy[:, 0], xy[:, 1], gridsize=int(np.clip(len(xy) ** 0.5, 12, 60)), mincnt=1, cmap="GnBu_r")
    bar = fig.colorbar(cells, ax=axes, label="particles", pad=0.01)
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=0)
    bar.outline.set_visible(False)
    return fig


def classes(
    xy: Array, labels: Array, centres: Array, names: tuple[str, str] = ("PC1", "PC2"), title: str = ""
) -> Figure:
    """``xy`` (P, 2) coloured by ``labels`` (P,); the rows ``centres`` (K,) are marked with their class number."""
    fig = figure()
    axes = panel(fig, title, *names)
    colours = class_colours(len(centres))
    _points(axes, xy, colours[np.asarray(labels)])
    for k, row in enumerate(np.asarray(centres)):
        box = {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": colours[k], "linewidth": 1.5}
        axes.annotate(str(k), xy[row], fontsize=7, color=INK, ha="center", va="center", bbox=box)
    return fig


def without_tails(values: Array, name: str) -> tuple[Array, str]:
    """``values`` (P,) with those beyond ten quartile ranges moved in to there, and the axis name that says so."""
    low, high = np.percentile(values, [25, 75])
    reach = 10 * (high - low) or np.inf
    kept = np.clip(values, low - reach, high + reach)
    moved = int((kept != values).sum())
    return kept, f"{name}; {moved:,} farther out drawn at the edge" if moved else name


def histogram(values: Array, labels: Array, k: int, name: str = "PC1", title: str = "") -> Figure:
    """Particles over a code of one dimension, ``values`` (P,), stacked by ``labels`` (P,) of ``k`` classes."""
    fig = figure()
    values, name = without_tails(np.asarray(values), name)
    axes = panel(fig, title, name, "particles")
    edges = np.histogram_bin_edges(values, int(np.clip(2 * len(values) ** 0.5, 5, 80)))
    below = np.zeros(len(edges) - 1)
    for c, colour in enumerate(class_colours(k)):
        counts = np.histogram(values[np.asarray(labels) == c], edges)[0]
        axes.bar(edges[:-1], counts, np.diff(edges), below, align="edge", color=colour, label=str(c))
        below += counts
    if k > 1:
        axes.legend(title="class", loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + k // 16,
                    frameon=False, fontsize=7, title_fontsize=7, labelcolor=INK)  # fmt: skip
    return fig


def viewing_direction(
    xy: Array, direction: Array, names: tuple[str, str] = ("UMAP1", "UMAP2"), title: str = ""
) -> Figure:
    """``xy`` (P, 2) coloured by the beam axis in the consensus frame, ``direction`` (P, 3), with a colour key."""
    fig = figure()
    axes = panel(fig, title, *names)
    _points(axes, xy, direction_colours(direction))
    key = axes.inset_axes((1.01, 0.0, 0.2, 0.26))
    u, v = np.meshgrid(np.linspace(-1, 1, 101), np.linspace(-1, 1, 101))
    radius2 = np.clip(u**2 + v**2, 0, 1)  # equal-area disc of the whole sphere: +z in the middle, -z on the rim
    side = 2 * np.sqrt(1 - radius2)
    disc = direction_colours(np.stack([u * side, v * side, 1 - 2 * radius2], -1).reshape(-1, 3)).reshape(101, 101, 3)
    key.imshow(np.dstack([disc, u**2 + v**2 <= 1]), origin="lower", interpolation="bilinear")
    key.set_title("beam axis", fontsize=7, color=MUTED)
    key.set_axis_off()
    return fig


def independent_axes(panels: Sequence[tuple[Array, Array, Array, str]]) -> Figure:
    """One panel for each axis: where the data put the particles (P,), by group (P,), and what the fitted law expects.

    panels: (place (P,), group (P,), law (n, 2) of positions and densities, title).
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    fig = figure(3.2 * columns, 2.5 * rows)
    places = fig.add_gridspec(rows, columns)
    for number, (place, group, law, title) in enumerate(panels):
        low, high = np.percentile(place, [0.5, 99.5])
        edges = np.linspace(low, high, int(np.clip(1.5 * len(place) ** 0.5, 8, 60)))
        axes = panel(fig, title, "position", "particles", places[number // columns, number % columns])
        k = int(group.max()) + 1
        for colour, part in zip(class_colours(k), range(k), strict=True):
            axes.hist(np.clip(place[group == part], low, high), edges.tolist(), color=colour, alpha=0.6)
        scale = len(place) * (edges[1] - edges[0])
        axes.plot(law[:, 0], law[:, 1] * scale, color=INK, linewidth=1.2)
        axes.set_xlim(low, high)
    return fig


def explained_variance(ratio: Array) -> Figure:
    """Bars: fraction of the variance of the codes on each principal component, (n,)."""
    fig = figure(5.6, 3.0)
    axes = panel(fig, "Explained variance", "principal component", "fraction of variance")
    number = np.arange(1, len(ratio) + 1)
    axes.bar(number, ratio, color=BLUE, width=0.7)
    axes.plot(number, np.cumsum(ratio), color=MUTED, marker="o", markersize=3, linewidth=1, label="cumulative")
    axes.set_xticks(number if len(number) <= 16 else number[::4])
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, fontsize=8, labelcolor=MUTED)
    return fig


def training_curves(metrics: Mapping[str, Array]) -> Figure:
    """Two panels from the columns of metrics.csv (NaN where empty): training loss and KL; held-out likelihood."""
    fig = figure(9.0, 3.4)
    passes = metrics["epoch"] + 1 if "epoch" in metrics else np.arange(len(next(iter(metrics.values()))))
    seen = metrics.get("particles", passes)
    left = panel(fig, "Training", "particles seen", "nats per particle", 121)
    for name, colour, label in (("loss", BLUE, "loss"), ("nll", "#56b4e9", "negative log-likelihood")):
        _curve(left, seen, metrics.get(name), colour, label)
    right = panel(fig, "Held-out particles (higher is better)", "particles seen", "ELBO, nats per particle", 122)
    _curve(right, seen, metrics.get("val_elbo"), BLUE, "network", marker="o")
    linear = metrics.get("linear_val_elbo", np.array([]))
    if np.isfinite(linear).any():
        level = float(linear[np.isfinite(linear)][-1])
        right.axhline(level, color=ORANGE, linewidth=1.2, linestyle="--", label="linear stage")
    for axes in (left, right):
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return fig


def _curve(axes: Axes, x: Array, y: Array | None, colour: str, label: str, marker: str = "") -> None:
    if y is None or not np.isfinite(y).any():
        return
    good = np.isfinite(y)
    axes.plot(x[good], y[good], color=colour, linewidth=1.6, marker=marker or None, markersize=3.5, label=label)


def fsc_curves(
    frequency: Array,
    curves: Mapping[str, Array],
    title: str = "Half-map FSC",
    particles: Mapping[str, int] | None = None,
) -> Figure:
    """FSC ``curves`` (name to (S,)) over ``frequency`` (S,) in 1/Angstrom, with the 0.143 and 0.5 thresholds.

    The curve called ``random`` is a control and drawn grey and dashed.  ``particles``: how many made each curve.
    """
    columns = 1 + (len(curves) - 1) // 20  # of the legend, beside the curves
    fig = figure(5.6 + 1.0 * columns, 3.6)
    counts = {name: f"{name} ({count:,})" for name, count in (particles or {}).items()}
    axes = panel(fig, title, "resolution (Å)", "FSC")
    own = [name for name in curves if name != "random"]
    for name, colour in zip(own, class_colours(len(own)), strict=True):
        axes.plot(frequency, curves[name], color=colour, linewidth=1.4, label=counts.get(name, name))
    if "random" in curves:
        label = counts.get("random", "random")
        axes.plot(frequency, curves["random"], color=MUTED, linewidth=1.4, linestyle="--", label=label)
    for level in (0.143, 0.5):
        axes.axhline(level, color=MUTED, linewidth=0.7, linestyle=":")
    axes.set_ylim(-0.1, 1.05)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{1 / s:.0f}" if s > 1e-6 else "∞"))
    axes.legend(title="map (particles)" if counts else None, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=columns,
                frameon=False, fontsize=7, title_fontsize=7, labelcolor=INK)  # fmt: skip
    return fig


def class_sizes(labels: Array, k: int) -> Figure:
    """Bars: particles in each of ``k`` classes."""
    fig = figure(5.6, 3.0)
    axes = panel(fig, "Class sizes", "class", "particles")
    axes.bar(np.arange(k), np.bincount(labels, minlength=k), color=class_colours(k), width=0.75)
    axes.set_xticks(np.arange(k))
    return fig


def tomogram_fractions(labels: Array, tomogram: Array, k: int) -> Figure:
    """Stacked bars: share of each class in every tomogram (the 40 largest): a class of one stands out."""
    names, index, counts = np.unique(np.asarray(tomogram, str), return_inverse=True, return_counts=True)
    table = np.zeros((len(names), k))
    np.add.at(table, (index, np.asarray(labels)), 1)
    shown = np.sort(np.argsort(-counts, kind="stable")[:40])
    share = table[shown] / counts[shown, None]
    fig = figure(5.6, 1.0 + 0.24 * len(shown))
    axes = panel(fig, "Classes in each tomogram", "fraction of its particles")
    left = np.zeros(len(shown))
    for c, colour in enumerate(class_colours(k)):
        axes.barh(np.arange(len(shown)), share[:, c], left=left, color=colour, height=0.8, label=str(c))
        left += share[:, c]
    labels_of = [f"{Path(names[i]).name} ({counts[i]})" for i in shown]
    axes.set_yticks(np.arange(len(shown)), labels_of, fontsize=7, parse_math=False)  # names may hold $
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    return fig


def slice_strip(volume: Array, limits: tuple[float, float]) -> NDArray[np.float32]:
    """Grey picture (C, 3C) 0..1: the central z, y and x slices side by side, black to white over ``limits``."""
    c = volume.shape[0] // 2
    strip = np.concatenate([volume[c][::-1], volume[:, c][::-1], volume[:, :, c][::-1]], axis=1)
    grey: NDArray[np.float32] = np.clip((strip - limits[0]) / max(limits[1] - limits[0], 1e-12), 0, 1)
    return grey


def slice_limits(volumes: Array) -> tuple[float, float]:
    """One grey range for several maps: their 0.5th and 99.8th percentile over the non-zero voxels."""
    inside = np.asarray(volumes)[np.asarray(volumes) != 0]
    return (float(np.percentile(inside, 0.5)), float(np.percentile(inside, 99.8))) if inside.size else (0.0, 1.0)


def montage(volumes: Array, titles: Sequence[str]) -> Figure:
    """Every map of ``volumes`` (n, C, C, C) as a front view, a side view and three slices, on common scales."""
    level, reach = contour(volumes)
    limits = slice_limits(volumes)
    columns = min(5, len(volumes))
    rows = -(-len(volumes) // columns)
    fig = Figure(figsize=(2.1 * columns, 2.05 * rows), layout="constrained")
    grid = fig.subplots(2 * rows, columns, squeeze=False, gridspec_kw={"height_ratios": [3, 2] * rows})
    for axes in grid.flat:
        axes.set_axis_off()
    for i, volume in enumerate(volumes):
        top, bottom = grid[2 * (i // columns), i % columns], grid[2 * (i // columns) + 1, i % columns]
        top.imshow(two_views(volume, level, reach, size=130))
        top.set_title(titles[i], fontsize=8, color=INK)
        bottom.imshow(slice_strip(volume, limits), cmap="gray", vmin=0, vmax=1)
    return fig


def two_views(volume: Array, level: float, reach: float, colour: Array | None = None, size: int = 150) -> Image:
    """RGBA (size, 2 size, 4): the surface from the front and from the side, lightened ``colour`` (3,)."""
    tint = 0.35 + 0.65 * np.asarray([0.2, 0.45, 0.7] if colour is None else colour)
    red, green, blue = (float(value) for value in tint)
    views = [render(volume, level, reach, (red, green, blue), view, size) for view in (FRONT, SIDE)]
    return np.concatenate(views, axis=1)


def picture_rows(pictures: Array, titles: Sequence[str]) -> Figure:
    """Grey pictures (rows, columns, C, C), each on its own scale, one title per column."""
    rows, columns = pictures.shape[:2]
    fig = Figure(figsize=(2.0 * columns, 2.0 * rows + 0.4), layout="constrained")
    for row, column in np.ndindex(rows, columns):
        axes = fig.add_subplot(rows, columns, 1 + row * columns + column)
        axes.imshow(pictures[row, column], cmap="gray", origin="lower")
        axes.set_axis_off()
        if row == 0:
            axes.set_title(titles[column], fontsize=7)
    return fig
