"""config.yaml of a run: read as plain options, each of the type it has on the command line.

Owns: the checks that let every verb trust these values.  Nothing heavy is imported: the command line needs them before
a verb runs.
"""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from opustomo.config import GridOptions, InputOptions, LinearConfig, TrainConfig
from opustomo.errors import UserError, reading

_LARGEST_FILE = 1 << 20
# what a run resolves or adds; the rest are options
_RESOLVED: dict[str, Any] = {
    "kind": Literal["network", "linear", "map"],
    "box": int, "pixel_size": float, "working_box": int, "crop": int, "templateres": int, "particles": int,
    "rows": str | None, "identity": str, "encoded_with": str, "made_by": str, "star_sha256": str | None,
    "mask_sha256": str | None,
}  # fmt: skip


class _Plain(yaml.SafeLoader):
    """No aliases: a few lines of them stand for more values than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases are not for config.yaml")
        return super().compose_node(parent, index)


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml of a run.  Raises UserError if the folder is no run, or naming what is wrong with the file."""
    path = folder / "config.yaml"
    if not path.exists():
        found = "is a file, not a run folder" if folder.is_file() else "no run here (config.yaml is missing)"
        raise UserError(f"{folder}: {found}; give the folder that `train -o` or `linear -o` wrote")
    with reading(path, "restore it from a copy"):
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError("too large")
        try:
            values = _Plain(path.read_text(encoding="utf-8", errors="surrogateescape")).get_single_data()
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a table of options; restore it from a copy")
    hints = {
        name: hint
        for group in (LinearConfig, TrainConfig, InputOptions, GridOptions)
        for name, hint in get_type_hints(group).items()
    }
    for name, hint in (hints | _RESOLVED).items():
        if name in values and not _fits(values[name], hint):
            raise UserError(f"{path}: {name} cannot be {values[name]!r:.80}; restore the file from a copy")
    return values


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can stand for an option of this type; paths are strings, groups are not looked at."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is int:
        return type(value) is int and abs(value) < 1 << 31
    if hint in (str, Path):
        return type(value) is str and "\0" not in value
    return value is None if hint is type(None) else hint is not bool or type(value) is bool
