"""``train --profile``: where the time of a step goes, as two files that a user can send.

Owns: ``profile.txt`` and ``profile.json.gz`` of a run folder and the names of a step's parts.  Neither file holds a
path, a name of a particle or of a machine.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from opustomo import __version__, parallel
from opustomo.checkpoint import flatten
from opustomo.config import TrainConfig
from opustomo.data.atomic import atomic, write_text
from opustomo.model.vae import Vae
from opustomo.monitor import peak_memory_gb
from opustomo.training.context import Context

PARTS = ("read", "encode", "decode", "likelihood", "backward", "exchange", "optimiser")
WARM_UP, MEASURED = 10, 8  # steps
OPERATORS = 25  # listed
KEPT = ("schemaVersion", "displayTimeUnit", "deviceProperties", "traceEvents")  # of the trace: not the machine's name
WORDS = frozenset({"encode_mode", "beta", "device", "contrast", "normalisation", "format"})  # options that are no paths

_measured: torch.device | None = None  # the device of the steps that are being measured


@contextmanager
def part(name: str) -> Iterator[None]:
    """A part of a step.  While steps are measured it is named in the profile and ends when the GPU has done it."""
    if _measured is None:
        yield
        return
    with record_function(name):
        yield
        if _measured.type == "cuda":
            torch.cuda.synchronize(_measured)


class Profile:
    """Measures some steps of the first epoch that it sees, and writes both files below ``folder``."""

    def __init__(self, config: TrainConfig, model: Vae, context: Context, particles: int) -> None:
        self.folder, self.device, self.done = config.output, context.device, False
        self.about = _about(config, model, context, particles)

    def steps(self, batches: Iterable[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
        """Pass ``count`` batches through; what is done with each is a step."""
        if self.done:
            yield from batches
            return
        global _measured
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines
        first = min(WARM_UP, count // 2)  # the first steps fill caches and choose algorithms
        last = min(first + MEASURED, count)
        cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        recorder = profile(activities=[ProfilerActivity.CPU, *cuda])
        try:
            for number, batch in enumerate(batches):
                if not first <= number < last:
                    yield batch
                    continue
                if number == first:
                    recorder.start()
                    _measured = self.device
                with part("step"):
                    yield batch
                if number + 1 == last:
                    _measured = None
                    recorder.stop()
                    self._write(recorder, first, last)
        finally:
            if _measured is not None:  # a step failed
                _measured = None
                recorder.stop()

    def _write(self, recorder: profile, first: int, last: int) -> None:
        self.done = True
        order = "self_cpu_time_total" if self.device.type == "cpu" else "self_device_time_total"
        operators = recorder.key_averages().table(order, row_limit=OPERATORS, max_name_column_width=60)
        gpu = f"; {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the GPU" if self.device.type == "cuda" else ""
        text = [
            *self.about,
            f"peak memory {peak_memory_gb():.2f} GB{gpu}",
            "",
            f"steps {first + 1} to {last} of an epoch, means; measuring makes short operations slower",
            *_table(times(recorder)),
            "",
            operators,
        ]
        write_text(self.folder / "profile.txt", "\n".join(text) + "\n")
        with atomic(self.folder / "profile.json.gz") as temporary:
            recorder.export_chrome_trace(str(temporary))
            trace = without_names(json.loads(temporary.read_text()))
            with gzip.open(temporary, "wt") as file:
                json.dump(trace, file)


def times(recorder: profile) -> dict[str, float]:
    """Milliseconds of ``step`` and of each part in it, means over the steps; ``other``: what is in none."""
    total = dict.fromkeys(("step", *PARTS), 0.0)
    steps = 0
    for event in recorder.events() or ():
        if event.name in total and event.device_type == DeviceType.CPU:
            total[event.name] += event.time_range.elapsed_us() / 1e3
            steps += event.name == "step"
    total = {name: value / steps for name, value in total.items()}
    return total | {"other": total["step"] - sum(total[name] for name in PARTS)}


def _table(found: dict[str, float]) -> list[str]:
    names = [name for name in (*PARTS, "other", "step") if found[name]]
    lines = [f"{name:12}{found[name]:10.3f}{found[name] / found['step']:9.1%}" for name in names]
    return [f"{'part':12}{'ms':>10}{'share':>9}", *lines]


def without_names(trace: dict[str, Any]) -> dict[str, Any]:
    """A Chrome trace without what tells whose machine it is: its name, and anything that could be a path."""
    kept = {name: trace[name] for name in KEPT if name in trace}
    for event in kept["traceEvents"]:
        arguments = event.get("args", {})
        event["args"] = {k: v for k, v in arguments.items() if not (isinstance(v, str) and ("/" in v or "\\" in v))}
    return kept


def _about(config: TrainConfig, model: Vae, context: Context, particles: int) -> list[str]:
    """Versions, device, sizes and the options that are no paths, a line each."""
    grid, parameters = context.grid, sum(p.numel() for p in model.parameters())
    numbers = {k: v for k, v in flatten(config).items() if k in WORDS or isinstance(v, int | float)}
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return [
        f"opustomo {__version__}, Python {platform.python_version()}, torch {torch.__version__} ({built}), "
        f"{platform.system()} {platform.machine()}",
        f"device: {_device(context.device)}; {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) in each of "
        f"{parallel.count()} process(es); {torch.backends.cpu.get_cpu_capability()}",
        "sizes: " + ", ".join(f"{k} {v:g}" for k, v in grid._asdict().items())
        + f"; {model.components.shape[0]} components, {particles} particles trained on, {parameters / 1e6:.2f} million "
        f"parameters, decoder {'recomputed' if model.decoder.recomputed else 'kept'}",
        "options: " + ", ".join(f"{k} {v}" for k, v in numbers.items()),
    ]  # fmt: skip


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {torch.cuda.mem_get_info(device)[1] / 1e9:.0f} GB"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"
