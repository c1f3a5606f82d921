"""Several processes on CPUs over gloo are one: same particles, gradients, codes and files; the end of one ends all."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opustomo import cli, parallel
from opustomo.config import TrainConfig
from opustomo.data.cache import open_cache
from opustomo.errors import UserError
from opustomo.physics.grid import Grid
from opustomo.training import start as start_module
from opustomo.training.job import Job, prepare, processes
from opustomo.training.memory import Fit
from parallel_work import epoch_of, failing, shared_epoch
from small_set import (
    PARTICLES,
    SmallSet,
    copy_run,
    given_cache,
    hurry,
    metrics_of,
    tensors,
    train,
    train_line,
)

ROUNDING = 2e-4  # of the largest value: float32 sums in another order, after some steps


# ------------------------------------------------------------------------------------------------ one epoch


@pytest.fixture(scope="module")
def job(small_set: SmallSet, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Nine particles in batches of 4, the last of one; three orientations, so that --lamb has codes to compare."""
    line = train_line(
        small_set, tmp_path_factory.mktemp("job") / "run", "--cache", str(given_cache(finished_run)), "--no-estpose",
        "-b", "2", "--num-gpus", "2", "--multigpu", "--lamb", "0.5", "--log-interval", "5",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        made, _ = prepare(*cli.parse_verb(line))
    group = np.arange(PARTICLES) % 3
    chosen = torch.tensor([i for g, n in ((0, 4), (1, 4), (2, 1)) for i in range(g, 3 * n, 3)])
    assert made.model.encoder is not None
    torch.nn.init.normal_(made.model.encoder.head.weight, std=0.01)  # an untrained one moves no code
    context = dataclasses.replace(made.context, group=group)
    return dataclasses.replace(made, train=chosen, context=context)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = ROUNDING) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(a.abs().max())


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(job: Job, tmp_path: Path) -> None:
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    alone = epoch_of(pickle.loads(pickle.dumps(job)))
    assert parallel.launch(2, partial(shared_epoch, tmp_path)) == 0
    first, second = (pickle.loads((tmp_path / f"found{i}").read_bytes()) for i in (0, 1))
    # every particle once, and neither process has them all
    assert sorted(first["seen"] + second["seen"]) == sorted(alone["seen"]) == sorted(job.train.tolist())
    assert {len(first["seen"]), len(second["seen"])} == {4, 5}
    assert len(alone["steps"]) == 3
    for one, mine, other in zip(alone["steps"], first["steps"], second["steps"], strict=True):
        assert float(one.abs().max()) > 0
        assert torch.equal(mine, other) and close(one, mine)
    for name in ("bank", "code", "sigma"):
        assert torch.equal(first[name], second[name]) and close(alone[name], first[name]), name
    assert not torch.equal(alone["bank"], job.bank)
    assert first["scores"] == second["scores"] == pytest.approx(alone["scores"], rel=1e-5)
    assert len(alone["rows"]) == len(first["rows"]) == 2 and second["rows"] == []
    for one, mine in zip(alone["rows"], first["rows"], strict=True):
        assert mine == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_a_cache_is_sent_as_its_folder(finished_run: Path) -> None:
    cache = open_cache(given_cache(finished_run))
    cache.moved = torch.rand(PARTICLES, 6)
    sent = pickle.dumps(cache)
    assert len(sent) < 20_000
    opened = pickle.loads(sent)
    rows = torch.tensor([3, 0, 59])
    assert torch.equal(opened.numerator(rows), cache.numerator(rows))
    assert torch.equal(opened.weight(rows), cache.weight(rows)) and torch.equal(opened.moved, cache.moved)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_a_partition(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "count", lambda: count)
    for size in (0, 1, 7, 8, 65):
        parts: list[int] = []
        rounds: list[int] = []
        sizes: list[int] = []
        for number in range(count):
            monkeypatch.setattr(parallel, "rank", lambda number=number: number)
            own = range(size)[parallel.share(size)]
            parts += own
            sizes.append(len(own))
            rounds += parallel.turns(range(size))
        assert parts == list(range(size)) == sorted(rounds)
        assert max(sizes) - min(sizes) <= 1


