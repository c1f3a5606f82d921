"""The documents are true: their command lines parse, their links lead somewhere, what they name is there."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from opustomo import cli, config
from opustomo.compat import arguments, dsd, dsdsh
from opustomo.errors import UserError
from opustomo.options import options_of

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAMS: dict[str, ModuleType] = {"dsd": dsd, "dsdsh": dsdsh}
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
DRAWN_WITH = [3, 11]  # matplotlib, for the picture of the conventions
# Options of other programs, and those that the documents say do not exist yet
FOREIGN = {"--i", "--name", "--output_ctf_csv", "--dont_correct_ctf_3d", "--particles_m", "--half1", "--half2"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def command_lines(text: str) -> Iterator[list[str]]:
    """Words of every line in a fenced block that starts with one of our programs; comments are cut off.

    A launcher in front (``torchrun ... -m opustomo``) is left out.
    """
    for line in block_lines(FENCED.findall(text)):
        line = re.sub(r"^torchrun .* -m (?=opustomo )", "", line)
        if line.split(" ")[0] in {"opustomo", *PROGRAMS}:
            yield shlex.split(line, comments=True)


def block_lines(blocks: list[str]) -> Iterator[str]:
    """Lines of blocks, continued ones as one."""
    for block in blocks:
        yield from block.replace("\\\n", " ").splitlines()


def lines_within(text: str) -> Iterator[list[str]]:
    """Words of command lines in running text: `opustomo VERB ARGUMENT ...`; names in capitals become a number."""
    for code in re.findall(r"`((?:opustomo|dsdsh?) [^`]+)`", FENCED.sub("", text)):
        words = shlex.split(code)
        whole = len(words) > 2 and words[1][0].islower() and not words[2].startswith("-") and "..." not in words
        if whole and "--help" not in words:
            yield [*words[:2], *(re.sub(r"^[A-Z]+$", "16", word) for word in words[2:])]


def parse(words: list[str]) -> None:
    """Read a command line as its program would, without running it; UserError when it does not fit."""
    program, *rest = words
    if rest in (["--version"], ["--help"], ["-h"]):
        return
    if program == "opustomo":
        cli.parse_verb(rest)
        return
    command = PROGRAMS[program].COMMANDS[rest[0]]
    found, given = arguments.Parser(f"{program} {rest[0]}", command).read(rest[1:])
    if rest[0] == "train_tomo":
        dsd.train_config(found, given)


@cache
def known_options() -> frozenset[str]:
    """Every long option of every command."""
    native = {flag for verb in cli.VERBS.values() for o in options_of(getattr(config, verb.config)) for flag in o.flags}
    forms = (arguments.Parser("", c) for module in PROGRAMS.values() for c in module.COMMANDS.values())
    seeds = {flag for form in forms for flag in form._option_string_actions}
    return frozenset({*native, *seeds, "--resume", "--help", "--version", "--completion"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_command_lines_can_be_typed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("star: particles.star\n")  # for --resume run
    text = path.read_text()
    for words in (*command_lines(text), *lines_within(text)):
        try:
            parse(words)
        except UserError as error:
            pytest.fail(f"{shlex.join(words)}: {error}")


# how lines of other programs begin; the first three are looked at below
OTHERS = ("make ", "pip install ", "torchrun ", "python3 -m venv ", "ssh -L ", "recovar pipeline ")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_line_of_a_block_is_one_that_is_looked_at(path: Path) -> None:
    """Blocks that say what they hold (```text, ```python) and the tree are no command lines."""
    fenced = re.findall(r"^```([^\n]*)\n(.*?)^```", path.read_text(), re.M | re.S)
    blocks = [block for kind, block in fenced if not kind and not block.startswith("src/")]
    known = tuple(f"{program} " for program in ("opustomo", *PROGRAMS))
    assert [line for line in block_lines(blocks) if line and not line.startswith((*known, *OTHERS))] == []


def test_targets_extras_and_scripts_that_are_named_exist() -> None:
    """`make NAME`, `pip install ".[NAME]"` and `python tools/NAME.py`, wherever a document says so."""
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    made = set(re.findall(r"^make ([\w-]+)", text, re.M)) | set(re.findall(r"`make ([\w-]+)", text))
    assert len(made) > 8 and made <= targets
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = set(re.findall(r'pip install "?\.\[(\w+)\]', text))
    assert {"movie", "atoms"} <= extras <= set(optional)
    scripts = set(re.findall(r"(?:tools|benchmarks|analysis_scripts)/\w+\.py", text))
    assert len(scripts) > 8 and [name for name in scripts if not (ROOT / name).is_file()] == []


def test_the_readme_goes_the_whole_way() -> None:
    """Each verb of the path stands there as a line that can be copied; the earlier program's have their own page."""

    def typed(document: str) -> set[tuple[str, ...]]:
        return {tuple(words[:2]) for words in command_lines((ROOT / document).read_text())}

    path = ("check", "average", "train", "analyze", "volumes", "select", "report")
    assert typed("README.md") >= {("opustomo", verb) for verb in path}
    assert typed("docs/migration.md") >= {("dsdsh", name) for name in dsdsh.COMMANDS}


def test_the_readme_is_short_and_has_all_that_a_stranger_looks_for() -> None:
    """What it is, the two commands, a picture, how to install, the path; every verb; and no more than that."""
    text = (ROOT / "README.md").read_text()
    parts = (
        "make demo ",
        "make test ",
        "docs/images/report.png",
        "pip install .",
        "opustomo check",
        "docs/quickstart.md",
    )
    places = [text.index(part) for part in parts]
    assert places == sorted(places) and len(text.encode()) < 10_000
    assert [verb for verb in cli.VERBS if not re.search(rf"\b{verb}\b", text)] == []


