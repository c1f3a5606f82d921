"""What a training step costs beside its network: CPU-seconds of a step over those of bare decoder and optimiser.

    python benchmarks/step.py [--repeats 15]           (make bench-step)

Random data of the right sizes, no files.  Step and bare network alternate, so that a noisy machine hits both; medians.
"bare": decoder (and encoder, where the row has one) forwards, backwards and AdamW on random input.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from opustomo.linear import LinearModel
from opustomo.mixture import Mixture, Statistics, draw
from opustomo.model.vae import Vae
from opustomo.objective import PoseModes, on_the_band
from opustomo.physics.fourier import band_frequencies
from opustomo.physics.grid import Grid
from opustomo.physics.volume import spherical_mask
from opustomo.preparation import prepare_process
from opustomo.train import train_step
from opustomo.training.context import Context, linear_bands

AIM = 1.6  # a step over its bare network; tests/test_profiling.py fails at half above it
AIM_WITHOUT = 1.25  # where pose errors are not integrated out


@dataclass(frozen=True)
class Row:
    """A configuration; sizes in voxels."""

    title: str
    working_box: int
    crop: int
    templateres: int
    width: float
    batch: int
    components: int = 4
    encoderres: int = 0
    poses: bool = True  # pose errors integrated out, as training always does


ROWS = [
    Row("default on CPUs: working box 32, template 32, width 0.25", 32, 26, 32, 0.25, 8),
    Row("the same with an encoder", 32, 26, 32, 0.25, 8, encoderres=6),
    Row("64, template 64, width 0.25", 64, 50, 64, 0.25, 8),
    Row("OPUS-TOMO's widths: 64, template 128, width 1", 64, 60, 128, 1.0, 4),
    Row("the same with its encoder", 64, 60, 128, 1.0, 4, encoderres=12),
]


class MemoryRows:
    """Numerators (P, C, C, C) and weights (P, n) in memory."""

    def __init__(self, numerators: torch.Tensor, weights: torch.Tensor) -> None:
        self.numerators, self.weights = numerators, weights
        self.moved = torch.zeros(len(weights), 6)

    def __len__(self) -> int:
        return len(self.weights)

    def numerator(self, index: torch.Tensor) -> torch.Tensor:
        """(b, C, C, C)."""
        return self.numerators[index]

    def weight(self, index: torch.Tensor) -> torch.Tensor:
        """(b, n)."""
        return self.weights[index]


def prepare(row: Row) -> tuple[Vae, Context]:
    """A network and a context of 4 batches of random particles; the decoder's last layer is not zero any more."""
    torch.manual_seed(0)
    count, k, c = 4 * row.batch, row.components, row.crop
    band = len(band_frequencies(row.working_box))
    grid = Grid(row.working_box, 5.0, row.working_box, c, row.templateres)
    mask = spherical_mask(c, 0.4 * c, 2.0)
    volumes = torch.randn(1 + k + 6, c, c, c) * mask
    network = Vae(
        mask, volumes[0], volumes[1 : 1 + k], mask,
        templateres=row.templateres, width=row.width, encoderres=row.encoderres,
    )  # fmt: skip
    last = network.decoder.rise[-1].weight
    assert isinstance(last, torch.Tensor)
    torch.nn.init.normal_(last, std=0.01)
    curve = torch.ones(row.working_box // 2 + 1)
    model = LinearModel(volumes[0], volumes[1 : 1 + k], curve, curve, (1.0, 1.0), torch.ones(2, c, c, c))
    modes = on_the_band(volumes[1 + k :], row.working_box)
    if not row.poses:
        modes = PoseModes(*(values[:0] for values in vars(modes).values()))
    eye = torch.eye(1 + k, dtype=torch.float64)
    known = Statistics(torch.zeros(count).double(), torch.randn(count, 1 + k).double(), eye.expand(count, -1, -1))
    mixture = Mixture(
        torch.full((4,), 0.25, dtype=torch.float64), torch.randn(4, k).double(), eye[1:, 1:].expand(4, -1, -1)
    )
    return network, Context(
        rows=MemoryRows(torch.randn(count, c, c, c), torch.rand(count, band)),
        grid=grid,
        statistics=known,
        mixture=mixture,
        gain=torch.ones(count),
        pose_prior=torch.zeros(count, len(modes.modes)),
        linear=linear_bands(model, grid),
        pose=modes,
        precision=torch.ones(band),
        group=np.zeros(count, np.int64),
        device=torch.device("cpu"),
        autocast=False,
    )


def step_and_bare(row: Row, network: Vae, context: Context) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """A step of training, and one of the bare network, of batch number i."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(0)
    code, density = torch.randn(row.batch, row.components), torch.randn(row.batch, *(row.crop,) * 3)

    def step(i: int) -> None:
        index = torch.arange(row.batch) + row.batch * (i % 4)
        out = train_step(network, context, index, None, draw(context.mixture, row.batch, generator))
        (out.nll + out.kl + out.prior / 1000).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def bare(i: int) -> None:
        loss = network.decoder(code).square().mean()
        if network.encoder is not None:
            shift, scale = network.encoder(density, torch.cat([code, code], 1))
            loss = loss + shift.square().mean() + scale.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, bare


def measure(row: Row, repeats: int) -> tuple[float, float, float]:
    """CPU-seconds per particle of a step and of the bare network, and the median of their ratios."""
    prepare_process(1)  # as the programs do: one thread, freed memory kept
    step, bare = step_and_bare(row, *prepare(row))
    times: list[tuple[float, float]] = []
    for i in range(repeats + 2):
        start = time.process_time()
        step(i)
        between = time.process_time()
        bare(i)
        times.append((between - start, time.process_time() - between))
    kept = times[2:]  # the first ones fill caches
    ratio = statistics.median(a / b for a, b in kept)
    return statistics.median(a for a, _ in kept) / row.batch, statistics.median(b for _, b in kept) / row.batch, ratio


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))))
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, one thread, torch {torch.__version__}\n")
    print("| configuration | batch | step, CPU-s per particle | bare | ratio |\n|---|---|---|---|---|")
    for row in (ROWS[i] for i in options.rows):
        step, bare, ratio = measure(row, options.repeats)
        print(f"| {row.title} | {row.batch} | {step:.4f} | {bare:.4f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
