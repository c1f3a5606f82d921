"""The architecture's rules, read from the source: who imports whom, sizes, and what is never loaded or written."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from beartype.roar import BeartypeCallHintParamViolation

import opustomo
from opustomo.physics.geometry import euler_to_matrix

ROOT = Path(opustomo.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))
PARENT = "opustomo"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in FILES}


def is_in(module: str, layer: str) -> bool:
    return module == layer or module.startswith(layer + ".")


def imports(module: str) -> set[str]:
    """Our modules that a module imports anywhere (also inside functions and for types), without the package's name."""
    found: set[str] = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found.add(node.module or "")
            # `from opustomo.data import mrc` imports opustomo.data.mrc
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.removeprefix(PARENT + ".") for name in found if name.startswith(PARENT + ".")}
    return {name for name in ours if name in MODULES}


# layer -> what of ours it may import; a layer may always import itself
ALLOWED = {
    "physics": (),
    "model": ("physics",),
    "objective": ("physics",),
    "reconstruct": ("physics",),
    "mixture": (),
    "linear": ("physics", "reconstruct", "mixture", "pose_scale"),
    "pose_scale": ("mixture",),
    "motion_covariance": (),
    "bodies": ("physics", "reconstruct", "linear", "objective", "motion_covariance"),
    "linear_fit": (
        "physics",
        "reconstruct",
        "linear",
        "mixture",
        "pose_scale",
        "errors",
        "data.particles",
        "data.poses",
    ),
}


@pytest.mark.parametrize("layer", ALLOWED)
def test_lower_layers_import_only_what_is_below_them(layer: str) -> None:
    for module in filter(lambda name: is_in(name, layer), MODULES):
        for target in imports(module):
            assert any(is_in(target, allowed) for allowed in (layer, *ALLOWED[layer])), f"{module} imports {target}"


def test_the_explorer_looks_at_runs_from_outside() -> None:
    """It may load checkpoints, and use what the verbs after training use; only the command line starts it."""
    inside = (
        "train",
        "training",
        "objective",
        "linear",
        "linear_fit",
        "model",
        "cli",
    )
    for module, tree in MODULES.items():
        for target in imports(module):
            if is_in(module, "explore"):
                assert not any(is_in(target, layer) for layer in inside), f"{module} imports {target}"
            else:
                assert not is_in(target, "explore"), f"{module} imports {target}"
        assert is_in(module, "explore") or "http.server" not in ast.unparse(tree), f"{module} serves"


def test_data_knows_no_model_and_nothing_above() -> None:
    above = (
        "model", "train", "training", "linear", "linear_fit", "linear_stage", "mixture", "preparation", "reconstruct",
        "objective", "bodies", "analysis", "explore", "cli", "compat",
    )  # fmt: skip
    assert all(any(is_in(name, layer) for name in MODULES) for layer in (*above, *ALLOWED))
    for module in filter(lambda name: is_in(name, "data"), MODULES):
        for target in imports(module):
            assert not any(is_in(target, layer) for layer in above), f"{module} imports {target}"


def test_nothing_but_the_command_line_knows_the_earlier_programs_forms() -> None:
    for module in MODULES:
        if not any(is_in(module, layer) for layer in ("compat", "cli", "completion")):
            assert not any(is_in(target, "compat") for target in imports(module)), module


def test_the_rules_see_what_they_judge() -> None:
    assert "physics.ctf" in imports("physics.observation")
    assert "data.mrc" in imports("data.observe")
    assert len(MODULES) > 20


def test_relion_columns_are_named_only_where_files_are_read_and_written() -> None:
    """A string that is a column's name; sentences to the user may mention one."""
    for module, tree in MODULES.items():
        if is_in(module, "data"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.fullmatch(r"_?rln\w+", node.value), f"{module}:{node.lineno} names {node.value}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_450_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_is_unpickled_without_restriction() -> None:
    for module, tree in MODULES.items():
        for call in calls(tree):
            function = ast.unparse(call.func)
            keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
            if function == "torch.load":
                assert keywords.get("weights_only") == "True", f"{module}:{call.lineno} torch.load"
            assert function not in {"pickle.load", "pickle.loads"}, f"{module}:{call.lineno} {function}"
            if function in {"np.load", "numpy.load"}:
                assert keywords.get("allow_pickle", "False") == "False", f"{module}:{call.lineno} {function}"


def test_nothing_from_a_file_is_run_and_no_archive_unpacked() -> None:
    forbidden = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"subprocess", "tarfile", "marshal", "shelve", "dill"}, f"{module}: {names}"
        for call in calls(tree):
            function = ast.unparse(call.func)
            assert function not in forbidden, f"{module}:{call.lineno} {function}"
            assert not function.endswith((".extractall", ".extract", ".unpack_archive")), f"{module}:{call.lineno}"
            assert not any(word.arg == "shell" for word in call.keywords), f"{module}:{call.lineno} shell"


# what is not a whole file: a log and a table that grow, rows of a cache that have checksums, a lock, a last resort
GROWING = {
    ("monitor", "self.path.open('a', newline='')"),
    ("data.cache", "path.open('wb')"),
    ("data.atomic", "path.open('a')"),
    ("cli", "os.open(os.devnull, os.O_WRONLY)"),
}


def test_every_file_is_written_atomically() -> None:
    """A call that writes stands in a ``with atomic(...)``, or is one of those that know why not."""
    writes = {"write_text", "write_bytes", "touch", "savefig", "to_csv", "tofile"}
    seen = set()
    for module, tree in MODULES.items():
        covered = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.With) and any("atomic(" in ast.unparse(item) for item in node.items)
            for inner in ast.walk(node)
        }
        for call in calls(tree):
            text, name = ast.unparse(call), getattr(call.func, "attr", getattr(call.func, "id", ""))
            mode = any(isinstance(a, ast.Constant) and str(a.value)[:1] in ("w", "a", "x", "r+") for a in call.args)
            opens = name == "open" and (mode or "O_WRONLY" in text)
            library = text.startswith(("np.save", "torch.save", "mrcfile.new", "pickle.dump"))
            method = name in writes and isinstance(call.func, ast.Attribute)
            if (opens or library or method) and call not in covered and "(buffer," not in text:
                assert (module, text) in GROWING, f"{module}:{call.lineno} {text}"
                seen.add((module, text))
    assert seen == GROWING


def test_physics_has_no_files_no_classes_but_the_grid_and_no_device_literals() -> None:
    for module in filter(lambda name: is_in(name, "physics"), MODULES):
        tree = MODULES[module]
        classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        assert classes <= {"Grid"}, f"{module} defines {classes}"
        for call in calls(tree):
            assert ast.unparse(call.func) not in {"open", "Path", "print"}, f"{module}:{call.lineno}"
            assert not ast.unparse(call.func).endswith(".cuda"), f"{module}:{call.lineno}"


def test_physics_is_type_checked_while_it_is_tested() -> None:
    """The import hook of conftest is alive: a list is not a tensor."""
    with pytest.raises(BeartypeCallHintParamViolation):
        euler_to_matrix([0.0, 0.0, 0.0])  # type: ignore[arg-type]