def test_a_wrong_line_would_be_seen() -> None:
    text = (
        "```\nopustomo train a.star -o run --epoch 3   # comment\ndsd train_tomo a.star \\\n  -o run --nonsense\n```\n"
    )
    text += (
        "```\ntorchrun --nnodes 2 -m opustomo train a.star --epoch 3\n```\n`opustomo average A.star -o B --epoch 3`\n"
    )
    lines = [*command_lines(text), *lines_within(text)]
    assert [len(words) for words in lines] == [7, 6, 5, 7]
    for words in lines:
        with pytest.raises(UserError):
            parse(words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_options_named_in_the_text_exist(path: Path) -> None:
    prose = FENCED.sub("", path.read_text())
    named = {
        flag for code in re.findall(r"`([^`]+)`", prose) for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", code)
    }
    assert named - FOREIGN <= known_options()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_relative_links_resolve(path: Path) -> None:
    for picture, target in LINK.findall(path.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in file or picture:
            continue
        reached = (path.parent / file).resolve() if file else path
        assert reached.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(reached), f"{target} has no such heading"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pictures_are_there() -> None:
    for path in DOCUMENTS:
        for picture, target in LINK.findall(path.read_text()):
            assert not picture or (path.parent / target).is_file(), f"{name_of(path)}: {target} is missing"


def tree_paths(text: str) -> list[str]:
    """Paths of the tree in CONTRIBUTING.md: names before the comment (two blanks apart), folders by indentation."""
    block = next(block for block in FENCED.findall(text) if block.startswith("src/"))
    folders: dict[int, str] = {}
    found = []
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        parent = next((folders[i] for i in sorted(folders, reverse=True) if i < indent), "")
        names = []
        for word in line.split():
            if not re.fullmatch(r"[\w/]+(/|\.\w+)|Makefile", word):
                break
            names.append(parent + word)
        assert names, f"no path in {line!r}"
        found += names
        if names[0].endswith("/"):
            folders = {i: folder for i, folder in folders.items() if i < indent} | {indent: names[0]}
    return found


def test_what_the_tree_names_is_there() -> None:
    paths = tree_paths((ROOT / "CONTRIBUTING.md").read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_module_at_the_top_is_in_the_tree() -> None:
    paths = tree_paths((ROOT / "CONTRIBUTING.md").read_text())
    package = ROOT / "src" / "opustomo"
    top = [p.name + "/" * p.is_dir() for p in package.iterdir() if not p.name.startswith("_") and p.suffix != ".typed"]
    assert sorted(set(top) - {path.removeprefix("src/opustomo/") for path in paths}) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_of_the_package_named_in_the_text_exist(path: Path) -> None:
    prose = FENCED.sub("", path.read_text())
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", prose))
    # table rows that begin with "no": said not to be there yet
    absent = {name for row in re.findall(r"^\| no ([^|]*)\|", prose, re.M) for name in re.findall(r"[\w/]+\.py", row)}
    places = (ROOT, ROOT / "src" / "opustomo", ROOT / "tests")
    assert {name for name in named - absent if not any((place / name).exists() for place in places)} == set()
    assert {name for name in absent if (places[1] / name).exists()} == set(), "there by now: mend the text"


def test_tests_named_in_the_documents_exist() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", text))
    assert len(named) > 40
    for file, test in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_every_column_and_file_is_documented() -> None:
    from opustomo.analysis.class_quality import COLUMNS
    from opustomo.analysis.dynamics import COLUMNS as OF_MOTIONS
    from opustomo.data.cache import _ROW_FILES, CTF_PACK
    from opustomo.data.readers.tilts import COLUMNS as CTF_COLUMNS
    from opustomo.monitor import METRIC_COLUMNS

    inputs, outputs = ((ROOT / "docs" / name).read_text() for name in ("inputs.md", "outputs.md"))
    assert [name for name in CTF_COLUMNS if f"`{name}`" not in inputs] == []
    written = (*METRIC_COLUMNS, *_ROW_FILES, CTF_PACK, *COLUMNS, *OF_MOTIONS, "explained")
    assert [name for name in written if f"`{name}`" not in outputs] == []
    assert [f.name for f in fields(config.InputOptions) if f"--{f.name.replace('_', '-')}" not in inputs] == []


def test_defaults_in_the_option_table_are_the_programs() -> None:
    table = re.findall(r"^\| ([^|]*`--[^|]*) \| ([\d.]+)[^|]* \|", (ROOT / "docs" / "inputs.md").read_text(), re.M)
    train, grid = config.TrainConfig(Path(), Path()), config.GridOptions()
    assert len(table) >= 8
    for flags, value in table:
        name = re.findall(r"--([\w-]+)", flags)[-1].replace("-", "_")
        owner = train if hasattr(train, name) else grid
        assert float(value) == float(getattr(owner, name)), flags


def test_the_picture_of_the_conventions_is_what_its_script_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn with the program's matrices: a convention that was changed, or a picture that was not drawn anew, shows."""
    kept, new = ROOT / "docs/images/conventions.png", tmp_path / "new.png"
    if [int(part) for part in matplotlib.__version__.split(".")[:2]] < DRAWN_WITH:
        pytest.skip("an older matplotlib sets the words of the picture elsewhere")
    monkeypatch.setattr("sys.argv", ["draw_conventions.py", str(new)])
    runpy.run_path(str(ROOT / "tools/draw_conventions.py"), run_name="__main__")
    one, other = (imread(path)[..., :3] for path in (kept, new))
    assert kept.stat().st_size < 200_000 and one.shape == other.shape
    assert np.abs(one - other).mean() < 0.001  # another rasteriser smooths edges otherwise
