"""The quality of classes as pictures and as a section of the report.

Owns: how quality.csv and quality_fsc.csv are drawn; the numbers are those of ``class_quality``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from opustomo.analysis import page
from opustomo.analysis.page import Section
from opustomo.analysis.plots import INK, MUTED, Array, class_colours, panel

if TYPE_CHECKING:
    from opustomo.analysis.class_quality import ClassQuality

COLUMNS = 4  # of the small pictures


def colour_of(rows: Sequence[ClassQuality]) -> dict[int, Array]:
    """The colour of every class, as in the other pictures of the same classes."""
    colours = class_colours(1 + max(row.number for row in rows))
    return {row.number: colours[row.number] for row in rows}


def quality_figure(rows: Sequence[ClassQuality]) -> Figure:
    """Worth, resolution and difference of every class that could be halved, best first, beside its controls."""
    shown = [row for row in rows if not math.isnan(row.worth)]
    fig = Figure(figsize=(10.5, 1.7 + 0.27 * len(shown)), layout="constrained")
    worth, area, change = panels = [
        panel(fig, "Worth of one particle", "typical particles", "class (particles)", (1, 3, 1)),
        panel(fig, "Agreement of the halves", "FSC, mean over shells", place=(1, 3, 2)),
        panel(fig, "Difference from the average", "nats for each particle", place=(1, 3, 3)),
    ]
    for axes in panels:
        axes.set_yticks(range(len(shown)), [f"{row.number} ({row.particles:,})" for row in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
    colours = colour_of(rows)
    for y, row in enumerate(shown):
        colour = colours[row.number]
        _dot(worth, y, row.worth, row.worth_low, row.worth_high, colour)
        _mark(area, y, row.fsc_area_random, "|")
        _dot(area, y, row.fsc_area, row.fsc_area, row.fsc_area, colour)
        _mark(change, y, row.nats_random, "|")
        _mark(change, y, row.nats_chance, "x")
        _dot(change, y, row.nats, row.nats - row.nats_error, row.nats + row.nats_error, colour, row.distinct != "no")
    worth.axvline(1.0, color=MUTED, linewidth=1.2, linestyle="--")
    worth.set_xscale("log")
    worth.set_xlim(
        min(0.45, *(0.8 * row.worth_low for row in shown)), max(2.2, *(1.2 * row.worth_high for row in shown))
    )
    worth.xaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]))
    worth.xaxis.set_minor_locator(NullLocator())
    change.set_xscale("symlog", linthresh=10)
    change.xaxis.set_major_locator(FixedLocator([-100, -10, -5, 0, 5, 10, 30, 100, 300, 1000, 3000]))
    change.xaxis.set_minor_locator(NullLocator())
    for axes in (worth, change):
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for marker, name in (("|", "random classes of the same size"), ("x", "what a choice by noise reaches at most")):
        change.plot([], [], marker, label=name, color=MUTED, markersize=9)
    change.plot([], [], "o", label="not distinct", color=MUTED, markerfacecolor="white")
    fig.legend(loc="outside lower right", frameon=False, fontsize=8, ncols=3, labelcolor=INK)
    return fig


def _dot(axes: Axes, y: int, value: float, low: float, high: float, colour: Array, filled: bool = True) -> None:
    axes.plot([low, high], [y, y], color=colour, linewidth=2)
    axes.plot(value, y, "o", color=colour, markersize=6, markerfacecolor=colour if filled else "white")


def _mark(axes: Axes, y: int, value: float, marker: str) -> None:
    axes.plot(value, y, marker, color=MUTED, markersize=9)


def agreement_figure(frequency: Array, curves: Mapping[str, Array], rows: Sequence[ClassQuality]) -> Figure:
    """One small picture for each class: FSC of its half maps and of its difference maps, controls in grey."""
    shown = [row for row in rows if f"class{row.number}" in curves]
    colours, columns = colour_of(rows), min(COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    fig = Figure(figsize=(max(2.7 * columns + 0.4, 8.0), 2.1 * lines + 0.5), layout="constrained")  # room for the key
    for i, row in enumerate(shown):
        axes = panel(
            fig,
            f"class {row.number} ({row.particles:,})",
            "resolution (Å)" if i + columns >= len(shown) else "",
            "FSC" if i % columns == 0 else "",
            (lines, columns, i + 1),
        )
        name, colour = f"class{row.number}", colours[row.number]
        for suffix, style, label in (("", "-", "half maps"), ("_difference", ":", "difference maps")):
            axes.plot(
                frequency[1:], curves[name + suffix][1:], color=colour, linewidth=1.6, linestyle=style, label=label
            )
            control = curves[f"{name}{suffix}_random"]
            axes.plot(
                frequency[1:], control[1:], color=MUTED, linewidth=1.0, linestyle=style, label=f"{label}, random class"
            )
        axes.axhline(0.143, color=MUTED, linewidth=0.5)
        axes.set_ylim(-0.35, 1.05)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{1 / s:.0f}" if s > 1e-6 else "∞"))
    handles, labels = fig.axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=8, labelcolor=INK)
    return fig


# Headings of the table and what they mean
MEANING = {
    "class": "number and colour as in the other sections",
    "particles": "number and share",
    "worth": "typical particles that one of them is worth (one standard deviation either side); sorts the table",
    "resolution (Å)": "of the half maps at FSC 0.5 / 0.143, corrected for the mask; in brackets random classes, 0.143",
    "difference (nats)": "what the other half's difference map tells about each particle; in brackets what a "
    "choice by noise reaches at most",
    "difference maps": "correlation between the halves; in brackets random classes of the same size",
    "certain": "share of the particles that belong to this class with a probability of at least 0.9",
    "outlier": "mean outlier score of the linear stage",
    "tomograms": "number, and effective number (exp of the entropy); in brackets the latter for random particles",
}


def quality_section(rows: Sequence[ClassQuality], frequency: Array, curves: Mapping[str, Array]) -> Section:
    """The table, best class first, and both pictures."""
    table = [_cells(row) for row in rows]
    used = [name for name in MEANING if any(row[name] for row in table)]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in used)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(row[name])}</td>' for name in used)}</tr>" for row in table)
    meaning = page.table({name: MEANING[name] for name in used})
    figures = []
    if curves:
        figures.append(page.figure(quality_figure(rows), "From quality.csv", wide=True))
        figures.append(page.figure(agreement_figure(frequency, curves, rows), "From quality_fsc.csv", wide=True))
    note = (
        "From the data alone, without decoder or template: two disjoint halves of every class and of random "
        "classes of its size. <b>Worth</b> says how good the particles are (1: as good as typical ones, junk: near 0); "
        "the <b>difference</b> whether they differ from the average, as junk does. Halves share poses and classes: "
        "compare these resolutions with each other and with random classes only."
    )
    wide = f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
    body = f"{wide}<details><summary>What the columns mean</summary>{meaning}</details>{page.row(figures)}"
    return Section("quality", "Quality of the classes", note, body)


def _cells(row: ClassQuality) -> dict[str, str]:
    """The texts of one row of the table; empty where nothing is known."""
    reach = [_angstrom(value) for value in (row.resolution_half, row.resolution, row.resolution_random)]
    verdict = {"yes": "distinct", "no": "not distinct", "": ""}[row.distinct]
    effective, random = math.exp(row.tomogram_entropy), math.exp(row.tomogram_entropy_random)
    measured = not math.isnan(row.worth)
    return {
        "class": str(row.number),
        "particles": f"{row.particles:,}, {row.fraction:.1%}",
        "worth": f"{row.worth:.2f} ({row.worth_low:.2f} to {row.worth_high:.2f})" if measured else row.note,
        "resolution (Å)": f"{reach[0]} / {reach[1]} ({reach[2]})" if measured else "",
        "difference (nats)": _known(row.nats, f"{row.nats:.1f} (≤ {row.nats_chance:.1f}): {verdict}"),
        "difference maps": _known(row.difference_cc, f"{row.difference_cc:.2f} ({row.difference_cc_random:.2f})"),
        "certain": _known(row.certain, f"{row.certain:.0%}"),
        "outlier": _known(row.outlier, f"{row.outlier:.1f}"),
        "tomograms": _known(row.tomograms, f"{row.tomograms:.0f}, {effective:.1f} ({random:.1f})"),
    }


def _known(value: float, text: str) -> str:
    return "" if math.isnan(value) else text


def _angstrom(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.1f}"
