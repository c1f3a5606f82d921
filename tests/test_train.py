"""Training end to end on the small set: the files of a run, what every option does, and which particles are seen."""

from __future__ import annotations

import csv
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mrcfile
import numpy as np
import pytest
import torch
import yaml

from opustomo import checkpoint, cli
from opustomo import train as training
from opustomo.config import InputOptions, TrainConfig
from opustomo.data.mrc import header_of
from opustomo.data.observe import Noise, observe
from opustomo.data.particles import Particles
from opustomo.data.pickles import load_pickle, load_pickles, load_poses, load_split
from opustomo.data.readers import read_particles
from opustomo.mixture import single
from opustomo.monitor import METRIC_COLUMNS
from opustomo.objective import envelope
from opustomo.physics.fourier import from_band, irfft3, shell_mean
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band
from opustomo.physics.volume import centre_crop
from small_set import (
    EPOCHS,
    PARTICLES,
    SMALL,
    SmallSet,
    given_cache,
    held_out,
    hurry,
    learner_of,
    metrics_of,
    tensors,
    train,
)

Trainer = Callable[..., Path]
QUICK = ("-n", "1", "--zdim", "1", "--no-estpose")


def train_quickly(small_set: SmallSet, finished_run: Path, folder: Path, *options: str) -> Path:
    """One epoch on the shared cache with the options QUICK, without pictures: a third of the time."""
    cache = () if {"--cache", "--no-cache"} & set(options) else ("--cache", str(given_cache(finished_run)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        assert train(small_set, folder, *QUICK, *cache, *options) == 0
    return folder


@pytest.fixture
def quick(small_set: SmallSet, finished_run: Path, tmp_path: Path) -> Trainer:
    """``train_quickly`` into the folder of the test."""

    def run(*options: str, name: str = "run") -> Path:
        return train_quickly(small_set, finished_run, tmp_path / name, *options)

    return run


@pytest.fixture(scope="module")
def plain_epoch(small_set: SmallSet, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch with nothing but the options QUICK."""
    return train_quickly(small_set, finished_run, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def one_by_one(small_set: SmallSet, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Batches of one particle, with the prior of --lamb."""
    return train_quickly(small_set, finished_run, tmp_path_factory.mktemp("single") / "run", "-b", "1", "--lamb", "0.5")


def learned(run: Path, epoch: int = 0) -> dict[str, torch.Tensor]:
    state = tensors(run / f"weights.{epoch}.pkl")["model"]
    return {name: value for name, value in state.items() if name.startswith(("encoder.", "decoder."))}


def differs(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return any(a[name].shape != b[name].shape or not torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ files of a run


def test_run_holds_every_promised_file_and_no_other(finished_run: Path) -> None:
    epochs = {f"{kind}.{n}.pkl" for kind in ("weights", "z", "pose") for n in range(EPOCHS)}
    whole = {"config.yaml", "config.pkl", "run.log", "metrics.csv", "split.pkl", "mask.mrc", "tmp.mrc", "tmp.png"}
    assert {path.name for path in finished_run.iterdir()} == epochs | whole | {"cache", "linear"}


def test_signal_over_noise_of_every_shell(finished_run: Path) -> None:
    """Down to Nyquist of the working box; half of it times the values is about what the average explains."""
    with (finished_run / "linear" / "snr.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert list(rows[0]) == ["shell", "resolution_angstrom", "values", "snr_average", "snr_variability"]
    assert [row["resolution_angstrom"] for row in rows] == pytest.approx([360 / s for s in range(1, 9)], rel=1e-4)
    average, variability = ([row[f"snr_{name}"] for row in rows] for name in ("average", "variability"))
    assert all(a > v > 0 for a, v in zip(average, variability, strict=True))
    nats = sum(0.5 * row["values"] * row["snr_average"] for row in rows)
    assert nats == pytest.approx(float(metrics_of(finished_run)[1]["linear_val_elbo"]), rel=0.15)
    text = (finished_run / "run.log").read_text()
    assert text.count("signal over noise of one particle") == 2 and "resolution (A):" in text


def test_codes_of_every_particle_at_every_epoch(finished_run: Path) -> None:
    for epoch in range(EPOCHS):
        codes = tensors(finished_run / f"z.{epoch}.pkl")
        assert codes["mu"].shape == codes["sigma"].shape == (PARTICLES, 2)
        assert torch.isfinite(codes["mu"]).all() and (codes["sigma"] > 0).all()
        used = len(tensors(finished_run / f"weights.{epoch}.pkl")["model"]["components"])
        assert 1 <= used <= 2 and codes["mu"][:, :used].std(0).min() > 0.1 and codes["sigma"][:, :used].max() < 1
        # a dimension without a component says nothing: the prior
        assert (codes["mu"][:, used:] == 0).all() and (codes["sigma"][:, used:] == 1).all()
    first, last = (tensors(finished_run / f"z.{n}.pkl")["mu"] for n in (0, EPOCHS - 1))
    assert ((first - last).abs().amax(1) > 0).all()  # encoded anew, every one of them


def test_codes_tell_the_states_apart(small_set: SmallSet, finished_run: Path) -> None:
    code = tensors(finished_run / f"z.{EPOCHS - 1}.pkl")["mu"][:, 0].numpy()
    low, high = code[small_set.state == 0], code[small_set.state == 1]
    assert low.max() < high.min() or high.max() < low.min()


def test_config_in_both_forms_says_what_was_run(small_set: SmallSet, finished_run: Path) -> None:
    values = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert values["kind"] == "network" and Path(values["star"]) == small_set.star
    assert (values["box"], values["working_box"], values["crop"]) == (24, 16, 16)
    assert values["templateres"] == 16 and values["width"] == 0.1 and values["encoderres"] == 6
    legacy, meta = load_pickles(finished_run / "config.pkl", 2)
    assert legacy["model_args"]["zdim"] == 2 and legacy["dataset_args"]["mask"] == str(small_set.mask)
    assert legacy["lattice_args"]["D"] == 25 and meta["cmd"]
    with (finished_run / "config.pkl").open("rb") as file:  # as users' own scripts read it
        assert pickle.load(file)["model_args"]["Apix"] == pytest.approx(22.5)


def test_metrics_have_their_columns_and_count_every_particle(finished_run: Path) -> None:
    head = (finished_run / "metrics.csv").read_text().splitlines()[0]
    assert head == ",".join(METRIC_COLUMNS)
    rows = metrics_of(finished_run)
    steps, ends = [r for r in rows if r["loss"]], [r for r in rows if r["val_elbo"]]
    assert [int(r["particles"]) for r in steps] == [54, 108, 162]  # a tenth is held out, nothing is dropped
    assert [int(r["epoch"]) for r in ends] == [0, 1, 2]
    for row in ends:
        assert float(row["val_elbo"]) == pytest.approx(-float(row["val_nll"]) - float(row["val_kl"]), abs=1e-3)


def test_poses_are_those_of_the_star_on_demand(small_set: SmallSet, plain_epoch: Path) -> None:
    given, kept = read_particles(small_set.star, InputOptions()), load_poses(plain_epoch / "pose.0.pkl")
    assert np.allclose(kept.rotation, given.rotation, atol=1e-6)
    assert np.allclose(kept.origin * 24, given.origin, atol=1e-5)
    assert np.allclose(kept.euler, given.euler, atol=1e-4)
    assert not (plain_epoch / "cache").exists()  # nothing was moved: the shared one serves


def test_split_is_a_permutation_and_the_run_reads_it(finished_run: Path) -> None:
    order = load_split(finished_run / "split.pkl", PARTICLES)
    trained, held = checkpoint.open_run(finished_run).split
    assert (len(trained), len(held)) == (54, 6)
    assert np.array_equal(np.concatenate([trained, held]), order)


def test_preview_is_a_map_that_overlays_the_consensus(finished_run: Path) -> None:
    header = header_of(finished_run / "tmp.mrc")
    assert header.shape == (16, 16, 16) and header.pixel_size == pytest.approx(22.5)
    with mrcfile.open(finished_run / "tmp.mrc") as preview:
        assert float(preview.header.origin.x) == pytest.approx(12 * 15 - 8 * 22.5)
        assert float(preview.data.std()) > 0
    assert (finished_run / "tmp.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_overwritten(
    small_set: SmallSet, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    assert train(small_set, finished_run, "-n", "1") == 2
    assert "opustomo train --resume" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_intervals_and_names_of_what_is_written(quick: Trainer) -> None:
    run = quick("-n", "3", "--checkpoint", "2", "--log-interval", "16", "--tmp-prefix", "look", "--plot")
    assert sorted(path.name for path in run.glob("weights.*")) == ["weights.1.pkl", "weights.2.pkl"]
    assert (run / "look.mrc").exists() and not (run / "tmp.mrc").exists()
    particles = [int(row["particles"]) for row in metrics_of(run) if row["loss"]]
    assert {54, 108, 162} <= set(particles) and len(particles) >= 9
    assert all(later - earlier < 16 + 8 for earlier, later in pairwise([0, *particles]))


# ------------------------------------------------------------------------------------------------ what is learned


def test_same_seed_same_run_wherever_it_is_typed(
    quick: Trainer, plain_epoch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    again = quick()
    assert list(here.iterdir()) == []
    assert metrics_of(again) == metrics_of(plain_epoch)
    assert not differs(learned(again), learned(plain_epoch))


def test_rows_on_the_fly_give_the_run_of_the_cache(
    quick: Trainer, plain_epoch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def once(particles: Particles, i: int, grid: Grid, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
        # a row is asked for some fifty times, and what is tested is what comes of it
        if i not in made:
            made[i] = observe(particles, i, grid, noise)
        return made[i]

    monkeypatch.setattr("opustomo.data.cache.observe", once)
    monkeypatch.setattr("opustomo.data.cache.free_memory", lambda: 0)
    run = quick("--no-cache")
    assert len(made) == PARTICLES
    assert not (run / "cache").exists()
    for row, cached in zip(metrics_of(run), metrics_of(plain_epoch), strict=True):
        for name in ("loss", "nll", "kl", "val_elbo", "linear_val_elbo"):
            if cached[name]:
                assert float(row[name]) == pytest.approx(float(cached[name]), rel=2e-3, abs=0.05)


@pytest.mark.parametrize(
    "options",
    [
        ("--lr", "2e-3"),
        ("--wd", "0.5"),
        ("--beta", "cos"),
        ("--beta-control", "3"),
        ("--bfactor", "4"),
        ("--seed", "1"),
        ("--accum-step", "2"),
        ("--prior", "0"),
        ("--tv", "0.1"),
        ("--l1", "0.1"),
    ],
    ids=" ".join,
)
def test_options_act(options: tuple[str, ...], quick: Trainer, plain_epoch: Path) -> None:
    """No option is accepted and ignored: the weights after an epoch are others."""
    run = quick(*options)
    assert differs(learned(run), learned(plain_epoch))
    assert all(math.isfinite(value) for value in held_out(run))


def test_codes_are_the_linear_stages_unless_something_asks_for_others(quick: Trainer) -> None:
    """Without an encoder; --lamb, which moves codes, brings one, and so does its size."""
    plain = quick("--encoderres", "0")
    assert not any(name.startswith("encoder.") for name in learned(plain))
    run = checkpoint.open_run(plain)
    exact = run.linear_results()
    assert run.model.encoder is None and exact is not None
    assert np.allclose(run.codes, exact["code"], atol=1e-5)
    assert float(run.model.nonlinear(torch.from_numpy(run.codes[:1])).detach().abs().max()) > 0
    asked = learned(quick("--encoderres", "0", "--lamb", "0.5", name="asked"))
    assert "encoder.head.weight" in asked


def test_sizes_of_the_network_act(quick: Trainer) -> None:
    run = quick("--width", "0.15", "--encoderres", "4", "--templateres", "32", "--zdim", "3")
    state, usual = learned(run), ("encoder.stem.2.weight", "decoder.first.weight", "encoder.head.weight")
    used = len(tensors(run / "weights.0.pkl")["model"]["components"])
    assert [tuple(state[name].shape[:2]) for name in usual] == [(20, 8), (76, used), (2 * used, 76)]
    opened = checkpoint.open_run(run)
    assert opened.codes.shape == (PARTICLES, 3)
    assert opened.model.encoder is not None
    assert opened.grid.templateres == 32 and opened.model.encoder.encoderres == 4
    assert opened.decode(opened.codes[:2]).shape == (2, 16, 16, 16)


@pytest.mark.slow
def test_strength_of_the_disentanglement_prior_acts(quick: Trainer, one_by_one: Path) -> None:
    """Batches of one: four batches for each of a dozen wedge orientations need 48 particles, here there are 60."""
    strong = quick("-b", "1", "--lamb", "1")
    assert differs(learned(one_by_one), learned(strong))
    assert "no effect" not in (strong / "run.log").read_text()


def test_a_disentanglement_prior_that_cannot_act_is_said(quick: Trainer) -> None:
    """Sixty particles in batches of eight are one group of orientations: nothing to compare with."""
    assert "--lamb 1" in (text := (quick("--lamb", "1") / "run.log").read_text()) and "no effect" in text


def test_a_damped_run_writes_sharp_maps(quick: Trainer) -> None:
    """--bfactor damps what is compared with the data; the decoded map is the undamped one, masked once."""
    run = checkpoint.open_run(quick("--bfactor", "100"))
    seen = run.model.linear(torch.from_numpy(run.codes[:1])).detach()[0]
    written = torch.from_numpy(run.decode(run.codes[:1])[0])
    size, inside = run.grid.working_box, run.mask > 0.99
    bands = model_band(torch.stack([seen, written]), size)
    undamped = bands[0] / envelope(100.0, 0, size, run.grid.extent)
    expected = centre_crop(irfft3(from_band(undamped, size)), run.grid.crop)
    for where in (inside, run.mask > 0.2):
        pair = torch.stack([written[where], expected[where]])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.99
        assert float(pair[0].std() / pair[1].std()) == pytest.approx(1.0, abs=0.05)
    power = shell_mean(bands.abs().square(), size)
    assert float((power[1] / power[0])[6]) > 1.5
    assert float(written[run.mask == 0].abs().max()) == 0.0


def test_subset_of_the_particles(quick: Trainer, tmp_path: Path, small_set: SmallSet) -> None:
    rows = np.arange(3, 43)
    (tmp_path / "rows.txt").write_text("\n".join(map(str, rows)))
    run = quick("--ind", f"{tmp_path}/rows.txt", "--cache", f"{tmp_path}/cache")
    given = read_particles(small_set.star, InputOptions())
    assert tensors(run / "z.0.pkl")["mu"].shape == (40, 1)
    assert np.allclose(load_poses(run / "pose.0.pkl").euler, given.euler[rows], atol=1e-4)
    assert len(load_split(run / "split.pkl", 40)) == 40


@pytest.mark.slow
def test_training_on_everything(quick: Trainer) -> None:
    run = quick("--valfrac", "0")
    assert [row["particles"] for row in metrics_of(run) if row["loss"]] == ["60"]
    assert len(held_out(run)) == 1
    trained, held = checkpoint.open_run(run).split
    assert len(trained) == 60 and len(held) == 0


def test_batch_of_one(one_by_one: Path) -> None:
    assert [row["particles"] for row in metrics_of(one_by_one) if row["loss"]] == ["54"]
    assert all(torch.isfinite(value).all() for value in learned(one_by_one).values())


def test_fewer_gpus_than_asked_keep_the_global_batch(quick: Trainer, plain_epoch: Path) -> None:
    two = quick("--multigpu", "--num-gpus", "2", "-b", "4")
    assert "--num-gpus 2" in (two / "run.log").read_text()
    assert not differs(learned(two), learned(plain_epoch))


def test_split_file_of_the_user_is_read_and_kept(quick: Trainer, tmp_path: Path) -> None:
    order = np.arange(PARTICLES)[::-1].copy()
    with (tmp_path / "mine.pkl").open("wb") as file:
        pickle.dump(order, file)
    run = quick("--split", f"{tmp_path}/mine.pkl")
    assert not (run / "split.pkl").exists()
    assert sorted(checkpoint.open_run(run).split[1]) == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(load_pickle(tmp_path / "mine.pkl"), order)


@pytest.mark.parametrize(("lot", "groups"), [(1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (9, [7])])
def test_every_accumulated_gradient_is_the_mean_of_its_batches(
    lot: int, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of the last group of an epoch, which may be shorter: 54 particles are six batches of 8 and one of 6."""
    model, seen = torch.nn.Linear(1, 1, bias=False), []
    numbers = torch.linspace(-1.0, 1.0, 54)

    def step(model: torch.nn.Linear, context: object, index: torch.Tensor, *_: object) -> training.Step:
        seen.append(float(numbers[index].mean()))
        nothing = torch.zeros(len(index))
        value = numbers[index] * model.weight[0, 0]
        return training.Step(value, nothing, nothing, nothing, nothing[:, None], nothing, nothing)

    taken: list[float] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monkeypatch.setattr(training, "train_step", step)
    monkeypatch.setattr(optimizer, "step", lambda: taken.append(float(model.weight.grad)))
    context: Any = SimpleNamespace(device=torch.device("cpu"), group=np.zeros(54, np.int64), mixture=single(1))
    metrics: Any = SimpleNamespace(append=lambda **_: None)
    config = TrainConfig(Path(), Path(), accum_step=lot, bfactor=0.0)
    learner = learner_of(model, optimizer, torch.zeros(54, 1), 0)
    training.train_epoch(config, context, learner, torch.arange(54), metrics)
    assert len(seen) == 7
    starts = np.cumsum([0, *groups[:-1]])
    expected = [np.mean(seen[a : a + n]) for a, n in zip(starts, groups, strict=True)]
    assert taken == pytest.approx(expected, rel=1e-5)


def test_small_options_are_what_the_fixture_says() -> None:
    config: Any = cli.parse_verb(["train", "x.star", "-o", "run", *SMALL])[0]
    assert (config.batch, config.zdim, config.width, config.grid.downfrac) == (8, 2, 0.1, 0.7)
