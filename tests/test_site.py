"""The documentation site: the page of commands is the code's, nothing is left out, and the site builds offline."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

from opustomo import cli, config
from opustomo.compat import arguments, dsd, dsdsh
from opustomo.options import options_of
from test_docs import FENCED

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def write_cli() -> ModuleType:
    """tools/write_cli.py."""
    spec = importlib.util.spec_from_file_location("write_cli", ROOT / "tools" / "write_cli.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(text: str) -> dict[str, str]:
    """Text below each heading of the third level, by heading."""
    parts = re.split(r"^### (.+)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_page_of_commands_is_up_to_date(write_cli: ModuleType) -> None:
    written = (DOCS / "cli.md").read_text()
    assert written == write_cli.page(), "run `make docs`, or: python tools/write_cli.py"


def test_every_option_of_every_verb_has_a_row_with_its_help() -> None:
    found = sections((DOCS / "cli.md").read_text())
    for name, verb in cli.VERBS.items():
        rows = [line for line in found[f"opustomo {name}"].splitlines() if line.startswith("| `")]
        for option in options_of(getattr(config, verb.config)):
            label = (", ".join(option.flags) or option.metavar).replace("|", "\\|")
            [row] = [row for row in rows if re.match(rf"\| `{re.escape(label)}[ `]", row)]
            assert row.count(" | ") >= 2 and len(row.split(" | ")[-1]) > 8, row
            assert (" | needed | " in row) == option.required, row


def test_stated_defaults_are_the_programs() -> None:
    rows = sections((DOCS / "cli.md").read_text())["opustomo train"]
    stated = dict(re.findall(r"^\| `[^`]*--([\w-]+)[^`]*` \| `([\d.]+)` \|", rows, re.M))
    train = config.TrainConfig(Path(), Path())
    assert len(stated) > 15
    for name, value in stated.items():
        owner = train if hasattr(train, name.replace("-", "_")) else train.grid
        assert float(value) == float(getattr(owner, name.replace("-", "_"))), name


def test_migration_names_every_old_command_and_argument() -> None:
    text = FENCED.sub("", (DOCS / "migration.md").read_text())
    words = set(
        re.findall(r"(?<![\w-])(?:--?[A-Za-z][\w-]*|[A-Za-z]\w*(?:\.star)?)", " ".join(re.findall(r"`([^`]+)`", text)))
    )
    for module in (dsd, dsdsh):
        for name, command in module.COMMANDS.items():
            assert name in words, name
            for action in arguments.Parser("", command)._actions:
                missing = {flag for flag in action.option_strings if flag not in words} - {"-h", "--help"}
                assert not missing, f"{name}: {missing}"


def test_every_page_is_in_the_table_of_contents() -> None:
    """Also told by Sphinx; here without it."""
    listed = set()
    for page in DOCS.rglob("*.md"):
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.M | re.S):
            names = [line for line in block.splitlines() if line and not line.startswith(":")]
            for name in names:
                matches = [*page.parent.glob(f"{name}.md")]
                assert matches, f"{page.name}: {name} is not there"
                listed.update(path.resolve() for path in matches)
    pages = {path.resolve() for path in DOCS.rglob("*.md")} - {DOCS.resolve() / "index.md"}
    assert pages - listed == set()


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("furo")
    built = tmp_path / "site"
    options = ["-W", "--keep-going", "-q", "-d", str(tmp_path / "trees")]
    line = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(built)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = {page: page.read_text() for page in sorted(built.rglob("*.html"))}
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    names = {page.resolve(): set(re.findall(r' id="([^"]+)"', text)) for page, text in pages.items()}
    for page, text in pages.items():
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]* (?:src|href)="([^"]+)"', text)
        assert [address for address in loaded if address.startswith(("http", "//"))] == [], page.name
        for address in {*loaded, *re.findall(r'<a [^>]*href="([^"]+)"', text)}:
            file, _, anchor = unquote(address).partition("#")
            if file.startswith(("http", "mailto")) or anchor.startswith(":"):
                continue
            target = (page.parent / file.partition("?")[0]).resolve() if file else page.resolve()
            assert target.exists(), f"{page.name}: {address} leads nowhere"
            assert not anchor or target not in names or anchor in names[target], f"{page.name}: {address}: no such name"
    assert not re.findall(r"url\(['\"]?(?:https?:)?//", "".join(p.read_text() for p in built.rglob("*.css")))
