"""Archives of tensors and arrays (``torch.save``, ``np.savez``): written atomically, read without running anything.

Owns: the checks before their readers see them.  Both are zip archives with a checksum for every part, which torch does
not look at; both would make an array of any size that a few bytes claim.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opustomo.data.atomic import atomic
from opustomo.errors import reading

_LARGEST = 1 << 27  # bytes that compressed parts may take beyond what the archive takes


def save_tensors(path: Path, payload: dict[str, Any]) -> None:
    """``torch.save`` of tensors and plain values, atomically.  Raises UserError where the disk is full."""
    with atomic(path) as temporary, temporary.open("wb") as handle:
        try:
            torch.save(payload, handle)
        except RuntimeError as error:
            # torch closes its archive after a failed write, which fails in words of its own and hides the reason
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def save_arrays(path: Path, /, **arrays: NDArray[Any]) -> None:
    """``np.savez``, atomically.  Raises UserError where the disk is full."""
    with atomic(path) as temporary, temporary.open("wb") as handle:
        np.savez(handle, allow_pickle=False, **arrays)


def read_tensors(path: Path, fix: str = "write it again") -> Any:
    """What ``torch.save`` wrote: tensors and plain values.  Raises UserError (ending in ``fix``): absent or damaged."""
    with reading(path, fix), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's thoughts about a damaged file, which is refused in one line
        _inspect(path)
        try:
            payload = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # torch tells how to run what is in it
            raise ValueError("it holds more than tensors and plain values") from None
        size = path.stat().st_size
        if any(tensor.nbytes > size for tensor in _tensors(payload)):
            raise ValueError("a tensor larger than the file")
    return payload


def read_arrays(path: Path, fix: str) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz``.  Raises UserError (ending in ``fix``) where it is absent or damaged."""
    with reading(path, fix):
        _inspect(path)
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}


def _inspect(path: Path) -> None:
    """Every part must have its checksum, and no more bytes than an archive of this size may hold."""
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > path.stat().st_size + _LARGEST:
            raise ValueError("its parts claim more than the file can hold")
        if (bad := archive.testzip()) is not None:
            raise ValueError(f"the bytes of {bad} do not have their checksum")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in inner for tensor in _tensors(part)]
