"""Install the wheel and the sdist into fresh environments and use them there: `make dist-check`.

    python tools/dist_check.py dist [--python python3.12] [--extra atoms] [--versions lowest|newest] [--torch SPEC]

Owns: nothing of the program.  Each environment is a venv in a temporary folder, removed afterwards; every command runs
there, in an empty folder, so that no file of this checkout can stand in for what the package lacks.  `lowest` takes the
least version that pyproject.toml allows of everything it names; of torch, too, unless --torch says otherwise.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from math import cos, sin
from pathlib import Path

ROOT = Path(__file__).parents[1]
# every file that the package names is there, the licence too, and it is that package which is used
FILES = """
from importlib import metadata
files = metadata.files("opustomo")
gone = [str(f) for f in files if not f.locate().exists()]
assert not gone, gone
assert any(str(f).endswith("licenses/LICENSE") for f in files), "no licence"
import opustomo
assert "site-packages" in opustomo.__file__, opustomo.__file__
"""
COMMANDS = (
    "opustomo --version",
    "dsd --version",
    "dsdsh --version",
    "opustomo --completion bash",
    "opustomo simulate -o sim --preset two-state --n 48 --box 24 --angpix 16",
    "opustomo check sim/particles.star",
    "opustomo average sim/particles.star -o average",
    "opustomo train sim/particles.star -r average/mask.mrc -o run -n 1 --zdim 2 --templateres 32",
    "opustomo analyze run --clusters 3",
    "opustomo volumes run --kmeans 3",
    "opustomo movie run --pc 1",
    "opustomo report run",
    "opustomo doctor",
)
QUICK = 6  # of these, for the sdist
ATOM = "ATOM  {:5d}  CA  GLY A{:4d}    {:8.3f}{:8.3f}{:8.3f}  1.00 20.00           C  \n"  # a helix of 300 of them


def main() -> int:
    """Every package in every environment asked for; 1 if anything failed."""
    arguments = _arguments()
    packages = sorted([*arguments.folder.glob("*.whl"), *arguments.folder.glob("*.tar.gz")])
    if not packages:
        print(f"{arguments.folder}: no wheel and no sdist; make dist builds them", file=sys.stderr)
        return 2
    failed = 0
    for python in arguments.python:
        for package in packages:
            with tempfile.TemporaryDirectory(prefix="opustomo-dist-") as place:
                failed += not _try(Path(place), python, package.resolve(), arguments)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where make dist left wheel and sdist")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--extra", nargs="*", default=[], help="extras, added one after the other")
    parser.add_argument("--versions", choices=("newest", "lowest"), default="newest")
    parser.add_argument("--torch", help="requirement for torch, e.g. torch==2.13.0 (default: as --versions)")
    return parser.parse_args()


def _try(place: Path, python: str, package: Path, arguments: argparse.Namespace) -> bool:
    """Install without extras and use everything; then add each extra and use it.  The sdist is the wheel's source:
    that it installs and starts is enough."""
    title = f"{python} {package.name}, {arguments.versions} versions"
    wheel = package.suffix == ".whl"
    start, empty, binaries = time.monotonic(), place / "empty", place / "venv" / "bin"
    empty.mkdir()
    try:
        _run([python, "-m", "venv", str(place / "venv")], empty)
        constraints = place / "constraints.txt"
        constraints.write_text(lowest(arguments.torch is not None) if arguments.versions == "lowest" else "")
        pip = [str(binaries / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        if arguments.torch:
            _run([*pip, arguments.torch], empty)
        for extra in ("", *arguments.extra) if wheel else ("",):
            _run([*pip, "-c", str(constraints), f"{package}{f'[{extra}]' if extra else ''}"], empty)
            _run([str(binaries / "python"), "-c", FILES], empty)
            for command in _of_extra(extra, empty) if extra else COMMANDS if wheel else COMMANDS[:QUICK]:
                program, *words = command.split()
                _run([str(binaries / program), *words], empty)
            print(f"ok      {title}, {extra or 'no extra'}: {time.monotonic() - start:.0f} s", flush=True)
    except subprocess.CalledProcessError as error:
        last = (error.stdout or "").strip().splitlines()[-15:]
        print(f"FAILED  {title}: {' '.join(map(str, error.cmd[-6:]))}", *last, sep="\n    ", flush=True)
        return False
    return True


def _of_extra(extra: str, folder: Path) -> tuple[str, ...]:
    """Commands that need the extra."""
    if extra == "atoms":
        (folder / "helix.pdb").write_text("".join(ATOM.format(i, i, *_on_a_helix(i)) for i in range(1, 301)) + "END\n")
        return ("opustomo simulate -o atoms --atoms helix.pdb --n 4 --box 24 --angpix 8",)
    return ("opustomo movie run --kmeans 3",) if extra == "movie" else ()


def _on_a_helix(i: int) -> tuple[float, float, float]:
    return 30 * cos(i / 5), 30 * sin(i / 5), 0.2 * i


def lowest(without_torch: bool) -> str:
    """Constraints that pin everything pyproject.toml names to the least version it allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    named = [*project["dependencies"], *(line for extra in ("atoms", "movie") for line in optional[extra])]
    pinned = [re.sub(r">=", "==", line) for line in named]
    return "\n".join(line for line in pinned if not (without_torch and line.startswith("torch=="))) + "\n"


def _run(command: list[str], folder: Path) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run(
        command, cwd=folder, env=plain, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


if __name__ == "__main__":
    sys.exit(main())
