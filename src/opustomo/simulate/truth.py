"""What is known of a simulated set: labels.npz, the true maps in gt/, the mask, and the masks of rigid bodies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from opustomo.data.bodies import write_multibody_star
from opustomo.data.mrc import write_volume
from opustomo.data.tensors import save_arrays
from opustomo.simulate.molecule import Beads, gaussian_volume, soft_edge, surface_distance
from opustomo.simulate.plan import GOOD, Plan, Preset, relion_euler
from opustomo.simulate.tilt_series import TiltSeries


def truth_beads(preset: Preset) -> dict[str, Beads]:
    """What the true maps show, by file stem: ``state{S}_hinge{+h.h}`` or the coordinate's own name; h in five steps."""
    molecule, values = preset.molecule, np.unique(np.linspace(*preset.rotation, 5))
    return {
        f"state{s}_{molecule.coordinate}{h:+.1f}": molecule.at(s, h)
        for s in preset.states
        for h in (values if molecule.moves[s] else [0.0])
    }


def solvent_mask(
    maps: list[NDArray[np.float32]], pixel_size: float, margin: float = 10.0, edge: float = 20.0
) -> NDArray[np.float32]:
    """Soft mask around the union of the maps: Angstrom of margin, then a cosine edge."""
    union = np.max(maps, axis=0)
    distance = ndimage.distance_transform_edt(union < 0.1 * np.percentile(union, 99)) * pixel_size
    return soft_edge(distance - margin, edge)


def mask_of(preset: Preset, beads: Iterable[Beads], margin: float, edge: float) -> NDArray[np.float32]:
    """Soft mask around a molecule as it is at each of ``beads``."""
    if preset.molecule.radius is None:
        return solvent_mask(
            [gaussian_volume(b, preset.box, preset.pixel_size) for b in beads], preset.pixel_size, margin, edge
        )
    outside = np.min([surface_distance(b, preset.box, preset.pixel_size) for b in beads], axis=0)
    return soft_edge(outside - preset.molecule.radius - margin, edge)


def write_truth(output: Path, preset: Preset, plan: Plan, series: TiltSeries) -> None:
    """labels.npz, gt/, mask.mrc, and bodies.star where rigid parts turn."""
    labels = {
        "state": plan.state,
        preset.molecule.coordinate: plan.coordinate,
        "true_pose": np.column_stack([relion_euler(plan.rotation), plan.origin, plan.defocus]),
        "tilts": series.tilts,
        "bfac": series.bfactor,
        "scale": series.scale,
    }
    if len(preset.states) == 2:
        labels["present"] = (plan.state == preset.states[1]).astype(np.int64)
    if preset.moves:
        labels |= preset.molecule.known(plan.coordinate)
        write_bodies(output, preset)
    if preset.junk > 0:
        labels |= {"junk": (plan.junk_kind != GOOD).astype(np.int64), "junk_kind": plan.junk_kind}
    save_arrays(output / "labels.npz", **labels)
    maps = truth_beads(preset)
    for stem, beads in maps.items():
        volume = gaussian_volume(beads, preset.box, preset.pixel_size)
        write_volume(output / "gt" / f"{stem}.mrc", volume, preset.pixel_size)
    write_volume(output / "mask.mrc", mask_of(preset, maps.values(), 10.0, 20.0), preset.pixel_size)


def write_bodies(output: Path, preset: Preset) -> None:
    """Masks of the rigid parts, and the STAR file of bodies that RELION's multi-body refinement takes.

    Every body turns against the first, and that one against the second.  Nothing is written where there is only one.
    """
    bodies = {f"body_{name}.mrc": beads for name, beads in preset.molecule.bodies().items()}
    if len(bodies) < 2:
        return
    for name, beads in bodies.items():
        mask = mask_of(preset, [beads], 0.0, min(20.0, 2 * preset.pixel_size))
        write_volume(output / name, mask, preset.pixel_size)
    write_multibody_star(output / "bodies.star", list(bodies), [1, *[0] * (len(bodies) - 1)])
