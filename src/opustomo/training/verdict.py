"""What a finished run says about itself: was the network worth it, and can its codes be trusted?

Owns: the lines that end ``train``.  Each says what was found and, where something is wrong, what to change.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opustomo.analysis.score_poses import directions
from opustomo.config import TrainConfig
from opustomo.monitor import NOTABLE
from opustomo.training.start import Start

log = logging.getLogger("opustomo")

Floats = NDArray[np.floating]

LOST = 0.5  # of what the linear stage's codes hold: less is a collapse
NOTHING = 0.1  # nats a code holds that says nothing
MOVED = 1.0  # of the linear stage's own uncertainty: further the data cannot have asked for, unless the bound says so
READABLE = 0.05  # R^2 of the orientation, beyond chance
WORDS = {
    "beam": "the beam axis", "tilt_axis": "the tilt axis", "in_plane": "the in-plane angle",
    "beam_even": "the beam axis up to sign", "tilt_axis_even": "the tilt axis up to sign",
}  # fmt: skip


def write_verdict(saved: dict[int, float], linear: float, held: int) -> None:
    """Say whether the network earned its place on held-out particles, and which of its epochs to use.

    saved: held-out bound of every epoch with a checkpoint; linear: that of the linear stage; held: particles held out.
    """
    if held == 0:
        log.warning("no particles were held out: nothing here says whether the network is better than the linear stage")
        return
    judged = last = max(saved)
    best = max(saved, key=lambda epoch: saved[epoch])
    if saved[best] - saved[last] > NOTABLE:
        judged = best
        log.warning(
            "held-out particles were explained best after epoch %d, by %.2f nats more than at the end: use --epoch %d "
            "in analyze, volumes and report, or train for fewer epochs", best, saved[best] - saved[last], best,
        )  # fmt: skip
    network = "the network" if judged == last else f"the network of epoch {judged}"
    gain = saved[judged] - linear
    if gain > NOTABLE:
        log.info("%s explains held-out particles better than the linear stage, by %.2f nats each", network, gain)
    elif gain > -NOTABLE:
        log.info(
            "%s explains held-out particles as well as the linear stage (%+.2f nats each): at this number of "
            "particles the linear model leaves nothing to be found", network, gain,
        )  # fmt: skip
    else:
        log.warning(
            "%s explains held-out particles worse than the linear stage (%.2f against %.2f nats): "
            "raise --prior, lower --lr, or take the maps of `opustomo linear`", network, saved[judged], linear,
        )  # fmt: skip


@dataclass(frozen=True)
class Codes:
    """Posterior means and standard deviations of P codes, (P, K) each."""

    mean: Floats
    spread: Floats

    def information(self, prior: Floats) -> float:
        """Nats by which a code's data have narrowed the prior of variance (K,), mean over particles: 0 is the prior."""
        return float(0.5 * np.log(prior / np.maximum(self.spread, 1e-12) ** 2).sum(1).mean())


def former_codes(start: Start) -> Codes:
    """The linear stage's, of the particles that take part in fits."""
    codes, used = start.linear.codes, start.linear.typical
    return Codes(codes.centre()[used].numpy(), codes.spread()[used].numpy())


def warn_of_codes(config: TrainConfig, start: Start, mean: Tensor, spread: Tensor, gain: float) -> None:
    """A warning for everything that is wrong with the codes (P, K) of the last epoch; see ``faults``."""
    used, prior = start.linear.typical, start.linear.mixture.variance().numpy()
    own = Codes(mean[used].numpy(), spread[used].numpy())
    for fault in faults(config, own, former_codes(start), prior, start.rotation, gain):
        log.warning("%s", fault)


def faults(config: TrainConfig, codes: Codes, linear: Codes, prior: Floats, rotation: Floats, gain: float) -> list[str]:
    """What is wrong with the codes of a finished run, one sentence each; [] for a good one.

    linear: those it started from; prior: variance (K,) of their distribution; rotation: A (P, 3, 3); gain: held-out
    bound minus the linear stage's, nats.
    """
    found = (
        _collapse(config, codes.information(prior), linear.information(prior)),
        _stretch(config, codes, linear, gain),
        _orientation(config, codes, linear, rotation),
    )
    return [line for line in found if line]


