"""A run seen by another of its codes, or by some of its particles: what an analysis is of.

Owns: the conformation of the bodies as codes, alone or beside composition, the maps at them, and second rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opustomo.analysis.places import stem
from opustomo.checkpoint import Run
from opustomo.config_analysis import Codes, MapChoice
from opustomo.errors import UserError, reading


@dataclass(frozen=True)
class Moving(Run):
    """A run whose codes move its bodies: columns of composition, maybe none, and then those of the conformation.

    still: the run by composition; base: (zdim,) its code where the columns say nothing of composition.
    """

    still: Run | None = None
    base: NDArray[np.float32] | None = None

    def linear_results(self) -> None:
        """The linear stage knows nothing of these codes."""

    def linear_stage(self) -> None:
        """The same."""

    @torch.no_grad()
    def decode(self, codes: NDArray[np.floating[Any]], batch: int = 8) -> NDArray[np.float32]:
        """As ``Run.decode``: the density at the composition, with its bodies moved."""
        assert self.still is not None and self.base is not None
        if codes.ndim != 2 or codes.shape[1] != self.codes.shape[1]:
            raise UserError(f"codes of shape {codes.shape} where {self.path} has {self.codes.shape[1]} dimensions")
        bodies = self.bodies
        loading, used = bodies.model.modes(bodies.dimensions)[0], codes.shape[1] - bodies.dimensions
        moved = []
        for i in range(0, len(codes), batch):
            part = np.asarray(codes[i : i + batch], np.float32)
            composition = np.tile(self.base, (len(part), 1))
            composition[:, :used] = part[:, :used]
            density = torch.from_numpy(self.still.decode(composition, batch))
            moved.append(bodies.model.bodies.move(density, torch.from_numpy(part[:, used:]) @ loading.T))
        return torch.cat(moved).numpy()


def seen_as(run: Run, codes: Codes, filtered: bool = False, state: NDArray[np.floating[Any]] | None = None) -> Run:
    """The run with the codes asked for; state: (zdim,) composition at which bodies are shown (None: the mean).

    ``joint``: the components in use, then the conformation; both have about unit variance in the set.
    Raises UserError where there is no conformation.
    """
    name = stem(codes, filtered)
    if codes == "composition":
        return replace(run, analysis=name)
    bodies = run.bodies
    motion, spread = (value.numpy() for value in bodies.conformation)
    used = len(run.weights["model"]["components"]) if codes == "joint" else 0
    sigma = np.zeros_like(run.codes) if run.sigma is None else run.sigma
    changed = {
        "codes": np.concatenate([run.codes[:, :used], motion], 1),
        "sigma": np.concatenate([sigma[:, :used], spread], 1),
        "analysis": name,
        "still": run,
        "base": np.asarray(run.codes.mean(0) if state is None else state, np.float32),
    }
    return Moving(**{field.name: getattr(run, field.name) for field in fields(Run)} | changed)


def chosen_view(run: Run, choice: MapChoice) -> Run:
    """The run by the codes that ``volumes`` and ``movie`` were asked for, its bodies at the composition of --state."""
    codes: Codes = "conformation" if choice.conformation else choice.codes
    state = None
    if choice.state:
        words = f"--state {' '.join(map(str, choice.state))}"
        if codes != "conformation":
            raise UserError(f"{words}: is for conformations; add --codes conformation, or leave it out")
        if len(choice.state) != 2:
            raise UserError(f"{words}: give K of k-means and a class J, counted from 0")
        clusters, number = choice.state
        path = run.path / f"{stem('composition', False)}.{run.epoch}" / f"kmeans{clusters}" / "centers.txt"
        with reading(path, f"make it with `opustomo analyze {run.path} --clusters {clusters}`"):
            centres = np.loadtxt(path, ndmin=2)
        if not 0 <= number < len(centres) or centres.shape[1] != run.codes.shape[1]:
            raise UserError(f"{words}: {path} has classes 0 to {len(centres) - 1}; give one of them")
        state = centres[number]
    return seen_as(run, codes, choice.filtered, state)


def along_conformation(run: Run, number: int, points: int = 10) -> NDArray[np.float64]:
    """Codes along conformation ``number`` (from 1), 5th to 95th percentile, the others 0; of a run seen by them."""
    if not 1 <= number <= run.codes.shape[1]:
        raise UserError(f"--conformation {number}: {run.path} has conformations 1 to {run.codes.shape[1]}")
    codes = np.zeros((points, run.codes.shape[1]))
    first, last = np.percentile(run.codes[:, number - 1], [5, 95])
    codes[:, number - 1] = np.linspace(first, last, points)
    return codes


def some_of(run: Run, rows: NDArray[np.int64]) -> Run:
    """The particles at ``rows`` alone."""
    chosen = {name: getattr(run, name)[rows] for name in ("codes", "rotation", "origin", "euler")}
    chosen |= {"sigma": None if run.sigma is None else run.sigma[rows], "rows": rows}
    return replace(run, **chosen, weights=run.weights | {"typical": torch.from_numpy(run.typical[rows])})
