"""The first steps of training, taken apart: accumulation, a loss that is not finite, and that it learns at all."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from opustomo import cli
from opustomo import train as training
from opustomo.config import TrainConfig
from opustomo.errors import UserError
from opustomo.model.vae import Vae
from opustomo.start import Context
from small_set import (
    PARTICLES,
    MemoryRows,
    SmallSet,
    hurry,
    train_line,
)


@dataclasses.dataclass
class Prepared:
    config: TrainConfig
    untrained: Vae
    context: Context
    train: torch.Tensor

    def model(self) -> Vae:
        return copy.deepcopy(self.untrained)


class Ready(Exception):
    """Raised in place of the first step."""


@pytest.fixture(scope="module")
def prepared(small_set: SmallSet, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Everything that stands before the first step, its latent stage untrained."""
    made: list[Prepared] = []

    def stop(
        config: TrainConfig, model: Vae, context: Context, optimizer: object, train: torch.Tensor, *_: Any
    ) -> None:
        made.append(Prepared(config, model, context, train))
        raise Ready

    line = train_line(small_set, tmp_path_factory.mktemp("prepared") / "run", "--cache", f"{finished_run}/cache")
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch, latent_steps=0)
        monkeypatch.setattr(training, "train_epoch", stop)
        with pytest.raises(Ready):
            training.main(*cli.parse_verb(line))
    return made[0]


def test_accumulated_steps_are_one_larger_batch(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda shape, generator=None: torch.zeros(shape))
    monkeypatch.setattr(training, "learning_rate", lambda peak, progress: 1e-2)
    monkeypatch.setattr(training, "beta_weight", lambda schedule, progress: 1.0)
    halves = [prepared.train[:6], prepared.train[6:12]]
    moved = []
    for lot, batches in ((1, [torch.cat(halves)]), (2, halves)):
        monkeypatch.setattr(training, "batch_order", lambda *args, made=batches: made)
        model = prepared.model()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        config = dataclasses.replace(prepared.config, accum_step=lot, log_interval=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        metrics = training.Metrics(config.output / "metrics.csv")
        bank = torch.zeros(PARTICLES, config.zdim)
        training.train_epoch(config, model, prepared.context, optimizer, prepared.train[:12], bank, 0, metrics)
        moved.append({k: v - before[k] for k, v in model.state_dict().items()})
    largest = max(float(v.abs().max()) for v in moved[0].values())
    assert largest > 0
    for name, value in moved[0].items():
        assert torch.allclose(value, moved[1][name], atol=1e-3 * largest), name


def test_loss_that_is_not_finite_names_the_particle(prepared: Prepared) -> None:
    rows = prepared.context.rows
    everything = torch.arange(PARTICLES)
    damaged = MemoryRows(rows.numerator(everything), rows.weight(everything))
    bad = int(prepared.train[5])
    damaged.numerators[bad] = math.nan
    context = dataclasses.replace(prepared.context, rows=damaged)
    model, bank = prepared.model(), torch.zeros(PARTICLES, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    metrics = training.Metrics(prepared.config.output / "metrics.csv")
    with pytest.raises(UserError, match=rf"not finite for particle row\(s\) {bad + 1};"):
        training.train_epoch(prepared.config, model, context, optimizer, prepared.train, bank, 0, metrics)


def test_training_improves_the_bound_of_the_particles_it_sees(prepared: Prepared) -> None:
    """Forty steps on twelve particles: the network can learn at all, beyond the linear stage it starts from."""
    model, index = prepared.model(), prepared.train[:12]
    config = dataclasses.replace(prepared.config, epochs=20, lr=2e-3, beta="constant")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    metrics, bank = training.Metrics(config.output / "metrics.csv"), torch.zeros(PARTICLES, 2)
    before = training.evaluate(model, prepared.context, index, 0.0, 0)["val_elbo"]
    for epoch in range(config.epochs):
        training.train_epoch(config, model, prepared.context, optimizer, index, bank, epoch, metrics)
    after = training.evaluate(model, prepared.context, index, 0.0, 0)["val_elbo"]
    assert after > before + 0.3, (before, after)
