"""``opustomo demo``: the whole path on a simulated set, each stage announced as the command that would do the same.

Owns: the stages, their options (chosen for two cores and ten minutes) and the bar that the result must clear.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from opustomo import cli
from opustomo.config import DemoConfig
from opustomo.data.atomic import write_text
from opustomo.errors import UserError
from opustomo.monitor import duration, peak_memory_gb, setup_log

MARKER = ".opustomo-demo"
STAGE_FOLDERS = ("data", "average", "run", "classes")
CLASSES = 4
TRAIN_OPTIONS = ("--epochs", "8", "--zdim", "8", "--downfrac", "0.75")
LOWEST_AUC = 0.9
# What the closing table shows of RUN/evaluation.json: dotted names in it, in words.
FIGURES = {
    "composition.auc": "composition: AUC of a linear probe",
    "composition.gmm_ari": "composition: ARI of classes found without labels",
    "conformation.hinge.probe_corr": "30S rotation: correlation of a linear probe",
    "volumes.resolution_0.5_mean": "class volumes against truth: FSC = 0.5 at (A)",
    "volumes.difference_cc_mean": "difference maps against truth: correlation",
    "invariance.max_r2": "orientation, defocus readable from the code: R^2",
    "likelihood.gain_over_linear": "network above linear stage, held out (nats/particle)",
}


def main(config: DemoConfig) -> int:
    """Run every stage below ``config.output``; returns 1 when the codes do not separate what was simulated."""
    output = config.output
    claim(output)
    setup_log(output, verbose=False)
    stages = command_lines(output, config.seed)
    start = time.monotonic()
    for number, arguments in enumerate(stages, 1):
        print(f"\n[{number}/{len(stages)}] opustomo {' '.join(arguments)}", flush=True)
        began = time.monotonic()
        if status := cli.dispatch(arguments):
            raise UserError(f"the stage `opustomo {' '.join(arguments)}` ended with status {status}")
        print(f"[{number}/{len(stages)}] {arguments[0]} done in {duration(time.monotonic() - began)}", flush=True)
    spent = duration(time.monotonic() - start)
    figures = json.loads((output / "run" / "evaluation.json").read_text())
    return conclude(figures, output / "run" / "report.html", f"{spent}, {peak_memory_gb():.1f} GB at most")


def claim(output: Path) -> None:
    """Make ``output`` the demo's own: new, empty, or a former demo whose results are removed.

    Raises ``UserError`` for a folder with anything else in it.
    """
    marker = output / MARKER
    if output.exists() and not output.is_dir():
        raise UserError(f"-o {output}: is a file; give the name of a new folder")
    if output.is_dir() and any(output.iterdir()) and not marker.exists():
        raise UserError(f"-o {output}: exists and is not a former demo; give the name of a new folder with -o")
    for name in STAGE_FOLDERS:
        shutil.rmtree(output / name, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    write_text(marker, "made by opustomo demo, which may replace the folders beside this file\n")


def command_lines(output: Path, seed: int) -> list[list[str]]:
    """The stages as the arguments of ``opustomo``, in order."""
    data, run = output / "data", output / "run"
    star, mask, k = str(data / "particles.star"), str(data / "mask.mrc"), str(CLASSES)
    return [
        ["simulate", "-o", str(data), "--preset", "demo", "--seed", str(seed)],
        ["check", star, "-r", mask],
        ["average", star, "-r", mask, "-o", str(output / "average")],
        ["train", star, "-r", mask, "-o", str(run), "--seed", str(seed), *TRAIN_OPTIONS],
        ["analyze", str(run), "--pcs", "2", "--clusters", k],
        ["volumes", str(run), "--kmeans", k],
        ["volumes", str(run), "--pc", "1"],
        ["quality", str(run), "--kmeans", k],
        ["select", star, "--run", str(run), "-o", str(output / "classes"), "--kmeans", k],
        ["evaluate", str(run), "--truth", str(data)],
        ["report", str(run), "--clusters", k],
    ]


def conclude(figures: dict[str, Any], report: Path, cost: str) -> int:
    """Print the figures against truth and the report's path; status 1 when the composition AUC is below the bar."""
    found = flattened(figures)
    print("\nfigures against the simulated truth (all of them: evaluation.json beside the report)")
    for name, words in FIGURES.items():
        if name in found:
            print(f"  {words:<54} {found[name]:8.3f}")
    auc = found.get("composition.auc", float("nan"))
    print(f"\ntime and memory: {cost}\nreport: {report}")
    if auc >= LOWEST_AUC:
        return 0
    message = f"composition AUC {auc:.3f} is below {LOWEST_AUC}: the codes do not separate what was simulated"
    return cli.fail("opustomo demo", message, 1)


def flattened(figures: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number in nested figures by its dotted name; lists, texts and missing values are left out."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            found |= flattened(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found
