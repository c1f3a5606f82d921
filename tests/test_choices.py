"""What a run says about the values it uses: one line each, with the reason, and which of them were given."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opustomo.config import TrainConfig
from opustomo.training import choices

NAMES = ["zdim", "templateres", "width", "encoderres", "lr", "epochs", "batch", "beta-control", "prior", "lamb"]


def config(**options: float) -> TrainConfig:
    return TrainConfig(Path(), Path(), **options)  # type: ignore[arg-type]


def test_a_run_says_once_what_it_uses_and_why(finished_run: Path) -> None:
    text = (finished_run / "run.log").read_text()
    lines = re.findall(rf" INFO +({'|'.join(NAMES)}) (\S+): (.+)$", text, re.M)
    assert [name for name, *_ in lines] == NAMES
    said = {name: (float(value), reason) for name, value, reason in lines}
    assert {name for name in NAMES if said[name][1].startswith("given")} == {
        "zdim",
        "width",
        "epochs",
        "batch",
        "encoderres",
    }
    assert said["zdim"] == (2, "given; 1 of 2 used: held-out evidence chose 1 component")
    assert said["templateres"] == (16, "the multiple of 16 at or above the crop of 16")
    assert "no viewing direction can be read" in said["lamb"][1]


@pytest.mark.parametrize(
    ("name", "asked", "value", "given", "source"),
    [
        ("lr", 1e-4, 1e-4, frozenset({"lr"}), "given"),
        ("lr", 1e-3, 1e-3, frozenset({"lr"}), "given"),  # the default, typed
        ("lr", 1e-3, 1e-3, frozenset(), ""),
        ("lr", 1e-3, 1e-3, None, ""),
        ("lr", 1e-4, 1e-4, None, "given"),
        ("width", 0.0, 0.25, frozenset({"width"}), ""),  # automatic was typed
        ("templateres", 192, 192, frozenset(), "the default of the command that was typed"),  # of dsd
    ],
)
def test_what_was_given_is_told_from_what_was_chosen(
    name: str, asked: float, value: float, given: frozenset[str] | None, source: str
) -> None:
    assert choices._source(name, config(**{name: asked}), value, given) == source


@pytest.mark.parametrize(
    ("zdim", "used", "trail", "words"),
    [
        (12, 3, [(0, 1.0), (3, 5.0), (4, 4.0)], "3 of 12 used: held-out evidence chose 3 components"),
        (2, 2, [(0, 1.0), (2, 5.0)], "the most allowed; a larger --zdim may find more"),
        (12, 12, [(0, 1.0), (12, 5.0)], "12 of 12 used: held-out evidence chose 12 components"),
        (12, 1, [(0, 1.0), (1, 0.5)], "prefers the average alone, one component is kept"),
    ],
)
def test_components_that_are_used(zdim: int, used: int, trail: list[tuple[int, float]], words: str) -> None:
    assert choices._components(zdim, used, trail).endswith(words)


def test_why_there_is_an_encoder_or_none() -> None:
    assert choices._encoder(config(), False).startswith("no encoder: no code it found was better")
    assert choices._encoder(config(encoderres=6), False) == "half of OPUS-TOMO's, on a CPU"
    assert choices._encoder(config(encoderres=12, lamb=0.5), True).endswith("; --lamb needs an encoder to act on")


def test_steps_are_counted_as_they_are_made() -> None:
    assert choices._epochs(config(), 54).startswith("70 steps for 54 particles")
    assert choices._epochs(config(accum_step=2), 54).startswith("40 steps")
    assert "not tried" in choices._epochs(config(), 50_000) and "not tried" not in choices._epochs(config(), 800)
