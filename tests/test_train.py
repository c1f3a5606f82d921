"""Training end to end on the small set: the files of a run, what every option does, and which particles are seen."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import torch
import yaml

from opustomo import checkpoint, cli
from opustomo.analysis.score_poses import pose_errors
from opustomo.compat.legacy_files import load_pickle, load_pickles, load_poses, load_split
from opustomo.config import InputOptions
from opustomo.data.mrc import header_of
from opustomo.data.observe import Noise, observe
from opustomo.data.particles import Particles
from opustomo.data.readers import read_particles
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
    held_out,
    hurry,
    metrics_of,
    tensors,
    train,
)

Trainer = Callable[..., Path]


@pytest.fixture
def quick(small_set: SmallSet, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Train a run of one epoch on the cache of the finished run, without pictures."""
    hurry(monkeypatch)

    def run(*options: str, name: str = "run") -> Path:
        cache = () if {"--cache", "--no-cache", "--estpose"} & set(options) else ("--cache", f"{finished_run}/cache")
        assert train(small_set, tmp_path / name, "-n", "1", *cache, *options) == 0
        return tmp_path / name

    return run


@pytest.fixture(scope="module")
def plain_epoch(small_set: SmallSet, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch with nothing but the options SMALL."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        assert train(small_set, folder, "-n", "1", "--cache", f"{finished_run}/cache") == 0
    return folder


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


def test_codes_of_every_particle_at_every_epoch(finished_run: Path) -> None:
    for epoch in range(EPOCHS):
        codes = tensors(finished_run / f"z.{epoch}.pkl")
        assert codes["mu"].shape == codes["sigma"].shape == (PARTICLES, 2)
        assert torch.isfinite(codes["mu"]).all() and (codes["sigma"] > 0).all()
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


def test_poses_of_the_run_are_those_of_the_star(small_set: SmallSet, finished_run: Path) -> None:
    given, kept = read_particles(small_set.star, InputOptions()), load_poses(finished_run / f"pose.{EPOCHS - 1}.pkl")
    assert np.allclose(kept.rotation, given.rotation, atol=1e-6)
    assert np.allclose(kept.origin * 24, given.origin, atol=1e-5)
    assert np.allclose(kept.euler, given.euler, atol=1e-4)


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


def test_nothing_is_written_where_the_command_was_typed(
    quick: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    quick()
    assert list(here.iterdir()) == []


def test_a_finished_run_is_not_overwritten(
    small_set: SmallSet, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    assert train(small_set, finished_run, "-n", "1") == 2
    assert "--load latest" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_intervals_and_names_of_what_is_written(quick: Trainer) -> None:
    run = quick("-n", "3", "--checkpoint", "2", "--log-interval", "16", "--tmp-prefix", "look", "--plot")
    assert sorted(path.name for path in run.glob("weights.*")) == ["weights.1.pkl", "weights.2.pkl"]
    assert (run / "look.mrc").exists() and not (run / "tmp.mrc").exists()
    particles = [int(row["particles"]) for row in metrics_of(run) if row["loss"]]
    assert {54, 108, 162} <= set(particles) and len(particles) >= 9
    assert all(later - earlier < 16 + 8 for earlier, later in pairwise([0, *particles]))


# ------------------------------------------------------------------------------------------------ what is learned


def test_untrained_network_has_the_bound_of_the_linear_stage(quick: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opustomo.latent_stage.STEPS", 0)
    run = quick("--lr", "0", "--valfrac", "0.5")
    (row,) = [row for row in metrics_of(run) if row["val_elbo"]]
    assert float(row["val_elbo"]) == pytest.approx(float(row["linear_val_elbo"]), abs=0.02)
    stored = np.load(run / "linear" / "linear.npz")
    codes = tensors(run / "z.0.pkl")
    assert np.allclose(codes["mu"][:, 0], stored["code"][:, 0], atol=1e-5)
    assert np.allclose(codes["sigma"][:, 0], np.sqrt(stored["covariance"][:, 0, 0]), rtol=1e-4)
    assert codes["mu"][:, 1].abs().max() == 0 and np.allclose(codes["sigma"][:, 1], 1)  # unused: the prior


def test_same_seed_same_run(quick: Trainer, plain_epoch: Path) -> None:
    again = quick()
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
    monkeypatch.setattr("opustomo.data.cache.os.sysconf", lambda name: 0)  # as if no memory were free
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
        ("--beta", "constant"),
        ("--beta-control", "3"),
        ("--bfactor", "4"),
        ("--seed", "1"),
        ("--accum-step", "2"),
        ("--prior", "0"),
    ],
    ids=" ".join,
)
def test_options_act(options: tuple[str, ...], quick: Trainer, plain_epoch: Path) -> None:
    """No option is accepted and ignored: the weights after an epoch are others."""
    run = quick(*options)
    assert differs(learned(run), learned(plain_epoch))
    assert all(math.isfinite(value) for value in held_out(run))


def test_sizes_of_the_network_act(quick: Trainer) -> None:
    run = quick("--width", "0.15", "--encoderres", "4", "--templateres", "32", "--zdim", "3")
    state, usual = learned(run), ("encoder.stem.2.weight", "decoder.first.weight", "encoder.head.weight")
    assert [tuple(state[name].shape[:2]) for name in usual] == [(20, 8), (76, 3), (6, 76)]
    opened = checkpoint.open_run(run)
    assert opened.grid.templateres == 32 and opened.model.encoder.encoderres == 4
    assert opened.decode(opened.codes[:2]).shape == (2, 16, 16, 16)


@pytest.mark.slow
def test_strength_of_the_disentanglement_prior_acts(quick: Trainer) -> None:
    """Batches of one: four batches for each of a dozen wedge orientations need 48 particles, here there are 60."""
    weak, strong = (quick("-b", "1", "--lamb", lamb, name=lamb) for lamb in ("0.1", "1"))
    assert differs(learned(weak), learned(strong))
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


@pytest.mark.slow
def test_pose_errors_shrink_with_estpose(small_set: SmallSet, quick: Trainer) -> None:
    given = read_particles(small_set.star, InputOptions())
    poses = load_poses(quick("--estpose") / "pose.0.pkl")
    after, before = (
        pose_errors(np.asarray(r, float), np.asarray(o, float), small_set.rotation, small_set.origin)
        for r, o in ((poses.rotation, poses.origin * 24), (given.rotation, given.origin))
    )
    assert after["shift_median"] < 0.5 * before["shift_median"]
    assert after["angle_p90"] < 0.8 * before["angle_p90"]


def test_subset_of_the_particles(quick: Trainer, tmp_path: Path, small_set: SmallSet) -> None:
    rows = np.arange(3, 43)
    (tmp_path / "rows.txt").write_text("\n".join(map(str, rows)))
    run = quick("--ind", f"{tmp_path}/rows.txt", "--cache", f"{tmp_path}/cache")
    given = read_particles(small_set.star, InputOptions())
    assert tensors(run / "z.0.pkl")["mu"].shape == (40, 2)
    assert np.allclose(load_poses(run / "pose.0.pkl").euler, given.euler[rows], atol=1e-4)
    assert len(load_split(run / "split.pkl", 40)) == 40


@pytest.mark.slow
def test_training_on_everything(quick: Trainer) -> None:
    run = quick("--valfrac", "0")
    assert [row["particles"] for row in metrics_of(run) if row["loss"]] == ["60"]
    assert len(held_out(run)) == 1
    trained, held = checkpoint.open_run(run).split
    assert len(trained) == 60 and len(held) == 0


def test_batch_of_one(quick: Trainer) -> None:
    run = quick("-b", "1", "--lamb", "0.5")
    assert [row["particles"] for row in metrics_of(run) if row["loss"]] == ["54"]
    assert all(torch.isfinite(value).all() for value in learned(run).values())


def test_fewer_gpus_than_asked_keep_the_global_batch(quick: Trainer, small_set: SmallSet) -> None:
    two, one = quick("--multigpu", "--num-gpus", "2", "-b", "4", name="two"), quick("-b", "8", name="one")
    assert "--num-gpus 2" in (two / "run.log").read_text()
    assert not differs(learned(two), learned(one))


def test_split_file_of_the_user_is_read_and_kept(quick: Trainer, tmp_path: Path) -> None:
    order = np.arange(PARTICLES)[::-1].copy()
    with (tmp_path / "mine.pkl").open("wb") as file:
        pickle.dump(order, file)
    run = quick("--split", f"{tmp_path}/mine.pkl")
    assert not (run / "split.pkl").exists()
    assert sorted(checkpoint.open_run(run).split[1]) == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(load_pickle(tmp_path / "mine.pkl"), order)


def test_small_options_are_what_the_fixture_says() -> None:
    config: Any = cli.parse_verb(["train", "x.star", "-o", "run", *SMALL])[0]
    assert (config.batch, config.zdim, config.width, config.grid.downfrac) == (8, 2, 0.1, 0.7)
