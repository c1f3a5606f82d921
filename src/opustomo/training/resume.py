"""Continuing a run: which options hold, and whether the continuation is exact.

Owns: the rules of ``--load``.  ``--load latest``, which ``--resume`` stands for, goes on exactly and refuses changed
options, but for the number of epochs; ``--load W.pkl`` lets options that were typed override the stored ones, lists
them, and then starts warm.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opustomo.checkpoint import BEFORE, epochs_of, flatten, load_tensors, states_of
from opustomo.config import GridOptions, InputOptions, TrainConfig
from opustomo.data.bodies import absolute
from opustomo.errors import UserError, reading
from opustomo.stored import read_config
from opustomo.training.course import Course

_CHECKPOINT = re.compile(r"weights\.(\d+)\.pkl")
# options that say where and how to run, not what is computed
_FREE = frozenset(
    {"output", "load", "latents", "workers", "verbose", "plot", "device", "deterministic", "compile", "profile"}
)
# stored unless typed, and free to change: they do not touch what is computed
_HARMLESS = frozenset({"cache", "no_cache", "checkpoint", "checkpoint_minutes", "keep", "log_interval", "tmp_prefix"})
# sizes of the network, and what the stored poses and codes belong to
_FIXED = ("zdim", "masks", "zaffinedim", "templateres", "width", "encoderres", "star", "ind", "estpose")
# what a checkpoint of train has and neither one of the linear stage nor of an earlier version
_NEEDED = frozenset(
    {
        "model",
        "optimizer",
        "bank",
        "course",
        "gain",
        "typical",
        "usual",
        "grid",
        "noise",
        "mixture",
        "linear",
        "rotation",
    }
)


LEARNED = frozenset({"encoder", "decoder", "scale"})  # of its model; the encoder where there is one


@dataclass(frozen=True)
class Continuation:
    """Weights to go on from; ``optimiser``: its state, the memory bank and the position within an epoch go on too.

    own: the furthest state of this very folder.
    """

    weights: dict[str, Any]
    optimiser: bool
    own: bool
    new_poses: bool = False  # --poses has changed: those of the checkpoint do not hold
    notes: tuple[str, ...] = ()  # for the run's log, which is opened later


def resolve(config: TrainConfig, given: frozenset[str] | None) -> tuple[TrainConfig, Continuation | None]:
    """Merge typed options with those of the run that ``config.load`` names.

    No continuation, though ``config.load`` is set: the run had learned nothing yet when it was interrupted.
    given: names of the options that were typed (None: all that differ from their defaults).  Raises UserError for
    changed options under ``latest``, for sizes that must match, and for codes of another run.  ``resume`` among the
    given: the user typed --resume RUN, which stands for -o RUN --load latest.
    """
    spelt = "--resume" if given is not None and "resume" in given else "--load"
    if config.load is None:
        if config.latents is not None:
            raise UserError("--latents has no effect without --load weights.N.pkl; add --load or leave it out")
        return config, None
    folder, paths = _source(config, spelt)
    stored = _stored(folder)
    typed = {k: v for k, v in typed_options(config, given).items() if not _same(k, stored.get(k), v, folder)}
    changed = {k: v for k, v in typed.items() if k in stored and k not in _FREE | _HARMLESS}
    latest = config.load == "latest"
    path, weights, notes = _first_sound(paths, spelt) if paths else (folder, {}, [])
    _refuse(config, stored, changed, path, spelt)
    if config.latents is not None:
        notes += _check_codes(config.latents, path)
    merged = _merge(config, stored, typed)
    if not weights:
        return merged, None
    where = f"epoch {weights['epoch']}"
    if step := weights["course"]["step"]:
        where += f" after {step} steps"
    elif path.name == BEFORE:
        where = "the linear stage"
    notes.append(f"{_how(stored, changed)} from {where} of {folder}{_listing(stored, changed)}")
    old = [e for e in epochs_of(config.output) if e >= merged.epochs]
    if old:
        notes.append(f"epochs {old[0]} to {old[-1]} in {config.output} are of the former run and remain")
    if weights["course"]["epoch"] >= merged.epochs:
        raise UserError(
            f"-n {merged.epochs}: epoch {weights['epoch']} of {folder} is the last already; give a larger -n "
            "(the total)"
        )
    optimiser = not changed.keys() - {"epochs"}
    return merged, Continuation(weights, optimiser, latest and optimiser, "poses" in changed, tuple(notes))


def _first_sound(paths: list[Path], spelt: str) -> tuple[Path, dict[str, Any], list[str]]:
    """The first file that is not damaged, what is in it, and a note about every one before it."""
    notes: list[str] = []
    for path in paths:
        try:
            tensors = load_tensors(path)
        except UserError as error:
            if path is paths[-1]:
                raise
            notes.append(f"{error}; going on from the one before it")
            continue
        return path, _complete(path, tensors, spelt), notes
    raise AssertionError


def _refuse(config: TrainConfig, stored: dict[str, Any], changed: dict[str, Any], path: Path, spelt: str) -> None:
    folder = path.parent if path.is_file() else path
    # the stored motions of bodies are of these particles at these poses on this grid
    for name in (*_FIXED, *(("mask", "downfrac", "poses") if stored.get("masks") else ())):
        # a run without an encoder may get one
        if name in changed and not (name == "encoderres" and stored[name] == 0):
            raise UserError(
                f"{spelt_option(name, changed[name])} where {folder} was trained with {stored[name]}; give what it was "
                f"trained with, or start a new run without {spelt}"
            )
    if config.load == "latest" and changed.keys() - {"epochs"}:
        listing = ", ".join(f"{spelt_option(k, v)} (was {stored[k]})" for k, v in changed.items())
        resumed = spelt == "--resume"
        raise UserError(
            f"{spelt if resumed else '--load latest'} continues exactly, but options changed: {listing}; "
            f"leave them out, or {'in place of --resume type STAR -o RUN' if resumed else 'use'} "
            f"--load {path if path.is_file() else folder / 'weights.N.pkl'} to start warm"
        )


def _complete(path: Path, weights: dict[str, Any], spelt: str) -> dict[str, Any]:
    # a network without weights would be started anew in silence
    parts = {name.split(".")[0] for name in weights["model"]} if isinstance(weights.get("model"), dict) else set()
    if missing := (_NEEDED - weights.keys()) | (LEARNED - {"encoder"} - parts):
        raise UserError(
            f"{path}: has no {', '.join(sorted(missing))}, it is of no network or of an earlier version; "
            f"start a new run without {spelt}"
        )
    with reading(path, "use that of another epoch"):
        Course.of(weights["course"])
    return weights


def _how(stored: dict[str, Any], changed: dict[str, Any]) -> str:
    if not changed:
        return "exact continuation"
    if changed.keys() - {"epochs"}:
        return "warm start, not an exact continuation,"
    way = "stretch" if changed["epochs"] > stored["epochs"] else "shrink"
    return f"continuation with the optimiser's state, but schedules {way} to {changed['epochs']} epochs,"


def _listing(stored: dict[str, Any], changed: dict[str, Any]) -> str:
    return "".join(f"{', ' if i else ': '}{k} {stored[k]} -> {v}" for i, (k, v) in enumerate(changed.items()))


def spelt_option(name: str, value: Any) -> str:
    """An option as it is typed."""
    if name == "star":
        return f"STAR file {value}"
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def _source(config: TrainConfig, spelt: str) -> tuple[Path, list[Path]]:
    """The run's folder and the files to go on from, the furthest first; none where nothing was learned yet."""
    assert config.load is not None
    if config.load == "latest":
        present = states_of(config.output)
        if not present and not (config.output / "config.yaml").is_file():
            raise UserError(
                f"{'--resume' if spelt == '--resume' else '--load latest:'} {config.output}: no run of train there; "
                "repeat the original command (run.log begins with it), the cache that is there is used"
            )
        return config.output, present
    path = Path(config.load)
    if path.is_dir():
        raise UserError(f"--load {path}: is a folder; give RUN/weights.N.pkl or `latest`")
    if path.is_file() and not _CHECKPOINT.fullmatch(path.name):
        raise UserError(f"--load {path}: is not a weights file; give RUN/weights.N.pkl or `latest`")
    if not path.is_file():
        raise UserError(f"--load {path}: no such checkpoint; give RUN/weights.N.pkl or `latest`")
    return path.parent, [path]


