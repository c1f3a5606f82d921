"""Adenylate kinase between its closed and its open form: the path, what its data hold, and how well its ends are found.

Part of ``bodies.py``.  The path is a simulated transition of 98 frames, of which seven are taken: first the LID turns,
by 50 degrees, then the NMP domain, by 42, with much that is not rigid.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from opustomo.analysis import score_maps
from opustomo.analysis.score_codes import principal_components
from opustomo.analysis.seen import seen_as
from opustomo.analysis.truth import read_truth
from opustomo.checkpoint import open_run
from opustomo.config import SimulateConfig
from opustomo.physics.volume import fourier_shell_correlation
from opustomo.simulate import dataset, tilt_series
from opustomo.simulate.plan import chosen_preset, make_plan
from opustomo.simulate.tilt_series import TiltSeries

PATH = "adk.pdb"
FRAMES = np.linspace(0, 97, 7).astype(int)
TENTH = 0.1  # of the particles at each end of an axis
KNOWN = 5  # places along the path at which the information is looked at


def write_path(models: Path, output: Path) -> None:
    """The frames as models of one PDB file, closed first."""
    output.parent.mkdir(parents=True, exist_ok=True)
    atoms = [line for line in (models / "adk_open.pdb").read_text().splitlines() if line.startswith("ATOM")]
    lines = []
    for number, places in enumerate(read_dcd(models / "adk_dims.dcd", len(atoms))[FRAMES], 1):
        rows = (
            f"{line[:30]}{x:8.3f}{y:8.3f}{z:8.3f}{line[54:]}" for line, (x, y, z) in zip(atoms, places, strict=True)
        )
        lines += [f"MODEL     {number:4d}", *rows, "ENDMDL"]
    output.write_text("\n".join([*lines, "END", ""]))


def read_dcd(path: Path, atoms: int) -> NDArray[np.float64]:
    """(frames, atoms, 3) of a DCD file: Fortran records, of which those of a frame are x, y and z."""
    raw, at, columns = path.read_bytes(), 0, []
    while at < len(raw):
        (size,) = struct.unpack_from("<i", raw, at)
        if size == 4 * atoms:
            columns.append(np.frombuffer(raw, "<f4", atoms, at + 4))
        at += size + 8
    return np.array(columns, np.float64).reshape(-1, 3, atoms).transpose(0, 2, 1)


def figures(data: Path, run: Path) -> dict[str, float | None]:
    """What the data hold, what one axis of the run's codes tells, and how near the maps at its ends are."""
    return oracle(data) | axis_and_ends(data, run)


def oracle(data: Path) -> dict[str, float | None]:
    """d' between the ends of the path, and the correlation with it that its information allows; poses known.

    The second from the slope of the images along the path at KNOWN places, as if it told everything.
    """
    stated = json.loads((data / "sim.json").read_text())
    atoms = tuple(Path(path) for path in stated["atoms"])
    size = {"n": stated["n"], "box": stated["box"], "angpix": stated["pixel_size"], "snr": stated["snr"]}
    preset = chosen_preset(SimulateConfig(data, atoms=atoms, **size))
    series, plan = TiltSeries(preset.box, preset.pixel_size), make_plan(preset, stated["seed"])
    std = dataset.noise_level(plan, series, preset.snr, tilt_series.backprojection_matrix(series), stated["seed"])
    rows = np.arange(4)
    transfer = tilt_series.transfer(plan.tilt_defocus(series)[rows], series)

    def images(value: float) -> torch.Tensor:
        at = replace(plan, coordinate=np.full(len(plan.state), value))
        seen = tilt_series.project([at.beads(int(i), preset.pixel_size) for i in rows], series) * transfer
        return torch.fft.irfftn(seen, s=(preset.box, preset.box), dim=(-2, -1)) / std

    def apart(a: float, b: float) -> float:
        return float((images(b) - images(a)).square().sum((1, 2, 3)).sqrt().mean())

    length = preset.rotation[1]
    middles, step = (np.arange(KNOWN) + 0.5) / KNOWN * length, 0.02 * length
    slope = np.array([apart(m - step / 2, m + step / 2) / step for m in middles])
    variance, error = length**2 / 12, float(np.mean(1 / slope**2))
    return {
        "d' of the ends, known poses": apart(0.0, length),
        "bound of the correlation": (1 + error / variance) ** -0.5,
    }


def axis_and_ends(data: Path, folder: Path) -> dict[str, float | None]:
    """Correlation of the path with the first component of the codes, and the maps at the means of its outer tenths.

    Codes: the conformation where there are bodies.  Maps are compared on the working grid, as they stand.
    """
    run, truth = open_run(folder), read_truth(data, len(open_run(folder).codes))
    run = run if run.conformation is None else seen_as(run, "conformation")
    first, path = principal_components(run.codes.astype(np.float64))[:, 0], truth.coordinates["path"]
    order = np.argsort(first if np.corrcoef(first, path)[0, 1] > 0 else -first)
    tenth = round(TENTH * len(order))
    ends = [run.codes[rows].mean(0) for rows in (order[:tenth], order[-tenth:])]
    found = [score_maps.masked(torch.from_numpy(volume), run) for volume in run.decode(np.stack(ends))]
    maps = sorted(truth.maps, key=lambda known: known.value)
    true = [score_maps.true_volume(known, run) for known in (maps[0], maps[-1])]
    curves = [fourier_shell_correlation(a, b)[1:].mean() for a, b in zip(found, true, strict=True)]
    moved, wanted = found[1] - found[0], true[1] - true[0]
    return {
        "path with the first axis": abs(float(np.corrcoef(first, path)[0, 1])),
        "FSC area, closed end": float(curves[0]),
        "FSC area, open end": float(curves[1]),
        "difference of the ends, correlation": float((moved * wanted).sum() / (moved.norm() * wanted.norm())),
    }
