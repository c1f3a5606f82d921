"""Who makes which rows of a cache: the threads of one process, or several processes, each its share.

Owns: the division of rows over processes and machines, and what is done where one of them meets a row it cannot make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from opustomo import parallel
from opustomo.data.observe import observe_all
from opustomo.data.particles import Particles
from opustomo.data.star import StarFile
from opustomo.errors import UserError
from opustomo.machine import usable_cores

if TYPE_CHECKING:
    from opustomo.data.cache import Cache, Progress, Row

ROUND = 256  # rows that each of several processes makes before it hears of the others
BLOCK = 2048  # rows; in every file of a cache they take whole pages of 4096 bytes


def fill(
    cache: Cache,
    particles: Particles,
    rows: np.ndarray,
    workers: int,
    progress: Progress,
    reopen: Callable[[], Cache] | None = None,
) -> Cache:
    """Make and write ``rows``; the cache, on the disk, with all of them.

    reopen: opens the files of the cache, in any process; where other processes wait for work each makes its share of
    the rows, the same to the last bit.  None: the rows have no files.  Raises UserError for a particle that cannot be
    used, with ``--damaged stop``.
    """
    if reopen is not None and parallel.helped():
        _fill_together(reopen, particles, rows, workers, progress)
        return reopen()
    # written by the threads that make them: one writer would hold many cores up
    made = observe_all(particles, rows.tolist(), cache.grid, cache.noise, workers, then=cache.write)
    try:
        for _ in progress(made, len(rows)):
            pass
    finally:
        cache.flush()
    return cache


@dataclass(frozen=True)
class _Share:
    """Rows that one of several processes makes now: ``particles`` are the ``rows`` of the cache.

    faults of the particles: a dictionary, also with ``--damaged stop``: the first process says which was the first.
    """

    reopen: Callable[[], Cache]
    particles: Particles
    rows: np.ndarray
    skip: bool
    threads: int


def shares(rows: np.ndarray, machines: Sequence[int]) -> list[np.ndarray]:
    """A partition of ``rows`` over processes on ``machines`` (of each process, from 0), in turns.

    No two machines write the same page of a file: network file systems keep pages, and a machine that writes a part of
    one may undo what another has written there.
    """
    block, number, parts = (rows // BLOCK) % (max(machines) + 1), np.array(machines), []
    for i, machine in enumerate(machines):
        before, here = int((number[:i] == machine).sum()), int((number == machine).sum())
        parts.append(rows[block == machine][before::here])
    return parts


def _fill_together(
    reopen: Callable[[], Cache], particles: Particles, rows: np.ndarray, workers: int, progress: Progress
) -> None:
    machines, cores = parallel.machines(), usable_cores()
    threads = max(1, min(workers or cores, cores) // machines.count(machines[0]))
    queues, skip, nothing = shares(rows, machines), particles.faults is not None, torch.zeros(0)

    def made() -> Iterator[Row]:
        for begin in range(0, max(map(len, queues)), ROUND):
            now = [queue[begin : begin + ROUND] for queue in queues]
            faults: dict[str, str] = {}
            parts = [_Share(reopen, _some(particles, part), part, skip, threads) for part in now]
            for found in parallel.everywhere(_make, parts):
                faults |= found
            for i in np.sort(np.concatenate(now)).tolist():
                if particles.names[i] in faults:
                    with particles.looking_at(i):
                        raise UserError(faults[particles.names[i]])
                yield i, nothing, nothing

    for _ in progress(made(), len(rows)):
        pass


def _some(particles: Particles, index: np.ndarray) -> Particles:
    """What another process needs to know of the particles at ``index``: little enough to be sent."""
    return replace(particles.subset(index), faults={}, star=StarFile(particles.source, {}))


def _make(share: _Share) -> dict[str, str]:
    """Why particles cannot be used, by name; their rows are zeros with ``--damaged skip``, else not written."""
    particles, rows, cache = share.particles, share.rows, share.reopen()
    faults = particles.faults
    assert faults is not None

    def keep(j: int, numerator: Tensor, weight: Tensor) -> None:
        if share.skip or particles.names[j] not in faults:
            cache.write(int(rows[j]), numerator, weight)

    made: Iterable[Row] = observe_all(particles, range(len(rows)), cache.grid, cache.noise, share.threads, then=keep)
    try:
        for _ in made:
            pass
    finally:
        cache.flush()
    return faults
