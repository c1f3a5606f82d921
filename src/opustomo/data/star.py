"""STAR files: every block, column and value kept as the text it was, numbers made on demand.

Owns: the parsing of STAR text (with line numbers in its errors) and the table that is written back unchanged.
The ``starfile`` library would not do (docs/decisions/0004): it turns numbers into floats, fills short rows silently and
writes values that it reads as something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from opustomo.data.atomic import provenance, write_text
from opustomo.errors import UserError

_QUOTED = re.compile(r"\"[^\"]*\"(?=\s|$)|'[^']*'(?=\s|$)|\S+")
# Values that are only read as what they are within quotes; the last three at the start of a row alone.
_QUOTES_NEEDED = re.compile(r"(?m)^$|[^\S\n]|^[\"'#_]|^data_|^loop_$")
_PARTICLE_BLOCKS = ("particles", "images", "")

Block = pd.DataFrame | dict[str, str]


@dataclass(frozen=True)
class StarFile:
    """A STAR file: ``blocks`` maps the name behind ``data_`` to a table of strings (loop) or a dict (plain pairs)."""

    path: Path
    blocks: dict[str, Block]

    @property
    def particle_block(self) -> str:
        """Name of the block with one row per particle; UserError when there is none."""
        tables = [name for name, block in self.blocks.items() if isinstance(block, pd.DataFrame)]
        named = [name for name in _PARTICLE_BLOCKS if name in tables]
        found = named or [name for name in tables if _match(self.blocks[name], "rlnImageName")]
        if not found:
            blocks = ", ".join("data_" + name for name in self.blocks)
            column = "rlnTomoParticlesFile"
            if (block := next((name for name in self.blocks if self.has(name, column)), None)) is not None:
                raise UserError(
                    f"{self.path}: is an optimisation set; give the table of particles that it names here, "
                    f"{self.text(block, column, 'the set')[0]}"
                )
            raise UserError(
                f"{self.path}: has no table of particles (blocks found: {blocks}); "
                "give the STAR file with one row per subtomogram, e.g. run_data.star"
            )
        return found[0]

    @property
    def optics_block(self) -> str | None:
        """Name of the optics table, None for RELION 3.0 files."""
        return "optics" if "optics" in self.blocks else None

    @property
    def particles(self) -> pd.DataFrame:
        """The particle table (P rows, values are str); UserError when it has no rows."""
        return self.table(self.particle_block)

    def table(self, block: str) -> pd.DataFrame:
        """A block as a table of strings (plain pairs become one row); UserError when absent or empty."""
        found = self.blocks.get(block)
        if found is None:
            raise UserError(f"{self.path}: has no block data_{block}; it is needed here")
        table = found if isinstance(found, pd.DataFrame) else _as_table([list(found.values())], list(found))
        if len(table) == 0:
            raise UserError(f"{self.path}: the table data_{block} has no rows; select at least one particle")
        return table

    def with_rows(self, rows: NDArray[np.integer]) -> StarFile:
        """The file with these rows of its particles alone, in this order."""
        table = self.particles.iloc[rows].reset_index(drop=True)
        return StarFile(self.path, {**self.blocks, self.particle_block: table})

    def has(self, block: str, column: str) -> bool:
        """Whether the column exists (upper and lower case alike: some converters write rlnCoordinatex)."""
        return block in self.blocks and _match(self.blocks[block], column) is not None

    def spelt(self, column: str) -> str:
        """A column of the particles as the file spells it, as it is given where there is none."""
        return _match(self.particles, column) or column

    def text(self, block: str, column: str, purpose: str) -> NDArray[np.object_]:
        """A column as strings, (rows,); UserError naming the column and what it is for when it is missing."""
        table = self.table(block)
        name = _match(table, column)
        if name is None:
            raise UserError(
                f"{self.path}: data_{block} has no column _{column}, needed for {purpose}; "
                "add the column or give the STAR file that has it"
            )
        return table[name].to_numpy(dtype=object)

    def numbers(self, block: str, column: str, purpose: str) -> NDArray[np.float64]:
        """A column as finite numbers, (rows,) float64; UserError naming row and value otherwise."""
        return _numbers(self.text(block, column, purpose), self.path, column)


def read_star(path: Path) -> StarFile:
    """Read a STAR file whole.  UserError: missing, not a STAR file, uneven number of columns (with its line)."""
    blocks: dict[str, Block] = {}
    for name, block in _parse(path).items():
        if isinstance(block, _Loop):
            blocks[name] = _as_table(block.rows, block.columns)
        else:
            blocks[name] = block
    return StarFile(path, blocks)


def write_star(path: Path, blocks: Mapping[str, Block]) -> None:
    """Write blocks in their order, atomically; values are written exactly as the strings they are.

    The first line, a comment, holds version and command.

    UserError: a value with both kinds of quotes, which cannot be written so that it is read as what it is.
    """
    lines = [f"# {provenance()}", ""]
    for name, block in blocks.items():
        lines += [f"data_{name}", ""]
        if isinstance(block, pd.DataFrame):
            lines += ["loop_", *(f"_{column} #{i}" for i, column in enumerate(block, 1))]
            columns = [_written(block[column], f"{path}: data_{name}, column _{column}") for column in block]
            lines += map("\t".join, zip(*columns, strict=True))
        else:
            values = _written(block.values(), f"{path}: data_{name}")
            lines += [f"_{column}\t{value}" for column, value in zip(block, values, strict=True)]
        lines += ["", ""]
    write_text(path, "\n".join(lines))


def _written(values: Iterable[str], where: str) -> list[str]:
    """Values as words of a STAR file.  One search tells whether any needs quotes: they hold no newline."""
    values = list(values)
    if not _QUOTES_NEEDED.search("\n".join(values)):
        return values
    words = []
    for row, value in enumerate(values, 1):
        mark = next((m for m in "\"'" if m not in value), None) if _QUOTES_NEEDED.search(value) else ""
        if mark is None:
            raise UserError(f"{where}, row {row}: {value!r} has quotes of both kinds; rename that file or particle")
        words.append(f"{mark}{value}{mark}")
    return words


def number_columns(names: Sequence[str], values: NDArray[Any], digits: int) -> dict[str, list[str]]:
    """Columns of a table to write, as text: numbers (rows, names) with ``digits`` behind the point."""
    return {name: [f"{value:.{digits}f}" for value in column] for name, column in zip(names, values.T, strict=True)}


def read_numeric_table(path: Path, block: str, columns: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """The asked-for columns that exist in one table, each (rows,) float64; fast enough for thousands of files.

    ``block`` may be missing when the file has a single table.  UserError: no such table, no rows, not a number.
    """
    parsed = _parse(path)
    loops = {name: loop for name, loop in parsed.items() if isinstance(loop, _Loop)}
    loop = loops.get(block) or (next(iter(loops.values())) if len(loops) == 1 else None)
    if loop is None or not loop.rows:
        raise UserError(f"{path}: has no table data_{block} with rows; write the file again")
    index = {name.lower(): i for i, name in enumerate(loop.columns)}
    places = {name: index[name.lower()] for name in columns if name.lower() in index}
    by_column = list(zip(*loop.rows, strict=True))
    try:
        # all columns at once: this runs for every particle's file
        values = np.array([by_column[i] for i in places.values()], np.float64)
    except ValueError:
        values = np.full(1, np.nan)
    if np.isfinite(values).all():
        return dict(zip(places, values, strict=True))
    return {name: _numbers(by_column[i], path, name) for name, i in places.items()}


def _as_table(rows: list[list[str]], columns: list[str]) -> pd.DataFrame:
    """Strings as objects, the names too: pandas' own strings cannot hold what is not UTF-8."""
    return pd.DataFrame(rows, columns=pd.Index(columns, dtype=object), dtype=object)


