"""What the processes of test_parallel do; imported by each of them, so little is imported at once."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opustomo import cli, parallel
from opustomo.errors import UserError
from small_set import learner_of


class Note:
    """Rows of metrics, kept."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def append(self, **row: float) -> None:
        self.rows.append(row)


def epoch_of(job: Any) -> dict[str, Any]:
    """One epoch on the process's share: rows seen, the gradient of every step, codes, metrics and scores."""
    from opustomo import train as training

    steps: list[torch.Tensor] = []
    seen: list[int] = []
    note = Note()
    optimizer = torch.optim.SGD(job.model.parameters(), lr=1e-3)

    def remember(_: object, __: object, ___: object) -> None:
        steps.append(torch.cat([p.grad.flatten() for p in job.model.parameters() if p.grad is not None]))

    def step(model: Any, context: Any, index: torch.Tensor, *others: Any) -> training.Step:
        seen.extend(index.tolist())
        return train_step(model, context, index, *others)

    optimizer.register_step_pre_hook(remember)
    train_step, training.train_step = training.train_step, step
    try:
        training.train_epoch(
            job.config,
            job.context,
            learner_of(job.model, optimizer, job.bank, 0),
            job.train,
            note if parallel.first() else None,  # type: ignore[arg-type]
        )
    finally:
        training.train_step = train_step
    code, sigma = training.encode_all(job.model, job.context, 3)
    scores = training.evaluate(job.model, job.context, torch.arange(40), 0.0, 0)
    timeless = [{k: v for k, v in row.items() if "second" not in k} for row in note.rows]
    return {"seen": seen, "steps": steps, "bank": job.bank, "code": code, "sigma": sigma, "scores": scores,
            "rows": timeless}  # fmt: skip


def shared_epoch(folder: Path) -> int:
    """In a process of its own: ``epoch_of`` with the job that the first process has been given."""
    with parallel.joined("cpu"):
        given = pickle.loads((folder / "job").read_bytes()) if parallel.first() else None
        found = epoch_of(parallel.from_first(given))
        (folder / f"found{parallel.rank()}").write_bytes(pickle.dumps(found))
    return 0


def failing(how: str) -> int:
    """Exchanges without end, until the second process is killed or finds a mistake."""

    def work() -> int:
        with parallel.joined("cpu"):
            for step in range(1_000_000):
                parallel.total(torch.ones(1))
                if step == 20 and parallel.rank() == 1:
                    if how == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise UserError("particle 7 is damaged; repair it")
        return 0

    return cli.run("opustomo train", work)


def first_rows(count: int, size: int) -> Any:
    """Instead of rows from the whole file, to estimate the noise from."""
    return np.arange(min(count, 8))


def shared_rows(star: Path, mask: Path, folder: Path, damaged: str, killed: bool) -> int:
    """The cache of a set by all processes; the first writes what it read of some rows, killed: the second dies."""
    from opustomo.config import GridOptions, InputOptions
    from opustomo.data import filling, noise
    from opustomo.data.inputs import read_inputs
    from opustomo.preparation import RowMaker

    filling.ROUND = 8
    noise.sample_rows = first_rows

    def make() -> list[bool]:
        options = InputOptions(damaged=damaged)
        inputs = read_inputs(star, options, GridOptions(mask, 0.7), cache=folder)
        rows = RowMaker(inputs, folder, options, 1)(inputs.particles)
        assert rows.numerator(torch.arange(len(rows))).isfinite().all()
        return inputs.particles.usable.tolist()

    def work() -> int:
        with parallel.joined("cpu"):
            made = []
            observe = filling.observe_all

            def noted(particles: Any, rows: Any, *others: Any, **more: Any) -> Any:
                made.extend(particles.names[i] for i in rows)
                if killed and parallel.rank() == 1 and len(made) > 8:
                    os.kill(os.getpid(), signal.SIGKILL)
                return observe(particles, rows, *others, **more)

            filling.observe_all = noted
            usable = parallel.prepared(make)
            folder.with_name(f"made{parallel.rank()}").write_bytes(pickle.dumps((made, usable)))
        return 0

    return cli.run("opustomo train", work)
