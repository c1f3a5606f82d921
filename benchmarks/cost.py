"""What a run costs, counted and measured here, and what it would take on machines that are not here.

    python benchmarks/cost.py --markdown docs/scaling.md           (make bench-cost)

Counted in real steps (benchmarks/step.py): the FLOP of convolutions and products, the bytes that go in and out of every
other operator, what autograd keeps, and the number of operators.  Measured: FLOP per second, decoding, and the passes
of the linear stage on this CPU.  The cost of a row is read from the table that benchmarks/scale.py has written on the
page.  The predictions are arithmetic on these figures and on the published ones of an H100.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scale import markdown, put
from step import MemoryRows, Row, prepare, step_and_bare
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from opustomo.data.cache import Cache, Stored, row_bytes
from opustomo.data.filling import BLOCK
from opustomo.data.observe import Noise
from opustomo.linear import POSE, LinearModel, accumulate, choose_components, columns, infer, statistics
from opustomo.linear_fit import EM_STEPS, MAX_COMPONENTS, SAMPLE
from opustomo.model.decoder import Decoder
from opustomo.physics.fourier import band_frequencies
from opustomo.physics.grid import Grid, template_size
from opustomo.physics.volume import spherical_mask
from opustomo.training import memory

MARKS = "<!-- cost -->", "<!-- end of cost -->"
BOXES, COUNTS, GPUS = (64, 128, 192), (10_000, 100_000, 1_000_000), (1, 8, 64)
OPUS = {64: 128, 128: 160, 192: 192}  # template at full resolution
EPOCHS, BATCH, ROUNDS, COMPONENTS, MORE = 10, 8, 3, 4, 2  # rounds of poses; K tried after the best

# An H100 SXM, published: dense bf16 989 TFLOP/s, 3.35 TB/s, NVLink 450 GB/s each way; NDR InfiniBand 50 GB/s a GPU.
PEAK, BANDWIDTH, NVLINK, FABRIC = 989e12, 3.35e12, 450e9, 50e9
EFFICIENCY = (0.03, 0.08, 0.20)  # of PEAK in 3-D convolutions: worst, taken, best
REACHED = 0.6  # of the bandwidths, by operators one after the other and by exchanges
LAUNCH = 5e-6  # seconds of an operator, however small
DISK, CORES, HOST = 5e9, 16, 2e12  # bytes per second and node; cores to each GPU; memory of a node of 8 GPUs
NODE = 8


@dataclass(frozen=True)
class Sizes:
    """A configuration; the mask reaches 0.4 of the box, as that of the demo does."""

    box: int
    working_box: int
    templateres: int
    width: float

    @property
    def crop(self) -> int:
        return 2 * math.ceil(0.4 * self.working_box)

    @property
    def grid(self) -> Grid:
        return Grid(self.box, 5.0, self.working_box, self.crop, self.templateres)


def halved(box: int, width: float) -> Sizes:
    """The default resolution."""
    return Sizes(box, box // 2, template_size(2 * math.ceil(0.2 * box)), width)


def full(box: int) -> Sizes:
    """Every voxel, and OPUS-TOMO's widths."""
    return Sizes(box, box, OPUS[box], 1.0)


# ------------------------------------------------------------------------------------------------ counting


