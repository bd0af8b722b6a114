"""The story of a run: take rows, make a step, once in a while log, validate, save; until the stream is dry.

In:  a Trainer (student, optimizer, counters), a Feed (rows of the stream). Out: better weights, metrics, checkpoints.

All ranks walk through this together. Before each step they agree on one message whether anybody has rows, whether anybody
was asked to stop, and how many tokens each loss has in the whole step: the one division. A rank that has run dry goes on
with an idle batch until all have. Neither ray nor vllm here: a step runs and is timed wherever torch does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raykd.data.process_targets import describe_missing
from raykd.loss_config import LossConfig
from raykd.losses.combine import combine, loss_counts
from raykd.losses.context import LossContext
from raykd.training.feed import Feed
from raykd.training.head_metrics import head_metrics, read_heads
from raykd.training.int8 import smooth_student
from raykd.training.loss_needs import tell_idle
from raykd.training.meters import Sums, add_report, mean_losses, to_host
from raykd.training.reference import with_reference
from raykd.training.rollouts import KeptRollouts, RolloutRows
from raykd.training.schedules import learning_rate
from raykd.training.sharding import clip_gradients
from raykd.training.simulated import sleep_as_if_trained
from raykd.training.trainer import Trainer
from raykd.types import Batch, LossReport

logger = logging.getLogger(__name__)

Log = Callable[[int, Mapping[str, float]], None]


class NotFiniteError(ValueError):
    """Too many steps in a row had a loss or gradient that is no number."""


def fit(
    trainer: Trainer,
    feed: Feed,
    *,
    log: Log,
    stop: Callable[[], bool],
    before_step: Callable[[int], None],
    save_now: Callable[[], bool] = lambda: False,
    rollouts: KeptRollouts | None = None,
) -> bool:
    """Train on what the feed yields, from the trainer's step on; leave a checkpoint. Collective.

    Args:
        log: called on every rank with (step, metrics); only rank 0's is meant to write.
        stop: asked once a step; when any rank says yes, all leave after a checkpoint.
        before_step: called with the number of the step that is about to be made, the first being 1.
        save_now: asked once a step; when any rank says yes, all write a checkpoint after it.
        rollouts: what the student itself answers to a step's prompts, as micro-batches on top of the step's own.

    Returns whether it was stopped, rather than the rows (or train.max_steps) at their end. Errors: NotFiniteError after
    `max_skipped_steps` skipped steps in a row.
    """
    progress, limit = trainer.progress, trainer.config.train.max_steps
    stopped = False
    while limit is None or progress.step < limit:
        trainer.quantize_now()
        rows = feed.next_step()  # blocks while the teacher is slower
        sampled = rollouts.rows(rows.table, progress.step) if rollouts else RolloutRows([], {})
        batches = _judged(trainer, rows.batches) + sampled.batches
        losses = trainer.losses_now()
        measured = trainer.loss_state.measure(batches, losses)
        counted = count_tokens(batches, losses, trainer.context)
        asked = {"stop": stop(), "save": save_now()}
        agreed = trainer.ranks.sum(rows.numbers | sampled.numbers | asked | counted | measured)
        stopped = bool(agreed["stop"])
        if stopped or not agreed["sequences"]:
            break
        before_step(progress.step + 1)
        batches = _with_idle(trainer, feed, batches)
        smooth_student(trainer, batches)
        trainer.loss_state = trainer.loss_state.updated(agreed, losses)
        step(trainer, batches, agreed, losses)
        trainer.recent.append(rows.uid)
        trainer.meters.add_numbers(agreed)
        progress.sequences += int(agreed["sequences"])
        progress.response_tokens += int(agreed["response_tokens"])
        progress.supervised = sorted({*progress.supervised, *(term for term in losses.terms if agreed[term])})
        if progress.step == trainer.config.train.log_every:
            _tell_idle(trainer, at_end=False)
        _once_in_a_while(trainer, feed, log, at_end=False)
        if agreed["save"]:
            trainer.save()
    _tell_missing(trainer, feed)
    if not stopped and (progress.epoch == trainer.config.train.epochs - 1 or progress.step == limit):
        _tell_idle(trainer, at_end=True)
    if stopped:  # whoever stops a run wants it to be quick
        trainer.save()
    else:
        _once_in_a_while(trainer, feed, log, at_end=True)
    return stopped


def _tell_missing(trainer: Trainer, feed: Feed) -> None:
    """Say once at the end why rows of the first worker had nothing for a loss to look at."""
    total = feed.missing.total()
    for loss, reasons in describe_missing(feed.missing).items():
        if trainer.ranks.rank == 0:
            logger.info("%s found no target in some of %d samples: %s", loss, total, "; ".join(reasons))


def _tell_idle(trainer: Trainer, *, at_end: bool) -> None:
    """Say at the first log entry and at the end of the run which losses nothing was for, over all ranks."""
    progress = trainer.progress
    if trainer.ranks.rank == 0 and progress.step:
        tell_idle(trainer.config.loss, progress.supervised, progress.step, at_end=at_end)


def step(trainer: Trainer, batches: list[Batch], counts: Mapping[str, Tensor], losses: LossConfig) -> None:
    """One optimizer step: this rank's micro-batches, and `counts`, the tokens of every loss over all ranks. Collective.

    A loss or gradient that is not finite never reaches the weights: the step is skipped on all ranks alike.
    """
    if trainer.config.simulates("step"):
        sleep_as_if_trained(batches, trainer.config.rates.worker_tokens_per_s)
        trainer.meters.add_losses({})
        trainer.progress.step += 1
        return
    world_size = trainer.ranks.world_size
    counts, context = _on_device(trainer, counts, losses), trainer.context_now()
    sums: Sums = {}
    for index, batch in enumerate(batches):
        with trainer.exchange_gradients(now=index == len(batches) - 1):
            report = _forward(trainer, trainer.model, batch, counts, losses, context)
            add_report(sums, report)
            # A total that is no number makes every gradient one, and so, once they are added up, the norm on every rank.
            finite = torch.where(torch.isfinite(sums["total"]), 1.0, torch.nan)
            (report.total * world_size * finite).backward()  # DDP and FSDP take the mean over ranks: this makes it the sum
    grad_norm = clip_gradients(list(trainer.student.parameters()), trainer.config.train.max_grad_norm)
    if torch.isfinite(grad_norm):  # the one time per step that the host waits for the device
        for group in trainer.optimizer.param_groups:
            rate = learning_rate(trainer.progress.step, trainer.num_steps, trainer.config.train)
            group["lr"] = rate * group["lr_scale"]
        trainer.optimizer.step()
        trainer.progress.skipped_in_a_row = 0
        trainer.meters.add_losses(sums | {"grad_norm": grad_norm / world_size})
    else:
        _skip(trainer, batches, grad_norm)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.progress.step += 1


def count_tokens(batches: list[Batch], losses: LossConfig, context: LossContext) -> dict[str, float]:
    """Count of every active loss over some micro-batches that are still on the host; 0 where there are none."""
    counts = dict.fromkeys(losses.terms, 0.0)
    for batch in batches:
        for name, count in loss_counts(batch, losses, context).items():
            counts[name] += count.item()  # a tensor of the host
    return counts


def _judged(trainer: Trainer, batches: list[Batch]) -> list[Batch]:
    """The batches with what the frozen student thinks of the pairs in them."""
    if trainer.reference is None:
        return batches
    return with_reference(trainer.reference, batches, trainer.autocast(), trainer.num_passes)


def _with_idle(trainer: Trainer, feed: Feed, batches: list[Batch]) -> list[Batch]:
    """The micro-batches and as many idle ones as this rank needs to take part in the collectives: one has each of them."""
    return batches + [feed.idle_batch() for _ in range(trainer.num_passes(max(1, len(batches))) - len(batches))]


def _on_device(trainer: Trainer, counts: Mapping[str, Tensor], losses: LossConfig) -> dict[str, Tensor]:
    """Counts by term, in one transfer that does not wait for the step before."""
    together = torch.stack([counts[name] for name in losses.terms]).float().to(trainer.device, non_blocking=True)
    return dict(zip(losses.terms, together.unbind(), strict=True))


def _forward(
    trainer: Trainer,
    model: nn.Module,
    batch: Batch,
    counts: Mapping[str, Tensor],
    losses: LossConfig,
    context: LossContext,
) -> LossReport:
    """`batch` is on the host: there it costs no waiting to look where the latent slots end."""
    latent_width = trainer.student.latent_width(batch.input_ids)
    batch = batch.to(trainer.device)
    with trainer.autocast():
        output = model(batch.input_ids, batch.decision_index, batch.end_index, latent_width)
        if "self_kd" in losses.weights:
            assert trainer.reference is not None, "self_kd without the frozen student"
            with torch.no_grad():
                reference = trainer.reference(batch.input_ids, latent_width=latent_width).hidden
            output = replace(output, reference_hidden=reference)
        return combine(batch, output, trainer.head, losses, counts, context)


def _skip(trainer: Trainer, batches: list[Batch], grad_norm: Tensor) -> None:
    """Count a step that is not made and keep its rows for replay. Errors: NotFiniteError."""
    progress, ranks = trainer.progress, trainer.ranks
    progress.skipped_steps += 1
    progress.skipped_in_a_row += 1
    folder = trainer.run_folder / "skipped"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step-{progress.step + 1}-rank-{ranks.rank}.safetensors"
    save_file({f"{i}/{name}": value for i, batch in enumerate(batches) for name, value in vars(batch).items()}, file)
    logger.error("step %d is skipped: gradient norm %g; its batch is in %s", progress.step + 1, grad_norm, file)
    if progress.skipped_in_a_row >= (limit := trainer.config.train.max_skipped_steps):
        raise NotFiniteError(
            f"{limit} steps in a row (the last is step {progress.step + 1}) had a loss or gradient that is not finite, "
            f"train.max_skipped_steps allows {limit - 1}; their batches are in {folder}. Lower train.learning_rate, or look "
            "for bad rows there"
        )


def _once_in_a_while(trainer: Trainer, feed: Feed, log: Log, *, at_end: bool) -> None:
    """After a step: what is due by its number. At the end: what the last step's number did not call for."""
    step, train = trainer.progress.step, trainer.config.train
    if (step % train.log_every == 0) != at_end and trainer.meters.steps:
        log(step, _metrics(trainer))
    if (step % train.validate_every == 0) != at_end and (measured := validate(trainer, feed)):
        log(step, {f"validation/{name}": value for name, value in measured.items()})
    if (step % train.checkpoint_every == 0) != at_end:
        trainer.save()


