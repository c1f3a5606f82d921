"""The names that scripts in Python use: the page about them is true, and its example does what it says."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import opustomo
from opustomo import api
from opustomo.checkpoint import Run
from opustomo.data.inputs import Inputs
from opustomo.data.observe import Noise
from opustomo.data.particles import Particles
from small_set import PARTICLES, SmallSet

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text()


def first_cells(heading: str) -> list[str]:
    """Code of the first column of the table below a heading."""
    table = PAGE.split(f" {heading}\n")[1].split("\n#")[0]
    return [code for cell in re.findall(r"^\| (`[^|]*) \|", table, re.M) for code in re.findall(r"`([^`]+)`", cell)]


def test_every_name_stands_there_with_its_arguments() -> None:
    stated = set(first_cells("Functions"))
    for name in set(opustomo.__all__) - {"UserError"}:
        given = inspect.signature(getattr(api, name)).parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in given]
        assert f"{name}({', '.join(map(str, bare))})" in stated
    assert len(stated) == len(opustomo.__all__) - 1


@pytest.mark.parametrize("kind", [Particles, Inputs, Run, Noise], ids=lambda kind: kind.__name__)
def test_fields_named_on_the_page_exist(kind: type) -> None:
    names = {cell.split("(")[0] for cell in first_cells(kind.__name__)}
    assert len(names) > 2
    assert names <= {*kind.__dataclass_fields__, *dir(kind)}  # type: ignore[attr-defined]


def test_functions_of_physics_named_on_the_page_exist() -> None:
    named = re.findall(r"`(opustomo\.[\w.]+)\.(\w+)`", PAGE)
    assert len(named) > 6
    assert all(hasattr(importlib.import_module(module), name) for module, name in named)


def test_example(
    small_set: SmallSet, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Particles that prefer one end of the code are of one state, and the STAR file that is written can be read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(finished_run)
    [code] = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    known: dict[str, object] = {}
    exec(code, known)
    nats = np.asarray(known["nats"])
    assert f"{(nats > 3).sum()} of {PARTICLES}" in capsys.readouterr().out
    last = small_set.state[nats > 3]
    assert 10 < len(last) < PARTICLES and max((last == 0).mean(), (last == 1).mean()) > 0.9
    codes = opustomo.open_run("run").codes[:, 0]
    assert codes[nats > 3].min() > codes[nats < -3].max(), "towards the last map the first code grows"
    assert len(list((tmp_path / "maps").glob("*.mrc"))) == 10
    volume, pixel = opustomo.read_volume("maps/0.mrc")
    run = opustomo.open_run("run")
    assert np.array_equal(volume, np.asarray(known["maps"])[0]) and pixel == pytest.approx(run.grid.working_pixel)
    chosen = opustomo.read_particles("chosen/selected.star")
    assert [Path(name).name for name in chosen.names] == [
        path.name for path, taken in zip(opustomo.read_particles(run.star).image_files, nats > 3, strict=True) if taken
    ]
    assert np.allclose(chosen.origin, run.origin[nats > 3], atol=1e-4)


def test_rows_of_other_particles_are_refused(finished_run: Path, tmp_path: Path) -> None:
    run = opustomo.open_run(str(finished_run))
    for rows in ([0, PARTICLES], [-1], [0.5], np.ones(3, bool)):
        with pytest.raises(opustomo.UserError, match=f"from 0 to {PARTICLES - 1}"):
            opustomo.write_particles(tmp_path, run, rows)
    with pytest.raises(opustomo.UserError, match="no particles"):
        opustomo.write_particles(tmp_path, run, [])
    with pytest.raises(opustomo.UserError, match="decode one"):
        opustomo.write_map(tmp_path / "a.mrc", np.zeros((4, 4, 4)), run)
    assert not list(tmp_path.iterdir())


def test_importing_loads_nothing_that_takes_time() -> None:
    code = "import sys, opustomo; dir(opustomo); sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'typing')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = opustomo.nothing
