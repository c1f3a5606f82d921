"""Licences of everything the program needs and of what it carries, as Markdown: `make licences` > THIRD_PARTY.md.

Owns: the walk over the metadata of installed packages, from this program's requirements on (extras included, the tools
of developers not), and over `src/opustomo/**/vendor/README.txt`, whose tables name what is carried.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
EXTRAS = ("atoms", "movie")
HEAD = """\
# Licences of others

opustomo itself is under [BSD-3-Clause](LICENSE). This page is written by `tools/licences.py` (`make licences`) from the
metadata of installed packages.

## Carried along

Files of other projects that are part of this repository and of the package.

| what | version | licence | where |
|---|---|---|---|
"""
NEEDED = """
The bead model of the simulator is derived from PDB entry 4V5D (CC0).

## Needed

Installed by pip beside the program, not part of it. Direct requirements and, below them, what these need in turn, as
installed with the CPU build of torch; CUDA builds add packages under NVIDIA's own licences (`nvidia-*`).
The wheels of imageio-ffmpeg carry the program ffmpeg, built under the GPL; `opustomo movie` starts it, no more.

| package | licence | for |
|---|---|---|
"""
CLASSIFIER = re.compile(r"License :: (?:OSI Approved :: )?(?!OSI Approved$)(.+)")


def carried() -> list[str]:
    """Rows about vendored files, from the tables beside them."""
    rows = []
    for path in sorted((ROOT / "src").rglob("vendor/README.txt")):
        for line in path.read_text().splitlines():
            cells = re.split(r"\s{2,}", line.strip())
            if len(cells) >= 4 and cells[0] != "name" and not line.startswith(" "):
                name, version, licence = cells[:3]
                rows.append(
                    f"| {name} | {version} | {licence} | [{path.parent.name}/]({path.parent.relative_to(ROOT)}) |"
                )
    return rows


def needed() -> dict[str, tuple[str, set[str]]]:
    """Licence, and who asks for it, of every package that the program needs directly or in turn, by name."""
    found: dict[str, tuple[str, set[str]]] = {}
    waiting = [(name, "opustomo") for name in requirements("opustomo", EXTRAS)]
    while waiting:
        name, parent = waiting.pop(0)
        if name in found:
            found[name][1].add(parent)
            continue
        try:
            found[name] = (licence(name), {parent})
        except metadata.PackageNotFoundError:
            continue  # of another system or Python
        waiting += [(other, name) for other in requirements(name, ())]
    return found


def requirements(package: str, extras: tuple[str, ...]) -> list[str]:
    """Normalised names of what a package requires, with these extras of it."""
    names = []
    for requirement in map(Requirement, metadata.requires(package) or ()):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            names.append(re.sub(r"[-_.]+", "-", requirement.name).lower())
    return names


def licence(package: str) -> str:
    """The SPDX expression of a package; else its classifiers; else the first line of its licence field."""
    fields = metadata.metadata(package)
    if expression := fields.get("License-Expression"):
        return str(expression)
    classifiers = [match[1] for line in fields.get_all("Classifier") or () if (match := CLASSIFIER.match(line))]
    stated = (str(fields.get("License") or "").strip().splitlines() or [""])[0][:60]
    return ", ".join(classifiers) or stated or "see the package"


def page() -> str:
    """The whole document."""
    direct = set(requirements("opustomo", EXTRAS))
    rows = sorted(needed().items(), key=lambda item: (item[0] not in direct, item[0]))
    table = [f"| {name} | {text.replace('|', '/')} | {', '.join(sorted(parents))} |" for name, (text, parents) in rows]
    return HEAD + "\n".join(carried()) + "\n" + NEEDED + "\n".join(table) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
