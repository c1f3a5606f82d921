"""What all processes of a training run begin with, and how the first of them makes it.

Owns: the order of everything before the first epoch (the parts are in ``start``), and how many processes there are.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opustomo import checkpoint, parallel
from opustomo.config import TrainConfig
from opustomo.errors import UserError
from opustomo.linear_fit import LinearResult
from opustomo.model.vae import Vae
from opustomo.monitor import setup_log
from opustomo.preparation import prepare_process
from opustomo.training.choices import choices
from opustomo.training.context import Context
from opustomo.training.course import Course
from opustomo.training.resume import Continuation, resolve
from opustomo.training.start import (
    Start,
    build,
    check_compiler,
    choose_device,
    save_config,
    select_inputs,
    split_of,
    start_from_linear,
    with_memory,
    with_sizes,
)

log = logging.getLogger("opustomo")


def processes(config: TrainConfig, given: frozenset[str] | None) -> int:
    """How many processes to start: one for each GPU asked for, of those that are here."""
    present = torch.cuda.device_count()
    if present < 2 or parallel.invited() or config.device == "cpu" or config.encode_mode == "fixed":
        return 1
    config, _ = resolve(config, given)
    return min(config.num_gpus, present) if config.multigpu else 1


@dataclass(frozen=True)
class Job:
    """What all processes of a run begin with; tensors on the CPU."""

    config: TrainConfig  # all sizes filled in
    train: Tensor  # rows that are trained on, and held out
    held: Tensor
    model: Vae
    context: Context
    bank: Tensor  # (P, K) codes last seen
    optimizer: dict[str, Any] | None  # state to go on with
    course: dict[str, Any]  # where it begins: see course.Course
    fresh: bool  # not the exact continuation of a checkpoint in this folder
    bound: float  # of the linear stage on the held-out particles, nats per particle
    started: float


def prepare(config: TrainConfig, given: frozenset[str] | None) -> tuple[Job, Start]:
    """Everything before the first epoch, with its files: rows, linear stage, network."""
    config, continuation = resolve(config, given)
    _refuse_foreign_output(config, continuation)
    setup_log(config.output, config.verbose)
    if continuation is None and config.load is not None:
        log.info("interrupted before anything was learned: begins again with the options it had")
    for note in continuation.notes if continuation is not None else ():
        log.info("%s", note)
    started = time.time()
    prepare_process(config.workers, config.deterministic)
    torch.manual_seed(config.seed)
    config = _shared(config, continuation)
    device = choose_device(config)
    if config.compile:
        check_compiler(device)
    asked, config = config, with_sizes(config, device)
    inputs = select_inputs(config)
    count, fresh = len(inputs.particles), continuation is None
    config, recomputed = with_memory(config, given, inputs.grid, count, device, fresh)
    split = split_of(config, inputs.particles.names)
    if fresh:  # from here on --resume knows what was asked for
        save_config(config, "network", inputs, None, split)
    start = start_from_linear(config, inputs, split, continuation)
    linear = start.linear
    train, held = (rows[linear.typical[rows]] for rows in (split.train, split.held))
    model, context = build(config, start, continuation, torch.device("cpu"))
    model.decoder.recomputed = recomputed
    save_config(config, "network", start.inputs, start.place, split)
    checkpoint.write_map(config.output / "mask.mrc", inputs.mask, inputs.grid)
    course, bank, optimizer = _beginning(continuation, linear, len(train))
    if fresh:
        for choice in choices(asked, config, given, start, len(train), device.type == "cuda"):
            log.info("%s %s: %s", *choice)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    log.info("%.1f million parameters; the data are ready after %.0f s", millions, time.time() - started)
    bound = float(linear.codes.evidence[held if len(held) else train].mean())
    exact = continuation is not None and continuation.own
    return Job(config, train, held, model, context, bank, optimizer, course, not exact, bound, started), start


def _shared(config: TrainConfig, continuation: Continuation | None) -> TrainConfig:
    """The options as several processes need them.  Raises UserError for what they cannot share."""
    if parallel.count() == 1:
        return config
    if config.no_cache:
        raise UserError(f"--no-cache: {parallel.count()} processes share the cache on disk; leave --no-cache out")
    if continuation is None and not config.multigpu:  # started by torchrun without saying so again
        return replace(config, num_gpus=parallel.count(), multigpu=True)
    return config


def _beginning(
    continuation: Continuation | None, linear: LinearResult, trained: int
) -> tuple[dict[str, Any], Tensor, dict[str, Any] | None]:
    """State of the course, memory bank and state of the optimiser; trained: particles in an epoch."""
    bank = linear.codes.centre().float()
    if continuation is None:
        return Course().state(), bank, None
    stored = continuation.weights
    if continuation.optimiser:
        return stored["course"], stored["bank"], stored["optimizer"]
    epoch = stored["course"]["epoch"]
    return Course(epoch, seen=epoch * trained).state(), bank, None


def _refuse_foreign_output(config: TrainConfig, continuation: Continuation | None) -> None:
    """A finished run is never overwritten by a new one."""
    own = continuation is not None and (
        config.load == "latest" or Path(str(config.load)).resolve().parent == config.output.resolve()
    )
    if not own and checkpoint.states_of(config.output):
        raise UserError(
            f"-o {config.output}: holds a run already; continue it with `opustomo train --resume {config.output}`, or "
            "choose another folder"
        )
