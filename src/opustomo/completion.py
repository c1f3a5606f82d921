"""``opustomo --completion bash|zsh|fish``: a script that completes opustomo, dsd and dsdsh in a shell.

Owns: the scripts.  They hold every verb, option and choice, so that no Python runs while someone types; a new version
of the program needs a new script.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from opustomo.errors import UserError

if TYPE_CHECKING:
    from opustomo.compat.arguments import Command


class Flag(NamedTuple):
    """An option of a verb in all its spellings; choices: its values where they are few; switch: it takes none."""

    spellings: tuple[str, ...]
    choices: tuple[str, ...] = ()
    switch: bool = False


class Verb(NamedTuple):
    """A verb of a program: its purpose in a line, its options."""

    purpose: str
    flags: tuple[Flag, ...]


Programs = dict[str, dict[str, Verb]]
GLOBAL = ("--help", "--version")
HELP = Flag(("-h", "--help"), switch=True)


def print_script(words: list[str]) -> int:
    """Print the script for the shell that is named; raises UserError for another."""
    if len(words) != 1 or words[0] not in SCRIPTS:
        found = f"--completion {' '.join(words)}: not known" if words else "--completion: no shell named"
        raise UserError(f"{found}; name one of {', '.join(SCRIPTS)}, e.g. opustomo --completion bash")
    print(SCRIPTS[words[0]](programs()), end="")
    return 0


def programs() -> Programs:
    """Every verb of the three programs with its options."""
    from opustomo.compat import dsd, dsdsh

    def seed(program: str, commands: dict[str, Command]) -> dict[str, Verb]:
        return {name: _seed_verb(f"{program} {name}", command) for name, command in commands.items()}

    return {"opustomo": _native(), "dsd": seed("dsd", dsd.COMMANDS), "dsdsh": seed("dsdsh", dsdsh.COMMANDS)}


def _native() -> dict[str, Verb]:
    from opustomo import config
    from opustomo.cli import VERBS
    from opustomo.options import options_of

    found = {}
    for name, verb in VERBS.items():
        config_class = getattr(config, verb.config)
        flags = [Flag(o.flags, o.choices, o.switch) for o in options_of(config_class) if o.flags]
        resume = [Flag(("--resume",))] if name == "train" else []
        found[name] = Verb(_purpose(config_class.__doc__), (*flags, *resume, HELP))
    return found


def _seed_verb(prog: str, command: Command) -> Verb:
    from opustomo.compat.arguments import Parser

    flags = [
        Flag(tuple(action.option_strings), tuple(map(str, action.choices or ())), action.nargs == 0)
        for action in Parser(prog, command)._actions
        if action.option_strings
    ]
    return Verb(_purpose(command.purpose), tuple(flags))


def _purpose(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]


def bash(known: Programs) -> str:
    """For bash 3 and later: ``source <(opustomo --completion bash)``."""
    return f"""\
# opustomo, dsd and dsdsh in bash: put this line into ~/.bashrc
#   source <(opustomo --completion bash)
_opustomo() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words=""
  local program=${{COMP_WORDS[0]##*/}} verb=${{COMP_WORDS[1]}}
  # bash takes --option=value for three words
  if [ "$current" = "=" ]; then current=""
  elif [ "$previous" = "=" ]; then previous=${{COMP_WORDS[COMP_CWORD-2]}}; fi
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    case "$program" in
{_verbs(known, "      {program}) words={words} ;;")}
    esac
  else
    case "$program $verb $previous" in
{_choices(known, "      {place}) words={words} ;;")}
    esac
    if [ -z "$words" ] && [ "${{current:0:1}}" = "-" ]; then
      case "$program $verb" in
{_flags(known, "        {place}) words={words} ;;")}
      esac
    fi
  fi
  if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$current")); fi
}}
complete -o bashdefault -o default -F _opustomo {" ".join(known)}
"""


def zsh(known: Programs) -> str:
    """For zsh with its completion system: a file ``_opustomo`` in a folder of ``fpath``, or sourced."""
    return f"""\
