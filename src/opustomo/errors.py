"""The one exception a user is meant to read.

Owns: the rule that a failure is one line saying what, where, why and how to mend it.
"""

from __future__ import annotations

import csv
import pickle
import signal
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake in the input, the options or the machine that the user can mend.

    The message is a single line: what is wrong, where (file, row, column), why, and the command or
    edit that fixes it.  ``cli.run`` prints it and exits with status 2; no traceback is shown.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


class ToldElsewhere(UserError):
    """The failure of another process of this run, which has told the user: it goes to the log alone."""


class Interrupted(KeyboardInterrupt):
    """A signal has asked the program to stop: its number, and words for the user on how to go on.

    told: another process of this run tells the user.
    """

    def __init__(self, number: int, words: str = "", *, told: bool = False) -> None:
        super().__init__()
        self.number, self.words, self.told = number, words, told

    def __str__(self) -> str:
        by = "" if self.number == signal.SIGINT else f" by {signal.Signals(self.number).name}"
        return f"interrupted{by}{self.words and ': '}{self.words}"


def printable(text: str) -> str:
    """``text`` with escapes in place of what a terminal would obey: names from files may hold anything but "/"."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


# what parsers raise for bytes that are not of their format
DAMAGE = (
    OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError,
    ArithmeticError, MemoryError, csv.Error, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@contextmanager
def reading(path: Path, fix: str) -> Iterator[None]:
    """Whatever goes wrong in the block is the fault of the file: a UserError that names it and ends in ``fix``."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {fix}") from None
    except DAMAGE as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}); {fix}") from None
