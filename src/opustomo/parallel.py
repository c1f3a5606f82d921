"""What the processes of one training run exchange, and how the end of one becomes the end of all.

Owns: starting or joining them, and every sum and copy between them.  Each process has one GPU (or is one of several on
CPUs) and does its share of every batch; the first one writes all files.  A run of one process passes unchanged through
everything here.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from opustomo.errors import ToldElsewhere, UserError
from opustomo.interruption import ignored, on_signal
from opustomo.machine import usable_cores

T = TypeVar("T")

JOINING = timedelta(minutes=10)
# the first process may make rows for days before the others have anything to do; one that has died is noticed at once
WAITING = timedelta(days=30)
STEP = timedelta(minutes=30)  # on GPUs, where a dead process may be noticed by its silence alone
GRACE = 15.0  # seconds to give the reason in before the others are ended
PR_SET_PDEATHSIG = 1  # of sys/prctl.h

_gpus: dist.ProcessGroup | None = None
_hosts: list[str] = []  # of every process
_waiting = False  # do the others wait for work of ``everywhere``?


class _Lost(Exception):
    """An exchange failed: another process is gone."""


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Is this the one that writes?"""
    return rank() == 0


# ------------------------------------------------------------------------------------------------ shares and sums


def share(size: int) -> slice:
    """This process's part of ``size`` things in a row; the parts differ by at most one and may be empty."""
    return slice(size * rank() // count(), size * (rank() + 1) // count())


def turns(items: Iterable[T]) -> Iterator[T]:
    """The items that are this process's turn: every ``count``-th."""
    return islice(items, rank(), None, count())


def total(values: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    if count() > 1:
        with _exchange():
            dist.all_reduce(values, group=_gpus if values.is_cuda else None)
    return values


def joint(values: Tensor, here: slice, size: int) -> Tensor:
    """The whole (size, K) of which every process has its own rows ``here``; gradients find their way back."""
    if count() == 1:
        return values
    whole: Tensor = _Joint.apply(functional.pad(values, (0, 0, here.start, size - here.stop)))
    return whole


class _Joint(torch.autograd.Function):
    """A sum over the processes, whose gradient is the sum of theirs: what each computes depends on the others' rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return total(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return total(gradients[0].clone())


def sum_gradients(model: nn.Module) -> None:
    """Sum every parameter's gradient over the processes, in one exchange; one that has none counts as zero."""
    if count() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    parts = total(flat).split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def from_all(values: Tensor) -> Tensor:
    """What every process gives, one after another along the first dimension, on the CPU."""
    gathered: list[Tensor] = [values] * count()
    if count() > 1:
        with _exchange():
            dist.all_gather_object(gathered, values)
    return torch.cat(gathered)


def from_first(value: T | None) -> T:
    """The first process's value, in all of them (pickled: tensors on the CPU); what the others give is ignored."""
    box = [value]
    if count() > 1:
        with _exchange():
            dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return cast(T, box[0])


# ------------------------------------------------------------------------------------------------ work for all


def prepared(make: Callable[[], T]) -> T:
    """What ``make`` gives in the first process, in all; meanwhile the others do their parts of ``everywhere``."""
    global _waiting
    if first():
        _waiting = count() > 1
        try:
            value = make()
        finally:
            _waiting = False
        return from_first((None, value))[1]
    while True:
        task: tuple[Any, Any] = from_first(None)
        if task[0] is None:
            return cast(T, task[1])
        _part(task[0], None)


def helped() -> bool:
    """Would ``everywhere`` be done by several?"""
    return _waiting


def everywhere(work: Callable[[Any], T], parts: Sequence[Any]) -> list[T]:
    """``work`` of ``parts[i]`` in process i, pickled; what each returns.  Only for the first, while others wait."""
    assert _waiting and len(parts) == count()
    from_first((work, None))
    return _part(work, list(parts))


def _part(work: Callable[[Any], T], parts: list[Any] | None) -> list[T]:
    own: list[Any] = [None]
    with _exchange():
        dist.scatter_object_list(own, parts)
    done = work(own[0])
    results: list[T] = [done] * count()
    with _exchange():
        dist.all_gather_object(results, done)
    return results


def machines() -> list[int]:
    """The number of each process's machine, from 0."""
    known = list(dict.fromkeys(_hosts))
    return [known.index(host) for host in _hosts]


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _Lost(str(error)) from error


# ------------------------------------------------------------------------------------------------ joining


def invited() -> bool:
    """Was this process started as one of several (torchrun, or the lines of runs/slurm.sbatch)?"""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the other processes for the length of the block, on the GPU of LOCAL_RANK unless ``device`` is cpu.

    Nothing happens in a process of its own.  Raises UserError when the others do not come, when the environment
    (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) is incomplete, and when another process dies.
    """
    if not invited():
        yield
        return
    use_gpu = device != "cpu" and torch.cuda.device_count() > 0
    store = _join(use_gpu)
    _hosts[:] = [socket.gethostname()] * count()
    with suppress(RuntimeError):  # a process that is gone already is noticed at the next exchange
        dist.all_gather_object(_hosts, socket.gethostname())
    if not first():
        logging.getLogger("opustomo").setLevel(logging.ERROR)
    try:
        # the first one is interrupted, says so, and ends them all
        with nullcontext() if first() else on_signal(ignored):
            yield
            total(torch.zeros(1))  # all or none have finished
    except _Lost:
        raise _reason(store) from None
    except KeyboardInterrupt as interrupted:
        _tell(store, UserError(str(interrupted) or "interrupted"))
        raise
    except Exception as error:
        if not _tell(store, error):
            raise ToldElsewhere(str(error)) from error
        raise
    dist.destroy_process_group()


def _join(use_gpu: bool) -> dist.Store:
    global _gpus
    number, size = _number("RANK"), _number("WORLD_SIZE")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or number >= size:
        wrong = f"{missing[0]} is not set" if number < size else f"RANK {number} of WORLD_SIZE {size}"
        raise UserError(f"{wrong}: start the processes with torchrun, or as runs/slurm.sbatch does")
    if use_gpu:
        _take_gpu(number)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=JOINING))
        dist.init_process_group("gloo", store=store, rank=number, world_size=size, timeout=WAITING)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"process {number} of {size} on {socket.gethostname()}: the others were not found at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({reason}); MASTER_ADDR is the name of the first "
            f"node, WORLD_SIZE the number of processes that are started"
        ) from None
    _gpus = dist.new_group(backend="nccl", timeout=STEP) if use_gpu else None
    return cast(dist.Store, store)


def _take_gpu(number: int) -> None:
    present = torch.cuda.device_count()
    here = _number("LOCAL_WORLD_SIZE", 1)
    if 1 < present < here:  # with one, the queueing system may have given every process its own
        raise UserError(f"{here} processes on {socket.gethostname()}, which has {present} GPUs; start one for each GPU")
    torch.cuda.set_device(_number("LOCAL_RANK", number) % present)


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text}: must be a whole number; torchrun and runs/slurm.sbatch set it")
    return int(text)


def divide_threads() -> None:
    """No more threads than this process's part of the cores, once all of the machine's compute."""
    here = _number("LOCAL_WORLD_SIZE", 1)
    if here > 1:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, usable_cores() // here)))


# ------------------------------------------------------------------------------------------------ the end


def _tell(store: dist.Store, error: Exception) -> bool:
    """Leave the reason to the others; True for the process that has to tell the user, the first to fail."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    try:
        store.set("reason", f"process {rank()} of {count()}: {text}")
        return int(store.add("told", 1)) == 1
    except RuntimeError:  # the store went with the process that held it
        return True


def _reason(store: dist.Store) -> UserError:
    """Why an exchange failed."""
    try:
        if store.check(["reason"]):
            return ToldElsewhere(store.get("reason").decode())
        alone = int(store.add("told", 1)) == 1
    except RuntimeError:
        alone = True
    return (UserError if alone else ToldElsewhere)(
        f"another of the {count()} processes ended without a word: killed, out of memory, or its machine failed; "
        "see the system's log, and go on with `opustomo train --resume RUN`"
    )


def launch(processes: int, function: Callable[[], int]) -> int:
    """Call ``function`` in so many processes of this machine that will join; the exit status of the first to fail.

    Those that are left when one fails are ended.  Raises UserError when it was killed and no other could say so.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    context = torch.multiprocessing.start_processes(
        _process, (processes, store.port, function), processes, join=False, start_method="spawn"
    )
    assert context is not None
    try:
        with on_signal(partial(_pass_on, context.processes)):
            while not context.join(grace_period=GRACE):
                pass
    except torch.multiprocessing.ProcessExitedException as ended:
        if ended.exit_code > 0:
            return int(ended.exit_code)
        if not store.check(["told"]):
            raise UserError(
                f"process {ended.error_index} of {processes} was ended by {ended.signal_name}: out of memory? See the "
                "system's log, and go on with `opustomo train --resume RUN`"
            ) from None
        return 1
    return 0


def _pass_on(processes: Sequence[Any], number: int) -> None:
    """Tell the first, which ends them all; Ctrl-C has reached it already."""
    if number != signal.SIGINT and processes[0].pid is not None:
        with suppress(ProcessLookupError):
            os.kill(processes[0].pid, number)


def _process(number: int, processes: int, port: int, function: Callable[[], int]) -> None:
    """One process of ``launch``; the environment is that of torchrun, with the store in the process that launched."""
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    with suppress(OSError, AttributeError):  # Linux: none is left behind where the one that launched them is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    leave(function())


def leave(status: int) -> NoReturn:
    """End this process without taking libraries down: threads of gloo that are still there would abort it (SIGABRT)."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
