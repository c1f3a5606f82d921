"""The run folder: what a stage writes, and opening it again.

Owns: config.yaml, config.pkl, weights.N.pkl, z.N.pkl, pose.N.pkl, split and mask of a run, for the linear stage and
for the network alike.  Everything is written atomically and read without executing pickles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from opustomo import __version__
from opustomo.bodies import BodyResult
from opustomo.data.atomic import provenance, write_text
from opustomo.data.mrc import write_volume
from opustomo.data.pickles import Poses, load_poses, load_split, save_config_pickle, save_poses
from opustomo.data.split import split_rows
from opustomo.data.tensors import read_arrays, read_tensors, save_tensors
from opustomo.errors import UserError, reading
from opustomo.model.vae import Vae
from opustomo.objective import envelope
from opustomo.physics.grid import Grid
from opustomo.physics.observation import seen_through
from opustomo.stored import read_config

WITHIN, BEFORE = "state.pkl", "start.pkl"  # of an epoch that is not finished, and of the first
NEAREST = 8  # codes whose rows are kept for every particle
Kind = Literal["network", "linear", "map"]  # map: of --encode-mode fixed, without codes


def flatten(config: Any) -> dict[str, Any]:
    """Options of a config dataclass as plain values, nested groups flattened: what config.yaml holds."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= flatten(value)
        else:
            values[field.name] = str(value) if isinstance(value, Path) else value
    return values


def write_config(folder: Path, values: dict[str, Any]) -> None:
    """config.yaml (options, resolved values, what made the run from which bytes) and config.pkl, as scripts know it."""
    sums = {f"{name}_sha256": _sum(values.get(name)) for name in ("star", "mask")}
    made = values | {"made_by": provenance(), **sums}
    write_text(folder / "config.yaml", yaml.safe_dump(made, sort_keys=False))
    dataset = {
        k: values[k] for k in ("star", "poses", "datadir", "mask", "ind", "angpix", "downfrac", "split", "valfrac")
    }
    lattice = {"D": values["box"] + 1, "extent": 0.5, "ignore_DC": True}
    model = {
        "zdim": values["zdim"],
        "templateres": values["templateres"],
        "width": values["width"],
        "encoderres": values["encoderres"],
        "Apix": values["box"] * values["pixel_size"] / values["working_box"],
        "downfrac": values["downfrac"],
        "bfactor": values["bfactor"],
    }
    legacy = {"dataset_args": dataset, "lattice_args": lattice, "model_args": model, "seed": values["seed"]}
    meta = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "cmd": list(sys.argv), "version": __version__}
    save_config_pickle(folder / "config.pkl", legacy, meta)


def _sum(path: str | None) -> str | None:
    """SHA-256 of a file, None where there is none."""
    if path is None or not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tensors(path: Path) -> dict[str, Any]:
    """Read a file of ``save_tensors``; nothing in it is executed.  Raises UserError if it is absent or damaged."""
    if not path.exists():
        raise UserError(f"{path}: no such file; `ls {path.parent}` shows which epochs exist")
    payload = read_tensors(path, "not a readable checkpoint: use that of another epoch")
    if not isinstance(payload, dict):
        raise UserError(f"{path}: not a checkpoint of this program; use a weights.N.pkl or z.N.pkl of a run")
    return payload


def epochs_of(folder: Path) -> list[int]:
    """Epochs for which weights.N.pkl and z.N.pkl both exist, ascending."""
    found = (re.fullmatch(r"weights\.(\d+)\.pkl", p.name) for p in folder.glob("weights.*.pkl"))
    return sorted(int(m[1]) for m in found if m and (folder / f"z.{m[1]}.pkl").exists())


def states_of(folder: Path) -> list[Path]:
    """Files that training can go on from, the one that is furthest first."""
    ended = [folder / f"weights.{epoch}.pkl" for epoch in reversed(epochs_of(folder))]
    return [path for path in (folder / WITHIN, *ended, folder / BEFORE) if path.is_file()]


def remove_epoch(folder: Path, epoch: int) -> None:
    """The files of a checkpoint, the codes first: without them an epoch does not count."""
    for name in ("z", "pose", "weights"):
        (folder / f"{name}.{epoch}.pkl").unlink(missing_ok=True)


def save_epoch(
    folder: Path,
    epoch: int,
    weights: dict[str, Any],
    code: Tensor,
    sigma: Tensor,
    poses: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    conformation: tuple[Tensor, Tensor] | None = None,
) -> None:
    """weights.N.pkl, z.N.pkl and pose.N.pkl of an epoch; z last, since an epoch counts from when it is there.

    code, sigma: (P, zdim); poses: rotation (P, 3, 3), origin as a fraction of the box (P, 3), Euler (P, 3);
    conformation: codes and their standard deviations (P, D), where there are bodies.
    """
    save_tensors(folder / f"weights.{epoch}.pkl", weights)
    save_poses(folder / f"pose.{epoch}.pkl", *poses)
    codes = {"mu": code.float().clone(), "sigma": sigma.float().clone(), "nn": neighbours(code)}
    if conformation is not None:
        codes |= {"multi_mu": conformation[0].float().clone(), "multi_sigma": conformation[1].float().clone()}
    save_tensors(folder / f"z.{epoch}.pkl", codes)


