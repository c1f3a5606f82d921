"""Whether a run fits in memory, before it starts: the estimate, the batch that fits, and what to lower.

Owns: the cost model of the host's memory and of the device's.  What a network keeps for its backward pass is counted
from its layers, without any data; the rest follows from the sizes of the grid.  docs/scaling.md has what was measured.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import nn

from opustomo.data.cache import HELD_SHARE, free_memory, row_bytes
from opustomo.errors import UserError
from opustomo.linear import POSE
from opustomo.model.decoder import Decoder
from opustomo.model.encoder import Encoder
from opustomo.physics.grid import Grid
from opustomo.reconstruct import batch_size

log = logging.getLogger("opustomo")

PROCESS = 0.4e9  # Python with its libraries
TABLE = 14e3  # a particle's row of the STAR file, paths, poses and some 40 tilts
TOLERANCE = 1.5  # estimates above the free memory by more than this are refused, by less warned of


@dataclass(frozen=True)
class Network:
    """Bytes of a network: of its parameters with gradients and AdamW's state, and for each particle of a batch.

    decoder: what its layers on large grids keep for the backward pass, unless they are computed again there; output:
    what that adds; rest: all else.
    """

    state: float
    decoder: float
    rest: float
    output: float = 0.0

    def step(self, batch: int, recomputed: bool) -> float:
        """Bytes of a training step.  Recomputed: those layers for one particle at a time."""
        decoder = self.decoder + batch * self.output if recomputed else batch * self.decoder
        return self.state + batch * self.rest + decoder


def network(grid: Grid, components: int, width: float, encoderres: int, *, half: bool) -> Network:
    """Cost of a network on ``grid``; half: its convolutions run at half precision."""
    with torch.device("meta"):  # sizes without numbers
        decoder = Decoder(components, grid.templateres, width)
        encoder = Encoder(components, width, encoderres) if encoderres else None
    parameters, encoded = _size(decoder), 0.0
    if encoder is not None:
        parameters += _size(encoder)
        encoded = 4.0 * _kept_by_encoder(encoder, grid.crop)
    small, large = (4.0 * count for count in _kept_by_decoder(decoder))
    band = grid.working_box**3  # a transform of the working box is as many numbers
    # pose modes and components, on the band and in space
    constants = (36.0 + 2.1 * components) * band + 4.0 * (components + 2 * POSE) * grid.crop**3
    likelihood = 4.0 * (7 * band + 4 * grid.templateres**3 + 3 * grid.crop**3)
    factor = 0.5 if half else 1.0
    # the gradients of the largest layer add about half of what is kept
    rest = likelihood + 1.5 * factor * (encoded + small)
    return Network(16.0 * parameters + constants, 1.5 * factor * large, rest, 8.0 * grid.templateres**3)


def linear_stage(grid: Grid, components: int, particles: int) -> float:
    """Bytes of the linear stage: normal equations at every voxel of the band, and the posteriors of all particles."""
    columns, free = components + 1 + POSE, components + 1
    voxels = math.pi / 12.0 * grid.working_box**3
    equations = voxels * 4.0 * (2 * columns**2 + 7 * free**2) + 40.0 * free * grid.working_box**3
    return equations + particles * 32.0 * columns**2


def _rows(grid: Grid, particles: int, free: float) -> float:
    """Bytes of the rows in memory: a batch of the linear stage in three copies, and a small set as a whole."""
    every = 2.0 * particles * row_bytes(grid)
    batch = 6.0 * min(batch_size(grid), particles) * row_bytes(grid)
    return batch + (every if every <= HELD_SHARE * free else 0.0)


def _kept_by_decoder(decoder: Decoder) -> tuple[int, int]:
    """Numbers that the backward pass needs of one particle: what enters and what leaves every non-linearity.

    Those of the layers on small grids, and of those on large ones, which can be recomputed.
    """
    count, edge = 2 * (decoder.first.out_features + decoder.second.out_features), decoder.grid
    for layer in decoder.trunk:
        edge *= 2
        count += 2 * _channels(layer)[1] * edge**3
    edge, large = decoder.resized, 0
    count += _channels(decoder.rise[0])[0] * edge**3
    for layer in decoder.rise[:-1]:
        edge *= 2
        large += 2 * _channels(layer)[1] * edge**3
    return count, large


def _kept_by_encoder(encoder: Encoder, crop: int) -> int:
    """The same of an encoder that sees a volume of edge ``crop``."""
    count, edge = crop**3, crop
    for layer in encoder.stem:
        edge //= 2
        count += 2 * _channels(layer)[1] * edge**3
    edge = encoder.encoderres
    count += _channels(encoder.stem[-1])[1] * edge**3
    for layer in encoder.body:
        edge //= 2
        count += 2 * _channels(layer)[1] * edge**3
    return count


def _channels(layer: nn.Module) -> tuple[int, int]:
    assert isinstance(layer, nn.Conv3d | nn.ConvTranspose3d)
    return layer.in_channels, layer.out_channels


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Fit:
    """The batch to train with, and whether the decoder is computed again in the backward pass."""

    batch: int
    recomputed: bool


def choose(cost: Network, batch: int, before: float, free: float, *, adjustable: bool, where: str, mend: str) -> Fit:
    """What fits: the batch as it is, else with the decoder recomputed, else (adjustable) the largest half of it.

    before: bytes that are taken besides the step; free: bytes that are there; where: "memory" or the GPU's name; mend:
    options that make the run smaller.  Raises UserError where not even that fits, naming what to lower.
    """
    sizes = [batch]
    while adjustable and sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    for size in sizes:
        for recomputed in (False, True):
            if before + cost.step(size, recomputed) <= free:
                return Fit(size, recomputed)
    least = before + cost.step(sizes[-1], True)
    message = f"about {least / 1e9:.1f} GB of {where} are needed with -b {sizes[-1]} and {free / 1e9:.1f} GB are free; "
    if least > TOLERANCE * free:
        smaller = sizes[-1] > 1 and before + cost.step(1, True) <= TOLERANCE * free
        raise UserError(message + (f"lower -b, or {mend}" if smaller else mend))
    log.warning("%sif it runs out, %s", message, mend)
    return Fit(sizes[-1], True)


def plan(
    grid: Grid, components: int, width: float, encoderres: int, batch: int, particles: int, device: torch.device,
    *, adjustable: bool,
) -> Fit:  # fmt: skip
    """Estimate a training run and fit its batch to the memory that is free, with a line of the log.

    components: those at most; batch: particles per step; adjustable: the batch was not asked for.  Raises UserError if
    the run does not fit.
    """
    cuda = device.type == "cuda"
    cost = network(grid, components, width, encoderres, half=cuda)
    free = free_memory()
    table, linear = (
        PROCESS + particles * TABLE + _rows(grid, particles, free),
        linear_stage(grid, components, particles),
    )
    mend = f"lower --downfrac, --templateres (now {grid.templateres}) or --zdim, or give a tighter mask"
    taken = PROCESS * 0.5  # the process is there already
    if table + linear - taken > TOLERANCE * free:
        raise UserError(
            f"the linear stage needs about {(table + linear) / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; "
            "lower --downfrac or --zdim, give a tighter mask, or use a machine with more memory"
        )
    known = table + particles * 32.0 * (components + 1) ** 2
    if cuda:
        there, total = torch.cuda.mem_get_info(device)
        name = f"the memory of {torch.cuda.get_device_name(device)} ({total / 1e9:.0f} GB)"
        codes = particles * 20.0 * (components + 1) ** 2
        fit = choose(cost, batch, codes, there, adjustable=adjustable, where=name, mend=mend)
        host = table + linear
    else:
        fit = choose(cost, batch, known - taken, free, adjustable=adjustable, where="memory", mend=mend)
        host = max(table + linear, known + cost.step(fit.batch, fit.recomputed))
    log.info(
        "memory: about %.1f GB of %.1f GB free%s%s", host / 1e9, free / 1e9,
        f"; on the GPU {cost.step(fit.batch, fit.recomputed) / 1e9:.1f} GB" if cuda else "",
        "; to save memory the decoder is computed again in the backward pass" if fit.recomputed else "",
    )  # fmt: skip
    if fit.batch < batch:
        log.info("-b %d: the largest that fits, in place of %d", fit.batch, batch)
    return fit
