"""What of this machine the process may use: cores and memory, with the limits of batch systems and containers.

Owns: reading /proc and the cgroups; nothing heavy is imported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cores:
    """How many cores the machine has, how many this process may run on, and their time it gets (None: all of it).

    quota counts cores: 1.5 is one and a half core's time, however many threads share it.
    """

    machine: int
    allowed: int
    quota: float | None = None

    @property
    def usable(self) -> int:
        """Threads that can be kept busy, at least 1."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, math.ceil(self.quota)))


def cores() -> Cores:
    """Cores of the machine, of the affinity mask, and the narrowest CPU quota of any cgroup above this process."""
    machine = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    return Cores(machine, allowed, min(_quotas(), default=None))


def usable_cores() -> int:
    """Threads that this process can keep busy: batch systems and containers give fewer cores than a machine has."""
    return cores().usable


def _quotas() -> Iterator[float]:
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = CGROUPS / controllers if controllers else CGROUPS  # version 1 has a tree for each controller
            inner = root / group.lstrip("/")
            for folder in (inner, *(above for above in inner.parents if above.is_relative_to(root))):
                with suppress(OSError, ValueError, ZeroDivisionError):  # no limit is "max", or -1
                    share = _share(folder, bool(controllers))
                    if share > 0:
                        yield share


def _share(folder: Path, first_version: bool) -> float:
    if first_version:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    else:
        quota, period = (folder / "cpu.max").read_text().split()
    return int(quota) / int(period)


def total_memory() -> int:
    """Bytes of memory in the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> int:
    """Bytes of memory that this process could get now: file pages that the system can drop count as free.

    Where a batch system has set a limit for the job (cgroup v2), what is left of it.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, StopIteration):  # ValueError: no limit, "max"
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        group = Path("/sys/fs/cgroup", next(g for g in groups if g.startswith("0::"))[3:].lstrip("/"))
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, int((group / "memory.max").read_text()) - int(used["anon"]))
    return free
