"""Training: read this file from top to bottom.

Owns: the run from a STAR file to checkpoints.  Data -> cache -> average -> linear stage -> network -> codes of every
particle.  ``train_step`` is one step; ``evaluate`` is the held-out evidence lower bound that has to beat the linear
stage's.
"""

from __future__ import annotations

import logging
import shlex
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from opustomo import checkpoint, parallel
from opustomo.config import TrainConfig
from opustomo.data.batches import bank_rows, batch_order
from opustomo.errors import UserError
from opustomo.interruption import Asked, on_signal
from opustomo.mixture import Luck, draw
from opustomo.model.vae import Vae
from opustomo.monitor import Metrics, peak_memory_gb, progress
from opustomo.objective import (
    beta_weight,
    differentiable_band,
    disentanglement,
    envelope,
    evidence,
    learning_rate,
    magnitude,
    pose_nuisance,
    resolved,
    spectral_prior,
    total_variation,
)
from opustomo.physics.observation import band_volume, seen_through
from opustomo.preparation import prepare_process
from opustomo.training.context import Batch, Context, encode_all, known, posterior_of, read_batch
from opustomo.training.course import Course, Window
from opustomo.training.guard import RanAway, Watch
from opustomo.training.job import Job, prepare
from opustomo.training.keeping import Files, Learner
from opustomo.training.profiling import Profile, part
from opustomo.training.start import Start, device_of, global_batch
from opustomo.training.verdict import warn_of_codes, write_verdict

log = logging.getLogger("opustomo")

EVALUATION_PAIRS = 4  # of opposite samples: they cancel what is odd in the code
CLIP = 10.0  # gradient norm, in nats per unit of weight
SETBACKS = 3  # returns to a checkpoint with half the learning rate


# ------------------------------------------------------------------------------------------------ the run


def main(config: TrainConfig, given: frozenset[str] | None = None) -> int:
    """``opustomo train``.  given: names of the options that were typed (None: all that differ from their defaults).

    One of several processes does its share of every batch and of the codes; the first one prepares and writes.
    """
    with parallel.joined(config.device):
        if config.encode_mode == "fixed":
            from opustomo.training import homogeneous

            return homogeneous.main(config, given) if parallel.first() else 0
        start: Start | None = None

        def begin() -> Job:
            nonlocal start
            job, start = prepare(config, given)
            return job

        fit(parallel.prepared(begin), start)
    return 0


def fit(job: Job, start: Start | None) -> None:
    """All epochs.  start: only in the process that writes."""
    if start is None:
        prepare_process(job.config.workers, job.config.deterministic)
    config, train, device = job.config, job.train, device_of(job.config.device)
    model, context, bank = job.model.to(device), job.context.to(device), job.bank.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.wd, fused=True)
    if job.optimizer is not None:
        optimizer.load_state_dict(job.optimizer)
    parallel.divide_threads()
    if config.compile:
        model.decoder.compile_large()
    profile = Profile(config, model, context, len(train)) if config.profile and start is not None else None
    learner, files, asked = Learner(model, optimizer, bank, Course.of(job.course)), Files(config, start), Asked()
    watch = Watch(
        asked,
        config.checkpoint_minutes,
        lambda: files.keep(learner),
        job.bound,
        f"opustomo train --resume {config.output}",
    )
    if job.fresh:
        files.begin(learner)
    metrics = files.metrics(learner.course)
    gain, codes = 0.0, None
    with on_signal(asked):
        while learner.course.epoch < config.epochs:
            try:
                train_epoch(config, context, learner, train, metrics, watch, profile)
            except RanAway as trouble:
                set_back(learner, files, trouble)
                metrics = files.metrics(learner.course)
                continue
            with watch.between_epochs():
                gain, codes = end_epoch(job, context, learner, files, metrics)
            learner.course = learner.course.next_epoch(len(train))
    if start is None:
        return
    write_verdict(files.bounds(), job.bound, len(job.held))
    assert codes is not None  # the last epoch is always saved
    used = start.linear.model.size
    warn_of_codes(config, start, codes[0][:, :used], codes[1][:, :used], gain)
    out = shlex.quote(str(config.output))
    log.info("finished in %.0f s, peak memory %.1f GB; next: opustomo analyze %s ; opustomo report %s",
             time.time() - job.started, peak_memory_gb(), out, out)  # fmt: skip