def _metrics(trainer: Trainer) -> dict[str, float]:
    """The log entry of the steps since the last one. Collective."""
    progress = trainer.progress
    entry = trainer.meters.read(trainer.ranks, trainer.losses_now().terms)
    trainer.meters.clear()
    return {
        "epoch": progress.epoch,
        "sequences": progress.sequences,
        "response_tokens": progress.response_tokens,
        "learning_rate": learning_rate(progress.step - 1, trainer.num_steps, trainer.config.train),
        "skipped_steps": progress.skipped_steps,
        **entry,
    }


@torch.no_grad()
def validate(trainer: Trainer, feed: Feed) -> dict[str, float]:
    """Losses and metrics on the held-out rows that have come by on all ranks; empty without any. Collective.

    Metrics of the heads are rank 0's alone.
    """
    if trainer.config.simulates("step"):
        return {}
    batches = _judged(trainer, [batch for table in feed.held_out for batch in feed.batches(table)])
    losses = trainer.losses_now()
    counts = trainer.ranks.sum(count_tokens(batches, losses, trainer.context))
    sums: Sums = {}
    trainer.student.eval()
    on_device, context = _on_device(trainer, counts, losses), trainer.context_now()
    batches = _with_idle(trainer, feed, batches)
    with read_heads(trainer.student) as readings:
        for batch in batches:
            add_report(sums, _forward(trainer, trainer.student, batch, on_device, losses, context))
    trainer.student.train()
    of_heads = head_metrics(readings, batches, trainer.config.halt.halt_probability, trainer.ranks)
    total = {name: value.item() for name, value in trainer.ranks.sum(to_host(sums)).items()}
    return of_heads | (mean_losses(total, losses.terms, steps=1) if any(counts.values()) else {})
