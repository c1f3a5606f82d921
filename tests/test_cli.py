"""The native command line: what it offers, how fast it answers, and how failures reach the user."""

import dataclasses
import errno
import importlib
import importlib.util
import os
import re
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from opustomo import __version__, cli, config, demo, options
from opustomo.compat import dsd, dsdsh
from opustomo.errors import UserError

HEAVY = {"torch", "pandas", "sklearn", "matplotlib", "scipy", "umap", "starfile"}

# Every option of `opustomo train`: adding, removing or renaming one is an announced change.
TRAIN_OPTIONS = [
    "STAR", "-o/--output", "--datadir", "--Apix/--angpix", "-D/--box", "--relion31", "--contrast",
    "--normalisation", "--format", "--damaged", "--tilt-limit", "-r/--mask", "--downfrac", "--poses", "--ind",
    "-n/--epochs", "-b/--batch",
    "--zdim", "--masks", "--zaffinedim",
    "--encode-mode", "--lr", "--wd", "--accum-step", "--beta", "--beta-control", "--prior", "--tv",
    "--l1", "--lamb", "--bfactor", "--valfrac", "--split", "--templateres", "--width", "--encoderres",
    "--estpose/--no-estpose", "--num-gpus", "--multigpu", "--cache", "--no-cache", "--plot", "--tmp-prefix",
    "--log-interval", "--checkpoint", "--checkpoint-minutes", "--keep", "--load", "--latents", "--seed", "--workers",
    "--device", "--deterministic", "--compile", "--profile", "--verbose",
]  # fmt: skip
LINEAR_OPTIONS = [
    "STAR", "-o/--output", "--datadir", "--Apix/--angpix", "-D/--box", "--relion31", "--contrast",
    "--normalisation", "--format", "--damaged", "--tilt-limit",
    "-r/--mask", "--downfrac", "--components", "--iterations",
    "--estpose/--no-estpose", "--clusters", "--seed", "--workers",
]  # fmt: skip


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )


@pytest.fixture
def verb_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Calls that reach the verbs' ``main``; no verb runs."""
    importlib.import_module("opustomo.training.job")  # needs some of them as they are
    calls: list[tuple] = []
    for name, verb in cli.VERBS.items():
        module = types.ModuleType(verb.module)
        module.main = lambda *args, name=name: calls.append((name, *args))  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"opustomo.{verb.module}", module)
    return calls


