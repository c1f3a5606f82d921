"""The report's section on rigid bodies: how they move against each other, and the map along their motions.

Owns: which motions are shown: those that the particles tell better than the spread of the set alone.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from opustomo.analysis import page, plots
from opustomo.analysis.dynamics import write_dynamics
from opustomo.analysis.latents import analysis_folder
from opustomo.analysis.page import Section
from opustomo.analysis.seen import along_conformation, seen_as
from opustomo.errors import reading

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

SHOWN, STEPS = 3, 5  # motions and maps of each
UNKNOWN = 0.6  # standard deviation of a code of unit variance, above which particles do not tell the motion


def motion_section(run: Run) -> Iterator[Section]:
    """Nothing for a run without bodies."""
    if run.conformation is None:
        return
    seen = seen_as(run, "conformation")
    table = analysis_folder(seen) / "dynamics.csv"
    if not table.is_file():
        write_dynamics(seen, table.parent)
    with reading(table, "make it again with `opustomo analyze`"), table.open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["series"] == "all"]
        words = {f"{row['moving']} against {row['fixed']}": _words(row) for row in rows}
    assert seen.sigma is not None
    error = seen.sigma.mean(0)
    known = [j for j in range(seen.codes.shape[1]) if np.ptp(seen.codes[:, j]) > 0 and error[j] < UNKNOWN][:SHOWN]
    figures = []
    for j in known:
        name = f"conformation {j + 1}"
        figures.append(page.figure(
            plots.histogram(seen.codes[:, j], np.zeros(len(seen.codes), np.int64), 1, name, "Particles"),
            f"Particles along {name}; each is known to {error[j]:.2f} of its spread",
        ))  # fmt: skip
        codes = along_conformation(seen, j + 1, STEPS)
        titles = [f"y{j + 1} = {value:+.2f}" for value in codes[:, j]]
        figures.append(page.figure(plots.montage(seen.decode(codes), titles), f"Along {name}", wide=True))
    note = (
        "Rigid bodies against each other, found of every particle by itself; the codes above are of bodies at rest. "
        "An axis is worth a name where the coherence is near 1 and the density moves by more than the noise lets it."
    )
    if not known:
        note += ' <b class="warn">The particles tell no motion: these bodies stand still, or the data are too weak.</b>'
    yield Section("motion", "Motion of the bodies", note, page.table(words) + page.row(figures))


def _words(row: dict[str, str]) -> str:
    axis = ", ".join(f"{float(row[f'axis_{name}']):.2f}" for name in "xyz")
    return (
        f"{float(row['swept_deg']):.1f}° about ({axis}), coherence {float(row['coherence']):.2f}, slides "
        f"{float(row['slide_A']):.1f} Å along it; density moves by {float(row['displacement_A']):.1f} Å"
    )
