"""``opustomo doctor``: is this machine ready, and what to mend; in a few seconds.

Owns: the order of the questions and the exit status (0; 1 where something would stop a run).
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from opustomo.config import DoctorConfig
from opustomo.data.findings import Finding, Report
from opustomo.doctor import compute, host, packages

NEXT = "next: opustomo check particles.star, or opustomo demo -o demo to see everything at work"


def main(config: DoctorConfig) -> int:
    """Print the report; returns 1 if anything in it would stop a run."""
    report = examine(config.folder)
    print(report.printed(config.json))
    if not config.json:
        again = f"mend the errors, then: opustomo doctor {shlex.quote(str(config.folder))}"
        print(again if report.count("error") else NEXT)
    return 1 if report.count("error") else 0


def examine(folder: Path) -> Report:
    """All findings about this machine, and about ``folder`` as a place for runs; nothing is left in it."""
    start = time.monotonic()
    loaded, versions = packages.load_torch()
    gpus: list[Finding] = []
    threads = [host.core_finding()]
    if loaded is not None:
        gpus = compute.gpu_findings(loaded)
        threads += compute.thread_findings(loaded)
    sections = {
        "programs": [*packages.program_findings(), *versions, *packages.extra_findings()],
        "GPU": gpus,
        "cores": threads,
        "memory": host.memory_findings(),
        "processes": host.process_findings(),
        "disk": host.disk_findings(folder),
    }
    return Report(folder.absolute(), sections, time.monotonic() - start, kind="folder")