@dataclass
class _Loop:
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def _parse(path: Path) -> dict[str, _Loop | dict[str, str]]:
    blocks: dict[str, _Loop | dict[str, str]] = {}
    name: str | None = None
    loop: _Loop | None = None
    for number, line in enumerate(_lines(path), 1):
        words = _words(line)
        if not words:
            continue
        quoted = line.lstrip()[0] in "\"'"  # then it is a value, whatever it says
        if words[0].startswith("data_") and len(words) == 1 and not quoted:
            name, loop = words[0][5:], None
            if name in blocks:
                raise UserError(f"{path}: line {number}: block data_{name} occurs twice; remove one of them")
            blocks[name] = {}
        elif name is None:
            raise UserError(f"{path}: is not a STAR file (line {number} comes before any data_ block); check the name")
        elif words[0] == "loop_" and not quoted:
            if blocks[name] != {}:
                raise UserError(f"{path}: line {number}: data_{name} has more than one table; give each a data_ line")
            blocks[name] = loop = _Loop()
        elif loop is not None and (loop.rows or quoted or not words[0].startswith("_")):
            _add_row(loop, words, path, number)
        elif loop is not None:
            _add_column(loop, words[0][1:], path, number)
        else:
            _add_pair(blocks[name], words, path, number)
    if not blocks:
        raise UserError(f"{path}: is not a STAR file (it has no data_ block); check the name")
    return blocks


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such STAR file; check the name and the working directory") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the name and permissions") from error
    if (zero := text.find(b"\0")) >= 0:
        line = text.count(b"\n", 0, zero) + 1
        raise UserError(f"{path}: is binary or damaged (line {line} holds a zero byte); give a STAR file that is text")
    # not str.splitlines: it also splits at form feeds and other rare separators within a value; the "\r" of CRLF
    # is white space to the tokenizer
    return text.decode("utf-8-sig", errors="surrogateescape").split("\n")


