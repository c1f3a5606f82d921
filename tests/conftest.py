"""What every test shares: type checks of the physics under test, and phantom data of an independent simulator."""

from __future__ import annotations

import importlib
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# also for the processes that tests start: more threads than cores wait for each other, at full cost
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from beartype import BeartypeConf
from beartype.claw import beartype_packages

from small_set import finished_run, small_set  # noqa: F401

# PEP 484: an int is welcome where a float is asked for, as it is for mypy
beartype_packages(("opustomo.physics", "opustomo.objective"), conf=BeartypeConf(is_pep484_tower=True))

torch.set_num_threads(1)  # for what modules share, too: sums of other threads have other last bits

SIMULATOR = Path(__file__).parents[2] / "shared" / "tools" / "simulate_phantom.py"


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """The same random numbers, and one thread: a verb run by a test may have asked for more, which only wait here."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cheap_session() -> Iterator[None]:
    """No picture is drawn and no disk waited for, but where a test asks: see ``pictures.py`` and test_disk."""
    from pictures import blank_pictures  # not before the hook: it imports what the hook is for

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        blank_pictures(patch)
        yield


@pytest.fixture(scope="session")
def step_benchmark() -> Iterator[ModuleType]:
    """benchmarks/step.py: a network and its context on random data; what it imports beside it can be imported, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("step")


def simulate(folder: Path, *options: str) -> Path:
    """Run the simulator that knows nothing of this project; poses in the STAR file are the true ones.

    In this process, with one thread and the random numbers of a new one: a process of its own costs as much again.
    """
    if not SIMULATOR.exists():
        pytest.skip(f"the independent simulator is not here ({SIMULATOR})")
    exact = ["--rot-err", "0", "--shift-err", "0", "--hinge", "0"]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it leaves files to be closed by Python
        torch.set_num_threads(1)
        patch.setattr(torch, "set_num_threads", lambda count: None)
        patch.setattr(sys, "argv", [str(SIMULATOR), "-o", str(folder), *exact, *options])
        torch.manual_seed(67280421310721)  # torch's own
        runpy.run_path(str(SIMULATOR), run_name="__main__")
    return folder


@pytest.fixture
def drawn() -> Iterator[None]:
    """Pictures are drawn: for tests that look at them, or whose names could break them."""
    from pictures import drawn_pictures

    with drawn_pictures():
        yield


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