def typed_options(config: TrainConfig, given: frozenset[str] | None) -> dict[str, Any]:
    """The options that were typed (given None: those that differ from their defaults) with their values."""
    values = flatten(config)
    if given is None:
        default = flatten(TrainConfig(config.star, config.output))
        given = frozenset(k for k, v in values.items() if v != default[k])
    return {k: v for k, v in values.items() if k in given}


def _stored(folder: Path) -> dict[str, Any]:
    """Options of a run; paths below its folder as they are now, should it have been moved or copied."""
    values = read_config(folder)
    former = Path(values.get("output") or folder).resolve()
    for name in _PATHS - _FREE:
        path = Path(values.get(name) or "")
        if path.is_relative_to(former) and (here := folder.resolve() / path.relative_to(former)).exists():
            values[name] = str(here)
    return values


def _same(name: str, stored: Any, value: Any, folder: Path) -> bool:
    """Equal options; paths by where they lead from the current folder or, if nothing is there, from the run's own."""
    if name == "masks" and value is not None:
        return stored in (value, absolute(value))
    if name not in _PATHS or stored is None or value is None:
        return bool(stored == value)
    here, wanted = Path(value).resolve(), Path(stored).resolve()
    # an absolute path stays what it is when joined
    return here == wanted or (not here.exists() and (folder / value).resolve() == wanted)


def _check_codes(latents: Path, weights: Path) -> list[str]:
    """The codes given with --latents must be those of the checkpoint: the posterior is computed from its weights."""
    folder, path, notes = weights.parent, latents, []
    if not path.is_file() and (folder / latents.name).is_file():
        path = folder / latents.name
        notes.append(f"{latents} is not there; {path} of the checkpoint's folder is used")
    number = _CHECKPOINT.fullmatch(weights.name)
    if number is None:
        raise UserError(f"--latents {latents}: {weights} has no codes yet; leave --latents out")
    codes, own = load_tensors(path).get("mu"), load_tensors(folder / f"z.{number[1]}.pkl")["mu"]
    if not isinstance(codes, torch.Tensor) or not torch.equal(codes, own):
        raise UserError(f"{path}: its codes do not belong to {weights}; give z.{number[1]}.pkl of that run")
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
