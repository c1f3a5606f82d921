"""What a run uses and why: the lines before the first epoch.

Owns: the reasons.  The values are made elsewhere (``config``, ``start.with_sizes``, ``physics.grid``, ``linear_fit``);
where a reason is a measurement, docs/experiments.md has it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from opustomo.config import TrainConfig
from opustomo.linear_fit import MAX_COMPONENTS
from opustomo.training.start import Start, global_batch
from opustomo.training.verdict import former_codes, orientation

MEASURED = 720  # training particles of the sets that the epochs were chosen on
DEFAULT = TrainConfig(Path(), Path())


class Choice(NamedTuple):
    """An option as it is spelt, the value in use, and where that comes from."""

    name: str
    value: str
    reason: str


def choices(
    asked: TrainConfig, config: TrainConfig, given: frozenset[str] | None, start: Start, trained: int, fast: bool
) -> list[Choice]:
    """One line for every option that is easily set wrong.

    asked: options as they came; config: with the sizes filled in; given: names that were typed (None: those that are
    not the default); trained: particles in an epoch; fast: on a GPU.
    """
    grid = start.inputs.grid
    reasons = {
        "zdim": _components(config.zdim, start.linear.model.size, start.linear.trail),
        "templateres": f"the multiple of 16 at or above the crop of {grid.crop}",
        "width": "all of OPUS-TOMO's channels, on a GPU" if fast else "a quarter of OPUS-TOMO's channels, on a CPU",
        "encoderres": _encoder(config, fast),
        "lr": "a held-out bound that rises steadily; with 0.002 it jumped from epoch to epoch",
        "epochs": _epochs(config, trained),
        "batch": "OPUS-TOMO's, and that of all measurements",
        "beta_control": "the likelihood is in nats, which counts the noise: 1 is the evidence lower bound at any SNR",
        "prior": "without it the decoder overfits, with 300 it does not move",
        "lamb": _disentanglement(start),
    }
    rows = []
    for name, reason in reasons.items():
        value = grid.templateres if name == "templateres" else getattr(config, name)
        rows.append(Choice(name.replace("_", "-"), f"{value:g}", _source(name, asked, value, given) or reason))
    # what the data made of it is worth knowing also where it was typed
    if rows[0].reason != reasons["zdim"]:
        rows[0] = rows[0]._replace(reason=f"{rows[0].reason}; {reasons['zdim']}")
    return rows


def _source(name: str, asked: TrainConfig, value: Any, given: frozenset[str] | None) -> str:
    """``given``, or whose default it is where it is not this program's; nothing for a value that was found here."""
    wanted = getattr(asked, name)
    if wanted != value or (wanted == getattr(DEFAULT, name) and (given is None or name not in given)):
        return ""
    return "given" if given is None or name in given else "the default of the command that was typed"


def _components(zdim: int, used: int, trail: list[tuple[int, float]]) -> str:
    best = max(trail, key=lambda tried: tried[1])[0]
    found = f"{used} of {zdim} used: held-out evidence "
    if best == 0:
        return found + "prefers the average alone, one component is kept"
    found += f"chose {used} component{'s' * (used != 1)}"
    return found + (", the most allowed; a larger --zdim may find more" if used == zdim < MAX_COMPONENTS else "")


def _encoder(config: TrainConfig, fast: bool) -> str:
    if config.encoderres == 0:
        return "no encoder: no code it found was better than the linear stage's, which are exact for a linear density"
    size = "OPUS-TOMO's, on a GPU" if fast else "half of OPUS-TOMO's, on a CPU"
    return size + ("; --lamb needs an encoder to act on" if config.lamb > 0 else "")


def _epochs(config: TrainConfig, trained: int) -> str:
    steps = config.epochs * math.ceil(math.ceil(trained / global_batch(config)) / config.accum_step)
    found = f"{steps} steps for {trained} particles; 20 epochs overfitted sets of {MEASURED}"
    if trained > 10 * MEASURED:
        found += ", larger ones were not tried: the held-out bound tells"
    return found


def _disentanglement(start: Start) -> str:
    name, score, chance = orientation(former_codes(start).mean, start.rotation)
    if score <= chance:
        return f"off: no viewing direction can be read from the linear stage's codes (R^2 {max(score, 0.0):.2f})"
    return f"off, but {name} can be read from the linear stage's codes (R^2 {score:.2f}): try 0.1 to 3"
