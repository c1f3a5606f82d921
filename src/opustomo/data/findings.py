"""Findings and the report they make: aligned text for people, JSON for programs.

Owns: the four levels and how a finding is worded, folded and counted.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from opustomo.errors import printable

Level = Literal["ok", "note", "warning", "error"]

_LEVEL_WIDTH, _TOPIC_WIDTH = 9, 16
_INDENT = 2 + _LEVEL_WIDTH + _TOPIC_WIDTH


@dataclass(frozen=True)
class Finding:
    """One fact about a data set or a machine: what was found and, where that is not obvious, what follows from it.

    ``action`` says what the program will do or what the user should; ``values`` are the numbers behind the words,
    plain Python types, for ``--json``.
    """

    level: Level
    topic: str
    found: str
    action: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """Level, topic, finding and action on one line, in columns."""
        text = f"{self.found} -> {self.action}" if self.action else self.found
        return f"  {self.level:<{_LEVEL_WIDTH}}{self.topic:<{_TOPIC_WIDTH}}{text}"


@dataclass(frozen=True)
class Report:
    """All findings about one STAR file or folder, by section in the order of printing.

    ``failure`` is the message that ended the reading, None where everything could be looked at; ``kind`` what JSON
    calls the subject.
    """

    subject: Path
    sections: dict[str, list[Finding]]
    seconds: float
    failure: str | None = None
    kind: str = "star"

    def count(self, level: Level) -> int:
        """Number of findings of a level."""
        return sum(finding.level == level for findings in self.sections.values() for finding in findings)

    def text(self, width: int | None = None) -> str:
        """The report for reading, folded to ``width`` characters; one line per finding when None."""
        lines = [f"{self.subject}"]
        for name, findings in self.sections.items():
            if findings:
                lines += ["", name, *(row for finding in findings for row in _folded(finding.line(), width))]
        if self.failure is None:
            lines += ["", f"{self._counts()}; looked at in {self.seconds:.1f} s"]
        return "\n".join(lines)

    def printed(self, as_json: bool) -> str:
        """JSON, or the text: folded to the terminal, one line per finding where it goes to a file or a pipe."""
        width = min(shutil.get_terminal_size().columns, 130) if sys.stdout.isatty() else None
        return self.json() if as_json else printable(self.text(width))

    def json(self) -> str:
        """The report for programs: subject, counts, seconds, failure, findings with section, level, topic, values."""
        findings = [
            {
                "section": name,
                "level": finding.level,
                "topic": finding.topic,
                "found": finding.found,
                "action": finding.action,
                "values": dict(finding.values),
            }
            for name, section in self.sections.items()
            for finding in section
        ]
        document = {
            self.kind: str(self.subject),
            "failure": self.failure,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "notes": self.count("note"),
            "seconds": round(self.seconds, 2),
            "findings": findings,
        }
        return json.dumps(document, indent=1, allow_nan=False)

    def _counts(self) -> str:
        levels: tuple[Level, ...] = ("error", "warning", "note")
        return ", ".join(_plural(self.count(level), level) for level in levels)


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names with commas and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def megabytes(size: float) -> str:
    """A number of bytes in GB or MB."""
    if size >= 1e11:
        return f"{size / 1e9:.0f} GB"
    return f"{size / 1e9:.2g} GB" if size >= 1e9 else f"{max(size / 1e6, 1):.0f} MB"


def first_line(error: BaseException) -> str:
    """The first line of what a library says of a failure, cut where it is long."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def span(low: float, high: float, digits: str = "g") -> str:
    """``3`` or ``3 to 5``, both ends in one number format."""
    first, last = format(low, digits), format(high, digits)
    return first if first == last else f"{first} to {last}"


def _plural(count: int, word: str) -> str:
    return f"{count or 'no'} {word}{'' if count == 1 else 's'}"


def _folded(line: str, width: int | None) -> list[str]:
    if width is None:
        return [line]
    # never narrower than a readable column beside the indent
    return textwrap.wrap(
        line,
        max(width, _INDENT + 40),
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
