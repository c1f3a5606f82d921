"""How often ``check`` is right about the tilt sign and the hand of the defocus, on sets made wrong on purpose.

    python benchmarks/hand.py

Simulated sets of the tests' simulator (32 particles of two tilt series) as tilt images and as subtomograms, each as
it is and with the defocus or the tilt angles turned round.  Standard errors in favour of the file, which ``check``
calls good above 4, wrong below -4 and not decidable between.  Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from opustomo.config import InputOptions
from opustomo.data.checks import hand, signal
from opustomo.data.particles import Particles
from opustomo.data.readers import read_particles
from opustomo.physics.grid import make_grid

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from dialect_writers import Subtomograms
from stack_writers import two_states_set

COUNT, BOX, PIXEL = 32, 32, 7.5
CASES = ((2.0, 0, 40.0), (2.0, 0, 300.0), (6.0, 1, 300.0), (0.5, 2, 300.0), (2.0, 3, 900.0))  # noise, seed, reach


def deviations(particles: Particles, turn: Callable[[Particles], Particles]) -> float:
    """Standard errors in favour of the file, as ``check`` would find them with its own noise model."""
    grid = make_grid(BOX, PIXEL, 1.0, BOX / 2)
    noise = signal.noise_model(particles, grid)
    assert not isinstance(noise, Exception)
    return hand.compare(particles, turn(particles), grid, noise).deviations


def mirrored(particles: Particles) -> Particles:
    """With the other hand of the defocus."""
    return hand.mirrored_defocus(particles)[0]


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| data | noise | spread (A) | hand: as it is | made wrong | tilt sign: as it is | made wrong |")
    print("|---|---|---|---|---|---|---|")
    for noise, seed, reach in CASES:
        made = two_states_set(COUNT, noise, step=6.0, scattered=3000.0, seed=seed, reach=reach)
        with tempfile.TemporaryDirectory() as folder:
            stars = {
                "tilt images": made.write_set(Path(folder, "images")),
                "subtomograms": Subtomograms(made, Path(folder, "volumes")).relion31(),
            }
            for kind, star in stars.items():
                good = read_particles(star, InputOptions())
                spread = hand.mirrored_defocus(good)[1]
                # the tilt sign of subtomograms is told from where their power lies
                turns = (mirrored, hand.inverted_tilts) if kind == "tilt images" else (mirrored,)
                figures = [f"{deviations(good, turn):.1f} | {deviations(turn(good), turn):.1f}" for turn in turns]
                figures += [" | "] * (2 - len(turns))
                print(f"| {kind} | {noise:g} | {spread:.0f} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
