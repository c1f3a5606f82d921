"""What every test shares: type checks of the physics under test, and phantom data of an independent simulator."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

from small_set import finished_run, small_set  # noqa: F401

# PEP 484: an int is welcome where a float is asked for, as it is for mypy
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
install_import_hook(["opustomo.physics", "opustomo.objective"], "conftest.checked")

torch.set_num_threads(1)  # for what modules share, too: sums of other threads have other last bits

SIMULATOR = Path(__file__).parents[2] / "shared" / "tools" / "simulate_phantom.py"


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """The same random numbers, and one thread: a verb run by a test may have asked for more, which only wait here."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def simulate(folder: Path, *options: str) -> Path:
    """Run the simulator that knows nothing of this project; poses in the STAR file are the true ones."""
    if not SIMULATOR.exists():
        pytest.skip(f"the independent simulator is not here ({SIMULATOR})")
    exact = ["--rot-err", "0", "--shift-err", "0", "--hinge", "0"]
    command = [sys.executable, str(SIMULATOR), "-o", str(folder), *exact, *options]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four noise-free particles of 64^3 voxels of 7 A, two states: 41 tilts, random orientations and origins."""
    folder = tmp_path_factory.mktemp("phantom")
    return simulate(folder, "-n", "4", "-D", "64", "--apix", "7", "--snr", "1e9")


@pytest.fixture(scope="session")
def lopsided_phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 8 tilts from -60 to 52 degrees: the sign of the tilt angle can be seen."""
    folder = tmp_path_factory.mktemp("lopsided")
    return simulate(folder, "-n", "4", "-D", "64", "--apix", "7", "--snr", "1e9", "--tilt-step", "16")


@pytest.fixture(scope="session")
def noisy_phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """140 particles of 32^3 voxels of 7.5 A at the simulator's usual noise, two states."""
    return simulate(tmp_path_factory.mktemp("noisy"), "-n", "140", "-D", "32", "--apix", "7.5")


@pytest.fixture(autouse=True)
def _no_log_left_open() -> Iterator[None]:
    """A verb run by a test leaves a log file in its run folder open and lines on a stream that is captured."""
    yield
    logger = logging.getLogger("opustomo")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
