"""What is installed: this program, Python, torch, what it needs, and the extras.

Owns: reading versions from the metadata of installed packages; of these torch alone is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import opustomo
from opustomo.data.findings import Finding, first_line, listed

REQUIREMENT = re.compile(r"^([\w.-]+)\s*>=\s*([\d.]+)(?:\s*;\s*extra\s*==\s*['\"](\w+)['\"])?$")
# what the extras are for; "dev" is for those who work on the program
PURPOSES = {"atoms": "simulate --atoms", "movie": "MP4 files of movie (GIFs need nothing more)"}
TORCH_FIX = "install it anew: pip install --force-reinstall torch, in the build for this machine (docs/install.md)"


def load_torch() -> tuple[ModuleType | None, list[Finding]]:
    """torch, and what it is; None with an error where it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch = importlib.import_module("torch")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        found = "not installed" if missing else f"cannot be loaded ({first_line(error)})"
        fix = "pip install torch, in the build for this machine (docs/install.md)" if missing else TORCH_FIX
        return None, [Finding("error", "torch", found, fix)]
    except OSError as error:  # a library that does not fit this machine
        return None, [Finding("error", "torch", f"cannot be loaded ({first_line(error)})", TORCH_FIX)]
    cuda, hip = torch.version.cuda, torch.version.hip
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU"
    values = {"version": str(torch.__version__), "cuda": cuda, "hip": hip}
    return torch, [Finding("ok", "torch", f"{torch.__version__}, {build} build", values=values)]


def program_findings() -> list[Finding]:
    """Versions and places of this program and Python, and whether everything that it needs is there."""
    place = str(Path(opustomo.__file__).parent)
    values = {"version": opustomo.__version__, "place": place}
    python = {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()}
    return [
        Finding("ok", "opustomo", f"{opustomo.__version__} in {place}", values=values),
        Finding("ok", "Python", f"{platform.python_version()}, {sys.executable}", values=python),
        _needed(),
    ]


def _needed() -> Finding:
    try:
        needed = [(name, least) for name, least, extra in _requirements() if not extra]
    except metadata.PackageNotFoundError:
        return Finding(
            "warning", "packages", "the program runs from a folder and is not installed, so what it needs is not known",
            "pip install . in that folder",
        )  # fmt: skip
    absent = [f"{name}>={least}" for name, least in needed if _version(name) is None]
    old = [f"{name}>={least}" for name, least in needed if _older(_version(name), least)]
    values = {"needed": len(needed), "missing": absent, "too_old": old}
    if absent or old:
        words = [f"{word}: {listed(names)}" for word, names in (("missing", absent), ("too old", old)) if names]
        command = "pip install " + " ".join(f"'{name}'" for name in (*absent, *old))
        return Finding("error", "packages", "; ".join(words), command, values)
    return Finding("ok", "packages", f"all {len(needed)} that are needed are there", values=values)


def _requirements() -> Iterator[tuple[str, str, str]]:
    """Name, least version and extra ("" for none) of what the installed program requires."""
    for line in metadata.requires("opustomo") or ():
        if (match := REQUIREMENT.match(line)) is not None:
            yield match[1], match[2], match[3] or ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _older(version: str | None, least: str) -> bool:
    return version is not None and _numbers(version) < _numbers(least)


def _numbers(version: str) -> tuple[int, ...]:
    """``2.6.0+cpu`` as (2, 6): zeros at the end say nothing."""
    found = re.match(r"[\d.]*\d", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def extra_findings() -> list[Finding]:
    """Extras that are there or not, and whether UMAP can keep what it compiles."""
    found = []
    for extra, module in (("atoms", "gemmi"), ("movie", "imageio_ffmpeg")):
        version = _version(module.replace("_", "-"))
        there = version is not None and importlib.util.find_spec(module) is not None
        install = "" if there else f"pip install 'opustomo[{extra}]', or pip install {module.replace('_', '-')}"
        text = f"{module} {version}, for {PURPOSES[extra]}" if there else f"not there; only for {PURPOSES[extra]}"
        found.append(Finding("ok" if there else "note", f"extra {extra}", text, install, {"version": version}))
    return [*found, _umap_cache()]


def _umap_cache() -> Finding:
    """UMAP is compiled when first used; numba keeps that beside the package or in a cache folder of the user."""
    spec = importlib.util.find_spec("umap")
    if spec is None or spec.origin is None:
        return Finding("note", "UMAP", "not installed: analyze needs it", "pip install umap-learn")
    named = os.environ.get("NUMBA_CACHE_DIR")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "numba"
    places = [*([Path(named)] if named else []), Path(spec.origin).parent / "__pycache__", user]
    place = next((place for place in places if _writable(place)), None)
    values = {"numba_cache": None if place is None else str(place)}
    if place is None:
        return Finding(
            "warning", "UMAP", f"no folder can be written to for what it compiles ({listed([str(p) for p in places])})",
            "export NUMBA_CACHE_DIR=FOLDER with a folder of yours, else analyze may fail or compile every time", values,
        )  # fmt: skip
    return Finding("ok", "UMAP", f"what it compiles is kept in {place}", values=values)


def _writable(folder: Path) -> bool:
    """Can files be made in ``folder``, or the folder itself?"""
    existing = next((place for place in (folder, *folder.parents) if place.exists()), None)
    return existing is not None and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
