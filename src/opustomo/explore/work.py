"""What takes long: maps that are decoded one at a time and kept, and jobs that write files.

Owns: the queue and its bound, the memory that decoded maps may take, and what became of a job.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opustomo.errors import UserError
from opustomo.explore.gate import Refused

log = logging.getLogger(__name__)

Volume = NDArray[np.float32]
WAITING = 48  # decodes that may wait
MEMORY = 256 << 20  # bytes of maps that are kept
JOBS = 4  # that may wait
TOLD = 20  # jobs that are remembered


class Decoder:
    """Maps by key: one is made at a time, those made last are kept, who asks for the same one waits for the same."""

    def __init__(self, waiting: int = WAITING, memory: int = MEMORY) -> None:
        self.waiting, self.memory, self.held = waiting, memory, 0
        self._kept: OrderedDict[Hashable, Volume] = OrderedDict()
        self._coming: dict[Hashable, Future[Volume]] = {}
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, "decode")

    def get(self, key: Hashable, make: Callable[[], Volume]) -> Volume:
        """The map of ``key``, made by ``make`` unless it is there.  Refused (503) when too many wait."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            coming = self._coming.get(key)
            if coming is None:
                if len(self._coming) >= self.waiting:
                    raise Refused(503, f"{self.waiting} maps are being waited for; try again in a moment")
                coming = self._coming[key] = self._worker.submit(self._make, key, make)
        return coming.result()

    def _make(self, key: Hashable, make: Callable[[], Volume]) -> Volume:
        try:
            volume = make()
            with self._lock:
                self._kept[key] = volume
                self.held += volume.nbytes
                while self.held > self.memory and len(self._kept) > 1:
                    self.held -= self._kept.popitem(last=False)[1].nbytes
            return volume
        finally:
            with self._lock:
                self._coming.pop(key, None)

    def close(self) -> None:
        """What has not begun is given up."""
        self._worker.shutdown(wait=False, cancel_futures=True)


@dataclass
class Job:
    """Something that writes files: its state is waiting, running, done or failed."""

    number: int
    title: str
    command: str  # that does the same
    state: str = "waiting"
    message: str = ""
    seconds: float = 0.0
    files: dict[str, Path] = field(default_factory=dict)  # by the name that the page asks for

    def told(self) -> dict[str, Any]:
        """For the page."""
        names = ("number", "title", "command", "state", "message", "seconds")
        return {name: getattr(self, name) for name in names} | {"files": list(self.files)}


class Jobs:
    """One at a time, in the order they came."""

    def __init__(self) -> None:
        self.jobs: dict[int, Job] = {}
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, "job")

    def start(self, title: str, command: str, work: Callable[[], list[Path]]) -> Job:
        """Have ``work`` done; it returns the files written.  Refused (503) when too many wait."""
        with self._lock:
            if sum(job.state in ("waiting", "running") for job in self.jobs.values()) > JOBS:
                raise Refused(503, f"{JOBS} jobs are waiting; wait for one to end")
            job = Job(max(self.jobs, default=0) + 1, title, command)
            self.jobs[job.number] = job
            for old in list(self.jobs)[:-TOLD]:
                del self.jobs[old]
        self._worker.submit(self._run, job, work)
        return job

    def _run(self, job: Job, work: Callable[[], list[Path]]) -> None:
        job.state, begun = "running", time.monotonic()
        try:
            job.files = {path.name: path for path in work()}
            state = "done"
        except (UserError, Refused) as error:
            state, job.message = "failed", str(error)
        except Exception as error:
            log.exception("%s", job.title)
            state, job.message = "failed", f"internal error: {error!r:.200}"
        job.seconds = time.monotonic() - begun
        job.state = state

    def close(self) -> None:
        """What has not begun is given up."""
        self._worker.shutdown(wait=False, cancel_futures=True)
