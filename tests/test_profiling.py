"""The profile of a run, the compiled decoder, and what a step costs beside its network."""

from __future__ import annotations

import gzip
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from opustomo.errors import UserError
from opustomo.model.decoder import Decoder
from opustomo.training import profiling
from opustomo.training.profiling import PARTS
from opustomo.training.start import check_compiler
from small_set import SmallSet, given_cache, hurry, metrics_of, train

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QUICK = ("-n", "1", "--zdim", "1", "--no-estpose", "--encoderres", "0")


def table_of(text: str) -> dict[str, float]:
    """Milliseconds of every part and of the step."""
    return {name: float(ms) for name, ms in re.findall(r"^(\w+) +([\d.]+) +[\d.]+%$", text, re.MULTILINE)}


@pytest.fixture(scope="module")
def profiled(small_set: SmallSet, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with a profile and the same without."""
    folder = tmp_path_factory.mktemp("profiled")
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        for name, options in (("with", ("--profile",)), ("without", ())):
            line = (*QUICK, "--cache", str(given_cache(finished_run)), *options)
            assert train(small_set, folder / name, *line) == 0
    return folder / "with", folder / "without"


def test_the_parts_of_a_step_add_up_to_it(profiled: tuple[Path, Path]) -> None:
    text = (profiled[0] / "profile.txt").read_text()
    assert "steps 4 to 7 of an epoch" in text  # of seven: not the first
    found = table_of(text)
    assert set(found) == {*PARTS, "other", "step"}
    assert all(ms > 0 for ms in found.values())
    inside = sum(found[name] for name in PARTS)
    # no time is counted twice; what is in no part is luck, penalties and lines of metrics
    assert 0.5 * found["step"] < inside < found["step"]
    assert inside + found["other"] == pytest.approx(found["step"], abs=0.02)


def test_the_trace_has_the_parts_of_every_step(profiled: tuple[Path, Path]) -> None:
    with gzip.open(profiled[0] / "profile.json.gz", "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    names = [event["name"] for event in events]
    assert [names.count(name) for name in ("step", *PARTS)] == [4] * (1 + len(PARTS))
    assert any(name.startswith("aten::") for name in names)


def test_a_profile_names_no_path_and_no_machine(small_set: SmallSet, profiled: tuple[Path, Path]) -> None:
    run = profiled[0]
    assert not list(run.glob(".profile*"))
    with gzip.open(run / "profile.json.gz", "rt") as file:
        trace = file.read()
    for text in ((run / "profile.txt").read_text(), trace):
        for secret in (str(small_set.folder), str(run), "particles.star", "mask.mrc", "host_name", "traceName", "/tmp"):
            assert secret not in text
    assert " batch 8," in (run / "profile.txt").read_text()


def test_paths_in_a_trace_are_left_out() -> None:
    event = {"name": "kernel", "args": {"kernel_file": "/home/me/k.py", "Input type": "float", "grid": [1, 2]}}
    told = profiling.without_names({"host_name": "mine", "traceName": "/home/me/t", "traceEvents": [event]})
    assert told == {"traceEvents": [{"name": "kernel", "args": {"Input type": "float", "grid": [1, 2]}}]}


def test_a_profile_changes_nothing_else(profiled: tuple[Path, Path]) -> None:
    measured, plain = profiled
    assert metrics_of(measured) == metrics_of(plain)
    files = {path.name for path in measured.iterdir()} - {path.name for path in plain.iterdir()}
    assert files == {"profile.txt", "profile.json.gz"}


def test_a_step_that_fails_ends_the_measurement() -> None:
    watcher = profiling.Profile.__new__(profiling.Profile)
    watcher.device, watcher.done = torch.device("cpu"), False
    steps = watcher.steps([torch.zeros(1)] * 4, 4)
    for _ in range(3):
        next(steps)
    assert profiling._measured is not None
    steps.close()
    assert profiling._measured is None and not watcher.done
    with torch.profiler.profile():  # refused while another is on
        pass


# ------------------------------------------------------------------------------------------------ the decoder, compiled


def gradients(decoder: Decoder, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    decoder.zero_grad()
    volume = decoder(code)
    volume.square().sum().backward()
    return volume.detach(), torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.filterwarnings("default")  # torch warns of its own tracing
@pytest.mark.slow
def test_a_compiled_decoder_has_the_same_numbers(recomputed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as for any backend, with the operators as they are: generating code takes minutes."""
    real, called = torch.compile, []

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = real(function, backend="aot_eager", fullgraph=True)
        return lambda x: called.append(len(x)) or compiled(x)

    monkeypatch.setattr(torch, "compile", traced)
    torch.manual_seed(0)
    decoder, code = Decoder(3, 16, 0.1), torch.randn(2, 3)
    torch.nn.init.normal_(decoder.rise[-1].weight, std=0.1)
    expected = gradients(decoder, code)
    decoder.recomputed = recomputed
    decoder.compile_large()
    for found, wanted in zip(gradients(decoder, code), expected, strict=True):
        assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert called == ([1] * 4 if recomputed else [2])
    with torch.no_grad():  # as evaluation has it
        assert torch.equal(decoder(code), expected[0])


def test_a_compiler_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("No working C++ compiler found in\n  a long listing")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match="--compile") as caught:
        check_compiler(torch.device("cpu"))
    assert "No working C++ compiler" in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ cost beside the network