def end_epoch(
    job: Job, context: Context, learner: Learner, files: Files, metrics: Metrics | None
) -> tuple[float, tuple[Tensor, Tensor] | None]:
    """Held-out bound, a line about it and, where a checkpoint is due, codes and files; all as the next epoch begins.

    Returns the bound's gain over the linear stage's, nats per particle, and codes and their standard deviations,
    (P, zdim) each.
    """
    config, model, epoch = job.config, learner.model, learner.course.epoch
    scores = evaluate(model, context, job.held if len(job.held) else job.train, config.bfactor, epoch)
    gain = scores["val_elbo"] - job.bound
    due = (epoch + 1) % config.checkpoint == 0 or epoch + 1 == config.epochs
    codes = encode_all(model, context, config.zdim) if due else None
    following = learner.course.next_epoch(len(job.train))
    if metrics is not None:
        metrics.append(epoch=epoch, particles=following.seen, linear_val_elbo=job.bound, **scores)
        log.info(
            "epoch %d: held-out bound %.2f nats per particle, linear stage %.2f (%+.2f)",
            epoch, scores["val_elbo"], job.bound, gain,
        )  # fmt: skip
        preview(config, model, context, job.train, epoch)
    if codes is not None:
        files.save(learner, following, codes)
    return gain, codes


