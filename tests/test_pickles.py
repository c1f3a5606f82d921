"""Pickles are read for their data and never run; layouts are those users' scripts expect."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from opustomo.data import pickles as legacy
from opustomo.errors import UserError


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"rotations": [x]}])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, wrap: object) -> None:
    path = tmp_path / "poses.pkl"
    path.write_bytes(pickle.dumps(wrap(Hostile(tmp_path / "ran"))))  # type: ignore[operator]
    with pytest.raises(UserError, match=r"poses.pkl: refused, .*(posix|nt)\.system") as caught:
        legacy.load_pickle(path)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "builtins getattr", "numpy.core.multiarray fromstring", "os system", "torch load"]
)
def test_only_constructors_of_data_are_reachable(tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    path = tmp_path / "a.pkl"
    path.write_bytes(b"c" + module.encode() + b"\n" + attribute.encode() + b"\n.")
    with pytest.raises(UserError, match="refused"):
        legacy.load_pickle(path)


@pytest.mark.parametrize(("protocol", "package"), [(2, b"numpy.core"), (2, b"numpy._core"), (4, None), (5, None)])
def test_arrays_of_numpy_1_and_2_load(tmp_path: Path, protocol: int, package: bytes | None) -> None:
    data = {
        "a": np.arange(6.0).reshape(2, 3).T,
        "b": np.float32(2.5),
        "c": (1, None, "x", b"y", {3}),
        "d": np.array(["s", None], object),
        "e": OrderedDict(k=1),
    }
    raw = pickle.dumps(data, protocol)
    if package:  # the name of numpy's inner package changed with version 2
        raw = raw.replace(b"numpy._core", package).replace(b"numpy.core", package)
    path = tmp_path / "a.pkl"
    path.write_bytes(raw)
    found = legacy.load_pickle(path)
    np.testing.assert_array_equal(found["a"], data["a"])
    assert found["b"] == 2.5 and found["c"] == data["c"] and found["e"] == data["e"]
    assert found["d"].tolist() == ["s", None]


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps(np.zeros(100))[:-30]])
def test_damaged_pickles(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="refused"):
        legacy.load_pickle(path)
    with pytest.raises(UserError, match="no such file"):
        legacy.load_pickle(tmp_path / "absent.pkl")


def test_pose_pickle_is_a_plain_tuple_of_three(tmp_path: Path) -> None:
    rotation, origin, euler = np.tile(np.eye(3), (5, 1, 1)), np.full((5, 3), 0.25), np.zeros((5, 3))
    path = tmp_path / "out" / "poses.pkl"
    legacy.save_poses(path, rotation, origin, euler)
    raw = pickle.loads(path.read_bytes())
    assert type(raw) is tuple and [part.shape for part in raw] == [(5, 3, 3), (5, 3), (5, 3)]
    assert all(part.dtype == np.float32 for part in raw)
    found = legacy.load_poses(path)
    np.testing.assert_array_equal(found.origin, origin)
    assert [entry.name for entry in path.parent.iterdir()] == ["poses.pkl"]


@pytest.mark.parametrize(
    "content",
    [
        (np.zeros((5, 3, 3)), np.zeros((5, 2))),
        (np.zeros((5, 3, 3)), np.zeros((4, 3)), np.zeros((5, 3))),
        (np.full((5, 3, 3), np.nan), np.zeros((5, 3)), np.zeros((5, 3))),
        np.arange(3),
        "text",
    ],
)
def test_other_pickles_are_no_poses(tmp_path: Path, content: object) -> None:
    legacy.save_pickle(tmp_path / "a.pkl", content)
    with pytest.raises(UserError, match=r"a\.pkl: .*pose"):
        legacy.load_poses(tmp_path / "a.pkl")


def test_config_pickle_is_two_dicts_one_after_another(tmp_path: Path) -> None:
    legacy.save_config_pickle(tmp_path / "config.pkl", {"model_args": {"zdim": 12}}, {"version": "x"})
    with (tmp_path / "config.pkl").open("rb") as file:
        assert pickle.load(file) == {"model_args": {"zdim": 12}}
        assert pickle.load(file) == {"version": "x"}
    assert legacy.load_pickles(tmp_path / "config.pkl", 2) == [{"model_args": {"zdim": 12}}, {"version": "x"}]


def test_split_must_be_a_permutation_of_this_set(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(10)
    legacy.save_split(tmp_path / "split.pkl", order)
    np.testing.assert_array_equal(legacy.load_split(tmp_path / "split.pkl", 10), order)
    with pytest.raises(UserError, match="not a permutation of the 11 particles"):
        legacy.load_split(tmp_path / "split.pkl", 11)


def test_row_numbers_as_pickle_or_text(tmp_path: Path) -> None:
    legacy.save_pickle(tmp_path / "ind.pkl", [5, 2, 2])
    (tmp_path / "ind.txt").write_text("5\n2, 2\n")
    for name in ("ind.pkl", "ind.txt"):
        assert legacy.load_indices(tmp_path / name, 6).tolist() == [2, 5]
        with pytest.raises(UserError, match=r"2 \.\. 5 do not fit 0 \.\. 4"):
            legacy.load_indices(tmp_path / name, 5)
    legacy.save_pickle(tmp_path / "bad.pkl", [0.5])
    with pytest.raises(UserError, match="one-dimensional integers"):
        legacy.load_indices(tmp_path / "bad.pkl", 5)
    with pytest.raises(UserError, match="no labels"):
        legacy.save_pickle(tmp_path / "labels.pkl", np.array([0, -1]))
        legacy.load_labels(tmp_path / "labels.pkl")
