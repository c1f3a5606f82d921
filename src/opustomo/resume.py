"""Continuing a run: which options hold, and whether the continuation is exact.

Owns: the rules of ``--load``.  ``--load latest`` goes on exactly and refuses changed options; ``--load W.pkl`` lets
options that were typed override the stored ones, lists them, and then starts warm.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opustomo.checkpoint import epochs_of, flatten, load_tensors, read_config
from opustomo.config import GridOptions, InputOptions, TrainConfig
from opustomo.errors import UserError

# options that say where and how to run, not what is computed
_FREE = frozenset({"output", "load", "latents", "workers", "verbose", "plot", "device"})
# stored unless typed, and free to change: they do not touch what is computed
_HARMLESS = frozenset({"cache", "no_cache", "checkpoint", "log_interval", "tmp_prefix"})
# sizes of the network, and what the stored poses and codes belong to
_FIXED = ("zdim", "templateres", "width", "star", "ind", "estpose")


@dataclass(frozen=True)
class Continuation:
    """Weights to go on from and the first epoch to train; ``exact``: optimiser and schedules continue too."""

    weights: dict[str, Any]
    first_epoch: int
    exact: bool
    new_poses: bool = False  # --poses has changed: those of the checkpoint do not hold
    notes: tuple[str, ...] = ()  # for the run's log, which is opened later


def resolve(config: TrainConfig, given: frozenset[str] | None) -> tuple[TrainConfig, Continuation | None]:
    """Merge typed options with those of the run that ``config.load`` names.

    given: names of the options that were typed (None: all that differ from their defaults).  Raises UserError for
    changed options under ``latest``, for sizes that must match, and for codes of another run.
    """
    if config.load is None:
        if config.latents is not None:
            raise UserError("--latents has no effect without --load weights.N.pkl; add --load or leave it out")
        return config, None
    folder, epoch = _source(config)
    stored = read_config(folder)
    typed = _typed(config, given)
    changed = {k: v for k, v in typed.items() if k in stored and k not in _FREE | _HARMLESS and not _same(stored[k], v)}
    for name in _FIXED:
        if changed.get(name):
            flag = "STAR file" if name == "star" else f"--{name}"
            raise UserError(
                f"{flag} {changed[name]} where {folder} was trained with {stored[name]}; give what it was trained "
                "with, or start a new run without --load"
            )
    if config.load == "latest" and changed.keys() - {"epochs"}:
        listing = ", ".join(f"--{k.replace('_', '-')} {v} (was {stored[k]})" for k, v in changed.items())
        raise UserError(f"--load latest continues exactly, but options changed: {listing}; leave them out, or use "
                        f"--load {folder}/weights.{epoch}.pkl to start warm")  # fmt: skip
    weights = load_tensors(folder / f"weights.{epoch}.pkl")
    notes = [] if config.latents is None else _check_codes(config.latents, folder, epoch)
    merged = _merge(config, stored, typed)
    exact = not changed.keys() - {"epochs"}
    how = "exact continuation" if exact else "warm start, not an exact continuation,"
    listing = ", ".join(f"{k} {stored[k]} -> {v}" for k, v in changed.items())
    notes.append(f"{how} from epoch {epoch} of {folder}" + (f": {listing}" if listing else ""))
    old = [e for e in epochs_of(config.output) if e >= merged.epochs]
    if old:
        notes.append(f"epochs {old[0]} to {old[-1]} in {config.output} are of the former run and remain")
    if epoch + 1 >= merged.epochs:
        raise UserError(
            f"-n {merged.epochs}: epoch {epoch} of {folder} is the last already; give a larger -n (the total)"
        )
    return merged, Continuation(weights, epoch + 1, exact, "poses" in changed, tuple(notes))


def _source(config: TrainConfig) -> tuple[Path, int]:
    assert config.load is not None
    if config.load == "latest":
        present = epochs_of(config.output)
        if not present:
            raise UserError(f"--load latest: {config.output} has no finished epoch; leave --load out to start")
        return config.output, present[-1]
    path = Path(config.load)
    match = re.fullmatch(r"weights\.(\d+)\.pkl", path.name)
    if match is None or not path.is_file():
        raise UserError(f"--load {path}: no such checkpoint; give RUN/weights.N.pkl or `latest`")
    return path.parent, int(match[1])


def _typed(config: TrainConfig, given: frozenset[str] | None) -> dict[str, Any]:
    values = flatten(config)
    if given is None:
        default = flatten(TrainConfig(config.star, config.output))
        given = frozenset(k for k, v in values.items() if v != default[k])
    return {k: v for k, v in values.items() if k in given}


def _same(stored: Any, value: Any) -> bool:
    """Equal options: paths by where they lead, so that the folder a command is typed in does not matter."""
    if isinstance(stored, str) and isinstance(value, str):
        return stored == value or Path(stored).resolve() == Path(value).resolve() or Path(stored).name == value
    return bool(stored == value)


def _check_codes(latents: Path, folder: Path, epoch: int) -> list[str]:
    """The codes given with --latents must be those of the checkpoint: the posterior is computed from its weights."""
    path, notes = latents, []
    if not path.is_file() and (folder / latents.name).is_file():
        path = folder / latents.name
        notes.append(f"{latents} is not there; {path} of the checkpoint's folder is used")
    codes, own = load_tensors(path).get("mu"), load_tensors(folder / f"z.{epoch}.pkl")["mu"]
    if not isinstance(codes, torch.Tensor) or not torch.equal(codes, own):
        raise UserError(
            f"{path}: its codes do not belong to {folder}/weights.{epoch}.pkl; give z.{epoch}.pkl of that run"
        )
    return notes


def _merge(config: TrainConfig, stored: dict[str, Any], typed: dict[str, Any]) -> TrainConfig:
    """Stored options, overridden by typed ones; where and how to run is taken from the command line."""

    def value(field: dataclasses.Field[Any], current: Any) -> Any:
        if isinstance(current, InputOptions | GridOptions):
            return dataclasses.replace(current, **pick(current))
        if field.name in typed or field.name in _FREE or field.name not in stored:
            return current
        kept = stored[field.name]
        return Path(kept) if field.name in _PATHS and kept is not None else kept

    def pick(options: TrainConfig | InputOptions | GridOptions) -> dict[str, Any]:
        return {f.name: value(f, getattr(options, f.name)) for f in dataclasses.fields(options)}

    return dataclasses.replace(config, **pick(config))


_PATHS = {
    field.name
    for cls in (TrainConfig, InputOptions, GridOptions)
    for field in dataclasses.fields(cls)
    if "Path" in str(field.type) or field.type in ("Mask", "Star", "Output")
}
