"""The maps of the report: classes of k-means, and groups along the discrete axes of the code.

Owns: one card for every map, on scales that all maps of a section share.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from numpy.typing import NDArray

from opustomo.analysis import page, plots
from opustomo.analysis.latents import Analysis
from opustomo.analysis.page import Section
from opustomo.analysis.surface import contour
from opustomo.analysis.volumes import read_codes
from opustomo.data.pickles import load_labels
from opustomo.errors import reading

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

MOST = 0.9  # of the particles decide on the scales of the maps
FEW = 5  # particles; a smaller class is pointed out
Volumes = NDArray[np.float32]


def classes_section(analysis: Analysis, volumes: Volumes) -> Section:
    """K-means classes: maps (K, C, C, C) decoded at the particles that stand for them."""
    sizes = np.bincount(analysis.labels, minlength=len(volumes))
    note = f"{_scales(sizes)} Classes near in number are near in code."
    few = int((sizes < FEW).sum())
    if few:
        have = "class has" if few == 1 else "classes have"
        note += f' <b class="warn">{few} {have} fewer than {FEW} particles: likely outliers.</b>'
    return Section("classes", "Classes", note, _cards("Class", volumes, sizes))


def axes_section(run: Run, folder: Path) -> Iterator[Section]:
    """What ``analyze`` found along single axes, and the maps of the groups; left out where it was not looked at."""
    table, picture, groups = folder / "axes.csv", folder / "axes.png", folder / "groups"
    if not table.is_file() or not picture.is_file():
        return
    with reading(table, "make it again with `opustomo analyze`"), table.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
        discrete = [row for row in rows if row["kind"] == "groups"]
        words = {f"axis {row['axis']}": _words(row) for row in rows}
    note = (
        "Every independent direction of the code by itself. Composition comes in groups with gaps between them, motion "
        "does not. Bars: where the data put the particles, noise included; line: what the fitted law expects. "
    )
    body = page.row([page.picture(picture.read_bytes(), "Independent axes of the code", wide=len(rows) > 1)])
    body += page.table(words)
    if discrete and (groups / "centers.txt").is_file():
        labels = load_labels(groups / "labels.pkl")
        codes = read_codes(groups / "centers.txt", run.codes.shape[1])
        sizes = np.bincount(labels, minlength=len(codes))
        note += (
            f"The groups along the discrete {'axis' if len(discrete) == 1 else 'axes'} are classes found without "
            f"labels; their maps are decoded at the mean code of each, so that motion is averaged out. {_scales(sizes)}"
        )
        body += _cards("Group", run.decode(codes), sizes)
    else:
        note += "None is discrete here: what varies, varies continuously, or too little for gaps to be seen."
    yield Section("axes", "Axes", note, body)


def _words(row: dict[str, str]) -> str:
    if row["kind"] != "groups":
        return "continuous"
    shares = ", ".join(f"{float(share):.0%}" for share in row["share"].split())
    return (
        f"{row['groups']} groups ({shares} of the particles), {float(row['certain']):.0%} of the particles certain of "
        f"theirs; {float(row['advantage_nats']):.0f} nats better than any continuous law"
    )


def _scales(sizes: NDArray[np.int64]) -> str:
    share = sizes[_most(sizes)].sum() / sizes.sum()
    return (
        "Surfaces share one contour level. Slices are central, across z, y and x, on one grey scale; below, the same "
        "slices minus the mean (red: more density, blue: less). Level, scale and mean are those of the largest, which "
        f"hold {share:.0%} of the particles."
    )


def _cards(name: str, volumes: Volumes, sizes: NDArray[np.int64]) -> str:
    """Surface, slices and difference from the mean of every map (K, C, C, C)."""
    colours, most = plots.class_colours(len(volumes)), _most(sizes)
    typical, weights = volumes[most], sizes[most]
    level, reach = contour(typical, weights)
    limits = plots.slice_limits(typical)
    mean = np.average(typical, axis=0, weights=weights)
    spread = float(np.percentile(np.abs(typical - mean), 99.8)) or 1.0
    cards = []
    for i, volume in enumerate(volumes):
        title = f"{name.lower()} {i}"
        views = page.image(plots.two_views(volume, level, reach, colours[i]), f"{title}, front and side")
        slices = page.image(plots.slice_strip(volume, limits), f"{title}, central slices", "pixels")
        change = matplotlib.colormaps["RdBu_r"](plots.slice_strip(volume - mean, (-spread, spread)))
        difference = page.image(change[..., :3], f"{title} minus the mean", "pixels")
        pictures = views + slices + difference
        cards.append(page.class_card(f"{name} {i}", int(sizes[i]), int(sizes.sum()), colours[i], pictures))
    return f'<div class="classes">{"".join(cards)}</div>'


def _most(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The largest classes that together hold most particles: a few odd ones may be decoded far too bright."""
    order = np.argsort(-sizes, kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order]
    return order[before < MOST * sizes.sum()]