@pytest.fixture(scope="module")
def cost_benchmark(step_benchmark: ModuleType) -> ModuleType:
    return importlib.import_module("cost")


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 1])
def test_a_step_costs_little_beside_its_network(row: int, step_benchmark: ModuleType) -> None:
    """Half above the aim at most; CPU-seconds of neighbours, so that what else a machine does hits both."""
    *_, ratio = step_benchmark.measure(step_benchmark.ROWS[row], 11)
    assert 1.0 < ratio < 1.5 * step_benchmark.AIM


@pytest.mark.slow
def test_a_step_that_is_done_twice_would_be_noticed(
    step_benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = step_benchmark.train_step

    def twice(*values: Any) -> Any:
        both = once(*values), once(*values)
        return SimpleNamespace(**{n: getattr(both[0], n) + getattr(both[1], n) for n in ("nll", "kl", "prior")})

    monkeypatch.setattr(step_benchmark, "train_step", twice)
    *_, ratio = step_benchmark.measure(step_benchmark.ROWS[0], 11)
    assert ratio > 1.5 * step_benchmark.AIM


# ------------------------------------------------------------------------------------------------ the cost model


def test_the_linear_stage_reads_rows_as_often_as_the_cost_model_says(cost_benchmark: ModuleType) -> None:
    counted, formula = cost_benchmark.passes_counted()
    assert counted == formula > 100


def test_the_cost_model_reads_the_cost_of_a_row_from_the_page(cost_benchmark: ModuleType) -> None:
    """The fit goes through the table: within a factor of two at the boxes that were measured."""
    page = (BENCHMARKS.parent / "docs" / "scaling.md").read_text()
    factor, power = cost_benchmark.row_law(page)
    assert 2.0 < power < 4.5
    [line] = re.findall(
        r"^\| 64 \| \d+ \| [\d.]+ \| ([\d.]+) \|", page.split("| MB per row | CPU-ms per row")[1].split("<!--")[0], re.M
    )
    assert 0.5 < factor * 64**power / (float(line) / 1e3) < 2.0


def test_a_bottleneck_moves_with_what_is_short(cost_benchmark: ModuleType) -> None:
    """Rows by the cores, the exchange by the fabric between nodes: arithmetic that has to react."""
    counts = cost_benchmark.Count(flop=3e10, convolutions=1e8, others=1e8, kept=0, operators=300, parameters=6e7)
    cost = cost_benchmark.Cost(cost_benchmark.full(128), counts, counts)
    usual = cost_benchmark.Here((1e-7, 3.3), 10.0, 0.5)
    one, node, many = (cost_benchmark.predicted(cost, usual, 10**5, n, 0.08) for n in (1, 8, 64))
    assert one["all-reduce"] == 0 < node["all-reduce"] < many["all-reduce"]
    assert one["convolutions"] == pytest.approx(8 * node["convolutions"])
    assert node["rows"] == pytest.approx(one["rows"] / 8) == pytest.approx(8 * many["rows"])
    slow = cost_benchmark.predicted(cost, cost_benchmark.Here((1e-6, 3.3), 10.0, 0.5), 10**5, 1, 0.08)
    assert slow["rows"] == pytest.approx(10 * one["rows"])
    few, many = (cost_benchmark.predicted(cost, usual, n, 1, 0.08) for n in (10**4, 10**7))
    assert few["linear stage's reading"] == 0 < many["linear stage's reading"]
