"""The tilt sign and the hand of the defocus show in how well particles fit their average, or not, and that is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opustomo.config import InputOptions
from opustomo.data.checks import hand, signal
from opustomo.data.findings import Finding
from opustomo.data.particles import Particles
from opustomo.data.readers import read_particles
from opustomo.physics.grid import make_grid
from stack_writers import Set, two_states_set

GRID = make_grid(24, 10.0, 1.0, 12)


@pytest.fixture(scope="module")
def made() -> Set:
    return two_states_set(24, 0.5, box=24, step=12.0, scattered=3000.0, reach=900.0)


@pytest.fixture(scope="module")
def particles(made: Set, tmp_path_factory: pytest.TempPathFactory) -> Particles:
    return read_particles(made.write_set(tmp_path_factory.mktemp("hand")), InputOptions())


def findings(particles: Particles) -> dict[str, Finding]:
    noise = signal.noise_model(particles, GRID)
    assert not isinstance(noise, Exception)
    return {found.topic: found for found in hand.hand_findings(particles, GRID, noise)}


def test_what_is_right_is_called_right(particles: Particles) -> None:
    assert {topic: found.level for topic, found in findings(particles).items()} == {
        "tilt sign": "ok", "defocus hand": "ok"
    }  # fmt: skip


def test_what_is_turned_round_is_called_wrong(particles: Particles) -> None:
    assert findings(hand.inverted_tilts(particles))["tilt sign"].level == "warning"
    assert findings(hand.mirrored_defocus(particles)[0])["defocus hand"].level == "warning"


def test_the_mirrored_defocus_is_that_of_the_other_hand(made: Set, particles: Particles, tmp_path: Path) -> None:
    """But for the mean depth of the particles, which the other hand turns round, too."""
    star = made.write_set(tmp_path)
    tomograms = star.with_name("tomograms.star")
    text = tomograms.read_text()
    assert " -1.0 " in text
    tomograms.write_text(text.replace(" -1.0 ", " 1.0 "))
    other, (mirrored, spread) = read_particles(star, InputOptions()), hand.mirrored_defocus(particles)
    tilts = np.diff(particles.tilt_offsets)[0]
    for name in ("TS_1", "TS_2"):
        rows = particles.tomogram == name
        given, found = (one.tilts.reshape(-1, tilts, 13)[rows, :, 3] for one in (other, mirrored))
        assert np.allclose(given - given.mean(0), found - found.mean(0), atol=0.1)
    assert 2000 < spread < 9000


def test_equal_depths_and_noise_decide_nothing(particles: Particles) -> None:
    tilts = particles.tilts.copy()
    tilts[:, 3:5] = 25000.0
    assert "too little" in findings(replace(particles, tilts=tilts))["defocus hand"].found
    lost = replace(particles, rotation=np.roll(particles.rotation, 7, axis=0))
    assert {found.level for found in findings(lost).values()} == {"note"}