def neighbours(code: Tensor) -> Tensor:
    """Rows of the nearest codes of every particle, nearest first, (P, at most ``NEAREST``) int64."""
    if code.shape[1] == 0:
        return torch.zeros(len(code), 0, dtype=torch.int64)
    values = code.double().numpy()
    wanted = min(NEAREST + 1, len(values))
    near = np.asarray(cKDTree(values).query(values, wanted)[1]).reshape(len(values), wanted)
    return torch.from_numpy(near[:, 1:].astype(np.int64))


@dataclass(frozen=True)
class Run:
    """An opened run at one epoch (see ``open_run``)."""

    path: Path
    kind: Kind
    epoch: int
    config: dict[str, Any]
    codes: NDArray[np.float32]  # (P, zdim)
    sigma: NDArray[np.float32] | None  # (P, zdim)
    grid: Grid
    rotation: NDArray[np.float64]  # (P, 3, 3)
    origin: NDArray[np.float64]  # (P, 3) pixels
    euler: NDArray[np.float64]  # (P, 3) degrees
    weights: dict[str, Any]
    conformation: NDArray[np.float32] | None = None  # (P, D), where there are bodies
    analysis: str = "analyze"  # its folders, without the epoch (see analysis.places)
    rows: NDArray[np.int64] | None = None  # of the particles that are looked at, in the run; None: all

    @property
    def bodies(self) -> BodyResult:
        """The rigid bodies of a run that has a conformation.  Raises UserError where it has none."""
        if "bodies" not in self.weights:
            raise UserError(f"{self.path}: has no conformation code; train with --masks to have one")
        return BodyResult.of(self.weights["bodies"])

    @property
    def star(self) -> Path:
        """The STAR file the run was made from."""
        return Path(self.config["star"])

    @property
    def mask(self) -> Tensor:
        """(C, C, C) on the working grid."""
        mask: Tensor = self.weights["model"]["mask"]
        return mask

    @property
    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row numbers for training and for validation; new particles of ``encode`` have trained nothing."""
        if self.config.get("encoded_with"):
            return np.arange(0), np.arange(len(self.codes))
        stored = Path(self.config["split"])
        here = self.path / stored.name  # also after the folder has moved
        order = load_split(stored if stored.is_file() else here, len(self.codes))
        if self.config.get("trained_rows") is None:  # runs made before there were copies
            return split_rows(order, float(self.config["valfrac"]))
        trained = int(self.config["trained_rows"])
        return order[:trained], order[trained:]

    @property
    def typical(self) -> NDArray[np.bool_]:
        """(P,) particles that took part in fits: all but those that outshine the molecule."""
        stored = self.weights.get("typical")
        return np.ones(len(self.codes), bool) if stored is None else np.asarray(stored, bool)

    def linear_results(self) -> dict[str, NDArray[Any]] | None:
        """The arrays of linear/linear.npz; None where it is not there, or where some particles are left out."""
        path = self.path / "linear" / "linear.npz"
        if not path.is_file() or self.rows is not None:
            return None
        return read_arrays(path, "restore it from a copy")

    def linear_stage(self) -> Run | None:
        """The linear stage that the network started from, as a run of its own; None where its files are not there."""
        stored = self.linear_results()
        if self.kind != "network" or stored is None:
            return None
        codes = np.asarray(stored["code"], np.float32)
        state = {name: self.weights["model"][name] for name in ("mask", "mean", "components")}
        bodies = {name: self.weights[name] for name in ("bodies",) if name in self.weights}
        return replace(self, kind="linear", codes=codes, sigma=None, weights={"model": state, **bodies})

    @cached_property
    def gram(self) -> NDArray[np.float64]:
        """(zdim, zdim): ``<y, gram y>`` is the squared norm of the density ``U y`` that a change y makes."""
        components = self.weights["model"]["components"].flatten(1).double().numpy()
        unused = self.codes.shape[1] - len(components)
        return np.pad(components @ components.T, (0, unused))

    @cached_property
    def model(self) -> Vae:
        """The network of the run, ready to decode."""
        return build_model(self.weights)

    def decode(self, codes: NDArray[np.floating[Any]], batch: int = 8) -> NDArray[np.float32]:
        """Masked densities (n, C, C, C) of codes (n, zdim) on the working grid; voxel C//2 is the centre."""
        if codes.ndim != 2 or codes.shape[1] != self.codes.shape[1]:
            raise UserError(f"codes of shape {codes.shape} where {self.path} has {self.codes.shape[1]} dimensions")
        used = len(self.weights["model"]["components"])  # dimensions beyond the components say nothing
        decoded = [
            self._decode(torch.from_numpy(np.asarray(codes[i : i + batch, :used], np.float32)))
            for i in range(0, len(codes), batch)
        ]
        return torch.cat(decoded).numpy()

    @torch.no_grad()
    def _decode(self, codes: Tensor) -> Tensor:
        if self.kind != "network":
            state = self.weights["model"]
            return state["mean"] + torch.einsum("bk,kzyx->bzyx", codes, state["components"])
        linear, nonlinear = self.model.linear(codes), self.model.nonlinear(codes)
        strength = float(self.config["bfactor"])
        if strength > 0:
            # training compares G V with the data; the map is V
            size = self.grid.working_box
            gain = 1.0 / envelope(strength, self.epoch, size, self.grid.extent)
            # where the mask ends, not times the mask: the components are masked already
            linear = seen_through(linear, gain, size) * (self.mask > 0)
        return linear + nonlinear