class Traffic(TorchDispatchMode):
    """Operators, and bytes in and out of them: convolutions (without their weights), and all others."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights, self.convolutions, self.others, self.operators = weights, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        self.operators += 1
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        moved = sum(t.nbytes for t in tensors if t.data_ptr() not in self.weights)
        if "convolution" in str(func):
            self.convolutions += moved
        else:
            self.others += moved
        return out


@dataclass(frozen=True)
class Count:
    """Of one step of a batch: FLOP, bytes of convolutions and of other operators, bytes kept, operators, parameters."""

    flop: float
    convolutions: float
    others: float
    kept: float
    operators: float
    parameters: float


def count(sizes: Sizes, batch: int) -> Count:
    row = Row("", sizes.working_box, sizes.crop, sizes.templateres, sizes.width, batch, COMPONENTS)
    network, context = prepare(row)
    step, _ = step_and_bare(row, network, context)
    own = {p.data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    constants = {t.untyped_storage().data_ptr() for t in network.buffers()}
    for value in (context.linear, context.pose.bands, context.pose.modes, context.pose.products, context.precision):
        constants.add(value.untyped_storage().data_ptr())
    traffic = Traffic(own)
    with FlopCounterMode(display=False) as flop, saved_tensors_hooks(keep, lambda t: t), traffic:
        step(0)
    bytes_kept = sum(size for key, size in kept.items() if key not in own | constants)
    parameters = sum(p.numel() for p in network.parameters())
    counted = flop.get_total_flops()
    return Count(counted, traffic.convolutions, traffic.others, bytes_kept, traffic.operators, parameters)


@dataclass(frozen=True)
class Cost:
    """``particle``: what a further particle of a batch adds; ``step``: the rest, once a step."""

    sizes: Sizes
    particle: Count
    step: Count


def cost(sizes: Sizes) -> Cost:
    one, two = count(sizes, 1), count(sizes, 2)
    names = Count.__dataclass_fields__
    further = Count(**{n: getattr(two, n) - getattr(one, n) for n in names})
    rest = {n: max(0.0, getattr(one, n) - getattr(further, n)) for n in names}
    return Cost(sizes, further, Count(**rest))


def cost_table(costs: list[Cost]) -> str:
    rows = []
    for c in costs:
        s, p = c.sizes, c.particle
        estimate = memory.network(s.grid, COMPONENTS, s.width, 0, half=False)
        rows.append([
            f"{s.box}", f"{s.working_box}", f"{s.templateres}", f"{s.width:g}", f"{c.step.parameters / 1e6:.1f}",
            f"{p.flop / 1e9:.2f}", f"{p.convolutions / 1e6:.0f}", f"{p.others / 1e6:.0f}", f"{c.step.operators:.0f}",
            f"{p.kept / 1e6:.0f}", f"{(estimate.rest + estimate.decoder) / 1e6:.0f}",
            f"{4 * c.step.parameters / 1e6:.0f}", f"{row_bytes(s.grid) / 1e6:.2f}",
        ])  # fmt: skip
    titles = [
        "box", "working box", "template", "width", "parameters, million", "GFLOP", "MB through convolutions",
        "MB through other operators", "operators a step", "MB kept (measured)", "MB with gradients, estimated",
        "all-reduce, MB", "cache, MB",
    ]  # fmt: skip
    return markdown(titles, rows)


# ------------------------------------------------------------------------------------------------ measuring


def seconds(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Wall and CPU seconds, the least of ``repeats`` after one that is not counted: what others do only adds."""
    function()
    found = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(w for w, _ in found), min(c for _, c in found)


def speed_table(counted: list[Cost]) -> str:
    """FLOP per second of a whole step on this machine."""
    rows = []
    for c in counted:
        s, batch = c.sizes, 8 if c.sizes.templateres < 128 else 2
        row = Row("", s.working_box, s.crop, s.templateres, s.width, batch, COMPONENTS)
        step, _ = step_and_bare(row, *prepare(row))
        line = [f"{s.working_box}", f"{s.templateres}", f"{s.width:g}"]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            wall, cpu = seconds(partial(step, 0), 9 if batch == 8 else 3)
            flop = batch * c.particle.flop / 1e9
            line += [f"{cpu / batch * 1e3:.1f}", f"{flop / cpu:.0f}"] if threads == 1 else []
            line.append(f"{flop / wall:.0f}")
        torch.set_num_threads(1)
        rows.append(line)
    titles = ["CPU-ms per particle", "GFLOP per CPU-s", "GFLOP/s, 1 thread", "GFLOP/s, 2 threads"]
    return markdown(["working box", "template", "width", *titles], rows)


def decode_rate() -> float:
    """CPU-seconds of a volume of 160^3 at width 1."""
    decoder = Decoder(12, 160, 1.0)
    with torch.no_grad():
        _, cpu = seconds(lambda: decoder(torch.randn(4, 12)), 3)
    return cpu / 4


def pass_flop(grid: Grid, components: int) -> float:
    """FLOP of a pass of the linear stage over one row: products with q volumes, and with their q (q + 1) / 2 pairs."""
    q = 1 + components + POSE
    return 2.0 * grid.crop**3 * q + len(band_frequencies(grid.working_box)) * q * (q + 1)


