"""What the shells complete: the scripts are run in the shells themselves, where they are installed."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from opustomo import cli, completion, config
from opustomo.completion import SCRIPTS, programs
from opustomo.options import options_of


@pytest.fixture(scope="module", params=list(SCRIPTS))
def shell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The script of every shell, in a file."""
    folder, known = tmp_path_factory.mktemp("completion"), programs()
    for name, script in SCRIPTS.items():
        (folder / name).write_text(script(known))
    return {name: folder / name for name in SCRIPTS}


def run(shell: str, code: str) -> list[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    plain = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    result = subprocess.run([shell, *plain, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    return result.stdout.splitlines()


# the shell's own functions print what they are given; what is typed is in "words"
ZSH = """
compdef() {{ }}; _files() {{ print FILES }}
_describe() {{ print -l -- ${{${{(P)2}}%%:*}} | grep -- "^${{words[CURRENT]}}" }}
compadd() {{ print -l -- ${{(P)2}} | grep -- "^${{words[CURRENT]}}" }}
source {script}; words=({words}); CURRENT=$#words; _opustomo
"""
BASH = """
source {script}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _opustomo
[ ${{#COMPREPLY[@]}} = 0 ] && echo FILES || printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(shell: str, script: Path, *typed: str) -> set[str]:
    """What the shell would offer for the last word; FILES where it is left to file names."""
    words = " ".join(word if word == '""' else shlex.quote(word) for word in typed)
    if shell == "fish":
        line = " ".join("" if word == '""' else word for word in typed)
        offered = run(shell, f"source {script}; complete -C {shlex.quote(line)}")
        return {row.split("\t")[0] for row in offered}
    return set(run(shell, {"bash": BASH, "zsh": ZSH}[shell].format(script=script, words=words)))


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (("opustomo", "tr"), {"train"}),
        (("opustomo", "--ver"), {"--version"}),
        (("opustomo", "train", "--check"), {"--checkpoint", "--checkpoint-minutes"}),
        (("opustomo", "check", "--contrast", '""'), {"auto", "white", "black"}),
        (("opustomo", "export", "a", "--format", "a"), {"artiax"}),
        (("dsdsh", "eval"), {"eval_vol"}),
        (("dsd", "train_tomo", "--beta", "c"), {"cos", "constant"}),
        (("dsd", "train_tomo", "--lamb"), {"--lamb"}),
    ],
)
def test_verbs_options_and_choices(
    shell: str, typed: tuple[str, ...], offered: set[str], scripts: dict[str, Path]
) -> None:
    assert completed(shell, scripts[shell], *typed) == offered


def test_every_verb_and_option_is_offered_in_bash(scripts: dict[str, Path]) -> None:
    """All that the program takes, and nothing that it does not."""
    assert completed("bash", scripts["bash"], "opustomo", '""') == {*cli.VERBS, "--help", "--version", "--completion"}
    code = f"source {scripts['bash']}\n" + "\n".join(
        f"COMP_WORDS=(opustomo {verb} -); COMP_CWORD=2; _opustomo; echo {verb} ${{COMPREPLY[@]}}" for verb in cli.VERBS
    )
    found = {line.split()[0]: set(line.split()[1:]) for line in run("bash", code)}
    for verb, (_, name, *_) in cli.VERBS.items():
        flags = {flag for option in options_of(getattr(config, name)) for flag in option.flags}
        assert found[verb] == flags | {"-h", "--help"} | ({"--resume"} if verb == "train" else set())


def test_values_are_left_to_file_names(scripts: dict[str, Path]) -> None:
    for typed in (("opustomo", "train", "par"), ("opustomo", "train", "-o", '""'), ("opustomo", "nonesuch", "-")):
        assert completed("bash", scripts["bash"], *typed) == {"FILES"}
    assert "-o default" in run("bash", f"source {scripts['bash']}; complete -p opustomo")[0]


def test_bash_takes_an_equals_sign_for_a_word(scripts: dict[str, Path]) -> None:
    whole = completed("bash", scripts["bash"], "opustomo", "check", "--contrast", "=")
    assert whole == {"auto", "white", "black"}
    assert completed("bash", scripts["bash"], "opustomo", "check", "--contrast", "=", "w") == {"white"}


def test_scripts_are_sound_for_their_shells_and_start_nothing(shell: str, scripts: dict[str, Path]) -> None:
    """While someone types no Python runs: the answer is there at once."""
    text = scripts[shell].read_text()
    assert "python" not in text and "$(opustomo" not in text and "`" not in text
    run(shell, f"exec {shell} -n {scripts[shell]}")


def test_a_shell_that_is_not_known_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["csh"], [], ["bash", "zsh"]):
        assert cli.main(["--completion", *words]) == 2
        told = capsys.readouterr()
        assert told.out == "" and "bash, zsh, fish" in told.err and told.err.count("\n") == 1


def test_the_script_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--completion", "bash"]) == 0
    assert capsys.readouterr().out == completion.bash(programs())
