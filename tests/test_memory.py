"""The estimate of memory: what it counts, what is done when a run does not fit, and that the result stays the same."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from opustomo.data import cache
from opustomo.errors import UserError
from opustomo.model.decoder import Decoder
from opustomo.model.vae import Vae
from opustomo.physics.grid import Grid
from opustomo.training import memory
from opustomo.training.memory import Fit, choose, linear_stage, network, plan

GRID = Grid(64, 5.0, 32, 28, 32)
K = 3
CPU = torch.device("cpu")


def small_vae() -> Vae:
    torch.manual_seed(0)
    size, mask = GRID.crop, torch.ones((GRID.crop,) * 3)
    volumes = torch.randn(1 + K, size, size, size)
    vae = Vae(
        mask, volumes[0], volumes[1:], mask,
        templateres=GRID.templateres, width=0.25, encoderres=0,
    )  # fmt: skip
    for parameter in vae.parameters():  # the last layer starts at zero, which would hide everything
        torch.nn.init.normal_(parameter, std=0.1)
    return vae


def gradients(vae: Vae, code: torch.Tensor) -> tuple[torch.Tensor, int]:
    """All gradients of a loss as one vector, and the bytes that were kept for the backward pass."""
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    vae.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = vae.nonlinear(code).square().sum()
    own = {parameter.untyped_storage().data_ptr() for parameter in vae.parameters()}
    size = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in vae.parameters() if p.grad is not None]), size


def test_recomputing_the_decoder_gives_the_same_gradients_from_less_memory() -> None:
    vae, code = small_vae(), torch.randn(4, K)
    usual, most = gradients(vae, code)
    vae.decoder.recomputed = True
    saved, least = gradients(vae, code)
    assert float((saved - usual).abs().max()) < 1e-5 * float(usual.abs().max())
    assert float(usual.abs().max()) > 0
    assert least < 0.5 * most


def test_what_the_decoder_keeps_is_what_autograd_keeps() -> None:
    """Counted without data on the one hand, the storages of a real forward pass on the other."""
    decoder = Decoder(K, GRID.templateres, 0.25)
    own = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder(torch.randn(2, K))
    real = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    counted = 4 * sum(memory._kept_by_decoder(decoder))
    assert counted == pytest.approx(real / 2, rel=0.05)


def test_larger_sizes_cost_more() -> None:
    base = network(GRID, K, 0.25, 0, half=False)
    wide, seeing = network(GRID, K, 1.0, 0, half=False), network(GRID, K, 0.25, 6, half=False)
    half = network(GRID, K, 0.25, 0, half=True)
    assert wide.state > 4 * base.state and wide.decoder > 2 * base.decoder
    assert seeing.rest > base.rest and seeing.state > base.state
    assert half.decoder == base.decoder / 2 and half.state == base.state
    assert base.step(8, True) < base.step(8, False) < base.step(16, False)
    assert linear_stage(GRID, 12, 1000) > linear_stage(GRID, 2, 1000) > linear_stage(GRID, 2, 10)


COST = memory.Network(state=100.0, decoder=50.0, rest=10.0)


@pytest.mark.parametrize(
    ("free", "adjustable", "expected"),
    [
        (581.0, True, Fit(8, False)),
        (579.0, True, Fit(8, True)),  # 100 + 8 x 10 + 50
        (231.0, False, Fit(8, True)),
        (229.0, True, Fit(4, True)),
        (189.0, True, Fit(2, True)),
        (165.0, True, Fit(1, False)),  # one particle: nothing is saved by computing it twice
    ],
)
def test_the_decoder_is_recomputed_before_the_batch_shrinks(free: float, adjustable: bool, expected: Fit) -> None:
    assert choose(COST, 8, 0.0, free, adjustable=adjustable, where="memory", mend="lower --downfrac") == expected


def test_what_does_not_fit_is_refused_with_what_to_lower(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"with -b 8 .* are free; lower -b, or lower --downfrac") as caught:
        choose(COST, 8, 0.0, 140.0, adjustable=False, where="memory", mend="lower --downfrac")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"with -b 1 .* are free; lower --downfrac"):
        choose(COST, 8, 0.0, 90.0, adjustable=True, where="memory", mend="lower --downfrac")
    with caplog.at_level(logging.WARNING):  # within what the estimate may be wrong by
        assert choose(COST, 8, 0.0, 200.0, adjustable=False, where="memory", mend="lower --downfrac") == Fit(8, True)
    assert "if it runs out, lower --downfrac" in caplog.text


def test_a_linear_stage_that_does_not_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 100_000_000)
    with pytest.raises(
        UserError, match=r"linear stage needs about .* GB of memory and 0.1 GB are free; lower --downfrac"
    ):
        plan(Grid(256, 2.0, 256, 200, 208), 12, 0.25, 0, 8, 1000, CPU, adjustable=True)


def test_a_run_that_fits_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 16_000_000_000)
    with caplog.at_level(logging.INFO, logger="opustomo"):
        assert plan(GRID, K, 0.25, 0, 8, 1000, CPU, adjustable=True) == Fit(8, False)
    assert "memory: about" in caplog.text and "16.0 GB free" in caplog.text


def test_free_memory_heeds_the_limit_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch system's limit counts, not what the whole machine has; pages that can be dropped count as free."""
    texts = {
        "/proc/meminfo": "MemTotal: 99 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\n",
        "/proc/self/cgroup": "0::/job/7\n",
        "/sys/fs/cgroup/job/7/memory.stat": "anon 1000\nfile 900000\n",
        "/sys/fs/cgroup/job/7/memory.max": "3000\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda self: texts[str(self)])
    assert cache.free_memory() == 2000
    texts["/sys/fs/cgroup/job/7/memory.max"] = "max\n"
    assert cache.free_memory() == 4000 * 1024