def _words(line: str) -> list[str]:
    words = _QUOTED.findall(line) if '"' in line or "'" in line else line.split()
    if "#" in line:
        words = list(takewhile(lambda word: not word.startswith("#"), words))
    if '"' in line or "'" in line:
        words = [w[1:-1] if len(w) > 1 and w[0] in "\"'" and w[-1] == w[0] else w for w in words]
    return words


def _add_row(loop: _Loop, words: list[str], path: Path, number: int) -> None:
    if len(words) != len(loop.columns):
        raise UserError(
            f"{path}: line {number} has {len(words)} values but the table has {len(loop.columns)} columns; "
            "the file is damaged or cut off: write it again"
        )
    loop.rows.append(words)


def _add_column(loop: _Loop, column: str, path: Path, number: int) -> None:
    if column in loop.columns:
        raise UserError(f"{path}: line {number}: column _{column} occurs twice; remove one of them")
    loop.columns.append(column)


def _add_pair(block: Any, words: list[str], path: Path, number: int) -> None:
    if not words[0].startswith("_") or len(words) > 2:
        raise UserError(f"{path}: line {number} is neither a '_name value' pair nor in a loop_ table; repair the file")
    if words[0][1:] in block:
        raise UserError(f"{path}: line {number}: {words[0]} occurs twice in its block; remove one of them")
    block[words[0][1:]] = words[1] if len(words) == 2 else ""


def _match(block: Block, column: str) -> str | None:
    names = list(block)
    if column in names:
        return column
    return next((str(name) for name in names if str(name).lower() == column.lower()), None)


def _numbers(values: Sequence[str] | NDArray[np.object_], path: Path, column: str) -> NDArray[np.float64]:
    try:
        numbers = np.array(list(map(float, values)), np.float64)
    except ValueError:
        numbers = np.array([_number_or_nan(value) for value in values], np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if bad.size:
        row = int(bad[0])
        raise UserError(f"{path}: column _{column}, row {row + 1}: {values[row]!r} is not a finite number; correct it")
    return numbers


def _number_or_nan(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float("nan")
