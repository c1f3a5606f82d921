"""What ``dsd`` and ``dsdsh`` share: argparse in the seed's forms, one-line mistakes, and the way to a config.

Owns: the parsing of a subcommand (which options were typed included) and the check of BOX and APIX given by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, get_type_hints

from opustomo import __version__, cli
from opustomo.config import InputOptions
from opustomo.errors import UserError
from opustomo.options import closest, flag_of

Config = TypeVar("Config")
Given = frozenset[str]


class Command(NamedTuple):
    """A subcommand: purpose, the arguments it adds, what it does with them, an example."""

    purpose: str
    arguments: Callable[[argparse.ArgumentParser], None]
    action: Callable[[argparse.Namespace, Given], int | None]
    example: str


class Parser(argparse.ArgumentParser):
    """argparse that reports a mistake as ``UserError`` and takes no abbreviations."""

    def __init__(self, prog: str, command: Command) -> None:
        super().__init__(
            prog=prog,
            description=command.purpose,
            epilog=f"example:\n  {command.example}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        command.arguments(self)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} -h shows the arguments)")

    def read(self, argv: Sequence[str]) -> tuple[argparse.Namespace, Given]:
        """The arguments, defaults filled in, and the names (dest) of those that were typed."""
        argv = [normalised(token) for token in argv]
        known = list(self._option_string_actions)
        for flag in filter(None, map(flag_of, argv)):
            # before argparse, which would first complain about what the misspelt option was meant to give
            if flag not in known and (flag.startswith("--") or flag[:2] not in known):
                self.error(f"unknown option {flag}{closest(flag, known)}")
        absent = object()
        names = [action.dest for action in self._actions if action.dest != "help"]
        arguments, unknown = self.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
        if unknown:
            self.error(f"unexpected '{unknown[0]}'")
        given = frozenset(name for name in names if getattr(arguments, name) is not absent)
        for name in names:
            if name not in given:
                setattr(arguments, name, self.get_default(name))
        return arguments, given


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the example; adds defaults, but no ``(default: None)``."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        stated = action.default is None or action.default is False or "default" in (action.help or "")
        return action.help if stated else super()._get_help_string(action)


def normalised(token: str) -> str:
    """``--beta_control`` as ``--beta-control``: both spellings are accepted."""
    flag = flag_of(token)
    return token if flag is None else flag + token[len(flag) :]


def main(program: str, purpose: str, commands: dict[str, Command], argv: Sequence[str] | None) -> int:
    """Run ``program COMMAND arguments``; returns the exit status (see ``cli.main``)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<16} {command.purpose.splitlines()[0]}" for name, command in commands.items()]
        print(f"{program}: {purpose}\n\nusage: {program} COMMAND [arguments]\n")
        print("\n".join(lines) + f"\n\n{program} COMMAND -h shows the arguments and an example.")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"{program} (opustomo {__version__})")
        return 0
    name = argv[0]
    if name not in commands:
        return cli.run(program, partial(cli.unknown_command, program, name, list(commands)))
    prog = f"{program} {name}"
    parser = Parser(prog, commands[name])
    try:
        arguments, given = parser.read(argv[1:])
    except UserError as error:
        return cli.fail(prog, str(error), 2)
    except SystemExit:  # argparse printed the help
        return 0
    output = getattr(arguments, "output", None) or getattr(arguments, "run", None)
    return cli.run(prog, partial(commands[name].action, arguments, given), output)


def to_config(config_class: type[Config], values: dict[str, Any]) -> Config:
    """A config whose fields, nested groups included, are taken from ``values`` where present."""
    hints = get_type_hints(config_class)
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(hints[field.name]):
            chosen[field.name] = to_config(hints[field.name], values)
        elif field.name in values:
            chosen[field.name] = values[field.name]
    return config_class(**chosen)


def note(command: str, message: str) -> None:
    """One line on stderr about an argument that is accepted but changes nothing."""
    print(f"{command}: note: {message}", file=sys.stderr)


def epoch_number(text: str) -> int:
    """An epoch as in weights.EPOCH.pkl, for argparse: 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no epoch: they are counted from 0, as in weights.EPOCH.pkl")
    return int(text)


def count(text: str) -> int:
    """A number of things, for argparse: 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 1")
    return int(text)


def damaged_argument(parser: argparse.ArgumentParser) -> None:
    """``--damaged``, as the verbs have it."""
    parser.add_argument(
        "--damaged", choices=("stop", "skip"), default=InputOptions().damaged,
        help="subtomograms that cannot be used (missing, cut off, NaN, one grey value, no tilt): stop, or go on",
    )  # fmt: skip


def box_and_pixel(box: float, angpix: float, names: tuple[str, str]) -> None:
    """Refuse a box and pixel size that cannot be true, before any file is opened.

    ``names`` is how the command calls them.  Raises ``UserError``, also when the two look swapped.
    """
    both = f"{names[0]} {box:g}, {names[1]} {angpix:g}"
    if not (math.isfinite(box) and math.isfinite(angpix)):
        raise UserError(f"{both}: both must be numbers")
    if angpix == int(angpix) and angpix >= 16 and (box != int(box) or 0 < box < 16):
        fix = f"give {names[0]} {angpix:g} and {names[1]} {box:g}"
        raise UserError(f"{both}: it looks like {names[0]} and {names[1]} are swapped; {fix}")
    if box != int(box):
        raise UserError(
            f"{names[0]} {box:g}: the box size is a whole number of voxels, as in the subtomograms' headers"
        )
    if box <= 0 or angpix <= 0:
        raise UserError(f"{both}: both must be above zero")


def input_options(arguments: argparse.Namespace, box: float, angpix: float, names: tuple[str, str]) -> InputOptions:
    """Box, pixel size and the other cross-checks of a STAR file; ``UserError`` for impossible ones (``names``: see
    ``box_and_pixel``)."""
    box_and_pixel(box, angpix, names)
    return InputOptions(arguments.datadir, angpix, int(box), arguments.relion31, damaged=arguments.damaged)


def existing_file(path: Path) -> Path:
    """``path`` when it is a file; raises ``UserError`` otherwise."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a file")
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the name and the working directory")
    return path
