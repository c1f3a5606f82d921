"""Write docs/cli.md: every verb and command with its purpose, example and options, from the code that reads them.

    python tools/write_cli.py [docs/cli.md]

``tests/test_site.py`` fails when the page is not what this writes.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from opustomo import cli, config
from opustomo.compat import arguments, dsd, dsdsh
from opustomo.data.atomic import write_text
from opustomo.options import options_of

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEADER = """\
# Command line

Every verb of `opustomo` and every command of `dsd` and `dsdsh`. The page is written by `tools/write_cli.py` from the
options themselves; `--help` behind a verb prints the same. An option without a default is off, or worked out from the
data. Values stand behind a blank or `=`; names take `-` or `_`.

Mistakes end with one line and status 2 ([messages](messages.md)), other failures with one line and
[another status](outputs.md#exit-status).
"""
SEEDS = "The forms of OPUS-TOMO on the same functions ([which does what](migration.md))."
RESUME = ("`--resume RUN`", "", "In place of STAR and `-o`: continue this run with its own options.")


class Row(NamedTuple):
    """An option in the table: how it is typed, its default, what it does."""

    typed: str
    default: str
    help: str


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEADER, "## opustomo\n"]
    for name, verb in cli.VERBS.items():
        config_class = getattr(config, verb.config)
        rows = list(verb_rows(config_class))
        if name == "train":
            rows.append(Row(*RESUME))
        parts.append(section(f"opustomo {name}", one_paragraph(config_class.__doc__), verb.example, rows))
    for program, commands in (("dsd", dsd.COMMANDS), ("dsdsh", dsdsh.COMMANDS)):
        parts.append(f"## {program}\n\n{SEEDS}\n")
        for name, command in commands.items():
            parser = arguments.Parser(f"{program} {name}", command)
            purpose = one_paragraph(command.purpose)
            purpose = purpose[0].upper() + purpose[1:] + "."
            parts.append(section(f"{program} {name}", purpose, command.example, list(command_rows(parser))))
    return "\n".join(parts)


def section(title: str, purpose: str, example: str, rows: list[Row]) -> str:
    """Heading, purpose, example and table of options of one command."""
    table = ["| option | default | what it does |", "|---|---|---|"]
    table += [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return "\n".join([f"### {title}", "", purpose, "", "```", typed_lines(example), "```", "", *table, ""])


def cell(text: str) -> str:
    """Text as a cell of a table: bars escaped, and ``<`` outside of code, where it would begin a tag."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part.replace("<", "&lt;") if i % 2 == 0 else part for i, part in enumerate(parts))


def typed_lines(example: str) -> str:
    """The example of a help text as lines that can be copied: no indentation, explanations as comments."""
    lines = textwrap.dedent("  " + example).splitlines()
    return "\n".join(re.sub(r"(?<=\S) {4,}(?=[^\s#])", "    # ", line) for line in lines)


def one_paragraph(text: str | None) -> str:
    return " ".join((text or "").split())


def verb_rows(config_class: type) -> Iterator[Row]:
    """A row for each option of a verb, in the order of its help."""
    for option, (field, hint, words) in zip(options_of(config_class), flat_fields(config_class), strict=True):
        names = ", ".join(option.flags) or option.metavar
        value = value_of(hint, option.metavar, option.number) if option.flags else ""
        yield Row(f"`{names}{' ' * bool(value)}{value}`", default_of(field, option.required), one_paragraph(words))


def flat_fields(config_class: type) -> Iterator[tuple[dataclasses.Field[Any], Any, str]]:
    """Field, type and help of every option; nested groups in place, as ``options_of`` has them."""
    hints, words = get_type_hints(config_class, include_extras=True), attribute_docs(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from flat_fields(hint)
        else:
            yield field, hint, words[field.name]


def attribute_docs(config_class: type) -> dict[str, str]:
    """The string below each field, of the class and those it extends."""
    found = {}
    for part in reversed([c for c in config_class.__mro__ if dataclasses.is_dataclass(c)]):
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(tree, ast.ClassDef)
        for one, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(one, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[ast.unparse(one.target)] = str(below.value.value)
    return found


def value_of(hint: Any, metavar: str, number: str) -> str:
    """What stands behind the flag: choices, the name that the help gives it, or the kind of number."""
    bare = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    kinds = (bare, *get_args(bare))
    named = any(getattr(m, "metavar", None) for m in getattr(hint, "__metadata__", ()))
    choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    if bare is bool:
        return ""
    if choices or named:
        return " | ".join(choices) or metavar
    if get_origin(bare) is tuple:
        return "N ..."
    return {"a whole number is": "N", "a number is": "X"}.get(number, "FILE" if Path in kinds else "TEXT")


def default_of(field: dataclasses.Field[Any], required: bool) -> str:
    if required:
        return "needed"
    return "on" if field.default is True else default_value(field.default)


def default_value(value: object) -> str:
    """Nothing for what is off or worked out from the data."""
    if value is None or isinstance(value, bool) or value in ((), ""):
        return ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def command_rows(parser: argparse.ArgumentParser) -> Iterator[Row]:
    """A row for each argument of a command of ``dsd`` or ``dsdsh``."""
    for action in parser._actions:
        if action.dest == "help":
            continue
        names = ", ".join(action.option_strings) or str(action.metavar or action.dest.upper())
        takes = bool(action.option_strings) and action.nargs != 0
        value = value_of_action(action) if takes else ""
        needed = action.required if action.option_strings else True
        default = default_value(action.default) if takes else ""
        yield Row(f"`{names}{' ' * bool(value)}{value}`", "needed" if needed else default, str(action.help))


def value_of_action(action: argparse.Action) -> str:
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    if action.metavar:
        return action.metavar
    if action.choices:
        return " | ".join(map(str, action.choices))
    known: dict[Any, str] = {None: "TEXT", int: "N", arguments.count: "N", Path: "FILE"}
    return known.get(action.type, "X")


if __name__ == "__main__":
    line = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    line.add_argument("page", nargs="?", type=Path, default=PAGE, help="the file to write (default: docs/cli.md)")
    write_text(line.parse_args().page, page())