#compdef {" ".join(known)}
# opustomo, dsd and dsdsh in zsh: put this line into ~/.zshrc, after compinit
#   source <(opustomo --completion zsh)
_opustomo() {{
  local program=${{words[1]:t}} verb=${{words[2]}} previous=${{words[CURRENT-1]}} current=${{words[CURRENT]}}
  local -a found
  if (( CURRENT == 2 )); then
    case "$program" in
{_described(known)}
    esac
    _describe verb found
    return
  fi
  case "$program $verb $previous" in
{_choices(known, "    {place}) found=({bare}) ;;")}
  esac
  if (( ! $#found )) && [[ $current == -* ]]; then
    case "$program $verb" in
{_flags(known, "      {place}) found=({bare}) ;;")}
    esac
  fi
  if (( $#found )); then compadd -a found; else _files; fi
}}
if [[ ${{funcstack[1]}} == _opustomo ]]; then _opustomo "$@"; else compdef _opustomo {" ".join(known)}; fi
"""


def fish(known: Programs) -> str:
    """For fish: ``opustomo --completion fish > ~/.config/fish/completions/opustomo.fish``."""
    lines = [
        "# opustomo, dsd and dsdsh in fish: put this line into ~/.config/fish/config.fish",
        "#   opustomo --completion fish | source",
    ]
    for program, verbs in known.items():
        for flag in _globals(program):
            lines.append(f"complete -c {program} -n __fish_is_first_token -a {flag}")
        for name, verb in verbs.items():
            lines.append(f"complete -c {program} -n __fish_is_first_token -f -a {name} -d {shlex.quote(verb.purpose)}")
            within = f"complete -c {program} -n '__fish_seen_subcommand_from {name}'"
            lines += [f"{within} {_fish_flag(flag)}" for flag in verb.flags]
    return "\n".join(lines) + "\n"


def _fish_flag(flag: Flag) -> str:
    """``-s n -l epochs -r``: short and long names, and whether a value follows."""
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-{'s' if len(name) == 2 else 'o'} {name[1:]}"
             for name in flag.spellings]  # fmt: skip
    value = f" -x -a '{' '.join(flag.choices)}'" if flag.choices else "" if flag.switch else " -r"
    return " ".join(names) + value


SCRIPTS: dict[str, Callable[[Programs], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def _globals(program: str) -> tuple[str, ...]:
    return (*GLOBAL, "--completion") if program == "opustomo" else GLOBAL


def _case(form: str, place: str, words: Iterator[str] | tuple[str, ...]) -> str:
    bare = " ".join(words)
    return form.format(place=place, program=place, words=f'"{bare}"', bare=bare)


def _verbs(known: Programs, form: str) -> str:
    return "\n".join(_case(form, program, (*verbs, *_globals(program))) for program, verbs in known.items())


def _described(known: Programs) -> str:
    lines = []
    for program, verbs in known.items():
        said = [shlex.quote(f"{name}:{verb.purpose}".replace("`", "'")) for name, verb in verbs.items()]
        lines.append(f"      {program}) found=({' '.join((*said, *_globals(program)))}) ;;")
    return "\n".join(lines)


def _choices(known: Programs, form: str) -> str:
    """A case for every option with few values: ``"dsd train_tomo --beta")``."""
    lines = [_case(form, '"opustomo --completion "*', tuple(SCRIPTS))]
    for program, verbs in known.items():
        for name, verb in verbs.items():
            for flag in verb.flags:
                if flag.choices:
                    places = "|".join(f'"{program} {name} {spelling}"' for spelling in flag.spellings)
                    lines.append(_case(form, places, flag.choices))
    return "\n".join(lines)


def _flags(known: Programs, form: str) -> str:
    return "\n".join(
        _case(form, f'"{program} {name}"', tuple(word for flag in verb.flags for word in flag.spellings))
        for program, verbs in known.items()
        for name, verb in verbs.items()
    )
