"""The first steps of training, taken apart: accumulation, a loss that is not finite, and that it learns at all."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opustomo import cli
from opustomo import train as training
from opustomo.config import TrainConfig
from opustomo.interruption import Asked
from opustomo.mixture import CodePosterior, Luck, Statistics, draw
from opustomo.model.vae import Vae
from opustomo.objective import magnitude, total_variation
from opustomo.training.context import Context
from opustomo.training.guard import RanAway, Watch
from opustomo.training.keeping import Learner
from small_set import (
    EPOCHS,
    PARTICLES,
    MemoryRows,
    SmallSet,
    given_cache,
    hurry,
    learner_of,
    tensors,
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

    def bank(self) -> torch.Tensor:
        return torch.zeros(PARTICLES, len(self.untrained.components))


class Ready(Exception):
    """Raised in place of the first step."""


@pytest.fixture(scope="module")
def prepared(small_set: SmallSet, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Everything that stands before the first step."""
    made: list[Prepared] = []

    def stop(config: TrainConfig, context: Context, learner: Learner, train: torch.Tensor, *_: Any) -> None:
        made.append(Prepared(config, learner.model, context, train))
        raise Ready

    line = train_line(small_set, tmp_path_factory.mktemp("prepared") / "run", "--cache", str(given_cache(finished_run)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        monkeypatch.setattr(training, "train_epoch", stop)
        with pytest.raises(Ready):
            training.main(*cli.parse_verb(line))
    return made[0]


def most_likely(posterior: CodePosterior, luck: object) -> torch.Tensor:
    """In place of ``CodePosterior.sample``: no chance."""
    return posterior.mean[torch.arange(len(posterior.mean)), posterior.share.argmax(1)]


def luck(prepared: Prepared, count: int, seed: int = 0) -> Luck:
    return draw(prepared.context.mixture, count, torch.Generator().manual_seed(seed))


def test_accumulated_steps_are_one_larger_batch(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of six, and two of an epoch that ends before the group of three is full."""
    monkeypatch.setattr(CodePosterior, "sample", most_likely)
    monkeypatch.setattr(training, "learning_rate", lambda peak, progress: 1e-2)
    monkeypatch.setattr(training, "beta_weight", lambda schedule, progress: 1.0)
    halves = [prepared.train[:6], prepared.train[6:12]]
    moved = []
    for lot, batches in ((1, [torch.cat(halves)]), (2, halves), (3, halves)):
        monkeypatch.setattr(training, "batch_order", lambda *args, made=batches: made)
        model = prepared.model()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        config = dataclasses.replace(prepared.config, accum_step=lot, log_interval=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        metrics = training.Metrics(config.output / "metrics.csv")
        bank = prepared.bank()
        training.train_epoch(
            config, prepared.context, learner_of(model, optimizer, bank, 0), prepared.train[:12], metrics
        )
        moved.append({k: v - before[k] for k, v in model.state_dict().items()})
    largest = max(float(v.abs().max()) for v in moved[0].values())
    assert largest > 0
    for other in moved[1:]:
        for name, value in moved[0].items():
            assert torch.allclose(value, other[name], atol=1e-3 * largest), name


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_stored_codes_are_those_of_the_stored_weights(prepared: Prepared, finished_run: Path, epoch: int) -> None:
    """Every particle, held-out ones too: no running average and nothing left over from an earlier epoch."""
    model = prepared.model()
    model.load_state_dict(tensors(finished_run / f"weights.{epoch}.pkl")["model"])
    stored, used = tensors(finished_run / f"z.{epoch}.pkl"), len(model.components)
    found = training.encode_all(model, prepared.context, stored["mu"].shape[1])
    for values, name in zip(found, ("mu", "sigma"), strict=True):
        assert torch.allclose(values, stored[name], atol=1e-6)
    others = tensors(finished_run / f"z.{(epoch + 1) % EPOCHS}.pkl")
    assert float((stored["mu"] - others["mu"])[:, :used].abs().max()) > 1e-5


# ------------------------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("bfactor", [0.0, 4.0])
def test_untrained_bound_is_the_evidence_under_the_mixture(prepared: Prepared, bfactor: float) -> None:
    """Exactly, not on average: whatever is drawn, the network's bound is what the linear stage knows."""
    index = torch.arange(40)
    scores = training.evaluate(prepared.model(), prepared.context, index, bfactor, 0)
    exact = training.known(prepared.context, index).evidence
    assert float(exact.std()) > 5
    assert scores["val_elbo"] == pytest.approx(float(exact.mean()), abs=2e-3)
    assert scores["val_nll"] + scores["val_kl"] == pytest.approx(-scores["val_elbo"], abs=1e-6)
    assert scores["val_kl"] > 0.5


def test_every_sample_of_the_untrained_bound_is_the_evidence(prepared: Prepared) -> None:
    """And the gradient of the encoder has no noise there: it is zero, that of the decoder is not."""
    model, index = prepared.model(), prepared.train[:8]
    exact = training.known(prepared.context, index).evidence.float()
    losses = []
    for seed in range(3):
        step = training.train_step(model, prepared.context, index, None, luck(prepared, 8, seed))
        assert torch.allclose(-step.nll - step.kl, exact, atol=0.02)
        losses.append(step.nll.detach())
    assert float((losses[0] - losses[1]).abs().mean()) > 0.05  # other samples, other codes
    (step.nll + step.kl).mean().backward()
    assert model.encoder is not None
    encoder, decoder = model.encoder.head.bias.grad, model.decoder.rise[-1].bias.grad
    assert isinstance(encoder, torch.Tensor) and isinstance(decoder, torch.Tensor)
    assert float(encoder.abs().max()) < 5e-3
    assert float(decoder.abs().max()) > 20 * float(encoder.abs().max())


def test_moved_posterior_has_a_lower_bound(prepared: Prepared) -> None:
    """Any other posterior than the exact one loses its divergence from it: 1/2 shift^2 in units of its width."""
    model, index = prepared.model(), torch.arange(40)
    start = training.evaluate(model, prepared.context, index, 0.0, 0)["val_elbo"]
    spread = training.known(prepared.context, index).spread()
    k = spread.shape[1]
    assert model.encoder is not None
    losses = []
    for push in (0.5, 1.0):
        with torch.no_grad():
            model.encoder.head.bias[:k] = push * spread.mean(0).float()
        losses.append(start - training.evaluate(model, prepared.context, index, 0.0, 0)["val_elbo"])
    assert losses[0] == pytest.approx(k * 0.5 * 0.25, rel=0.5)
    assert losses[1] == pytest.approx(4 * losses[0], rel=0.35)


def test_loss_that_is_not_finite_names_the_particle(prepared: Prepared) -> None:
    rows = prepared.context.rows
    everything = torch.arange(PARTICLES)
    damaged = MemoryRows(rows.numerator(everything), rows.weight(everything), rows.moved)
    bad = int(prepared.train[5])
    damaged.numerators[bad] = math.nan
    context = dataclasses.replace(prepared.context, rows=damaged)
    model, bank = prepared.model(), prepared.bank()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    metrics = training.Metrics(prepared.config.output / "metrics.csv")
    watch = Watch(Asked(), 0.0, lambda: None, 100.0, "")
    with pytest.raises(RanAway, match=rf"not finite for particle row\(s\) {bad + 1}$"):
        learner = learner_of(model, optimizer, bank, 0)
        training.train_epoch(prepared.config, context, learner, prepared.train, metrics, watch)


def test_training_improves_the_bound_of_the_particles_it_sees(prepared: Prepared) -> None:
    """Forty steps on twelve particles: the network can learn at all, beyond the linear stage it starts from."""
    model, index = prepared.model(), prepared.train[:12]
    config = dataclasses.replace(prepared.config, epochs=20, lr=2e-3, beta="constant")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    metrics, bank = (
        training.Metrics(config.output / "metrics.csv"),
        torch.zeros(PARTICLES, prepared.untrained.components.shape[0]),
    )
    before = training.evaluate(model, prepared.context, index, 0.0, 0)["val_elbo"]
    for epoch in range(config.epochs):
        training.train_epoch(config, prepared.context, learner_of(model, optimizer, bank, epoch), index, metrics)
    after = training.evaluate(model, prepared.context, index, 0.0, 0)["val_elbo"]
    assert after > before + 0.3, (before, after)


def added_by_training(prepared: Prepared, **options: float) -> tuple[torch.Tensor, list[float]]:
    """What the decoder adds to twelve particles after eight epochs, in units of the components', and the losses."""
    model, index = prepared.model(), prepared.train[:12]
    config = dataclasses.replace(prepared.config, lr=2e-3, beta="constant", log_interval=8, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    seen: list[float] = []
    metrics: Any = SimpleNamespace(append=lambda **row: seen.append(row["loss"]))
    for epoch in range(8):
        training.train_epoch(
            config, prepared.context, learner_of(model, optimizer, prepared.bank(), epoch), index, metrics
        )
    code = training.known(prepared.context, index).centre().float()
    with torch.no_grad():
        return model.nonlinear(code) / model.scale[0], seen


def test_regularisers_act(prepared: Prepared) -> None:
    """At the same seed TV leaves a smoother addition and L1 a smaller one; weights of 0 are the loss without them."""
    plain, losses = added_by_training(prepared, prior=0.0)
    assert added_by_training(prepared, prior=0.0, tv=0.0, l1=0.0)[1] == losses
    smooth, small = (added_by_training(prepared, prior=0.0, **{name: 0.02})[0] for name in ("tv", "l1"))
    assert float(total_variation(smooth).sum()) < 0.8 * float(total_variation(plain).sum())
    assert float(magnitude(small).sum()) < 0.8 * float(magnitude(plain).sum())


def test_prior_on_the_codes_of_particles_that_say_nothing_is_off(prepared: Prepared) -> None:
    """A particle without data has the prior's code; the others of this set are nearly exact."""
    rows, everything = prepared.context.rows, torch.arange(PARTICLES)
    step = training.train_step(prepared.model(), prepared.context, prepared.train[:8], None, luck(prepared, 8))
    assert float(step.resolved.min()) > 0.9
    silent = MemoryRows(0 * rows.numerator(everything), 0 * rows.weight(everything), rows.moved)
    nothing = Statistics(*(0 * getattr(prepared.context.statistics, name) for name in ("constant", "first", "second")))
    context = dataclasses.replace(prepared.context, rows=silent, statistics=nothing)
    step = training.train_step(prepared.model(), context, prepared.train[:8], None, luck(prepared, 8))
    assert float(step.resolved.max()) < 1e-3
    config = dataclasses.replace(prepared.config, lamb=1.0)
    others = torch.ones(20, step.code.shape[1])
    assert float(training.penalties(config, step, others, 12)[2].detach().max()) < 0.01
