"""STAR files of several tomograms or classes as one.

Owns: what may be joined: one dialect, pixel size and box, the same columns, no particle twice; optics groups that are
equal become one, others are numbered anew, and file names stay right where the files lie in different folders.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from opustomo.data.export import optimisation_blocks
from opustomo.data.readers import relion
from opustomo.data.readers.files import Locator
from opustomo.data.readers.sampling import differ
from opustomo.data.readers.source import Source, read_source
from opustomo.data.star import Block, StarFile, write_star
from opustomo.errors import UserError

_FILES = ("rlnImageName", "rlnCtfImage")
_NAMED = ("rlnOpticsGroup", "rlnOpticsGroupName")
_SHOWN = 4  # columns in a message


def combine(paths: Sequence[Path], output: Path, common: bool = False) -> list[str]:
    """Write the particles of all STAR files, in their order, as one; returns what was done, in lines.

    common: only columns that all have, where they do not have the same.  UserError, naming both files: other dialects,
    pixel sizes, boxes, columns or blocks, or a particle that is in the result twice.
    """
    if output.resolve() in {path.resolve() for path in paths}:
        raise UserError(f"{output}: is one of the files to combine; give another name")
    sources = [read_source(path) for path in paths]
    first = sources[0]
    lines: list[str] = []
    for source in sources[1:]:
        _refuse_different(first, source)
    moved = [_names_from(source, output.parent, lines) for source in sources]
    optics, tables = _optics(moved)
    columns = list(map(str, tables[0]))
    shared = [name for name in columns if all(name in table for table in tables)]
    for path, table in zip(paths, tables, strict=True):
        if not common and (other := list(map(str, set(table) ^ set(columns)))):
            raise UserError(
                f"{paths[0]} and {path} do not have the same columns ({', '.join(sorted(other)[:_SHOWN])}); add or "
                "remove them, or give --common-columns to keep those that all have"
            )
        if left := [str(name) for name in table if name not in shared]:
            lines.append(f"{path}: without its columns {', '.join(left)}")
    joined = pd.concat([table[shared] for table in tables], ignore_index=True)
    block = first.whole.particle_block
    blocks: dict[str, Block] = {
        **first.whole.blocks,
        **({"optics": optics} if optics is not None else {}),
        block: joined,
    }
    _refuse_twice(sources, StarFile(output, blocks), paths)
    write_star(output, blocks)
    if first.optimisation is not None:
        set_path = output.with_name(f"{output.stem}_optimisation_set.star")
        write_star(set_path, optimisation_blocks(first.optimisation, first.whole.path, output))
        lines.append(f"{set_path} names them with their tomograms")
        lines += _told_folder(first, paths[0], output)
    counts = " + ".join(str(len(source)) for source in sources)
    return [*lines, f"{counts} = {sum(map(len, sources))} particles written to {output}"]


def _refuse_different(first: Source, other: Source) -> None:
    """UserError where two sets cannot stand in one file."""
    a, b = first.whole, other.whole
    if first.format != other.format or relion.version(a) != relion.version(b):
        raise UserError(
            f"{a.path} is {relion.version(a)} ({first.format}) and {b.path} {relion.version(b)} ({other.format}); make "
            "them alike, e.g. RELION 3.0 of both with dsdsh convert_star"
        )
    values: tuple[tuple[str, Callable[[StarFile], Any]], ...] = (
        ("pixel size", lambda star: (relion.pixel_size(star) or (None,))[0]),
        ("size of the coordinates' pixels", _coordinate_pixel),
        ("box", relion.image_size),
        ("premultiplication with the CTF", relion.premultiplied),
    )
    for what, value in values:
        one, two = value(a), value(b)
        if (one is None) != (two is None) or (one is not None and differ(one, two)):
            raise UserError(
                f"{a.path} and {b.path} differ in {what} ({one} and {two}); particles of both are not read together: "
                "extract them alike"
            )
    if (first.tomograms and first.tomograms.resolve()) != (other.tomograms and other.tomograms.resolve()):
        raise UserError(
            f"{a.path} and {b.path} have different tomograms files ({first.tomograms}, {other.tomograms}); combine the "
            "sets in the program that made them"
        )
    keep = {"optics", a.particle_block, b.particle_block}
    for name in {*a.blocks, *b.blocks} - keep:
        if not _equal(a.blocks.get(name), b.blocks.get(name)):
            raise UserError(f"{a.path} and {b.path} differ in data_{name}; make them alike, or remove that block")


def _coordinate_pixel(star: StarFile) -> float | None:
    placed = star.has(star.particle_block, "rlnCoordinateX")
    return relion.coordinate_pixel(star) if placed else None


def _equal(a: Block | None, b: Block | None) -> bool:
    if isinstance(a, pd.DataFrame) and isinstance(b, pd.DataFrame):
        return a.equals(b)
    return type(a) is type(b) and not isinstance(a, pd.DataFrame) and a == b


def _names_from(source: Source, folder: Path, lines: list[str]) -> StarFile:
    """The file with names relative to ``folder`` where they are relative to the STAR's own and that is another.

    Names that lead nowhere from the STAR's folder (they are relative to --datadir) and absolute ones stay.
    """
    star, table = source.whole, source.whole.particles
    own = star.path.parent.resolve()
    if own == folder.resolve() or source.optimisation is not None:
        return star
    there = next((name.rpartition("@")[2] for name in map(str, relion.image_names(star))), "")
    if Path(there).is_absolute() or not (own / there).exists():
        return star
    base = os.path.relpath(own, folder.resolve())
    changed = {}
    for column in _FILES:  # rlnCtfImage may name volumes in whose place there are CTF STAR files
        if star.has(star.particle_block, column):
            parts = [str(name).rpartition("@") for name in star.text(star.particle_block, column, "the files")]
            changed[column] = [
                before + at + (name if Path(name).is_absolute() else os.path.normpath(f"{base}/{name}"))
                for before, at, name in parts
            ]
    lines.append(f"{star.path}: file names are now relative to {folder}")
    return StarFile(star.path, {**star.blocks, star.particle_block: table.assign(**changed)})


def _told_folder(source: Source, path: Path, output: Path) -> list[str]:
    """A line that says where the names of an optimisation set lead from, where that is neither beside it nor here."""
    name = str(relion.image_names(source.whole)[0])
    found = next((folder for folder in Locator(path, None).folders if (folder / name).exists()), None)
    if found is None or found.resolve() in (output.parent.resolve(), Path.cwd().resolve()):
        return []
    return [f"file names in both are relative to {found}: read them with --datadir {shlex.quote(str(found))}"]


def _optics(stars: Sequence[StarFile]) -> tuple[pd.DataFrame | None, list[pd.DataFrame]]:
    """One optics table, and the particles with their groups' numbers in it; equal groups become one.

    UserError: other columns, a particle's group that is not there.
    """
    tables = [star.particles for star in stars]
    if stars[0].optics_block is None:
        return None, tables
    groups: list[dict[str, str]] = []
    columns = list(stars[0].table("optics"))
    changed = []
    for star, table in zip(stars, tables, strict=True):
        optics = star.table("optics")
        if set(optics) != set(columns):
            other = ", ".join(sorted(map(str, set(optics) ^ set(columns))))
            raise UserError(f"{stars[0].path} and {star.path} do not have the same columns in data_optics ({other}); "
                            "add or remove them")  # fmt: skip
        numbers = []
        for record in optics.to_dict("records"):
            row = {str(name): str(value) for name, value in record.items()}
            what = {name: value for name, value in row.items() if name not in _NAMED}
            same = [i for i, one in enumerate(groups) if {k: v for k, v in one.items() if k not in _NAMED} == what]
            if not same:
                name = row.get("rlnOpticsGroupName", "")
                taken = {one.get("rlnOpticsGroupName") for one in groups}
                named = {"rlnOpticsGroupName": f"{name}_{len(groups) + 1}"} if name in taken else {}
                groups.append({**row, **named, "rlnOpticsGroup": str(len(groups) + 1)})
            numbers.append(groups[same[0] if same else -1]["rlnOpticsGroup"])
        changed.append(table.assign(rlnOpticsGroup=[numbers[row] for row in relion.optics_rows(star)]))
    return pd.DataFrame(groups, columns=columns), changed


def _refuse_twice(sources: Sequence[Source], whole: StarFile, paths: Sequence[Path]) -> None:
    """UserError naming the first particle that two of the files, or one of them twice, have."""
    seen: dict[str, tuple[Path, int]] = {}
    start, names = 0, relion.identities(whole)
    for path, source in zip(paths, sources, strict=True):
        count = len(source.whole.particles)
        mine = list(map(str, names[start : start + count]))
        rows = dict.fromkeys(mine) if source.rows is not None else mine  # of tilt images a particle has many rows
        for row, name in enumerate(rows):
            if name in seen:
                at, other = seen[name]
                raise UserError(
                    f"particle {name} is in {at} (number {other + 1}) and in {path} (number {row + 1}); particles must "
                    "be there once: remove one, or name the particles of different tomograms differently"
                )
            seen[name] = path, row
        start += count
