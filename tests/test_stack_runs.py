"""The verbs on tilt images: from an optimisation set and from a flat table to codes, and classes back to files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from opustomo import cli
from opustomo.checkpoint import open_run
from opustomo.config import InputOptions
from opustomo.data.readers import read_particles
from stack_writers import Set, two_states_set

COUNT = 60


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Set, dict[str, Path]]:
    """60 particles of two states, 13 images each, as an optimisation set and as a flat table."""
    folder = tmp_path_factory.mktemp("images")
    made = two_states_set(COUNT, 4.0, step=10.0)
    return made, {"set": made.write_set(folder / "set"), "flat": made.write_series(folder / "flat")}


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def separation(codes: np.ndarray, state: np.ndarray) -> float:
    """AUC of the states along the first component, either way round."""
    order = np.argsort(np.argsort(codes[:, 0])) + 1.0
    ones = int(state.sum())
    auc = (order[state == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(state) - ones))
    return float(max(auc, 1 - auc))


@pytest.mark.slow
def test_linear_stage_and_classes_of_both(written: tuple[Set, dict[str, Path]], tmp_path: Path) -> None:
    made, stars = written
    codes = {}
    for name, star in stars.items():
        folder = tmp_path / name
        options = ("--components", 1, "--no-estpose", "--workers", 1, "--downfrac", 0.75)
        assert run("linear", star, "-o", folder, *options) == 0
        codes[name] = np.asarray(open_run(folder).codes)
        assert separation(codes[name], made.state) > 0.95
        assert run("analyze", folder, "--clusters", 2, "--skip-umap") == 0
        assert run("select", star, "--run", folder, "--kmeans", 2, "-o", folder / "classes") == 0
        suffix = "_optimisation_set" if name == "set" else ""
        kept, given = [], read_particles(star, InputOptions())
        for i in (0, 1):
            part = read_particles(folder / f"classes/pre{i}{suffix}.star", InputOptions(datadir=star.parent))
            rows = [list(given.names).index(one) for one in part.names]
            assert np.array_equal(part.tilts, given.subset(np.array(rows)).tilts)
            kept += rows
        assert sorted(kept) == list(range(COUNT))
    correlation = np.corrcoef(codes["set"][:, 0], codes["flat"][:, 0])[0, 1]
    assert abs(correlation) > 0.995  # of 60 codes that the data hardly tell: 0.1 nats each


def test_check_says_what_the_images_are(
    written: tuple[Set, dict[str, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, words in (("set", f"RELION 5: {COUNT} particles"), ("flat", f"tilt images: {COUNT} particles")):
        assert run("check", written[1][name], "--json", "--sample", 20) == 0
        report = json.loads(capsys.readouterr().out)
        found = {(one["topic"], one["found"]) for one in report["findings"]}
        assert any(topic == "read as" and text.startswith(words) for topic, text in found)
        assert any(topic == "box" and "32 x 32 pixels" in text for topic, text in found)
        assert any(topic == "contrast" and "bright" in text for topic, text in found)
        assert not any(topic in ("wedge", "normalisation") for topic, _ in found)
        assert report["errors"] == 0


def test_average_of_images_is_the_object(written: tuple[Set, dict[str, Path]], tmp_path: Path) -> None:
    assert run("average", written[1]["set"], "-o", tmp_path, "--downfrac", 0.75, "--workers", 1) == 0
    fsc = np.loadtxt(tmp_path / "fsc.csv", delimiter=",", skiprows=1)
    assert fsc[1:5, -1].min() > 0.8
