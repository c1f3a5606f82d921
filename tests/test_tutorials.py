"""Quick start and tutorial are typed as they stand, and end as they say."""

from __future__ import annotations

import csv
import json
import pickle
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from opustomo import cli
from small_set import SmallSet
from star_sets import real_star
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


# in this order, each line once; the first page makes the run that the others look at
PAGES = ("../README.md", "troubleshooting.md", *(f"guides/{name}.md" for name in
         ("mask_and_sizes", "report", "back_to_relion_m", "dynamics", "second_rounds")))  # fmt: skip
# what a line holds that is not typed here, and why
NOT_TYPED = {
    "--resume run": "the run is finished; test_resume",
    " -n 40": "forty epochs; test_resume goes on, stretches and starts warm",
    "-o run --damaged skip": "another training; test_damaged",
    "--ind ": "another training; test_subset",
    "-r subunit.mrc ": "another training, of copies, whose average is typed; test_expand",
    "--run run_d3 ": "test_expand",
    "good/selected.star -r ": "another training, of the particles whose average is typed",
    "--difference ": "sixteen classes of 60 particles are too small; the tutorial types one",
    "--m-source ": "needs M's file of hashes; test_export",
    "--masks ": "rigid bodies; test_bodies, as the next two",
    "--conformation ": "",
    "--codes conformation": "",
    "opustomo doctor": "test_doctor",
    "opustomo encode": "test_encode",
    "quality run --labels": "test_class_quality",
    "opustomo movie": "test_movie, test_paths",
}


@pytest.mark.slow
def test_readme_and_guides(
    small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line of the README's path and of the guides on a run, as it stands, on 60 particles."""
    shutil.copytree(small_set.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    lines = [words for page in PAGES for words in command_lines((DOCS / page).read_text()) if words[0] == "opustomo"]
    left_out, verbs = set(), set()
    for line in dict.fromkeys(map(shlex.join, lines)):
        reasons = {part for part in NOT_TYPED if part in line}
        left_out |= reasons
        if not reasons:
            assert cli.main(shlex.split(line)[1:]) == 0, (line, "".join(capsys.readouterr()))
            verbs.add(line.split()[1])
    assert left_out == set(NOT_TYPED)
    assert verbs >= {"check", "average", "mask", "train", "status", "analyze", "volumes", "quality", "select"}


@pytest.mark.slow
def test_real_ribosomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first line of the page says of the 412 real particles what stands there; the others take minutes."""
    (tmp_path / "data").symlink_to(real_star("real_70S_empiar10499").parent)
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "tutorial_ribosome.md").read_text()
    line, *others = command_lines(page)
    assert line[1] == "check" and {"average", "linear", "train", "quality", "select"} <= {words[1] for words in others}
    given = {word for words in others for word in words if word.startswith("data/")}
    assert given == {"data/particles.star"} and (tmp_path / "data" / "particles.star").is_file()
    assert cli.main(line[1:]) == 0
    said = capsys.readouterr().out
    shown = re.findall(r"^```text\n(.*?)^```", page, re.M | re.S)[0].splitlines()
    assert len(shown) > 5
    assert [row for row in shown if row.split(" ...")[0] not in said] == []