def set_back(learner: Learner, files: Files, trouble: RanAway) -> None:
    """Back to the last checkpoint of an epoch, to go on from there at half the rate; in all processes alike.

    Raises UserError where that has been done often enough and the loss is not finite.
    """
    course = learner.course
    if course.setbacks == SETBACKS:
        if not trouble.lost:
            log.warning("epoch %d: %s, after %d returns; it goes on from here", course.epoch, trouble, SETBACKS)
            course.level = [0.0] * len(course.level)
            return
        raise UserError(
            f"epoch {course.epoch}: {trouble}, after {SETBACKS} returns to a checkpoint; give a lower --lr, and look "
            "at these subtomograms with `opustomo check`"
        )
    learner.restore(parallel.from_first(files.last_epoch(course) if parallel.first() else None))
    learner.course.rate, learner.course.setbacks = course.rate / 2, course.setbacks + 1
    log.warning(
        "epoch %d: %s; back to the beginning of epoch %d with %g of the learning rate",
        course.epoch, trouble, learner.course.epoch, learner.course.rate,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ one step


def log_evidence(
    model: Vae, context: Context, batch: Batch, code: Tensor, damping: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``log p(data | V(z)) - log p(data | 0)`` with pose errors integrated out, (b,); D(z), (b, C, C, C), and as the
    data see it on the band, (b, n)."""
    size = context.grid.working_box
    with part("decode"), torch.autocast(context.device.type, torch.bfloat16, enabled=context.autocast):
        density = model.nonlinear(code)
    nonlinear = density = density.float()
    with part("likelihood"):
        band = differentiable_band(nonlinear, size)
        if damping is not None:
            band = band * damping
            nonlinear = band_volume(band, size, context.grid.crop)
        known_part = torch.cat([torch.ones_like(code[:, :1]), code], 1) @ context.linear
        seen = torch.view_as_complex(known_part.unflatten(1, (-1, 2))) + band
        prior = context.pose_prior[batch.index.to(context.device)]
        nuisance = pose_nuisance(context.pose, batch.numerator, batch.weight, prior)
        fit, _ = evidence(model.linear(code) + nonlinear, seen, batch.numerator, batch.weight, nuisance, size)
    return fit, density, band


@dataclass(frozen=True)
class Step:
    """One sample of the negative evidence lower bound of a batch, (b,) each in nats, and what the priors look at.

    excess: of the bound over the linear stage's; code: (b, K) means; resolved: (b,), see ``objective.resolved``;
    density: (b, C, C, C), D(z) in units of the components' density.
    """

    nll: Tensor
    kl: Tensor
    excess: Tensor
    prior: Tensor
    code: Tensor
    resolved: Tensor
    density: Tensor


def train_step(model: Vae, context: Context, index: Tensor, damping: Tensor | None, luck: Luck) -> Step:
    """Forward pass of a batch: encode, sample, decode, compare."""
    with part("read"):
        batch = read_batch(context, index)
    with part("encode"):
        linear = known(context, index)
        posterior = posterior_of(model, context, linear, batch)
        code = posterior.sample(luck)
    fit, density, band = log_evidence(model, context, batch, code.float(), damping)
    # the posterior's own parameters held (Roeder et al. 2017): no noise is left where the posterior is exact
    kl = posterior.detach().log_density(code) - context.mixture.log_density(code)
    prior = spectral_prior(band, context.precision, context.grid.working_box)
    gate = resolved(posterior.spread().detach().square(), context.mixture.variance())
    excess = (kl - fit + linear.evidence).detach()
    return Step(-fit, kl.float(), excess, prior, posterior.centre().float(), gate.float(), density / model.scale[0])


def penalties(
    config: TrainConfig, out: Step, others: Tensor, particles: int, codes: Tensor | None = None, at: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted spectral prior, TV and L1, and disentanglement prior, each (b,) in nats.

    others: codes of other orientations (m, K); particles: how many are trained on; codes: of the whole batch (B, K),
    where this part of it begins at row ``at`` (None: it is the whole).
    """
    # the prior belongs to the decoder, not to a particle: each carries its share
    prior = config.prior / particles * out.prior
    regulariser = disentangled = torch.zeros_like(prior)
    if config.tv > 0:
        regulariser = regulariser + config.tv * total_variation(out.density)
    if config.l1 > 0:
        regulariser = regulariser + config.l1 * magnitude(out.density)
    if config.lamb > 0:
        disentangled = config.lamb * out.resolved * disentanglement(out.code, others, codes, at)
    return prior, regulariser, disentangled


@dataclass(frozen=True)
class Contribution:
    """What this process has to say about a batch, of which it has looked at its share.

    rows: that share; objective: its part of the batch's mean, to be minimised, nats per particle; excess: of its rows,
    see ``Step``; codes: of the whole batch (B, K) with --lamb; means: its part of the batch's mean loss, nll, kl and
    weighted priors (6,), on the device, since reading it would wait for every step.
    """

    rows: Tensor
    objective: Tensor
    excess: Tensor
    codes: Tensor
    means: Tensor


def contribution(
    config: TrainConfig, context: Context, learner: Learner, train: Tensor, index: Tensor, done: float
) -> Contribution:
    """Forward pass of this process's share of the batch at ``index``; done: how much of the run is, 0 to 1."""
    course, bank = learner.course, learner.bank
    damping = damping_of(config.bfactor, course.epoch, context)
    luck = draw(context.mixture, len(index), course.generator)
    others = bank_rows(train, context.group, index, course.generator) if config.lamb > 0 else index[:0]
    here = parallel.share(len(index))
    rows = index[here]
    code = torch.zeros((0, bank.shape[1]), requires_grad=True, device=bank.device)
    excess, means = code.detach().sum(1), torch.zeros(6, device=bank.device)
    if len(rows):  # the last batch may have fewer particles than there are processes
        out = train_step(learner.model, context, rows, damping, luck.of(here))
        code, excess = out.code, out.excess
    codes = parallel.joint(code, here, len(index)) if config.lamb > 0 else code
    objective = 0.0 * codes.sum()  # all take part in the way back, whether their loss has these codes or not
    if len(rows):
        beta = beta_weight(config.beta, done) * config.beta_control
        added = penalties(config, out, bank[others.to(context.device)], len(train), codes, here.start)
        loss = out.nll + beta * out.kl + sum(added)
        objective = objective + loss.sum() / len(index)
        means = torch.stack([value.detach().sum() for value in (loss, out.nll, out.kl, *added)]) / len(index)
    return Contribution(rows, objective, excess, codes.detach(), means)


def take_step(learner: Learner, rate: float) -> None:
    """A step of the optimiser along the gradients that all processes have gathered since the last one."""
    with part("exchange"):
        parallel.sum_gradients(learner.model)
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    with part("optimiser"):
        torch.nn.utils.clip_grad_norm_(learner.model.parameters(), CLIP)
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)


def train_epoch(
    config: TrainConfig,
    context: Context,
    learner: Learner,
    train: Tensor,
    metrics: Metrics | None = None,
    watch: Watch | None = None,
    profile: Profile | None = None,
) -> None:
    """The rest of an epoch; a line of metrics at every log interval and at the end.

    Each process has its share of every batch: the sums of their gradients are those of the whole batch.  After every
    step of the optimiser ``learner.course`` says where the epoch stands; that is when ``watch`` looks.
    """
    course, epoch = learner.course, learner.course.epoch
    learner.model.train()
    if course.step == 0:
        course.generator.manual_seed(config.seed * 100_003 + epoch)
    batches = batch_order(train, context.group, global_batch(config), config.seed, epoch)
    lot = config.accum_step
    window = Window(metrics, course)
    left = batches[course.step :]
    told = progress(left, sum(map(len, left)), f"epoch {epoch}", size=len)
    for step, index in enumerate(profile.steps(told, len(left)) if profile is not None else told, course.step):
        done = (epoch + step / len(batches)) / config.epochs
        found = contribution(config, context, learner, train, index, done)
        # the last group of an epoch may be shorter
        with part("backward"):
            (found.objective / min(lot, len(batches) - step // lot * lot)).backward()
        if config.lamb > 0:
            learner.bank[index.to(context.device)] = found.codes
        if watch is not None:
            watch.note(found.rows, found.excess, len(index))
        window.add(len(index), found.means)
        last = step + 1 == len(batches)
        complete = (step + 1) % lot == 0 or last
        rate = learning_rate(config.lr, done) * course.rate
        if complete:
            take_step(learner, rate)
        # --plot without an interval of its own: eight pictures an epoch
        interval = config.log_interval or (len(train) // 8 if config.plot else 0)
        if course.count and (last or (interval and course.count >= interval)):
            window.write(beta_weight(config.beta, done) * config.beta_control, rate)
            if config.plot and metrics is not None and not last:
                preview(config, learner.model, context, index, epoch)
                learner.model.train()
        if complete:
            course.step = step + 1
            if watch is not None:
                watch.look(course, last)


def damping_of(bfactor: float, epoch: int, context: Context) -> Tensor | None:
    """Envelope of --bfactor on the band, or None when there is none."""
    if bfactor <= 0:
        return None
    return envelope(bfactor, epoch, context.grid.working_box, context.grid.extent, context.device)


# ------------------------------------------------------------------------------------------------ after an epoch


@torch.no_grad()
def evaluate(model: Vae, context: Context, index: Tensor, bfactor: float, epoch: int) -> dict[str, float]:
    """Evidence lower bound of held-out particles, means per particle in nats.

    The bound is sampled together with that of the linear stage, whose exact value is known: their difference, at the
    same noise, varies far less than either (a control variate).  Several processes share the particles.
    """
    model.eval()
    damping = damping_of(bfactor, epoch, context)
    generator = torch.Generator().manual_seed(0)
    exact = gain = kl_sum = 0.0
    batches = ((rows, [draw(context.mixture, len(rows), generator) for _ in range(EVALUATION_PAIRS)])
               for rows in index.split(16))  # fmt: skip
    for rows, lucks in parallel.turns(batches):
        batch = read_batch(context, rows)
        linear, statistics = known(context, rows), context.statistics.at(rows.to(context.device))
        posterior = posterior_of(model, context, linear, batch)
        exact += float(linear.evidence.sum())
        for luck in lucks:
            for code in (posterior.sample(luck), posterior.sample(luck.opposite())):
                fit, *_ = log_evidence(model, context, batch, code.float(), damping)
                density = posterior.log_density(code)
                # what the linear stage makes of the same codes: together with its exact posterior it is its evidence
                control = statistics.evidence(code) - linear.log_density(code)
                gain += float((fit - density - control).sum()) / (2 * EVALUATION_PAIRS)
                kl_sum += float((density - context.mixture.log_density(code)).sum()) / (2 * EVALUATION_PAIRS)
    exact, gain, kl_sum = parallel.total(torch.tensor([exact, gain, kl_sum], dtype=torch.float64)).tolist()
    bound, kl = (exact + gain) / len(index), kl_sum / len(index)
    return {"val_nll": -(bound + kl), "val_kl": kl, "val_elbo": bound}


@torch.no_grad()
def preview(config: TrainConfig, model: Vae, context: Context, index: Tensor, epoch: int) -> None:
    """``<tmp-prefix>.mrc``, the volume of one particle, and ``<tmp-prefix>.png``: rows of projections.

    Each row: the subtomogram's numerator, the reconstruction seen through its weight, the masked numerator.
    """
    from opustomo.analysis import plots  # matplotlib: the first step does not wait for it

    model.eval()
    batch = read_batch(context, index[:4])
    code = posterior_of(model, context, known(context, batch.index), batch).centre().float()
    volume = model.linear(code) + model.nonlinear(code)
    seen = seen_through(volume, batch.weight, context.grid.working_box)
    checkpoint.write_map(config.output / f"{config.tmp_prefix}.mrc", volume[0].cpu(), context.grid)
    pictures = torch.stack([batch.numerator, seen, batch.numerator * model.mask], 1).sum(-3).cpu().numpy()
    titles = ("subtomogram", "reconstruction through its CTF", "masked subtomogram")
    plots.save(plots.picture_rows(pictures, titles), config.output / f"{config.tmp_prefix}.png")