def build_model(weights: dict[str, Any]) -> Vae:
    """The network of a checkpoint.  Raises UserError if its tensors do not fit its sizes."""
    state, shape = weights["model"], weights["shape"]
    try:
        model = Vae(
            state["mask"], state["mean"], state["components"], state["reach"],
            templateres=shape["templateres"], width=shape["width"], encoderres=shape["encoderres"],
        )  # fmt: skip
        model.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"the checkpoint does not fit its own sizes ({str(error).splitlines()[0]}); it is damaged"
        ) from None
    return model.eval()


def open_run(path: Path, epoch: int = -1, *, needs_codes: bool = True) -> Run:
    """Open a run folder at an epoch (0-based; -1: the latest).

    Raises UserError if there is none, or no codes in it where they are needed.
    """
    config = read_config(path)
    if needs_codes and config.get("kind") == "map":
        raise UserError(
            f"{path}: is one map (--encode-mode fixed) and has no codes; look at its average.mrc and `opustomo report "
            f"{path}`, or train without --encode-mode"
        )
    present = epochs_of(path)
    if not present:
        raise UserError(f"{path}: no finished epoch (weights.N.pkl with z.N.pkl) yet; wait for the first checkpoint")
    if epoch >= 0 and epoch not in present:
        raise UserError(f"{path}: no epoch {epoch}; present are {', '.join(map(str, present))} (0-based)")
    chosen = present[-1] if epoch < 0 else epoch
    codes = load_tensors(path / f"z.{chosen}.pkl")
    poses = load_poses(path / f"pose.{chosen}.pkl")
    weights = load_tensors(path / f"weights.{chosen}.pkl")
    with reading(path, f"weights, z and pose.{chosen}.pkl do not fit each other: use another epoch"):
        return _assemble(path, chosen, config, codes, poses, weights)


def _assemble(
    path: Path, epoch: int, config: dict[str, Any], codes: dict[str, Any], poses: Poses, weights: dict[str, Any]
) -> Run:
    """The run from what its files hold; any error where that does not fit together."""
    # a warm start may have changed the sizes: config.yaml tells those of the later epochs
    sizes = ("box", "pixel_size", "working_box", "crop", "templateres")
    grid = Grid(*weights.get("grid", [config[name] for name in sizes]))
    mu, sigma, multi, state = codes["mu"], codes.get("sigma"), codes.get("multi_mu"), weights["model"]
    for what, tensor, wanted in (
        ("codes", mu, (len(poses.euler), mu.shape[1])),
        ("sigma", mu if sigma is None else sigma, mu.shape),
        ("conformation", mu if multi is None else multi, (len(mu), (mu if multi is None else multi).shape[1])),
        ("mask", state["mask"], (grid.crop,) * 3),
        ("mean", state["mean"], (grid.crop,) * 3),
        ("components", state["components"], (len(state["components"]), *(grid.crop,) * 3)),
    ):
        if tuple(tensor.shape) != tuple(wanted):
            raise ValueError(f"{what} of shape {tuple(tensor.shape)}, not {tuple(wanted)}")
    return Run(
        path=path,
        kind=config["kind"],
        epoch=epoch,
        config=config,
        codes=mu.numpy(),
        sigma=None if sigma is None else sigma.numpy(),
        grid=grid,
        rotation=np.asarray(poses.rotation, float),
        origin=np.asarray(poses.origin, float) * grid.box,
        euler=np.asarray(poses.euler, float),
        weights=weights,
        conformation=None if multi is None else multi.numpy(),
    )


def write_map(path: Path, volume: Tensor, grid: Grid) -> None:
    """A model volume (C, C, C) on the working grid, with the header origin that overlays it on the consensus map."""
    write_volume(path, volume.numpy(), grid.working_pixel, grid.start(grid.working_pixel, grid.crop))
