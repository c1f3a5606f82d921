"""What each part is worth: one set, one part off at a time, the same scores for all.

    python benchmarks/ablation.py SET -o bench/ablation [--markdown FILE]

SET is a folder of the common simulator (particles.star, mask.mrc, labels.npz, gt/).  Parts of the linear stage are
taken out of ``opustomo linear``; those of the network out of ``opustomo train``, always from the same linear stage.
A part is taken out by replacing the function that does it, in this process: none of these is an option of the program.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from run import lookup
from torch import Tensor

from opustomo import linear, linear_fit, linear_stage, preparation, train
from opustomo.analysis.evaluate import evaluate, json_text
from opustomo.checkpoint import open_run
from opustomo.config import GridOptions, LinearConfig, TrainConfig
from opustomo.data.observe import Noise
from opustomo.mixture import single
from opustomo.model.vae import Vae
from opustomo.physics.fourier import from_band, irfft3, rfft3, to_band
from opustomo.physics.volume import centre_crop, centre_pad
from opustomo.training import context, job

FIGURES = {
    "likelihood.gain_over_linear": "gain",
    "composition.auc": "AUC",
    "composition.groups_ari": "groups ARI",
    "conformation.hinge.probe_corr": "hinge",
    "volumes.centre_difference_cc_mean": "difference",
    "volumes.particle_fsc_area": "FSC area",
    "poses.ratio.angle_median": "angle",
    "poses.ratio.shift_median": "shift",
    "invariance.max_r2": "R2",
}


@dataclass(frozen=True)
class Variant:
    """One row: what is replaced, ((module or class, name, value), ...), and options that differ from the defaults."""

    name: str
    patches: tuple[tuple[Any, str, Any], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def everywhere(volumes: Tensor, mask: Tensor, grid: Any) -> Tensor:
    """Instead of ``local_amplitude``: the prior knows no places."""
    return torch.ones_like(mask)


def no_pose_error(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that gives a linear model, made to give one without pose errors."""
    return lambda *a, **k: replace(function(*a, **k), pose_scale=(1e-6, 1e-6))


def white(function: Callable[..., Noise]) -> Callable[..., Noise]:
    """A noise model made to have the same power in all shells."""

    def flat(*a: Any, **k: Any) -> Noise:
        noise = function(*a, **k)
        return replace(noise, power=torch.full_like(noise.power, float(noise.power.mean())))

    return flat


def consensus_left(
    numerator: Tensor, weight: Tensor, mean: Tensor, precision: Tensor, mask: Tensor, size: int
) -> Tensor:
    """Encoder input ``mask IFFT[B / (W + 1/tau^2)]``."""
    data = to_band(rfft3(centre_pad(numerator, size)))
    return centre_crop(irfft3(from_band(data / (weight + precision), size)), numerator.shape[-1]) * mask


def not_deconvolved(
    numerator: Tensor, weight: Tensor, mean: Tensor, precision: Tensor, mask: Tensor, size: int
) -> Tensor:
    """Encoder input ``mask IFFT[B - W mean]``, divided by one number."""
    data = to_band(rfft3(centre_pad(numerator, size))) - weight * linear.model_band(mean, size)
    scale = (weight + precision).mean()
    return centre_crop(irfft3(from_band(data / scale, size)), numerator.shape[-1]) * mask


def nothing_added(self: Vae, code: Tensor) -> Tensor:
    """Instead of the decoder: the linear model's volumes as they are."""
    return torch.zeros((len(code), *self.mask.shape)) * self.decoder.first.weight.sum()


MODELS = [(linear, "average"), (linear, "rescale"), (linear_fit, "average"), (linear_fit, "rescale")]
LINEAR = [
    Variant("linear stage, everything on"),
    Variant("no local amplitude", ((linear, "local_amplitude", everywhere),)),
    Variant("poses as given (errors still integrated out)", options={"estpose": False}),
    Variant(
        "poses as given, errors not integrated out",
        tuple((module, name, no_pose_error(getattr(module, name))) for module, name in MODELS), {"estpose": False},
    ),
    Variant("codes N(0, 1) instead of a mixture",
            ((linear_fit, "choose_mixture", lambda stats, *rest: single(stats.first.shape[1] - 1)),)),
    Variant("the same noise power in all shells",
            ((preparation, "estimate_noise", white(preparation.estimate_noise)),)),
]  # fmt: skip
NETWORK = [
    Variant("network, everything on"),
    Variant("with an encoder", options={"encoderres": 6}),
    Variant("no decoder", ((Vae, "nonlinear", nothing_added),)),
    Variant("encoder sees the consensus too", ((context, "residual_density", consensus_left),), {"encoderres": 6}),
    Variant("encoder input not deconvolved", ((context, "residual_density", not_deconvolved),), {"encoderres": 6}),
    Variant("no spectral prior", options={"prior": 0.0}),
    Variant("--lamb 0.8", options={"lamb": 0.8}),
    Variant("--beta cos", options={"beta": "cos"}),
    Variant("--bfactor 4", options={"bfactor": 4.0}),
]


@contextmanager
def patched(patches: tuple[tuple[Any, str, Any], ...]) -> Iterator[None]:
    """Values replaced while the block runs."""
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    try:
        for owner, name, value in patches:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def scores(run: Path, truth: Path) -> dict[str, Any]:
    """Every metric of a finished run, kept in its evaluation.json."""
    kept = run / "evaluation.json"
    if not kept.exists():
        kept.write_text(json_text(evaluate(open_run(run), truth)))
    found: dict[str, Any] = json.loads(kept.read_text())
    log = (run / "run.log").read_text()
    lines = [line for line in log.splitlines() if "evidence of held-out particles" in line]
    found["evidence"] = float(lines[-1].split("evidence of held-out particles ")[1].split()[0]) if lines else None
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["linear", "network"])
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    stated = {
        "star": options.set / "particles.star",
        "grid": GridOptions(mask=options.set / "mask.mrc"),
        "seed": options.seed,
    }
    started: list[Any] = []

    def start_once(*arguments: Any) -> Any:
        """The linear stage is the same for every network: fitted once."""
        if not started:
            started.append(first_start(*arguments))
        else:  # each run folder has its own copy of the results
            config, inputs, *_ = arguments
            kept = (started[0].linear, started[0].rows, inputs.grid, inputs.mask)
            linear_stage.write_results(config.output / "linear", *kept, 4, config.seed)
        return started[0]

    first_start = job.start_from_linear
    lines = ["| part | evidence | " + " | ".join(FIGURES.values()) + " |", "|---" * (len(FIGURES) + 2) + "|"]
    for variant in [*(LINEAR if options.only != "network" else ()), *(NETWORK if options.only != "linear" else ())]:
        folder = options.output / "".join(c if c.isalnum() else "_" for c in variant.name)
        network = variant in NETWORK
        if not (folder / "z.0.pkl").exists() and not (folder / "evaluation.json").exists():
            once = ((job, "start_from_linear", start_once),) if network else ()
            with patched((*variant.patches, *once)):
                if network:
                    train.main(TrainConfig(output=folder, **stated, **variant.options))
                else:
                    linear_stage.main(LinearConfig(output=folder, **stated, **variant.options))
        found = scores(folder, options.set)
        values = [found["evidence"], *(lookup(found, name) for name in FIGURES)]
        lines.append(f"| {variant.name} | " + " | ".join("" if v is None else f"{v:.3f}" for v in values) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
