"""Drawing takes most of a report's time: unless a test looks at pictures, they are made but not drawn."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from matplotlib.image import imsave

from opustomo.analysis import page, plots, surface

PNG, RENDER = plots.png, plots.render


def _blank() -> bytes:
    buffer = io.BytesIO()
    imsave(buffer, np.zeros((1, 1)), format="png")
    return buffer.getvalue()


def blank_pictures(patch: pytest.MonkeyPatch) -> None:
    """Every figure is made, with tiny views of surfaces, and becomes a picture of one pixel."""
    blank = _blank()
    for module in (plots, page):
        patch.setattr(module, "png", lambda *_: blank)
    patch.setattr(plots, "render", lambda *given: surface.render(*given[:-1], size=16))


@contextmanager
def drawn_pictures() -> Iterator[None]:
    """Pictures as users get them."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (plots, page):
            patch.setattr(module, "png", PNG)
        patch.setattr(plots, "render", RENDER)
        yield
