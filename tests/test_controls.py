"""Numbers of the STAR file over the codes, classes by tomogram, epochs; and the verbs on a finished run, end to end."""

from __future__ import annotations

import csv
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile

from opustomo.analysis import controls
from opustomo.cli import main
from opustomo.data.pickles import load_labels
from small_set import SmallSet, copy_run


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_column_that_the_codes_tell_stands_out() -> None:
    rng = np.random.default_rng(0)
    codes = rng.normal(0, 1, (600, 2))
    told = controls.told_by_codes(
        codes,
        {
            "bent": codes[:, 0] ** 2 + 0.5 * codes[:, 1],  # by no linear map
            "half": codes[:, 0] + rng.normal(0, 1, 600),
            "chance": rng.normal(0, 1, 600),
        },
        np.arange(600),
    )
    assert told["bent"] > 0.85 and 0.3 < told["half"] < 0.65 and abs(told["chance"]) < 0.15
    still = controls.told_by_codes(np.zeros((600, 2)), {"any": codes[:, 0]}, np.arange(600))
    assert still == {"any": 0.0}
    # copies of a particle with one code have the same columns, which says nothing about the code
    copy = np.repeat(np.arange(200), 16)
    chance = {"chance": rng.normal(0, 1, 200)[copy]}
    assert abs(controls.told_by_codes(codes[copy], chance, copy)["chance"]) < 0.15
    assert controls.told_by_codes(codes[copy], chance, np.arange(3200))["chance"] > 0.9


def test_codes_that_were_turned_have_not_changed() -> None:
    rng = np.random.default_rng(1)
    before = rng.normal(0, 1, (300, 3))
    assert controls.linear_r2(before, before @ rng.normal(0, 1, (3, 2)) + 5) == pytest.approx(1)
    assert controls.linear_r2(before, rng.normal(0, 1, (300, 2))) < 0.05
    assert controls.linear_r2(before, np.ones((300, 2))) == 1


def test_verbs_on_a_finished_run(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """analyze leaves its tables, volumes writes filtered maps along a way, movie makes the maps that are missing."""
    run = copy_run(finished_run, tmp_path / "run", 2)
    folder = run / "analyze.2"
    assert main(["analyze", str(run), "--clusters", "3", "--pcs", "1", "--skip-umap"]) == 0
    table = starfile.read(small_set.star)
    rows = {row["column"]: row for row in table_of(folder / "controls.csv")}
    assert "rlnAngleRot" in rows and "rlnImageName" not in rows
    tilt = np.sort(pd.to_numeric(table["rlnAngleTilt"]).to_numpy())
    assert float(rows["rlnAngleTilt"]["lowest"]) == pytest.approx(tilt[0], rel=1e-5)
    labels = load_labels(folder / "kmeans3" / "labels.pkl")
    name = next(column for column in ("rlnTomoName", "rlnMicrographName") if column in table)
    counted = pd.crosstab(table[name].to_numpy(), labels)
    by_tomogram = table_of(folder / "kmeans3" / "tomograms.csv")
    for row, expected in zip(by_tomogram, counted.to_numpy(), strict=True):
        assert [int(row[f"class{i}"]) for i in range(3)] == expected.tolist()
    epochs = table_of(folder / "convergence.csv")
    assert [row["epoch"] for row in epochs] == ["0", "1", "2"] and epochs[0]["code_r2"] == ""
    assert all(0.5 < float(row["code_r2"]) <= 1 for row in epochs[1:]) and float(epochs[-1]["classes_ari_last"]) == 1
    assert (folder / "controls.png").is_file() and (folder / "convergence.png").is_file()

    way = [str(run), "--kmeans", "3", "--path", "0", "2"]
    assert main(["volumes", *way, "--points", "3", "--original", "--lowpass", "60"]) == 0
    maps = sorted((folder / "kmeans3_path0-2_3points").glob("reference*.mrc"))
    assert len(maps) == 3 and all(mrcfile.validate(str(path)) for path in maps)
    with mrcfile.open(maps[0]) as mrc:
        assert mrc.data.shape == (24, 24, 24) and float(mrc.voxel_size.x) == pytest.approx(15)
        spectrum = np.abs(np.fft.fftn(mrc.data))
    frequency = np.linalg.norm(np.stack(np.meshgrid(*[np.fft.fftfreq(24, 15)] * 3)), axis=0)
    assert np.square(spectrum[frequency > 1 / 45]).sum() < 1e-2 * np.square(spectrum[frequency < 1 / 60]).sum()
    assert main(["movie", *way, "--points", "2", "--size", "64"]) == 0
    made = {path.name for path in (folder / "kmeans3_path0-2_2points").iterdir()}
    assert {"reference0.mrc", "reference1.mrc", "reference.gif", "reference.cxc", "reference.png"} <= made

    capsys.readouterr()
    for words, message in (
        ((*way, "--fsc-weight", "--points", "3"), "fsc_data.csv: not there; make it with the same command and --from"),
        ((*way, "--lowpass", "3"), "--lowpass 3: the maps end at"),
        ((*way, "--sharpen", "1e9"), "--sharpen 1e+09: amplitudes"),
        ((*way, "--original", "--box", "40"), "leave --box and --angpix out"),
        ((str(run), "--pc", "1", "--path", "0", "2"), "--kmeans with either of the last two"),
    ):
        assert main(["volumes", *words]) == 2
        assert message in capsys.readouterr().err
