"""What is handed out: wheel and sdist, the files around them, and that each says what is true of this version."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import opustomo
from opustomo import cli

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(path: str | Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def package_files() -> set[str]:
    """Everything in src/opustomo but what Python compiles, from src/ on."""
    files = (path for path in (ROOT / "src" / "opustomo").rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT / "src")) for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str], str]:
    """Names in the wheel, which is made of the sdist; names in the sdist without its folder; the wheel's metadata."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"opustomo-{opustomo.__version__}.dist-info/METADATA").decode()
    with tarfile.open(sdist) as tar:
        return names, {member.name.split("/", 1)[1] for member in tar if member.isfile()}, metadata


@pytest.mark.slow
def test_the_wheel_is_the_package_and_its_licences(built: tuple[set[str], set[str], str]) -> None:
    """Every page, table and vendored file of the package is in it, with the licences, and nothing else."""
    names, _, metadata = built
    info = f"opustomo-{opustomo.__version__}.dist-info/"
    licences = {f"{info}licenses/LICENSE", f"{info}licenses/THIRD_PARTY.md"}
    files = package_files()
    assert {"opustomo/analysis/report_template.html", "opustomo/simulate/beads_70s.json", "opustomo/py.typed"} <= files
    about = {name for name in names if name.startswith(info)}
    assert names - about == files
    assert about == licences | {f"{info}{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    assert "License-Expression: BSD-3-Clause" in metadata and "Provides-Extra: atoms" in metadata


@pytest.mark.slow
def test_the_sdist_holds_all_that_its_documents_and_tests_name(built: tuple[set[str], set[str], str]) -> None:
    _, names, _ = built
    assert {f"src/{name}" for name in package_files()} <= names
    tracked = {f"tests/{path.relative_to(ROOT / 'tests')}" for path in (ROOT / "tests").rglob("*.py")}
    assert tracked <= names
    assert {"Makefile", ".ci/run", "CITATION.cff", "Dockerfile", "environment.yml", "runs/slurm.sbatch"} <= names
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / document).read_text()):
            within = target.rstrip("/")
            assert "://" in target or any(name == within or name.startswith(within + "/") for name in names), target


@pytest.mark.parametrize("folder", sorted((ROOT / "src").rglob("vendor")), ids=lambda path: path.parent.name)
def test_what_is_carried_along_is_named_with_its_licence(folder: Path) -> None:
    """Every vendored file stands in the table beside it, its licence lies there, and THIRD_PARTY.md has it."""
    table, page = (folder / "README.txt").read_text(), (ROOT / "THIRD_PARTY.md").read_text()
    files = {path.name for path in folder.iterdir()} - {"README.txt"}
    assert all(name in table for name in files)
    assert any("LICENSE" in name for name in files)
    rows = tool("licences").carried()
    assert any(str(folder.relative_to(ROOT)) in row for row in rows)
    assert all(row in page for row in rows), "make licences writes THIRD_PARTY.md anew"


def test_every_requirement_is_in_the_list_of_licences() -> None:
    """Names alone: versions and wording are those of the machine that wrote the list."""
    listed = set(re.findall(r"^\| ([a-z0-9-]+) \| [^|]+\|", (ROOT / "THIRD_PARTY.md").read_text(), re.M))
    optional = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *optional["atoms"], *optional["movie"]]
    assert {re.split(r"[><=]", line)[0] for line in needed} <= listed, "make licences writes THIRD_PARTY.md anew"


def test_least_versions_are_those_of_the_project() -> None:
    check = tool("dist_check")
    pinned = check.lowest(without_torch=False).split()
    assert {line.replace("==", ">=") for line in pinned} >= set(PROJECT["dependencies"])
    assert not [line for line in check.lowest(without_torch=True).split() if line.startswith("torch==")]


