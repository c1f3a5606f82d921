"""A training step on a device that is not the CPU.

There is no GPU where these tests run.  Tensors on "meta" have shapes but no values: they refuse to meet a tensor of
the CPU in one operation, as a GPU's do, and whatever would have to wait for a value (item, nonzero, a copy to the
host) is an error there, where on a GPU it would stop the queue at every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from opustomo import config, mixture, train
from opustomo.model.vae import Vae
from opustomo.physics import fourier
from opustomo.training import context
from opustomo.training.context import Context

META = torch.device("meta")


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables that are made once for each device come from the CPU; autocast and bf16 know no such device."""
    once, cast = fourier._band_index, torch.autocast
    monkeypatch.setattr(fourier, "_band_index", lambda size, device: once(size, "cpu").to(device))
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *rest, **more: contextlib.nullcontext() if kind == "meta" else cast(kind, *rest, **more),
    )
    monkeypatch.setattr(context, "_autocast", lambda device: False)
    yield
    for made in (fourier._frequencies, fourier._band_frequencies, fourier._band_multiplicity, fourier._band_shell):
        made.cache_clear()


class Moved(NamedTuple):
    """What a step needs, moved as ``train`` moves it; luck is drawn on the CPU there, too."""

    network: Vae
    context: Context
    luck: mixture.Luck


def moved(benchmark: ModuleType, encoderres: int) -> Moved:
    """A small network on random data."""
    row = benchmark.Row("", 16, 14, 16, 0.25, 4, components=2, encoderres=encoderres)
    network, context = benchmark.prepare(row)
    luck = mixture.draw(context.mixture, 4, torch.Generator().manual_seed(0))
    return Moved(network.to(META), context.to(META), luck)


def whole_step(network: Vae, context: Context, luck: mixture.Luck) -> Tensor:
    """One step with every term of the loss; its loss."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    out = train.train_step(network, context, torch.arange(4), torch.ones_like(context.precision), luck)
    options = config.TrainConfig(Path("x.star"), Path("x"), lamb=0.5, tv=0.1, l1=0.1)
    added = train.penalties(options, out, torch.randn(6, 2, device=META), 16)
    loss: Tensor = (out.nll + out.kl + sum(added)).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return loss


@pytest.mark.parametrize("encoderres", [0, 4])
def test_a_step_stays_on_its_device_and_waits_for_no_value(
    encoderres: int, on_meta: None, step_benchmark: ModuleType
) -> None:
    step = moved(step_benchmark, encoderres)
    assert whole_step(*step).device == META
    assert all(p.device == META and p.grad is not None for p in step.network.parameters())


def a_value(out: train.Step) -> Any:
    return float(out.nll.sum())


def a_choice(out: train.Step) -> Any:
    return out.nll[out.nll > 0]


def a_tensor_of_the_cpu(out: train.Step) -> Any:
    return out.nll + torch.ones(4)


@pytest.mark.parametrize("fault", [a_value, a_choice, a_tensor_of_the_cpu])
def test_what_would_wait_or_mix_devices_would_be_noticed(
    fault: Any, on_meta: None, step_benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, step = moved(step_benchmark, 0), train.train_step

    def faulty(*values: Any) -> train.Step:
        out = step(*values)
        fault(out)
        return out

    monkeypatch.setattr(train, "train_step", faulty)
    with pytest.raises((RuntimeError, NotImplementedError)):
        whole_step(*given)
