"""What a finished run says: whether the network was worth it, and codes that collapse, stretch or follow the view."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from opustomo.config import TrainConfig
from opustomo.mixture import single
from opustomo.training import verdict
from opustomo.training.verdict import Codes, faults, readable
from small_set import SmallSet, given_cache, hurry, train

PARTICLES, K = 200, 2
PRIOR = np.ones(K)
CONFIG = TrainConfig(Path(), Path())
RNG = np.random.default_rng(4)
ROTATION = Rotation.random(PARTICLES, rng=RNG).as_matrix()
LINEAR = Codes(0.9 * RNG.normal(size=(PARTICLES, K)), np.full((PARTICLES, K), 0.4))


def said(codes: Codes, linear: Codes = LINEAR, gain: float = 0.0, **options: object) -> list[str]:
    config = dataclasses.replace(CONFIG, **options)  # type: ignore[arg-type]
    return faults(config, codes, linear, PRIOR, ROTATION, gain)


def moved(by: np.ndarray | float) -> Codes:
    return Codes(LINEAR.mean + by, LINEAR.spread)


@pytest.mark.parametrize(
    ("saved", "held", "words"),
    [
        ({0: 20.0, 1: 20.5}, 10, "better than the linear stage, by 0.50 nats"),
        ({0: 20.0, 1: 20.01}, 10, "as well as the linear stage (+0.01 nats each)"),
        ({0: 19.0, 1: 19.01}, 10, "worse than the linear stage (19.01 against 20.00 nats)"),
        ({0: 20.5, 1: 19.0}, 10, "the network of epoch 0 explains held-out particles better than the linear stage"),
        (
            {0: 19.5, 1: 19.0},
            10,
            "the network of epoch 0 explains held-out particles worse than the linear stage (19.50",
        ),
        ({0: 20.4, 1: 20.2}, 10, "explained best after epoch 0, by 0.20 nats more than at the end: use --epoch 0"),
        ({0: 20.0, 1: 25.0}, 0, "no particles were held out"),
    ],
)
def test_verdict_says_what_was_found(
    saved: dict[int, float], held: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="opustomo"):
        verdict.write_verdict(saved, 20.0, held)
    assert words in caplog.text


def test_codes_that_stay_near_the_linear_stages_are_not_complained_about() -> None:
    assert said(LINEAR) == []
    assert said(moved(0.5 * LINEAR.spread * RNG.normal(size=(PARTICLES, K))), lamb=0.5) == []


@pytest.mark.parametrize(("spread", "complains"), [(0.45, False), (0.6, False), (0.7, True), (1.0, True)])
def test_collapse_is_what_the_codes_have_lost(spread: float, complains: bool) -> None:
    """In nats: log(prior / spread) summed over the dimensions, against the linear stage's."""
    codes = Codes(LINEAR.mean, np.full((PARTICLES, K), spread))
    assert codes.information(PRIOR) == pytest.approx(-K * np.log(spread))
    found = said(codes, beta_control=4.0)
    assert [("collapsed" in line, "lower --beta-control (now 4)" in line) for line in found] == [
        (True, True)
    ] * complains


def test_data_that_never_said_anything_are_not_the_networks_fault() -> None:
    silent = Codes(0.05 * LINEAR.mean, np.full((PARTICLES, K), 0.99))
    [line] = said(silent, silent)
    assert "so do the linear stage's" in line and "--beta-control" not in line
    [line] = said(silent, silent, masks="auto:2")
    assert "composition is not resolved beside what the bodies do" in line


def test_codes_far_from_the_linear_stages_need_a_reason() -> None:
    """Twice as wide, or shifted: silent only where held-out particles are explained better and no prior pulls."""
    for codes in (Codes(2 * LINEAR.mean, LINEAR.spread), moved(np.array([0.0, -1.0]))):
        [pulled] = said(codes, gain=0.5, lamb=3.0)
        assert "lower --lamb (now 3)" in pulled
        [lost] = said(codes, gain=-0.5)
        assert "lower --lr (now 0.001)" in lost
        assert said(codes, gain=0.5) == []
    assert "dimension 2 stands 2.5 of its uncertainties" in lost and "variance 1.00 times" in lost


@pytest.mark.parametrize("even", [False, True])
def test_codes_made_of_the_viewing_direction(even: bool) -> None:
    beam = ROTATION[:, 2, :K]
    codes = moved(0.35 * ((beam**2 if even else beam) - 0.3))
    strong = Codes(2 * (codes.mean - LINEAR.mean) + 0.2 * LINEAR.mean, LINEAR.spread)
    [line] = [line for line in said(strong, gain=1.0) if "can be read" in line]
    assert "the beam axis" in line and ("up to sign" in line) == even
    assert "raise --lamb (now 0)" in line
    [line] = said(strong, strong)
    assert "--estpose" in line and "--lamb" not in line


def test_r2_is_that_of_least_squares_and_has_no_bias() -> None:
    code = RNG.normal(size=(4000, 1))
    value = 0.6 * code + 0.8 * RNG.normal(size=(4000, 1))
    assert readable(code, value) == pytest.approx(0.36, abs=0.03)
    nothing = [readable(RNG.normal(size=(60, 6)), RNG.normal(size=(60, 3))) for _ in range(200)]
    assert np.mean(nothing) == pytest.approx(0.0, abs=0.02)
    assert readable(RNG.normal(size=(5, 2)), RNG.normal(size=(5, 3))) == float("-inf")


# ------------------------------------------------------------------------------------------------ in a run


@pytest.fixture
def log_of(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """run.log of a run with options."""
    hurry(monkeypatch)

    def run(*options: str) -> str:
        cache = ("--cache", str(given_cache(finished_run)), "--no-estpose", "--zdim", "1")
        assert train(small_set, tmp_path / "run", *cache, *options) == 0
        return (tmp_path / "run" / "run.log").read_text()

    return run


def test_a_good_run_is_silent(finished_run: Path) -> None:
    text = (finished_run / "run.log").read_text()
    assert not any(word in text for word in ("collapsed", "have left", "can be read from the codes", "next to nothing"))


@pytest.mark.slow
def test_far_too_strong_a_disentanglement_prior_is_said(log_of: Callable[..., str]) -> None:
    text = log_of("-n", "3", "-b", "1", "--lamb", "50", "--lr", "0.005")
    assert "have left what the data say" in text and "lower --lamb (now 50)" in text


@pytest.mark.slow
def test_far_too_strong_a_kl_term_is_said(log_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With one Gaussian for all codes; to a narrow Gaussian of each state nothing could collapse but the noise."""
    monkeypatch.setattr(
        "opustomo.linear_fit.choose_mixture", lambda statistics, *_: single(statistics.first.shape[1] - 1)
    )
    text = log_of("-n", "4", "-b", "2", "--lr", "0.003", "--beta-control", "100")
    assert "collapsed towards the prior" in text and "lower --beta-control (now 100)" in text