def test_scripts_that_take_arguments_read_them_with_argparse() -> None:
    """One that took whatever stands there for a file's name once answered --help with a file called so."""
    scripts = [*(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    taking = [path for path in scripts if "sys.argv" in path.read_text() or "parse_args" in path.read_text()]
    assert len(taking) > 10
    assert [path.name for path in taking if "argparse.ArgumentParser(" not in path.read_text()] == []
    assert [path.name for path in ROOT.iterdir() if path.name.startswith("-")] == []


def test_commands_of_the_installation_check_can_be_typed() -> None:
    check = tool("dist_check")
    for command in check.COMMANDS:
        program, *words = command.split()
        if program == "opustomo" and not words[0].startswith("-"):
            cli.parse_verb(words)


def test_the_citation_is_of_this_version() -> None:
    cited = load("CITATION.cff")
    assert (cited["title"], cited["version"], cited["license"]) == (
        "opustomo",
        opustomo.__version__,
        PROJECT["license"],
    )
    dois = re.findall(r"doi:(10\.[\w./-]*\w)", (ROOT / "README.md").read_text())
    assert dois and set(dois) <= {reference["doi"] for reference in cited["references"]}


def test_the_image_copies_what_is_there_and_lets_it_in() -> None:
    """Every source of the Dockerfile exists, and none of it is kept out of the context."""
    text = (ROOT / "Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M) for word in line.split()[:-1]]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert len(sources) >= 5 and set(sources) <= allowed
    assert all((ROOT / source).exists() for source in sources)
    torch = re.search(r"^ARG TORCH=(\S+)", text, re.M)
    assert torch is not None and f"TORCH ?= {torch[1]}\n" in (ROOT / "Makefile").read_text()


def test_continuous_integration_runs_what_is_run_here_on_every_python_that_is_promised() -> None:
    jobs = load(".github/workflows/ci.yml")["jobs"]
    commands = {name: [step.get("run", "") for step in job["steps"]] for name, job in jobs.items()}
    assert "bash .ci/run" in commands["test"]
    assert any("dist_check.py dist --extra" in command for command in commands["package"])
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert jobs["package"]["strategy"]["matrix"]["python"] == promised
    assert f">={promised[0]}" == PROJECT["requires-python"]
    conda = load("environment.yml")["dependencies"]
    assert f"python={promised[0]}" in conda and {"pip": ["-e ."]} in conda


def test_pythons_torch_and_extras_are_the_same_everywhere() -> None:
    """pyproject.toml says them; image, continuous integration, make, mypy and the documents repeat them."""
    texts = {name: (ROOT / name).read_text() for name in ("Dockerfile", "Makefile", ".github/workflows/ci.yml")}
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    said = f"Python {', '.join(promised[:-1])} or {promised[-1]}"
    assert [name for name in ("README.md", "docs/install.md") if said not in (ROOT / name).read_text()] == []
    assert re.findall(r"^ARG PYTHON=(.+)", texts["Dockerfile"], re.M) == promised[:1]
    assert PYPROJECT["tool"]["mypy"]["python_version"] == promised[0]
    steps = [step for job in load(".github/workflows/ci.yml")["jobs"].values() for step in job["steps"]]
    pythons = [step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})]
    assert set(pythons) <= {*promised, "${{ matrix.python }}"} and len(pythons) == 2
    extras = set(PROJECT["optional-dependencies"]) - {"dev", "docs"}  # those are for who works on the program
    assert set(re.findall(r"^ARG EXTRAS=(.+)", texts["Dockerfile"], re.M)[0].split(",")) == extras
    asked = [line for text in texts.values() for line in re.findall(r"--extra ((?:\w+ ?)+)", text)]
    assert len(asked) == 2 and all(set(line.split()) == extras for line in asked)
    assert set(re.findall(r'pip install "\.\[(\w+)\]', (ROOT / "docs/install.md").read_text())) == extras
    [least] = [line.split(">=")[1] for line in PROJECT["dependencies"] if line.startswith("torch>=")]
    assert re.findall(r'--versions lowest --torch "torch==([\d.]+)"', texts[".github/workflows/ci.yml"]) == [
        f"{least}.0"
    ]
    usual = re.findall(r"^ARG TORCH=torch==([\d.]+)", texts["Dockerfile"], re.M)
    assert usual == re.findall(r"^TORCH \?= torch==([\d.]+)", texts["Makefile"], re.M)
    assert [int(part) for part in usual[0].split(".")] >= [int(part) for part in least.split(".")]
    # `make dist` builds with what is installed
    assert set(PYPROJECT["build-system"]["requires"]) <= set(PROJECT["optional-dependencies"]["dev"])


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_forms_and_ask_for_what_exists(path: Path) -> None:
    form = load(path)
    assert {"name", "description", "body"} <= set(form)
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    for field in form["body"]:
        assert field["type"] in {"textarea", "input", "checkboxes"}
        assert field["attributes"]["label"]
        assert set(field.get("validations", {})) <= {"required"}
        assert field["type"] != "checkboxes" or all(option["label"] for option in field["attributes"]["options"])
    for command in re.findall(r"`opustomo (\w+)", path.read_text()):
        assert command in cli.VERBS


def test_the_map_of_tests_has_every_file_and_marks_the_slow_ones() -> None:
    """A new file of tests is added to the table at the end of CONTRIBUTING.md."""
    part = (ROOT / "CONTRIBUTING.md").read_text().split("## Which test guards what")[1]
    table = dict(re.findall(r"`(?:tests/)?((?:faults/)?test_\w+\.py)`( \*slow\*)?", part))
    folder = ROOT / "tests"
    texts = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("test_*.py")}
    assert set(table) == set(texts)
    marked = re.compile(r"^\s*@pytest\.mark\.slow|marks=pytest\.mark\.slow|^pytestmark = pytest\.mark\.slow", re.M)
    assert {name for name, mark in table.items() if mark} == {n for n, text in texts.items() if marked.search(text)}
