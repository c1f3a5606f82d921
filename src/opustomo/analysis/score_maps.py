"""Decoded volumes against the true maps: FSC, centring and differences between states.

Owns: the matching of label-free classes to true states and the comparison on the run's working grid, without any
re-alignment: a volume that is off centre is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.registration import phase_cross_correlation

from opustomo.analysis.seen import seen_as
from opustomo.analysis.truth import Truth, TruthMap
from opustomo.data.mrc import read_volume
from opustomo.physics.fourier import fourier_resize
from opustomo.physics.volume import centre_crop, fourier_shell_correlation

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

SAMPLE = 32  # particles decoded at their own codes, of composition and of conformation


@dataclass(frozen=True)
class ClassVolume:
    """One label-free class: its true state by majority, decoded medoid and mean code, true map, (C, C, C) masked."""

    size: int
    state: int
    purity: float
    coordinate: float  # of the true map
    decoded: torch.Tensor
    centre: torch.Tensor
    truth: torch.Tensor


def volumes(run: Run, truth: Truth, rows: NDArray[np.int64], classes: NDArray[np.int64]) -> dict[str, Any]:
    """Scores of the classes' medoid volumes, of their differences and of single particles; {} without true maps.

    rows: the particles scored; classes: (len(rows),) their label-free class.
    """
    matched = class_volumes(run, truth, rows, classes)
    if not matched:
        return {}
    pixel = run.grid.working_pixel
    per_class = {f"class{k}": _class_scores(volume, pixel) for k, volume in enumerate(matched)}
    scores: dict[str, Any] = {
        "states_found": len({volume.state for volume in matched}),
        **{f"{name}_mean": float(np.mean([c[name] for c in per_class.values()])) for name in _SUMMARY},
    }
    scores |= _differences(matched, "difference_cc", [volume.decoded for volume in matched])
    # a medoid has a conformation of its own, which a difference of two compositions then shows as well
    scores |= _differences(matched, "centre_difference_cc", [volume.centre for volume in matched])
    scores["particle_fsc_area"] = _particle_area(run, truth, rows)
    return scores | per_class


_SUMMARY = ("resolution_0.5", "resolution_0.143", "fsc_area", "off_centre")


def class_volumes(run: Run, truth: Truth, rows: NDArray[np.int64], classes: NDArray[np.int64]) -> list[ClassVolume]:
    """Medoid of every class (the member of the density nearest to that of the mean code), decoded, and its true map."""
    found = []
    for k in np.unique(classes):
        members = rows[classes == k]
        codes = run.codes[members]
        offset = codes - codes.mean(0)
        medoid = members[np.einsum("pi,ij,pj->p", offset, run.gram, offset).argmin()]
        states = truth.state[members] if truth.state is not None else np.zeros(len(members), np.int64)
        values, counts = np.unique(states, return_counts=True)
        state = int(values[counts.argmax()])
        target = truth.nearest_map(state, _median(truth.shown[members[states == state]]))
        if target is None:
            continue
        pair = run.decode(np.stack([run.codes[medoid], codes.mean(0)]))
        decoded, centre = (masked(torch.from_numpy(volume), run) for volume in pair)
        purity = float(counts.max() / len(members))
        true = true_volume(target, run)
        found.append(ClassVolume(len(members), state, purity, target.value, decoded, centre, true))
    return found


def true_volume(target: TruthMap, run: Run) -> torch.Tensor:
    """A true map (N, N, N) on the run's working grid, cropped and masked: (C, C, C)."""
    volume, _ = read_volume(target.path)
    resized = fourier_resize(torch.from_numpy(volume), run.grid.working_box)
    return masked(centre_crop(resized, run.grid.crop), run)


def masked(volume: torch.Tensor, run: Run) -> torch.Tensor:
    """Mean inside the mask removed (the data do not determine it), then masked; (C, C, C)."""
    mask = run.mask.to(torch.float32)
    volume = volume.to(torch.float32)
    return (volume - (volume * mask).sum() / mask.sum()) * mask


def resolution(curve: NDArray[np.float64], threshold: float, extent: float) -> float:
    """Resolution in Angstrom where an FSC curve (shells 0, 1, ...) first falls below ``threshold``.

    extent: edge of the box in Angstrom; shell s is at extent / s.  The crossing is interpolated; a curve that never
    falls gives Nyquist, one that starts below gives the extent.
    """
    below = np.flatnonzero(curve[1:] < threshold) + 1
    if len(below) == 0:
        return extent / (len(curve) - 1)
    last = int(below[0])
    if last == 1:
        return extent
    step = (curve[last - 1] - threshold) / (curve[last - 1] - curve[last])
    return float(extent / (last - 1 + step))


def off_centre(decoded: torch.Tensor, truth: torch.Tensor) -> float:
    """Distance in voxels of the cross-correlation peak from the origin, found to 1/50 voxel; NaN for an empty map."""
    if not decoded.any() or not truth.any():
        return float("nan")
    # unnormalised: whitening would let the noise of empty shells decide
    shift = phase_cross_correlation(truth.numpy(), decoded.numpy(), upsample_factor=50, normalization=None)[0]
    return float(np.linalg.norm(shift))


def _class_scores(volume: ClassVolume, pixel: float) -> dict[str, Any]:
    curve = _fsc(volume.decoded, volume.truth)
    extent = pixel * volume.decoded.shape[-1]
    return {
        "size": volume.size,
        "state": volume.state,
        "purity": volume.purity,
        "coordinate": volume.coordinate,
        "resolution_0.5": resolution(curve, 0.5, extent),
        "resolution_0.143": resolution(curve, 0.143, extent),
        "fsc_area": float(curve[1:].mean()),
        "off_centre": off_centre(volume.decoded, volume.truth),
        "fsc": curve.round(4).tolist(),  # shell s is at extent / s
    }


def _differences(matched: list[ClassVolume], name: str, volumes: list[torch.Tensor]) -> dict[str, float]:
    """Correlation of differences of ``volumes`` with those of the true maps, over all pairs of different states."""
    found = [
        _correlation(volumes[i] - volumes[j], matched[i].truth - matched[j].truth)
        for i, j in combinations(range(len(matched)), 2)
        if matched[i].state != matched[j].state
    ]
    return {f"{name}_mean": float(np.mean(found)), f"{name}_min": min(found)} if found else {}


def _particle_area(run: Run, truth: Truth, rows: NDArray[np.int64]) -> float:
    """Mean FSC area of at most 32 particles, each decoded at all its codes, against its own state and nearest map."""
    sample = np.sort(np.random.default_rng(0).permutation(rows)[:SAMPLE])
    states = truth.state if truth.state is not None else np.zeros(len(truth.junk), np.int64)
    targets = [truth.nearest_map(int(states[i]), truth.shown[i]) for i in sample]
    whole = run if run.conformation is None else seen_as(run, "joint")
    decoded = torch.from_numpy(whole.decode(whole.codes[sample]))
    areas = [
        _fsc(masked(volume, run), true_volume(target, run))[1:].mean()
        for volume, target in zip(decoded, targets, strict=True)
        if target is not None
    ]
    return float(np.mean(areas)) if areas else float("nan")


def _median(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def _fsc(a: torch.Tensor, b: torch.Tensor) -> NDArray[np.float64]:
    return fourier_shell_correlation(a, b).numpy().astype(np.float64)


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    norm = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / norm) if norm > 0 else 0.0
