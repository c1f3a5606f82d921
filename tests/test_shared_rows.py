"""Rows of a cache that two processes make together: the bytes of one process, after a death of one of them, too."""

from __future__ import annotations

import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from opustomo import cli, parallel
from opustomo.data.cache import read_manifest
from opustomo.data.filling import BLOCK, shares
from parallel_work import first_rows, shared_rows
from small_set import PARTICLES, SmallSet

BAD = 40  # counted from 0


@pytest.fixture
def given(small_set: SmallSet, tmp_path: Path) -> tuple[Path, Path]:
    """STAR file and mask of the small set, in which one subtomogram holds a value that is no number."""
    folder = tmp_path / "set"
    shutil.copytree(small_set.folder, folder)
    image = folder / "subtomo" / f"p{BAD:05d}.mrc"
    image.write_bytes(image.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    return folder / "particles.star", folder / "mask.mrc"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_two_processes_make_the_rows_of_one(
    given: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opustomo.data.noise.sample_rows", first_rows)  # not the damaged one
    star, mask = given
    cache = tmp_path / "both" / "cache"
    cache.parent.mkdir()
    assert parallel.launch(2, partial(shared_rows, star, mask, cache, "skip", True)) != 0
    last = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(last) == 1 and "another of the 2 processes ended" in last[0], last
    manifest = read_manifest(cache)
    assert manifest is not None and not manifest.get("finished")
    written = np.fromfile(cache / "checksum.u32", np.uint32).reshape(-1, 2)[:, 0]
    assert 16 <= written.sum() < PARTICLES  # the first round of both is kept

    assert parallel.launch(2, partial(shared_rows, star, mask, cache, "skip", False)) == 0
    (first, usable), (second, told) = (pickle.loads((cache.parent / f"made{i}").read_bytes()) for i in (0, 1))
    assert usable == told == [i != BAD for i in range(PARTICLES)]
    # both take part; no row is made twice, nor one that was there
    assert len(first) + len(second) == len({*first, *second}) == PARTICLES - written.sum()
    assert abs(len(first) - len(second)) <= 1
    line = ["cache", str(star), "-r", str(mask), "--downfrac", "0.7", "--workers", "1"]
    assert cli.main([*line, "--damaged", "skip", "-o", str(tmp_path / "one")]) == 0
    alone = files(tmp_path / "one")
    del alone["damaged.csv"]
    assert files(cache) == alone
    assert not np.frombuffer(alone["numerator.f16"], np.float16).reshape(PARTICLES, -1)[BAD].any()

    capfd.readouterr()
    assert cli.main([*line, "-o", str(tmp_path / "stopped")]) == 2
    reason = capfd.readouterr().err.splitlines()[-1].split("error: ")[1]
    assert parallel.launch(2, partial(shared_rows, star, mask, tmp_path / "stops", "stop", False)) != 0
    assert f"(row {BAD + 1} of {PARTICLES})" in reason
    assert [line.split("error: ")[1] for line in capfd.readouterr().err.splitlines() if "error" in line] == [reason]


@pytest.mark.parametrize("machines", [[0], [0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 2]])
def test_no_two_machines_write_one_page(machines: list[int]) -> None:
    rows = np.arange(5, 7 * BLOCK + 11, 3)
    parts = shares(rows, machines)
    assert np.array_equal(np.sort(np.concatenate(parts)), rows)
    pages: dict[int, set[int]] = {}
    for machine, part in zip(machines, parts, strict=True):
        pages.setdefault(machine, set()).update((part * 8 // 4096).tolist())  # the narrowest rows have 8 bytes
    assert sum(map(len, pages.values())) == len(set.union(*pages.values()))
    for machine in set(machines):
        own = [len(part) for part, other in zip(parts, machines, strict=True) if other == machine]
        assert max(own) - min(own) <= 1