# ------------------------------------------------------------------------------------------------ whole runs


def start(arguments: list[str], count: int = 2) -> list[subprocess.Popen[str]]:
    """``opustomo`` in several processes with the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = []
    for number in range(count):
        own = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        names = {k: str(v) for k, v in {**own, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items()}
        command = [sys.executable, "-m", "opustomo", *arguments]
        started.append(
            subprocess.Popen(command, env=os.environ | names, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    return started


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(finished_run: Path, tmp_path: Path) -> None:
    """The second and third epoch in two processes: the curve, codes and weights of one process, and its files."""
    run = copy_run(finished_run, tmp_path / "run", 0)
    both = start(["train", "--resume", str(run)])
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[1] == "" and "2 processes" in said[0]
    files = {path.name for path in finished_run.iterdir()} - {"cache"}
    assert {path.name for path in run.iterdir()} - {"cache"} == files
    for mine, one in zip(metrics_of(run), metrics_of(finished_run), strict=True):
        assert mine.keys() == one.keys()
        for name in filter(one.__getitem__, one):
            assert float(mine[name]) == pytest.approx(float(one[name]), rel=1e-3, abs=1e-3), name
    mine, one = (tensors(folder / "weights.2.pkl") for folder in (run, finished_run))
    assert mine.keys() == one.keys()
    for name, values in one["model"].items():
        assert close(values, mine["model"][name], 0.02), name  # Adam divides small gradients by their own size
    assert close(tensors(finished_run / "z.2.pkl")["mu"], tensors(run / "z.2.pkl")["mu"], 1e-3)


def started_twice(run: Path, epoch: int) -> list[subprocess.Popen[str]]:
    """Two processes that go on with ``run`` without end, once ``epoch`` is finished."""
    both = start(["train", "--resume", str(run), "-n", "100000"])
    patience = time.monotonic() + 200
    while not (run / f"weights.{epoch}.pkl").exists():
        assert both[0].poll() is None and time.monotonic() < patience, both[0].communicate()
        time.sleep(0.05)
    return both


@pytest.mark.slow
def test_a_killed_process_ends_the_run(finished_run: Path, tmp_path: Path) -> None:
    """One that is asked to stop stops all, and the first keeps the state; one that is killed ends all."""
    run = copy_run(finished_run, tmp_path / "run", 0)
    first, second = started_twice(run, 1)
    second.send_signal(signal.SIGUSR1)
    said = [process.communicate(timeout=100)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (128 + signal.SIGUSR1,) * 2, said
    assert (
        said[0].splitlines()[-1].startswith("opustomo train: interrupted by SIGUSR1: everything learned so far is kept")
    )
    assert said[1] == "" and tensors(run / "state.pkl")["course"]["epoch"] >= 2

    first, second = started_twice(run, 2 + tensors(run / "state.pkl")["course"]["epoch"])
    second.send_signal(signal.SIGKILL)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 2
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("opustomo train: error: another of the 2 processes ended") and "--resume" in last
    second.communicate()
    assert last in (run / "run.log").read_text().splitlines()[-1]
    assert train_again(run) == 0


def train_again(run: Path) -> int:
    """One more epoch in one process, from what a killed run has left."""
    last = max(int(path.name.split(".")[1]) for path in run.glob("z.*.pkl"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        return cli.main(["train", "--resume", str(run), "-n", str(last + 2)])


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("how", "message"),
    [("killed", "another of the 2 processes ended"), ("mistake", "particle 7 is damaged; repair it")],
)
def test_the_end_of_one_ends_all_in_one_line(how: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert parallel.launch(2, partial(failing, how)) != 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and lines[0].startswith(f"opustomo train: error: {message}"), lines
    assert time.monotonic() - began < 100


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"RANK": "2"}, "RANK 2 of WORLD_SIZE 2"),
        ({"RANK": "one"}, "RANK=one: must be a whole number"),
        ({"RANK": "0"}, "MASTER_ADDR is not set"),
    ],
    ids=["too large", "no number", "nowhere"],
)
def test_an_environment_that_cannot_be_joined(
    names: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **names}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(message)), parallel.joined("cpu"):
        pass


def test_processes_that_do_not_come_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "JOINING", parallel.timedelta(seconds=1))
    with pytest.raises(UserError, match=f"others were not found at localhost:{port}"), parallel.joined("cpu"):
        pass


def test_processes_that_are_started(small_set: SmallSet, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each GPU that is here and was asked for; as many as the run had been given when it goes on."""
    several = ("--num-gpus", "4", "--multigpu", "--device", "auto")

    def count(*options: str) -> int:
        return processes(*cli.parse_verb(train_line(small_set, Path("new"), *options)))

    assert count(*several) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert count(*several) == 3 and count(*several, "--num-gpus", "2") == 2
    assert count("--device", "auto") == count(*several, "--device", "cpu") == 1
    assert count(*several, "--encode-mode", "fixed") == 1
    assert processes(*cli.parse_verb(["train", "--resume", str(finished_run), "-n", "9"])) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count(*several) == 1


