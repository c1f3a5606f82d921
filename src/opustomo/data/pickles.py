"""Pickle layouts shared with the earlier program: poses, splits, labels, ``config.pkl``.

Owns: reading pickles without running what is in them (arrays, numbers, strings and containers only) and writing
them atomically in the layouts users' scripts expect.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opustomo.data.atomic import atomic
from opustomo.errors import UserError


def _dtype(kind: Any, *_: Any) -> np.dtype[Any]:
    """Numbers, strings and objects; numpy's own would also make structures, whose state can be forged."""
    if not re.fullmatch(r"[|<>=]?[biufcOSU]\d{0,9}", str(kind)):
        raise pickle.UnpicklingError(f"an array of {str(kind)[:40]}")
    return np.dtype(kind)


def _empty(*_: Any) -> NDArray[Any]:
    """An array that gets its shape and values with its state: another size asked for here would only take memory."""
    return np.empty(0)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> NDArray[Any]:
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")


def _bytes(text: str, coding: str) -> bytes:
    return text.encode(coding if coding == "latin1" else "ascii")


_MOST_CLASSES = 1_000_000
_CONTAINERS = (set, frozenset, complex)
# What pickles of arrays, numbers and containers ask for, and what they get instead of functions that would do more.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _bytes,
    ("__builtin__", "bytes"): lambda: b"",
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in _CONTAINERS},
    **{
        (f"{core}.{module}", name): function
        for core in ("numpy.core", "numpy._core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _empty),
            ("multiarray", "scalar", lambda dtype, data: np.frombuffer(data, dtype, 1)[0]),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _Restricted(pickle._Unpickler):
    """Reads data alone.  Python's own unpickler, not that in C: there its steps cannot be overridden.

    An array is never given its state as numpy would: ``__setstate__`` of arrays and types believes what it is told, and
    a damaged state crashes the process, a forged one makes addresses out of bytes.  A byte array is allocated at
    whatever size the file states.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    # of the superclass
    stack: list[Any]
    memo: dict[int, Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, np.dtype):
            full: Any = made.newbyteorder(state[1])
        elif isinstance(made, np.ndarray):
            full = _array(*state[-4:])
        else:
            raise pickle.UnpicklingError(f"it gives a state to {type(made).__name__}")
        # it has just been memorised; backwards this is found at once
        for key in reversed(self.memo):
            if self.memo[key] is made:
                self.memo[key] = full
                break
        self.stack[-1] = full

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def _array(shape: tuple[int, ...], dtype: np.dtype[Any], fortran: bool, content: Any) -> NDArray[Any]:
    """The array of this state; content: bytes, or a list of objects."""
    count = math.prod(shape)
    if not dtype.hasobject:
        flat = np.frombuffer(content, dtype).copy()
    elif isinstance(content, list):
        flat = np.empty(len(content), object)
        for i, value in enumerate(content):
            flat[i] = value
    if len(flat) != count:
        raise pickle.UnpicklingError(f"an array of {count} elements with {len(flat)}")
    return flat.reshape(shape, order="F" if fortran else "C")


def _refuse_bomb(loaded: Any, size: int) -> None:
    """A few bytes that share lists within lists stand for billions of elements, or for endlessly many."""
    seen, waiting = 0, [loaded]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += (*value.keys(), *value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif isinstance(value, np.ndarray) and value.dtype.hasobject:
            waiting += value.ravel().tolist()
        seen += 1
        if seen + len(waiting) > size:
            raise pickle.UnpicklingError("it repeats its parts without end")


class Poses(NamedTuple):
    """Pose pickle: rotations (P, 3, 3) float32, origins (P, 3) as a fraction of the box, Euler (P, 3) degrees."""

    rotation: NDArray[np.float32]
    origin: NDArray[np.float32]
    euler: NDArray[np.float32]


def load_pickle(path: Path) -> Any:
    """The first object of a pickle file: arrays, numbers, strings, containers.  UserError for anything else."""
    return load_pickles(path, 1)[0]


def _load_tensor(path: Path) -> Any:
    """A tensor as ``torch.save`` writes it (the earlier program's split) as an array; otherwise as ``load_pickle``."""
    if not zipfile.is_zipfile(path):
        return load_pickle(path)
    from opustomo.data.tensors import read_tensors  # here: labels and poses are read without torch

    found = read_tensors(path)
    return found.numpy() if hasattr(found, "numpy") else found


def load_pickles(path: Path, count: int) -> list[Any]:
    """The first ``count`` objects pickled one after another into a file (``config.pkl`` has two)."""
    try:
        raw = path.read_bytes()
        file = io.BytesIO(raw)  # not the file: a read cannot be larger than what there is
        found = [_Restricted(file).load() for _ in range(count)]
        _refuse_bomb(found, len(raw) + 16)
        return found
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the name") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the name and permissions") from error
    # a damaged or hostile pickle can raise any exception on its way through the unpickler
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{path}: refused, not a pickle of plain arrays, numbers and containers ({reason}); write it again"
        ) from None


def save_pickle(path: Path, obj: Any) -> None:
    """Pickle one object atomically (protocol 4, as every Python 3 reads)."""
    _save(path, [obj])


def save_config_pickle(path: Path, config: dict[str, Any], meta: dict[str, Any]) -> None:
    """``config.pkl``: two pickled dicts one after another, the options and time / cmd / version."""
    _save(path, [config, meta])


def save_poses(path: Path, rotation: NDArray[Any], origin_fraction: NDArray[Any], euler: NDArray[Any]) -> None:
    """Pose pickle: (P, 3, 3) rotations, (P, 3) origins as a fraction of the box, (P, 3) Euler degrees."""
    save_pickle(path, tuple(np.ascontiguousarray(a, np.float32) for a in (rotation, origin_fraction, euler)))


def load_poses(path: Path) -> Poses:
    """Read a pose pickle; UserError when it is not three arrays of P poses."""
    found = load_pickle(path)
    if not isinstance(found, tuple | list) or len(found) != 3:
        raise UserError(
            f"{path}: is not a pose pickle of rotations, origins and Euler angles; make it with "
            "`dsdsh prepare STAR BOX APIX`"
        )
    arrays = [value for value in found if isinstance(value, np.ndarray) and value.dtype.kind in "iuf"]
    shapes = [array.shape for array in arrays]
    n = len(arrays[0]) if shapes and shapes[0] else 0
    if n == 0 or shapes != [(n, 3, 3), (n, 3), (n, 3)]:
        raise UserError(
            f"{path}: is a pose pickle of the wrong shapes {shapes}, not (P, 3, 3), (P, 3), (P, 3); "
            "make it again with `dsdsh prepare STAR BOX APIX`"
        )
    with np.errstate(over="ignore"):  # what overflows is not finite
        poses = Poses(*(np.asarray(value, np.float32) for value in arrays))
    if not all(np.isfinite(value).all() for value in poses):
        raise UserError(f"{path}: has poses that are not finite numbers; make it again with `dsdsh prepare`")
    return poses


def save_split(path: Path, permutation: NDArray[Any]) -> None:
    """A permutation of P particles, of which the first part trains."""
    save_pickle(path, np.asarray(permutation, np.int64))


def load_split(path: Path, particles: int) -> NDArray[np.int64]:
    """Read a split: a permutation of 0 .. ``particles`` - 1; UserError when it is none."""
    split = _integers(_load_tensor(path), path, "a split")
    if not np.array_equal(np.sort(split), np.arange(particles)):
        raise UserError(
            f"{path}: is not a permutation of the {particles} particles ({split.size} entries); "
            "it belongs to another data set: give another --split"
        )
    return split


def load_indices(path: Path, particles: int) -> NDArray[np.int64]:
    """Row numbers (``--ind``), pickled or as text; sorted, each once.  UserError when outside 0 .. P - 1."""
    if path.suffix.lower() in (".txt", ".csv", ".dat"):
        found: Any = _text_numbers(path)
    else:
        found = load_pickle(path)
    index = np.unique(_integers(found, path, "a list of row numbers"))
    if index.size == 0 or index[0] < 0 or index[-1] >= particles:
        span = f"{index[0]} .. {index[-1]}" if index.size else "none"
        raise UserError(f"{path}: row numbers {span} do not fit 0 .. {particles - 1}; they belong to another STAR file")
    return index


def load_labels(path: Path, least: int = 0) -> NDArray[np.int64]:
    """Class of every particle (P,), 0-based, from ``labels.pkl``; least: -1 where some may be in none."""
    labels = _integers(load_pickle(path), path, "a list of labels")
    if labels.size == 0 or labels.min() < least or labels.max() < 0 or labels.max() >= _MOST_CLASSES:
        raise UserError(f"{path}: has no labels, negative ones or any beyond {_MOST_CLASSES}; run the analysis again")
    return labels


def _save(path: Path, objects: Sequence[Any]) -> None:
    with atomic(path) as temporary, temporary.open("wb") as file:
        for obj in objects:
            pickle.dump(obj, file, protocol=4)


def _text_numbers(path: Path) -> list[float]:
    found = []
    try:
        lines = path.read_text().split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the name") from error
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text; give one row number per line, or name a pickle .pkl") from None
    for number, line in enumerate(lines, 1):
        for word in line.replace(",", " ").split():
            try:
                found.append(float(word))
            except ValueError:
                raise UserError(f"{path}: line {number}: {word!r} is no row number; give one per line") from None
    return found


def _integers(found: Any, path: Path, what: str) -> NDArray[np.int64]:
    try:
        given = np.asarray(found)
        values = given.astype(np.float64) if given.dtype.kind != "c" else np.full(1, np.nan)
    except (TypeError, ValueError, OverflowError):
        given = values = np.full(1, np.nan)
    if given.dtype == bool:
        raise UserError(f"{path}: is a mask of true and false, not {what}; write np.flatnonzero(mask) instead")
    if values.ndim != 1 or not (np.abs(values) < 2**53).all() or not np.array_equal(values, np.round(values)):
        raise UserError(f"{path}: is not {what} (one-dimensional integers); check which file this is")
    return values.astype(np.int64)
