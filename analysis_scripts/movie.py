"""A movie of a series of density maps, made inside ChimeraX.

    cd RUN/analyze.19/pc1
    ChimeraX --script "path/to/analysis_scripts/movie.py reference 0.985"

Opens reference0.mrc, reference1.mrc, ... of the current folder in the order of their numbers as one volume series,
shows them at the contour level given (in the units of the maps; left out: ChimeraX's own choice), plays the series
forth and back and writes PREFIX.mp4 into the same folder.
"""

import re
import sys
from pathlib import Path

FRAMES_PER_MAP = 6
FRAMES_PER_SECOND = 25
PASSES = 2


def series(folder: Path, prefix: str) -> list[Path]:
    """Files PREFIX<number>.mrc of the folder, sorted by number (reference10 after reference9)."""
    numbered = [(re.fullmatch(re.escape(prefix) + r"(\d+)\.mrc", path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def commands(files: list[Path], prefix: str, level: float | None) -> list[str]:
    """The ChimeraX commands that open, play and record the series."""
    names = " ".join(f'"{path}"' for path in files)
    order = [*range(len(files)), *range(len(files) - 2, 0, -1)] * PASSES
    steps = [f"vseries play #1 jumpTo {i}; wait {FRAMES_PER_MAP}" for i in order]
    return [
        "close session",
        f"open {names} vseries true",
        "volume #1 style surface step 1" + (f" level {level:g}" if level is not None else ""),
        "set bgColor white; lighting soft; view",
        "movie record supersample 3",
        *steps,
        f'movie encode "{prefix}.mp4" framerate {FRAMES_PER_SECOND} quality high',
    ]


def main(session: object, arguments: list[str]) -> None:
    """Make the movie; ``arguments`` are PREFIX and, if wanted, LEVEL."""
    from chimerax.core.commands import run
    from chimerax.core.errors import UserError

    if not 1 <= len(arguments) <= 2:
        raise UserError("usage: movie.py PREFIX [LEVEL], e.g. movie.py reference 0.985")
    prefix = arguments[0]
    try:
        level = float(arguments[1]) if len(arguments) == 2 else None
    except ValueError:
        raise UserError(f"LEVEL {arguments[1]} is not a number") from None
    files = series(Path.cwd(), prefix)
    if len(files) < 2:
        raise UserError(f"{Path.cwd()}: needs at least two maps {prefix}0.mrc, {prefix}1.mrc, ...; found {len(files)}")
    for command in commands(files, prefix, level):
        run(session, command)


if "session" in globals():  # ChimeraX puts it there; elsewhere (tests) importing does nothing
    main(session, sys.argv[1:])  # noqa: F821