def em_passes(best: int) -> list[tuple[int, int]]:
    """(K, passes over all rows) of one choice of K, which goes on for MORE values after the best."""
    passes = [(0, 1 + 3 * 2 * EM_STEPS)]  # the average; a step reads every row three times
    for k in range(1, min(best + MORE, MAX_COMPONENTS) + 1):
        passes += [(k - 1 + 4, 3 * EM_STEPS // 2), (k, 3 * EM_STEPS)]
    return passes


def stage_passes(best: int) -> list[tuple[int, int]]:
    """Over the particles that are fitted: two choices of K, and EM steps after each round of poses."""
    return [*em_passes(best), (best, ROUNDS * 3 * EM_STEPS), *em_passes(best)]


PASSES_OF_ALL = 2 * ROUNDS + 20  # posteriors and pose errors of each round, last EM steps, codes


class Counted(MemoryRows):
    """Rows that count how often they are read."""

    reads = 0

    def numerator(self, index: torch.Tensor) -> torch.Tensor:
        """(b, C, C, C)."""
        self.reads += len(index)
        return super().numerator(index)


def passes_counted() -> tuple[int, int]:
    """Reads of a row in a choice of K that ends at 2: counted, and by ``em_passes``."""
    grid, particles = Grid(16, 5.0, 16, 16, 16), 24
    mask = spherical_mask(16, 6.0, 2.0)
    rows = Counted(torch.randn(particles, 16, 16, 16), torch.rand(particles, len(band_frequencies(16))))
    every = torch.arange(particles)
    choose_components(rows, every, every[:1], grid, mask, 2, EM_STEPS, 0, exactly=True)
    return rows.reads // particles, sum(passes for _, passes in em_passes(2 - MORE))


def linear_speed(sizes: Sizes) -> tuple[float, float]:
    """GFLOP per CPU-second of a pass over rows as a cache holds them (float16), and its bytes per CPU-second."""
    grid, particles = sizes.grid, 64
    band = len(band_frequencies(grid.working_box))
    noise = Noise(torch.ones(band), 1.0, False, torch.ones(grid.working_box // 2 + 1))
    shapes = (grid.crop**3, np.float16), (band, np.float16), (2, np.float32), (2, np.uint32)
    arrays = [np.zeros((particles, width), kind) for width, kind in shapes]
    rows = Cache(Path(), grid, noise, "", Stored(*arrays), torch.zeros(particles, 6))
    for i in range(particles):
        rows.write(i, torch.randn((grid.crop,) * 3), torch.rand(band))
    mean, components = torch.randn((grid.crop,) * 3), torch.randn(COMPONENTS, *(grid.crop,) * 3)
    model = LinearModel(mean, components, torch.ones(2), torch.ones(2))
    every, volumes = torch.arange(particles), columns(model, grid)
    post = infer(model, rows, every, grid)
    _, first = seconds(lambda: statistics(volumes, rows, every, grid), 5)
    _, second = seconds(lambda: accumulate(rows, every, grid, post), 5)
    spent = (2 * first + second) / 3  # of a step's three passes one is ``accumulate``
    return particles * pass_flop(grid, COMPONENTS) / spent / 1e9, particles * row_bytes(grid) / spent / 1e9


def row_law(page: str) -> tuple[float, float]:
    """CPU-seconds of a row are ``a M^b``: least squares in logarithms on the table of benchmarks/scale.py."""
    found = re.search(r"\| box \| particles \| MB per row \| CPU-ms per row .*\n\|[-| ]+\n((?:\|.*\n)+)", page)
    assert found is not None, "no table of rows on the page: run benchmarks/scale.py --markdown first"
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in found[1].splitlines()]
    x = torch.tensor([[1.0, math.log(float(line[0]))] for line in cells], dtype=torch.float64)
    y = torch.tensor([math.log(float(line[3]) / 1e3) for line in cells], dtype=torch.float64)
    a, b = torch.linalg.lstsq(x, y[:, None]).solution[:, 0].tolist()
    return math.exp(a), b


# ------------------------------------------------------------------------------------------------ predicting


@dataclass(frozen=True)
class Here:
    """What was measured here: of rows, and of the linear stage (GFLOP and GB per CPU-second)."""

    row: tuple[float, float]
    flop: float
    read: float


def gpu_seconds(c: Cost, efficiency: float) -> dict[str, float]:
    """Seconds of a particle's step on a GPU, by what takes them; convolutions in bf16, half of what was counted."""
    reached, step, p = REACHED * BANDWIDTH, c.step, c.particle
    launches = LAUNCH * step.operators / BATCH
    work = {
        "convolutions": max(p.flop / (efficiency * PEAK), 0.5 * p.convolutions / reached),
        "memory bandwidth": (p.others + (step.others + step.convolutions) / BATCH) / reached,
    }
    # operators are queued while others run: only what exceeds the work is waited for
    return work | {"launches": max(0.0, launches - sum(work.values()))}


def predicted(c: Cost, here: Here, particles: int, gpus: int, efficiency: float) -> dict[str, float]:
    """Seconds of every part of a run.  All nodes make rows; the linear stage is fitted on the cores of one."""
    grid, nodes = c.sizes.grid, math.ceil(gpus / NODE)
    makers = min(nodes, math.ceil(particles / BLOCK))  # a node makes blocks of rows
    cores, row = CORES * min(gpus, NODE), float(row_bytes(grid))
    whole, seen = particles * row, particles * EPOCHS
    share = gpu_seconds(c, efficiency)
    steps = seen / (BATCH * gpus)
    link = (NVLINK if gpus <= NODE else FABRIC) * REACHED
    passes, some = stage_passes(COMPONENTS), min(particles, SAMPLE)
    flop = sum(count * pass_flop(grid, k) for k, count in passes) * some
    flop += PASSES_OF_ALL * pass_flop(grid, COMPONENTS) * particles
    fitted = sum(count for _, count in passes) * some * row
    reads, room = fitted + PASSES_OF_ALL * whole, 0.5 * HOST * min(gpus, NODE) / NODE
    # what fits in the node's memory is read once
    disk = whole if whole <= room else PASSES_OF_ALL * whole + (fitted if some * row > room else 0.0)
    disk /= DISK
    computed = max(flop / here.flop / 1e9, reads / here.read / 1e9) / cores
    times = {
        "rows": particles * (1 + ROUNDS) * here.row[0] * grid.working_box ** here.row[1] / (cores * makers),
        # one works while the other does: the slower one is what is waited for
        "linear stage": computed if computed >= disk else 0.0,
        "linear stage's reading": disk if disk > computed else 0.0,
        **{name: seen / gpus * value for name, value in share.items()},
        "all-reduce": steps * 2 * (gpus - 1) / gpus * 4 * c.step.parameters / link,
    }
    step = sum(times[n] for n in (*share, "all-reduce"))
    again = 0.0 if whole <= 0.5 * HOST * nodes * min(gpus, NODE) / NODE else seen * row / (DISK * nodes)
    return times | {"cache reading": max(0.0, again - step)}


def duration(value: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if value >= size:
            return f"{value / size:.2g} {unit}" if value < 99.5 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} s"


def prediction_table(costs: list[Cost], here: Here) -> str:
    rows = []
    for c in costs:
        grid = c.sizes.grid
        for particles in COUNTS:
            on_gpu = memory.network(grid, COMPONENTS, c.sizes.width, 0, half=True).step(BATCH, False)
            on_gpu += particles * 20.0 * (COMPONENTS + 1) ** 2
            host = memory.PROCESS + particles * memory.TABLE + memory.linear_stage(grid, MAX_COMPONENTS, particles)
            line = [f"{grid.box}", f"{particles:,}", f"{particles * row_bytes(grid) / 1e9:.0f}"]
            line += [f"{on_gpu / 1e9:.1f}", f"{host / 1e9:.1f}"]
            for gpus in GPUS:
                times = predicted(c, here, particles, gpus, EFFICIENCY[1])
                total, (worst, most) = sum(times.values()), max(times.items(), key=lambda item: item[1])
                network = total - times["rows"] - times["linear stage"] - times["linear stage's reading"]
                line.append(f"{duration(total)} ({duration(network)}); {worst} {most / total:.0%}")
            rows.append(line)
    each = [f"{n} GPU{'s' * (n > 1)}: all (network); bottleneck" for n in GPUS]
    return markdown(["box", "particles", "cache, GB", "GPU, GB", "host, GB", *each], rows)


def step_table(costs: list[Cost]) -> str:
    """Milliseconds of a particle's step on one H100 for the three efficiencies, and what bounds it."""
    rows = []
    for c in costs:
        parts = gpu_seconds(c, EFFICIENCY[1])
        totals = [sum(gpu_seconds(c, e).values()) * 1e3 for e in EFFICIENCY]
        exchange = 4e3 * c.step.parameters / BATCH / REACHED
        rows.append([
            f"{c.sizes.working_box}", f"{c.sizes.templateres}", *(f"{ms:.2f}" for ms in totals),
            max(parts, key=lambda name: parts[name]), f"{2 * 7 / 8 * exchange / NVLINK:.2f}",
            f"{2 * 63 / 64 * exchange / FABRIC:.2f}",
        ])  # fmt: skip
    titles = [f"ms at {e:.0%} of the peak" for e in EFFICIENCY]
    return markdown(["working box", "template", *titles, "most of it", "ms of all-reduce, 8 GPUs", "64 GPUs"], rows)


def main() -> None:
    """Count, measure, predict, and put the tables between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    page = Path(__file__).parents[1] / "docs" / "scaling.md"
    parser.add_argument("--rows", type=Path, default=page, help="page with the table of benchmarks/scale.py")
    parser.add_argument("--markdown", type=Path, help="page that receives the tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load, law = os.getloadavg()[0], row_law(options.rows.read_text())
    costs = {key: [cost(s) for s in sizes] for key, sizes in {
        "cpu": [halved(box, 0.25) for box in BOXES], "gpu": [halved(box, 1.0) for box in BOXES],
        "full": [full(box) for box in BOXES]}.items()}  # fmt: skip
    counted, formula = passes_counted()
    assert counted == formula, f"a choice of K reads every row {counted} times, not {formula}"
    speeds = {box: linear_speed(halved(box, 1.0)) for box in BOXES[:2]}
    here = Here(law, *(min(pair) for pair in zip(*speeds.values(), strict=True)))
    passes = sum(n for _, n in stage_passes(COMPONENTS))
    text = "\n\n".join([
        f"`python benchmarks/cost.py`, {os.cpu_count()} cores, one thread unless said, load {load:.1f} when it began, "
        f"torch {torch.__version__}. Per particle of a step with K = {COMPONENTS} and no encoder, float32:",
        cost_table([c for group in costs.values() for c in group]),
        "Reached here, the best of a few (CPU-seconds with one thread, the rest in wall time, which other jobs share):",
        speed_table([*costs["cpu"][:2], costs["gpu"][0], costs["full"][0]]),
        f"Decoding: {decode_rate():.2f} CPU-s for a volume of 160^3 at width 1 (the earlier program: 3.2).",
        f"The linear stage reads every row {passes + PASSES_OF_ALL} times with K = {COMPONENTS} (two choices of K of "
        f"{sum(n for _, n in em_passes(COMPONENTS))} passes, {ROUNDS} rounds of poses; those of a choice were "
        f"counted too), of more than {SAMPLE:,} particles {PASSES_OF_ALL} times those beyond. A pass takes "
        + "; ".join(f"at working box {box // 2} {f:.1f} GFLOP and {b:.2f} GB of rows per CPU-s"
                    for box, (f, b) in speeds.items())
        + f". A row takes {law[0]:.2g} M^{law[1]:.2f} CPU-s for a working box M, fitted to the table of rows above.",
        "**Predicted, nothing of it measured: a particle's step on an H100, and what the exchange of gradients adds** "
        f"to it, batches of {BATCH} a GPU:",
        step_table(costs["gpu"] + costs["full"]),
        f"**Predicted: a run of {EPOCHS} epochs at the default resolution (`--downfrac 0.5`, width 1)**:",
        prediction_table(costs["gpu"], here),
        "**Predicted: the same at full resolution with OPUS-TOMO's widths and templates of 128, 160 and 192**:",
        prediction_table(costs["full"], here),
    ])  # fmt: skip
    print(text)
    if options.markdown:
        put(options.markdown, text, MARKS)


if __name__ == "__main__":
    main()