def test_several_gpus_become_several_processes(
    small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the command that was typed, with the options that were."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked: list[Any] = []
    monkeypatch.setattr(parallel, "launch", lambda count, function: asked.append((count, function)) or 5)
    assert train(small_set, tmp_path / "run", "--num-gpus", "2", "--multigpu", "--device", "auto") == 5
    [(count, function)] = asked
    config, given = function.args
    assert count == 2 and function.func is cli.member and isinstance(config, TrainConfig)
    assert config.num_gpus == 2 and "multigpu" in given
    assert not (tmp_path / "run").exists()  # the processes make it


@pytest.mark.parametrize("finished", [False, True])
def test_the_job_script_starts_every_task(finished: bool, tmp_path: Path) -> None:
    """Under a stand-in for SLURM: what each task would run parses, and its environment can be joined."""
    script = Path(__file__).parents[1] / "runs" / "slurm.sbatch"
    tools = {
        "scontrol": 'printf "node1\\nnode2\\n"',
        "srun": 'test "$1" = --kill-on-bad-exit=1 && shift\n'
        'for i in 0 1 2 3; do SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "$@"; done',
        "opustomo": 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT|$*"',
    }
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    if finished:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("star: particles.star\n")
    slurm = {"NTASKS": "4", "NTASKS_PER_NODE": "2", "JOB_ID": "123456", "JOB_NODELIST": "node[1-2]"}
    names = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | {f"SLURM_{k}": v for k, v in slurm.items()}
    done = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, env=os.environ | names, capture_output=True, text=True, check=True
    )
    said = [line.split("|") for line in done.stdout.splitlines()]
    assert [where for where, _ in said] == [f"{i}/4 {i % 2}/2 node1 23456" for i in range(4)]
    words = said[0][1].split()
    if finished:
        assert words == ["train", "--resume", "run"]
    else:
        config, _ = cli.parse_verb(words)
        assert (config.num_gpus, config.multigpu, config.load) == (4, True, None)


def test_every_process_takes_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of its number on the machine; the only one it sees, where the queueing system has chosen."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for present, local, here in ((4, 3, 4), (1, 3, 4), (8, 3, 4)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda present=present: present)
        monkeypatch.setenv("LOCAL_RANK", str(local))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        parallel._take_gpu(local)
    assert taken == [3, 0, 3]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"4 processes on .*, which has 2 GPUs"):
        parallel._take_gpu(3)


def test_each_process_needs_memory_for_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the batch of the run stays what it is, also where it was made for one process."""
    asked: list[int] = []

    def plan(grid: Grid, components: int, width: float, encoderres: int, batch: int, *_: object, **__: object) -> Fit:
        asked.append(batch)
        return Fit(batch, False)

    monkeypatch.setattr(start_module.memory, "plan", plan)
    monkeypatch.setattr(parallel, "count", lambda: 4)
    for several in (True, False):
        config = TrainConfig(Path(), Path(), batch=10, num_gpus=4, multigpu=several)
        made, _ = start_module.with_memory(config, None, Grid(16, 1.0, 8, 8, 16), 99, torch.device("cpu"), fresh=False)
        assert made == config
    assert asked == [10, 3]
