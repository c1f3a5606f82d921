"""Pickle layouts shared with the earlier program: poses, splits, labels, ``config.pkl``.

Owns: reading pickles without running what is in them (arrays, numbers, strings and containers only) and writing
them atomically in the layouts users' scripts expect.
"""

from __future__ import annotations

import codecs
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opustomo.data.atomic import atomic
from opustomo.errors import UserError


def _constructor(value: Any, protocol: int) -> Any:
    return value.__reduce_ex__(protocol)[0]


# The functions with which numpy rebuilds arrays, taken from the running numpy: its modules moved between 1 and 2.
_NUMPY: dict[tuple[str, str], Any] = {
    ("multiarray", "_reconstruct"): _constructor(np.zeros((1, 1))[:, ::2], 2),
    ("multiarray", "scalar"): _constructor(np.float64(0), 2),
    ("numeric", "_frombuffer"): _constructor(np.zeros(1), 5),
}
_CONTAINERS = (set, frozenset, complex, bytearray, slice, range)
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): codecs.encode,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in _CONTAINERS},
    **{(f"{core}.{module}", name): f for (module, name), f in _NUMPY.items() for core in ("numpy.core", "numpy._core")},
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


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
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return load_pickle(path)
    except OSError:
        return load_pickle(path)
    import torch  # here: labels and poses are read without it

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0][:120]}); write it again") from None
    return found.numpy() if isinstance(found, torch.Tensor) else found


def load_pickles(path: Path, count: int) -> list[Any]:
    """The first ``count`` objects pickled one after another into a file (``config.pkl`` has two)."""
    try:
        with path.open("rb") as file:
            return [_Restricted(file).load() for _ in range(count)]
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
    arrays = [np.asarray(value) for value in found]
    shapes = [array.shape for array in arrays]
    n = len(arrays[0]) if arrays[0].ndim else 0
    if n == 0 or shapes != [(n, 3, 3), (n, 3), (n, 3)]:
        raise UserError(
            f"{path}: is a pose pickle of the wrong shapes {shapes}, not (P, 3, 3), (P, 3), (P, 3); "
            "make it again with `dsdsh prepare STAR BOX APIX`"
        )
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


def load_labels(path: Path) -> NDArray[np.int64]:
    """Class of every particle (P,), 0-based, from ``labels.pkl``."""
    labels = _integers(load_pickle(path), path, "a list of labels")
    if labels.size == 0 or labels.min() < 0:
        raise UserError(f"{path}: has no labels or negative ones; run the analysis again")
    return labels


def _save(path: Path, objects: Sequence[Any]) -> None:
    with atomic(path) as temporary, temporary.open("wb") as file:
        for obj in objects:
            pickle.dump(obj, file, protocol=4)


def _text_numbers(path: Path) -> list[float]:
    try:
        return [float(word) for word in path.read_text().replace(",", " ").split()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the name") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; give one row number per line") from None


def _integers(found: Any, path: Path, what: str) -> NDArray[np.int64]:
    try:
        values = np.asarray(found, np.float64)
    except (TypeError, ValueError):
        values = np.full((1, 1), np.nan)
    if values.ndim != 1 or not np.array_equal(values, np.round(values)):
        raise UserError(f"{path}: is not {what} (one-dimensional integers); check which file this is")
    return values.astype(np.int64)
