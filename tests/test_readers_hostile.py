"""Readers and bytes of any kind: what cannot be used is refused in one line, quickly and in bounded memory."""

from __future__ import annotations

import pickle
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz_targets import TARGETS, attempt, seeds
from opustomo.data.mrc import read_volume
from opustomo.data.pickles import load_labels, load_pickle
from opustomo.data.star import read_star, write_star
from opustomo.errors import UserError, printable
from star_sets import BOX, Set

CORPUS = sorted(path for path in (Path(__file__).parent / "corpus").rglob("*") if path.is_file())
WORDS = [
    b"nan", b"1e999", b"1e308", b"-1", b"99999999999999999999", b'"', b"'", b"#", b"\0", b"\r", b"\n", b" ", b"\x0c",
    b"\xff", "\u2028".encode(), b"loop_", b"data_", b"data_optics", b"_rlnX", b"/", b"..", b"[[[[", b"&a", b"*a",
    b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\x96\xff\xff\xff\xff\xff\0\0\0", b"R", b"b", b"0x1F",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def good(folder: Path) -> dict[str, list[bytes]]:
    files = seeds(folder)
    for target in TARGETS:  # what libraries reserve at their first use is not the file's doing
        attempt(target, files[target][0], folder)
    return files


@contextmanager
def bounded(seconds: float = 5.0, memory: int = 1 << 30) -> Iterator[None]:
    """At most this much more memory, and time: an allocation beyond it raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, start = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - start < seconds


@pytest.mark.parametrize("target", TARGETS)
def test_the_good_files_are_read(target: str, folder: Path, good: dict[str, list[bytes]]) -> None:
    for content in good[target]:
        assert attempt(target, content, folder) is None


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[int, float, bytes, int]]:
    """Up to four changes: what is done, where (a fraction of the file), with which bytes, over how many."""
    change = st.tuples(
        st.integers(0, 3), st.floats(0, 1), st.sampled_from(WORDS) | st.binary(max_size=4), st.integers(1, 64)
    )
    return draw(st.lists(change, min_size=1, max_size=4))


def damaged(content: bytes, changes: list[tuple[int, float, bytes, int]]) -> bytes:
    raw = bytearray(content)
    for kind, where, word, length in changes:
        at = int(where * len(raw))
        if kind == 0:
            raw[at:at] = word
        elif kind == 1:
            raw[at : at + len(word)] = word
        elif kind == 2:
            del raw[at : at + length]
        else:
            del raw[at:]
    return bytes(raw)


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_are_used_or_refused(target: str, folder: Path, good: dict[str, list[bytes]]) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(which=st.integers(0, 2), changes=damages())
    def run(which: int, changes: list[tuple[int, float, bytes, int]]) -> None:
        files = good[target]
        with bounded():
            attempt(target, damaged(files[which % len(files)], changes), folder)

    run()


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_that_once_broke_something(path: Path, folder: Path, good: dict[str, list[bytes]]) -> None:
    """tests/corpus/READER/NAME; each crashed, hung or was misread before."""
    with bounded():
        attempt(path.parent.name, path.read_bytes(), folder)


# no newline: a value cannot hold one; no NUL: such a file is refused
VALUES = st.text(st.characters(codec="utf-8", exclude_characters="\n\0"), max_size=6) | st.sampled_from(
    ["loop_", "data_", "_x", "#", "'", "a b", "", "\udcff", "data_1/p.mrc", "it's", '5"', "\x85", "\x1c"]
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(rows=st.integers(1, 3).flatmap(lambda n: st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=1)))
def test_what_is_written_is_read_back(rows: list[list[str]], folder: Path) -> None:
    path = folder / "written.star"
    table = pd.DataFrame(rows, columns=[f"rln{i}" for i in range(len(rows[0]))], dtype=object)
    try:
        write_star(path, {"": table, "pairs": {"a": rows[0][0], "b": "2"}})
    except UserError as error:
        assert "quotes of both kinds" in str(error)
        return
    found = read_star(path).blocks
    assert found[""].to_numpy().tolist() == rows  # type: ignore[union-attr]
    assert found["pairs"] == {"a": rows[0][0], "b": "2"}


def test_a_million_rows(tmp_path: Path) -> None:
    path = tmp_path / "large.star"
    header = "data_particles\n\nloop_\n" + "".join(f"_rln{i} #{i}\n" for i in range(8))
    path.write_text(header + "sub/p1.mrc 1.5 2.5 3.5 0 0 1 x\n" * 200_000)
    with bounded(30.0):
        table = read_star(path)
        assert len(table.particles) == 200_000 and table.numbers("particles", "rln1", "a test").sum() == 300_000


@pytest.mark.parametrize("size", [(2000, 2000, 2000), (65535, 65535, 65535), (2**31 - 1, 1, 1), (-1, 16, 16)])
def test_headers_that_lie_about_the_size(size: tuple[int, int, int], tmp_path: Path) -> None:
    path = Set(tmp_path / "set", 1).write().parent / "sub" / "p0.mrc"
    raw = bytearray(path.read_bytes()[:2048])
    raw[:12] = np.array(size, "<i4").tobytes()
    path.write_bytes(raw)
    with bounded(), pytest.raises(UserError, match=r"p0\.mrc: (is truncated|is not an MRC volume)"):
        read_volume(path)


def test_pipes_do_not_wait_for_ever(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "p.mrc")
    with bounded(), pytest.raises(UserError, match=r"p\.mrc: cannot be read"):
        read_volume(tmp_path / "p.mrc")


def nested(depth: int = 9) -> bytes:
    """Lists of ten that are one list: a billion elements in a few dozen bytes."""
    value: list[object] = [1] * 10
    for _ in range(depth):
        value = [value] * 10
    return pickle.dumps(value)


def endless() -> bytes:
    value: list[object] = []
    value.append(value)
    return pickle.dumps(value)


GREEDY = {
    "nested lists": nested(),
    "a list in itself": endless(),
    "bytearray": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
    "bytes": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b".",
    "memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "array": b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I99999999999\ntS'd'\ntR.",
    # of whose type a forged state could say that it holds no pointers, so that its bytes become some
    "structure": pickle.dumps(np.dtype([("a", "O")])),
    "class": b"c__builtin__\nbytearray\n(I99999999999\ntR.",
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_pickles(name: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.pkl"
    path.write_bytes(GREEDY[name])
    with bounded(), pytest.raises(UserError, match=r"labels\.pkl: "):
        load_labels(path)


def test_an_array_with_a_false_state_is_refused(tmp_path: Path) -> None:
    """numpy's own __setstate__ ends the process here."""
    raw = pickle.dumps(np.array(["s", None], object), 2)
    path = tmp_path / "a.pkl"
    for state in (b"K\x02\x85", b"K\xff\x85"):
        path.write_bytes(raw.replace(b"K\x02\x85", state))
        if state == b"K\x02\x85":
            assert load_pickle(path).tolist() == ["s", None]
        else:
            with pytest.raises(UserError, match="an array of 255 elements with 2"):
                load_pickle(path)


def test_a_mask_is_no_list_of_rows(folder: Path) -> None:
    message = attempt("indices", pickle.dumps(np.array([True, False, True, True])), folder)
    assert message is not None and "np.flatnonzero" in message


def test_what_a_terminal_would_obey_is_shown_instead() -> None:
    assert str(UserError("a\x1b[31m\nb\udcff\u202e é")) == "a\\x1b[31m b\\udcff\\u202e é"
    assert printable("two\nlines") == "two\nlines"


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("rlnRandomSubset", "7", "_rlnRandomSubset, row 2: 7 is no half set"),
        ("rlnAngleRot", "1e300", "row 2 has the angle 1e+300"),
        ("rlnOriginX", "1e300", "row 2 has the origin 1e+300"),
        ("rlnMagnification", "1e-320", "rlnMagnification"),
        ("rlnImageName", "/", "/"),
        ("rlnImageName", "x" * 5000, "missing"),
        ("rlnCtfImage", "/", "CTF"),
        ("rlnCtfImage", "..", "CTF"),
    ],
)
def test_values_that_cannot_be(column: str, value: str, words: str, tmp_path: Path) -> None:
    from opustomo.config import InputOptions
    from opustomo.data.readers import read_particles

    made = Set(tmp_path / "set")
    made.columns.setdefault(column, ["1"] * made.n)[1] = value
    Set(tmp_path / "set").write(ctf=column != "rlnCtfImage")
    made.write_star()
    with pytest.raises(UserError) as caught:
        read_particles(made.star, InputOptions())
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_grey_values_beyond_use(value: float, tmp_path: Path) -> None:
    from opustomo.data.observe import read_band
    from opustomo.data.readers import read_transfer_volume
    from opustomo.physics.grid import Grid
    from star_sets import PIXEL, put_volume

    put_volume(tmp_path / "p.mrc", np.ones((BOX,) * 3, np.float32))
    raw = (tmp_path / "p.mrc").read_bytes()
    (tmp_path / "p.mrc").write_bytes(raw[:-400] + np.float32(value).tobytes() + raw[-396:])
    with pytest.raises(UserError, match=r"p\.mrc: NaN, infinite or absurdly large"):
        read_band(tmp_path / "p.mrc", Grid(BOX, PIXEL, 12, 10, 16))
    with pytest.raises(UserError, match=r"p\.mrc: NaN, infinite or absurdly large"):
        read_transfer_volume(tmp_path / "p.mrc", BOX)
