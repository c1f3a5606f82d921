"""HTML pieces of the report: sections, tiles, embedded pictures, tables; no knowledge of runs.

Owns: how text and pictures become one page without scripts, links to files or network requests.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray

from opustomo.analysis.plots import png


class Section(NamedTuple):
    """A part of the page: its anchor, heading, a note (HTML) that says how to read it, and its body (HTML)."""

    anchor: str
    title: str
    note: str
    body: str


def assemble(title: str, subtitle: str, tiles: Sequence[str], sections: Sequence[Section], footer: str) -> str:
    """The whole page; title, subtitle and footer are plain text."""
    template = Template(resources.files(__package__).joinpath("report_template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        links=" ".join(f'<a href="#{s.anchor}">{s.title}</a>' for s in sections),
        tiles="".join(tiles),
        sections="\n".join(_rendered(s) for s in sections),
        footer=html.escape(footer),
    )


def _rendered(section: Section) -> str:
    note = f"<p>{section.note}</p>" if section.note else ""
    return f'<section id="{section.anchor}"><h2>{section.title}</h2>{note}{section.body}</section>'


def row(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="row">{"".join(figures)}</div>'


def figure(fig: Figure, caption: str, wide: bool = False) -> str:
    """A drawing on a white card with its caption (plain text)."""
    return picture(png(fig), caption, wide)


def picture(data: bytes, caption: str, wide: bool = False) -> str:
    """The same for a drawing that is a PNG already."""
    name, text = ' class="wide"' if wide else "", html.escape(caption)
    return f"<figure{name}>{_embedded(data, text, 'paper')}<figcaption>{text}</figcaption></figure>"


def image(pixels: NDArray[Any], alt: str, kind: str = "") -> str:
    """An array (h, w) grey, (h, w, 3) or (h, w, 4) with values 0..1, one pixel each."""
    buffer = io.BytesIO()
    imsave(buffer, np.clip(pixels, 0, 1), format="png", cmap="gray", vmin=0, vmax=1)
    return _embedded(buffer.getvalue(), html.escape(alt), kind)


def _embedded(data: bytes, alt: str, kind: str) -> str:
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img class="{kind}" alt="{alt}" src="data:image/png;base64,{encoded}">'


def tile(value: str, name: str, kind: str = "") -> str:
    """A large figure with what it counts; ``kind`` good or warn colours it."""
    return f'<div class="tile"><b class="{kind}">{html.escape(value)}</b><span>{html.escape(name)}</span></div>'


def table(entries: Mapping[str, str]) -> str:
    """Two columns of plain text."""
    cells = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in entries.items())
    return f"<table>{cells}</table>"


def command(purpose: str, line: str) -> str:
    """A command line to copy, under the sentence that says what it is for; both plain text."""
    return f"<div>{html.escape(purpose)}:</div><pre>{html.escape(line)}</pre>"


def class_card(title: str, size: int, total: int, colour: NDArray[np.float64], pictures: str) -> str:
    """One class: its colour, title, share of the particles as text and bar, and its pictures (HTML)."""
    rgb = "rgb(" + ", ".join(str(round(255 * float(c))) for c in colour) + ")"
    share = f"{size / total:.1%}"
    heading = f'<i style="background:{rgb}"></i>{html.escape(title)}<em>{size:,} particles, {share}</em>'
    return (
        f'<div class="class"><h3>{heading}</h3>'
        f'<div class="bar"><i style="width:{share};background:{rgb}"></i></div>{pictures}</div>'
    )


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Entries of nested mappings as (dotted name, text); lists of more than six (curves) are left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        if len(value) <= 6:
            yield name, ", ".join(_text(v) for v in value)
    else:
        yield name, _text(value)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
