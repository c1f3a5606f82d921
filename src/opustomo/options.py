"""argv to config dataclass and back to "which options were typed": the one reading of the option table.

Owns: the flat option names that follow from the dataclasses of ``config.py`` and the one-line messages for a command
line that does not fit them.  tyro does the conversion; it is imported here, nothing heavier is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from opustomo.errors import UserError

Config = TypeVar("Config")

# Nested groups (input, grid) are one flat list to the user.
TYRO_CONFIG = (tyro.conf.OmitArgPrefixes,)
NUMBER = re.compile(r"^-[\d.]")
FRAME = "╭╰╮╯│─|+- "  # what tyro draws its boxes with, in ASCII where the terminal knows no better


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a config: its name, the flags that set it ("" for a positional argument) and what help calls it.

    number: what its values must be, in words; "" where they are not numbers.  choices: all values it can have, none
    where there are more.  switch: it takes no value.
    """

    field: str
    flags: tuple[str, ...]
    metavar: str
    required: bool
    number: str
    choices: tuple[str, ...] = ()
    switch: bool = False

    @property
    def label(self) -> str:
        """The name used in messages, e.g. ``STAR`` or ``-o/--output``."""
        return "/".join(self.flags) or self.metavar


def options_of(config_class: type) -> tuple[Option, ...]:
    """Every option of a config dataclass, nested groups flattened, in the order of the fields.

    Raises ``AssertionError`` when two fields would share a flag (a mistake in ``config.py``).
    """
    hints = get_type_hints(config_class, include_extras=True)
    options: list[Option] = []
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            options.extend(options_of(hint))
            continue
        metadata = get_args(hint)[1:] if hasattr(hint, "__metadata__") else ()
        aliases = [a for m in metadata for a in (getattr(m, "aliases", None) or ())]
        metavar = next((m.metavar for m in metadata if getattr(m, "metavar", None)), field.name.upper())
        positional = any(m is tyro.conf.Positional for m in metadata)
        name = field.name.replace("_", "-")
        # what is on by default can be typed either way
        flags = () if positional else (*aliases, "--" + name, *([f"--no-{name}"] if field.default is True else []))
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        bare = bare_of(hint)
        options.append(
            Option(field.name, flags, metavar, missing, number_of(hint), choices_of(bare), switch=bare is bool)
        )
    flags_seen = [flag for option in options for flag in option.flags]
    assert len(flags_seen) == len(set(flags_seen)), f"{config_class.__name__}: two options share a flag"
    return tuple(options)


def bare_of(hint: Any) -> Any:
    """A type hint without what ``Annotated`` adds."""
    return get_args(hint)[0] if hasattr(hint, "__metadata__") else hint


def choices_of(bare: Any) -> tuple[str, ...]:
    """The values of a ``Literal``, also of one that may be None; () for other types."""
    if get_origin(bare) is Literal:
        return tuple(map(str, get_args(bare)))
    return tuple(choice for part in get_args(bare) for choice in choices_of(part))


def number_of(hint: Any) -> str:
    """``a whole number is`` for int, ``a number is`` for float, the plural for tuples of int, else nothing."""
    bare = bare_of(hint)
    kinds = {bare, *get_args(bare)}
    if tuple in kinds | {get_origin(bare)}:
        return "whole numbers are" if int in kinds else ""
    return "a whole number is" if int in kinds else "a number is" if float in kinds else ""


def flag_of(token: str) -> str | None:
    """The flag a token of argv spells, normalised (``--no_cache=1`` -> ``--no-cache``); None for a value."""
    if not token.startswith("-") or token in ("-", "--") or NUMBER.match(token):
        return None
    name = token.split("=", 1)[0]
    return name.replace("_", "-") if name.startswith("--") else name


def closest(word: str, known: Sequence[str]) -> str:
    """``; did you mean 'x'?`` for a misspelt word, or an empty string."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def given_fields(argv: Sequence[str], options: Sequence[Option]) -> frozenset[str]:
    """Names of the config fields that argv sets by a flag.

    Raises ``UserError`` for a flag that no option has.
    """
    by_flag = {flag: option.field for option in options for flag in option.flags}
    given = set()
    for token in argv:
        flag = flag_of(token)
        if flag is None:
            continue
        if flag not in by_flag:
            raise UserError(f"unknown option {flag}{closest(flag, list(by_flag))}")
        given.add(by_flag[flag])
    return frozenset(given)


def parse(config_class: type[Config], argv: Sequence[str], prog: str) -> tuple[Config, frozenset[str]]:
    """A config and the names of the fields given explicitly (positional arguments included).

    Raises ``UserError`` (one line) for anything that does not fit the options of ``config_class``.
    """
    options = options_of(config_class)
    given = given_fields(argv, options)
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report), contextlib.redirect_stdout(report):
            config: Any = tyro.cli(config_class, prog=prog, args=list(argv), config=TYRO_CONFIG)
    except SystemExit:
        message = one_line(report.getvalue(), options)
        raise UserError(wrong_number(message, argv, options) or message) from None
    return config, given | {option.field for option in options if not option.flags}


def wrong_number(message: str, argv: Sequence[str], options: Sequence[Option]) -> str | None:
    """``-n/--epochs abc: a whole number is needed`` where tyro tells of Python's conversions; None for the rest."""
    for option in options:
        if not option.number or not message.startswith(f"Error parsing {option.label}:"):
            continue
        at = max(i for i, token in enumerate(argv) if flag_of(token) in option.flags)
        _, _, joined = argv[at].partition("=")
        values = [joined] if joined else itertools.takewhile(lambda token: flag_of(token) is None, argv[at + 1 :])
        return f"{option.label} {' '.join(values)}: {option.number} needed"
    return None


def print_help(config_class: type, prog: str) -> None:
    """tyro's help of one verb on stdout."""
    with contextlib.suppress(SystemExit):
        tyro.cli(config_class, prog=prog, args=["--help"], config=TYRO_CONFIG)


def one_line(report: str, options: Sequence[Option]) -> str:
    """tyro's boxed report of a bad command line as one line: what is missing, or its first paragraph."""
    rows = [row.rstrip(FRAME).lstrip(" │|") for row in re.sub(r"\x1b\[[\d;]*m", "", report).splitlines()]
    body = itertools.dropwhile(lambda row: not row.strip(FRAME), rows[1:])  # rows[0] is the title
    paragraph = list(itertools.takewhile(lambda row: row.strip(FRAME), body))
    if paragraph and paragraph[0].startswith("Missing from"):
        starts = {row.replace(",", " ").split(" ")[0] for row in paragraph[1:]}
        missing = [o.label for o in options if o.required and starts & {*o.flags, o.metavar}]
        return f"missing: {', '.join(missing)}"
    return " ".join(paragraph) or "the command line could not be read"