@pytest.mark.parametrize(
    "command",
    ["cli.main(['--help'])", "cli.main(['train', '--help'])", "dsd.main(['-h'])", "cli.main(['--completion', 'bash'])"],
)
def test_help_is_quick_and_loads_nothing_heavy(command: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = f"import sys; from opustomo import cli; from opustomo.compat import dsd; {command}; "
    result = python(code + f"print(sorted({HEAVY} & set(sys.modules)))")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stdout.endswith("[]\n"), result.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_a_mistake_is_told_without_loading_anything_heavy() -> None:
    code = "import sys; from opustomo import cli; cli.main(['train', '--nonsense']); "
    assert python(code + f"print(sorted({HEAVY} & set(sys.modules)))").stdout == "[]\n"


def test_overview_lists_every_verb_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out.split("The whole path")[0]
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert sorted(listed) == sorted(cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb_names_all_its_options_and_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    for option in options.options_of(getattr(config, cli.VERBS[verb].config)):
        assert set(option.flags or (option.metavar,)) <= set(words)
    assert words[-1] and "example:" in words


@pytest.mark.parametrize("verb", cli.VERBS)
def test_examples_under_the_help_can_be_typed(verb: str) -> None:
    for line in cli.VERBS[verb].example.splitlines():
        words = line.split("   ")[0].split()
        assert words[:2] == ["opustomo", verb]
        if "--resume" not in words:
            cli.parse_verb(words[1:])


def test_examples_of_the_overview_can_be_typed() -> None:
    lines = [line.split("#")[0].split() for line in cli.OVERVIEW.split("The whole path:")[1].splitlines()]
    typed = [words for words in lines if words[:1] == ["opustomo"]]
    assert len(typed) == 8
    for words in typed:
        cli.parse_verb(words[1:])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("opustomo 0.")
    for program in (dsd, dsdsh):
        assert program.main(["--version"]) == 0
        assert capsys.readouterr().out == f"{program.__name__.rpartition('.')[2]} (opustomo {__version__})\n"


def test_nothing_typed_is_not_a_success() -> None:
    assert cli.main([]) == 2


@pytest.mark.parametrize(
    ("options_class", "frozen"), [(config.TrainConfig, TRAIN_OPTIONS), (config.LinearConfig, LINEAR_OPTIONS)]
)
def test_options_change_only_deliberately(options_class: type, frozen: list[str]) -> None:
    assert [option.label for option in options.options_of(options_class)] == frozen


@pytest.mark.parametrize("verb", ["train", "linear"])
def test_poses_are_corrected_unless_told_otherwise(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = [verb, "a.star", "-o", "run"]
    for words, corrected in (([], True), (["--no-estpose"], False), (["--estpose"], True), (["--no_estpose"], False)):
        chosen, given = cli.parse_verb([*line, *words])
        assert chosen.estpose is corrected
        assert ("estpose" in given) == bool(words)
    assert cli.main([verb, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--estpose, --no-estpose Correct every particle's pose" in text


def test_a_switch_that_is_off_has_no_twin(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "a.star", "-o", "run", "--no-plot"]) == 2
    assert "unknown option --no-plot" in capsys.readouterr().err
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--no-plot" not in text and "--no-no-cache" not in text


def sample(option: options.Option, default: object) -> list[str]:
    """argv that sets an option to something else than its default."""
    literal = {
        "contrast": "black",
        "normalisation": "sum",
        "format": "series",
        "damaged": "skip",
        "tilt_limit": "40",
        "beta": "cos",
        "encode_mode": "fixed",
        "device": "cpu",
    }
    if isinstance(default, bool):
        return [option.flags[-1]]
    if isinstance(default, int | float):
        return [option.flags[-1], str(default + 1)]
    numbers = {"angpix": "2.5", "box": "48"}
    return [option.flags[-1], literal.get(option.field) or numbers.get(option.field, "word")]


def flat(value: object) -> dict[str, object]:
    found: dict[str, object] = {}
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        item = getattr(value, field.name)
        found |= flat(item) if dataclasses.is_dataclass(item) else {field.name: item}
    return found


@pytest.mark.parametrize("option", options.options_of(config.TrainConfig)[2:], ids=lambda option: option.field)
def test_every_field_of_train_is_reachable(option: options.Option) -> None:
    base = flat(config.TrainConfig(Path("a.star"), Path("run")))
    typed = sample(option, base[option.field])
    chosen, given = options.parse(config.TrainConfig, ["a.star", "-o", "run", *typed], "opustomo train")
    changed = flat(chosen)
    assert {name for name in base if base[name] != changed[name]} == {option.field}
    assert given == {"star", "output", option.field}


def test_what_was_typed_reaches_train_as_typed(verb_calls: list[tuple]) -> None:
    argv = [
        "train",
        "a.star",
        "-o",
        "run",
        "--beta_control=2",
        "-n",
        "4",
        "--lr",
        "-1e-3",
        "-r",
        "m.mrc",
        "--Apix",
        "2",
    ]
    assert cli.main(argv) == 0
    [(verb, chosen, given)] = verb_calls
    assert (verb, chosen.epochs, chosen.beta_control, chosen.lr) == ("train", 4, 2.0, -1e-3)
    assert chosen.grid.mask == Path("m.mrc") and chosen.input.angpix == 2.0
    assert given == {"star", "output", "beta_control", "epochs", "lr", "mask", "angpix"}


def test_typing_a_default_counts_as_given() -> None:
    argv = ["train", "a.star", "-o", "run", "--downfrac", str(config.GridOptions().downfrac)]
    assert "downfrac" in cli.parse_verb(argv)[1]


def test_resume_stands_for_the_runs_own_star(tmp_path: Path, verb_calls: list[tuple]) -> None:
    (tmp_path / "config.yaml").write_text("star: /data/a.star\nzdim: 4\n")
    assert cli.main(["train", "-n", "40", "--resume", str(tmp_path)]) == 0
    [(_, chosen, given)] = verb_calls
    assert (chosen.star, chosen.output, chosen.load, chosen.epochs) == (Path("/data/a.star"), tmp_path, "latest", 40)
    assert "epochs" in given and "zdim" not in given


def test_resume_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert "no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("[half of a table")
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "config.yaml: cannot be read" in message and message.count("\n") == 1
    (tmp_path / "config.yaml").write_text("kind: network\n")
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "config.yaml: names no STAR file" in message and message.count("\n") == 1


def test_resume_of_a_run_that_was_interrupted_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.log").write_text("")
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "not begun" in message and "repeat the original command" in message and "--load" not in message


def test_help_of_train_lists_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    assert "\n  --resume RUN  " in capsys.readouterr().out.split("example:")[0]


@pytest.mark.parametrize("verb", ["cache", "train", "select", "volumes", "simulate", "demo"])
def test_a_file_for_an_output_folder(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb_calls: list[tuple]
) -> None:
    (tmp_path / "out").write_text("mine")
    words = {"cache": ["a.star"], "train": ["a.star"], "select": ["a.star", "--run", "r"], "volumes": ["r"]}
    assert cli.main([verb, *words.get(verb, []), "-o", str(tmp_path / "out")]) == 2
    assert f"-o {tmp_path / 'out'}: is a file; give a folder" in capsys.readouterr().err
    assert not verb_calls


def test_the_page_of_a_report_may_be_there_already(tmp_path: Path, verb_calls: list[tuple]) -> None:
    (tmp_path / "report.html").write_text("")
    assert cli.main(["report", "run", "-o", str(tmp_path / "report.html")]) == 0
    assert len(verb_calls) == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "did you mean 'train'?"),
        (
            ["train", "a.star", "-o", "run", "--downfarc", "0.5"],
            "unknown option --downfarc; did you mean '--downfrac'?",
        ),
        (["train", "a.star"], "missing: -o/--output"),
        (["train", "-o", "run"], "missing: STAR"),
        (["train"], "missing: STAR, -o/--output"),
        (["train", "a.star", "b.star", "-o", "run"], "b.star"),
        (["train", "a.star", "-o", "run", "--lr", "fast"], "--lr fast: a number is needed"),
        (["train", "a.star", "-o", "run", "-n", "abc"], "-n/--epochs abc: a whole number is needed"),
        (["train", "a.star", "-o", "run", "--epochs=2.5"], "-n/--epochs 2.5: a whole number is needed"),
        (["train", "a.star", "-o", "run", "--Apix", "x"], "--Apix/--angpix x: a number is needed"),
        (
            ["select", "a.star", "--run", "r", "-o", "o", "--classes", "0", "b"],
            "--classes 0 b: whole numbers are needed",
        ),
        (["train", "a.star", "-o", "run", "--beta", "linear"], "invalid choice 'linear'"),
        (["train", "a.star", "-o", "run", "-n"], "Missing value for argument '-n/--epochs'"),
        (["average", "a.star", "-o", "run", "--estpose"], "unknown option --estpose"),
    ],
)
def test_a_command_line_that_does_not_fit_is_one_line(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], verb_calls: list[tuple]
) -> None:
    assert cli.main(argv) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and message.startswith("opustomo")
    assert not verb_calls


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "opustomo.cli", "select", "none.star", "--run", "none", "-o", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("opustomo select: error: ") and result.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def failing(error: BaseException) -> Callable[[], int]:
    def function() -> int:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("mask.mrc: empty"), 2, "opustomo x: error: mask.mrc: empty"),
        (KeyboardInterrupt(), 130, "opustomo x: interrupted"),
        (MemoryError(), 1, "out of memory; use a smaller batch"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "out of memory; use a smaller batch"),
        (OSError(errno.ENOSPC, "No space left on device", "cache/b"), 2, "cache/b: disk full"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "out: permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.mrc"), 2, "a.mrc: not found"),
        (ValueError("two\nlines"), 1, "internal error: ValueError: two lines; the traceback is in"),
        (RuntimeError("shape"), 1, "internal error: RuntimeError: shape"),
    ],
)
def test_every_failure_is_one_line_and_a_status(
    error: BaseException, status: int, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run("opustomo x", failing(error), tmp_path) == status
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_an_internal_error_leaves_its_traceback_in_the_output_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run("opustomo x", failing(ZeroDivisionError("here")), tmp_path) == 1
    assert str(tmp_path / "error.log") in capsys.readouterr().err
    assert "in function\n    raise error" in (tmp_path / "error.log").read_text()


def test_an_internal_error_makes_no_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.run("opustomo x", failing(ZeroDivisionError("here")), tmp_path / "out") == 1
    [log] = tmp_path.iterdir()
    assert str(log) in capsys.readouterr().err and "ZeroDivisionError" in log.read_text()


def test_debug_prints_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPUSTOMO_DEBUG", "1")
    assert cli.run("opustomo x", failing(UserError("why"))) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_the_pipe_is_no_error() -> None:
    code = "import sys; from opustomo import cli\ndef f(): raise BrokenPipeError\nsys.exit(cli.run('x', f))"
    result = python(code)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_verbs_status_is_the_programs_status(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("check")
    module.main = lambda chosen: 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "opustomo.data.check", module)
    assert cli.main(["check", "a.star"]) == 1


def test_stages_of_the_demo_are_valid_command_lines(tmp_path: Path) -> None:
    verbs = [cli.parse_verb(arguments) and arguments[0] for arguments in demo.command_lines(tmp_path, 1)]
    # the first two are part of train
    without = {"doctor", "linear", "cache", "encode", "demo", "export", "extract", "mask", "movie", "status", "explore",
               "expand"}  # fmt: skip
    assert set(cli.VERBS) - set(verbs) == without


def test_the_demo_replaces_its_own_folder_and_no_other(tmp_path: Path) -> None:
    own = tmp_path / "demo"
    demo.claim(own)
    (own / "run").mkdir()
    (own / "run" / "old").write_text("")
    (own / "notes.txt").write_text("mine")
    demo.claim(own)
    assert not (own / "run").exists() and (own / "notes.txt").exists()
    with pytest.raises(UserError, match="not a former demo"):
        demo.claim(tmp_path)
    assert own.exists()


@pytest.mark.parametrize(("auc", "status"), [(0.95, 0), (0.85, 1), (float("nan"), 1)])
def test_the_demo_fails_when_the_codes_miss_the_truth(
    auc: float, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.conclude({"composition": {"auc": auc}}, Path("demo/run/report.html"), "5 min") == status
    captured = capsys.readouterr()
    assert "demo/run/report.html" in captured.out and "linear probe" in captured.out
    assert ("composition AUC" in captured.err) == bool(status)


def movie_script() -> types.ModuleType:
    path = Path(__file__).parents[1] / "analysis_scripts" / "movie.py"
    spec = importlib.util.spec_from_file_location("movie", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_movie_opens_maps_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("reference10.mrc", "reference2.mrc", "reference0.mrc", "reference0_data.mrc", "other1.mrc"):
        (tmp_path / name).write_text("")
    movie = movie_script()
    files = movie.series(tmp_path, "reference")
    assert [path.name for path in files] == ["reference0.mrc", "reference2.mrc", "reference10.mrc"]
    commands = movie.commands(files, "reference", 0.985)
    assert "level 0.985" in commands[2] and commands[-1].startswith('movie encode "reference.mp4"')
    played = [command.split()[4].strip(";") for command in commands if command.startswith("vseries")]
    assert played[:5] == ["0", "1", "2", "1", "0"]


def test_movie_runs_with_chimerax_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("chimerax", "chimerax.core", "chimerax.core.commands", "chimerax.core.errors"):
        module = types.ModuleType(name)
        module.run = lambda session, command: ran.append(command)  # type: ignore[attr-defined]
        module.UserError = ValueError  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    for i in range(3):
        (tmp_path / f"reference{i}.mrc").write_text("")
    monkeypatch.chdir(tmp_path)
    movie = movie_script()
    movie.main(None, ["reference", "0.985"])
    assert [command.split()[0] for command in ran[:3]] == ["close", "open", "volume"]
    with pytest.raises(ValueError, match="not a number"):
        movie.main(None, ["reference", "high"])
    with pytest.raises(ValueError, match="at least two maps"):
        movie.main(None, ["missing"])


def test_threads_give_their_cores_away() -> None:
    """libgomp says at its start how long a thread may hold a core to wait; what a user sets himself stays."""
    code = "from opustomo.cli import run; run('x', lambda: print(__import__('torch').zeros(1)))"
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    plain = {k: v for k, v in os.environ.items() if k not in names} | {"OMP_DISPLAY_ENV": "VERBOSE"}
    told = [
        re.findall(r"GOMP_SPINCOUNT = '(\d+)'", subprocess.run(
            [sys.executable, "-c", code], env=plain | given, capture_output=True, text=True, check=True
        ).stderr)
        for given in ({}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"})
    ]  # fmt: skip
    if not told[0]:
        pytest.skip("this torch has another OpenMP library")
    assert told[0] == ["1000"]
    assert told[1] != ["1000"]
    assert told[2] == ["7"]
