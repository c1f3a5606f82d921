"""What every test shares: type checks of the physics while it is tested, and phantom data of an independent simulator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# PEP 484: an int is welcome where a float is asked for, as it is for mypy
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
install_import_hook(["opustomo.physics", "opustomo.objective"], "conftest.checked")

SIMULATOR = Path(__file__).parents[2] / "shared" / "tools" / "simulate_phantom.py"


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
    """Four noise-free particles of 48^3 voxels of 5 A at random orientations and origins, two states."""
    return simulate(tmp_path_factory.mktemp("phantom"), "-n", "4", "-D", "48", "--snr", "1e9")


@pytest.fixture(scope="session")
def noisy_phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 particles of 48^3 voxels at the simulator's usual noise, two states."""
    return simulate(tmp_path_factory.mktemp("noisy"), "-n", "160", "-D", "48")
