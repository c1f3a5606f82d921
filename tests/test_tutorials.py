"""Quick start and tutorial are typed as they stand, and end as they say."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from opustomo import cli
from test_docs import command_lines

DOCS = Path(__file__).parents[1] / "docs"


def type_lines(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run every ``opustomo`` line of a page in order; the verbs that ran."""
    monkeypatch.chdir(folder)
    verbs = []
    for program, *words in command_lines((DOCS / page).read_text()):
        assert program == "opustomo"
        assert cli.main(words) == 0, words
        verbs.append(words[0])
    return verbs


@pytest.mark.slow
def test_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    verbs = type_lines("quickstart.md", tmp_path, monkeypatch)
    assert {"simulate", "average", "train", "analyze", "volumes", "report", "check"} <= set(verbs)
    said = "".join(capsys.readouterr())
    assert "show separate groups; sizes: 0: 15, 1: 45" in said
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "run" / "analyze.2" / "kmeans2" / "reference1.mrc").is_file()


@pytest.mark.slow
def test_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every particle without the small subunit is found, and no other: what the page concludes."""
    verbs = type_lines("tutorial.md", tmp_path, monkeypatch)
    path = ["simulate", "check", "average", "train", "analyze", "volumes", "quality", "select", "evaluate", "report"]
    assert [verb for verb in dict.fromkeys(verbs) if verb in path] == path
    said = "".join(capsys.readouterr())
    assert "1 of 1 independent axes show separate groups; sizes: 0: 30, 1: 90" in said
    assert "as well as the linear stage" in said
    state = np.load(tmp_path / "simulated" / "labels.npz")["state"]
    group = pickle.loads((tmp_path / "run" / "analyze.3" / "groups" / "labels.pkl").read_bytes())
    assert np.array_equal(np.asarray(group) == 0, state == 0)
    counts = json.loads((tmp_path / "classes" / "manifest.json").read_text())["counts"]
    assert counts == {"0": 30, "1": 90}
    with (tmp_path / "run" / "analyze.3" / "kmeans4" / "quality.csv").open(newline="") as file:
        nats = {row["class"]: float(row["nats"]) for row in csv.DictReader(file)}
    assert min(nats["2"], nats["3"]) > 3 * max(nats["0"], nats["1"])
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert scores["poses"]["ratio"]["angle_median"] < 0.6


def test_pictures_of_the_tutorials_are_small() -> None:
    pictures = [*(DOCS / "images").glob("tutorial_*.png"), *(DOCS / "images").glob("ribosome_*.png")]
    assert len(pictures) >= 5
    assert all(picture.stat().st_size < 150_000 for picture in pictures)