def _collapse(config: TrainConfig, own: float, start: float) -> str:
    if start < NOTHING:
        unseen = "the data do not resolve where a particle stands"
        if config.masks is not None:
            unseen = "composition is not resolved beside what the bodies do (motions.csv)"
        return (
            f"the codes hold next to nothing ({own:.2f} nats each), and so do the linear stage's ({start:.2f}): "
            f"{unseen}; take no class for real that volumes --from-data does not show"
        )
    if own >= LOST * start:
        return ""
    # a KL term of the usual strength keeps what the data say
    option = "lamb" if config.lamb > 0 and config.beta_control <= 1 else "beta_control"
    return (
        f"the codes have collapsed towards the prior: they hold {own:.2f} nats each where the linear stage's hold "
        f"{start:.2f}; lower {_spelt(config, option)}"
    )


def _stretch(config: TrainConfig, codes: Codes, linear: Codes, gain: float) -> str:
    moves = np.sqrt((((codes.mean - linear.mean) / np.maximum(linear.spread, 1e-12)) ** 2).mean(0))
    worst = int(moves.argmax())
    # the disentanglement prior moves codes for its own sake, whatever the bound says
    if moves[worst] <= MOVED or (gain > NOTABLE and config.lamb == 0):
        return ""
    before, after = linear.mean[:, worst], codes.mean[:, worst]
    alike = float(np.corrcoef(before, after)[0, 1]) if np.ptp(before) > 0 and np.ptp(after) > 0 else 0.0
    wider = float(after.var() / max(float(before.var()), 1e-12))
    return (
        f"the codes have left what the data say: dimension {worst + 1} stands {moves[worst]:.1f} of its uncertainties "
        f"from the linear stage's (correlation {alike:.2f}, variance {wider:.2f} times); "
        f"lower {_spelt(config, 'lamb' if config.lamb > 0 else 'lr')}"
    )


def _orientation(config: TrainConfig, codes: Codes, linear: Codes, rotation: Floats) -> str:
    name, score, chance = orientation(codes.mean, rotation)
    if score <= chance:
        return ""
    before = orientation(linear.mean, rotation)[1]
    found = f"{name} can be read from the codes (R^2 {score:.2f}; from the linear stage's {max(before, 0.0):.2f}): "
    if before > score / 2:
        return found + (
            "the missing wedge may separate the particles, unless the states do face different ways; correct the poses "
            "(--estpose), or lower --zdim"
        )
    return found + f"training has put the missing wedge into them; raise {_spelt(config, 'lamb')}, or lower --lr"


def orientation(codes: Floats, rotation: Floats) -> tuple[str, float, float]:
    """Which direction is read best from the codes (P, K), its adjusted R^2, and the R^2 that chance stays below.

    rotation: A (P, 3, 3).
    """
    targets = directions(np.asarray(rotation, np.float64))
    scores = {name: readable(codes, value) for name, value in targets.items()}
    name = max(scores, key=lambda target: scores[target])
    # by chance alone an adjusted R^2 of 2 K unknowns scatters by sqrt(4 K) / P
    return WORDS[name], scores[name], READABLE + 6.0 * math.sqrt(codes.shape[1]) / len(codes)


def _spelt(config: TrainConfig, name: str) -> str:
    """An option with its value."""
    return f"--{name.replace('_', '-')} (now {getattr(config, name):g})"


def readable(codes: Floats, value: Floats) -> float:
    """Adjusted R^2 of least squares from the codes (P, K) and their squares to ``value`` (P, d), all columns together.

    -inf where there are too few particles for that many unknowns.
    """
    scaled = (codes - codes.mean(0)) / np.maximum(codes.std(0), 1e-12)
    design = np.concatenate([np.ones((len(codes), 1)), scaled, scaled**2], 1)
    free = len(codes) - design.shape[1]
    if free < 1:
        return float("-inf")
    residual = value - design @ np.linalg.lstsq(design, value, rcond=None)[0]
    total = ((value - value.mean(0)) ** 2).sum()
    return 1.0 - float((residual**2).sum() / max(total, 1e-12)) * (len(codes) - 1) / free
