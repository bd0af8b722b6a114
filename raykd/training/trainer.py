"""The state of training in one worker: made new, or taken from the newest checkpoint, and put into the next one.

In:  Config, the run folder, the group of workers. Out: a `Trainer`, which `loop.fit` drives.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raykd.config import Config, StudentConfig, TrainConfig
from raykd.data.curriculum import latent_ids
from raykd.loss_config import LossConfig
from raykd.losses.context import Head, LossContext
from raykd.student.heads import heads_in, make_heads, projections_of
from raykd.student.latent import LatentSpans
from raykd.student.model import Student, load_student
from raykd.student.quantization import prepare_int8, set_quantized
from raykd.training.checkpoint import (
    HEADS,
    STUDENT,
    Snapshot,
    latest_checkpoint,
    read_ledger,
    read_rng,
    read_state,
    restore_heads,
    save_checkpoint,
    take_over_heads,
    verify,
)
from raykd.training.loss_state import LossState, run_losses
from raykd.training.meters import Meters
from raykd.training.optimizer_state import optimizer_tensors, restore_optimizer, save_shards
from raykd.training.ranks import Ranks
from raykd.training.reference import needs_reference
from raykd.training.rng import restore_rng, rng_state, seed_everything
from raykd.training.sharding import gathered, reshard, shard, whole_tensors
from raykd.training.stages import HEAD_LOSSES, handed_over

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is: the counters of state.json."""

    step: int = 0
    epoch: int = 0
    sequences: int = 0  # that went into steps, over all ranks
    response_tokens: int = 0
    skipped_steps: int = 0  # whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    supervised: list[str] = field(default_factory=list)  # terms of losses that have had a token, sorted


@dataclass
class Trainer:
    """One worker's student, optimizer and counters."""

    config: Config
    run_folder: Path
    ranks: Ranks
    device: torch.device
    num_steps: int  # of the whole run: the length of the schedule
    teacher: Mapping[str, Any]  # identity of the teacher, kept in checkpoints
    student: Student
    model: nn.Module  # the student itself (in whole or this rank's share), or DDP around it
    optimizer: torch.optim.Optimizer
    reference: Student | None = None  # the student as the run began, frozen and in float, where a loss compares with it
    context: LossContext = field(default_factory=LossContext)
    loss_state: LossState = field(default_factory=LossState)
    progress: Progress = field(default_factory=Progress)
    meters: Meters = field(default_factory=Meters)
    consumed: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # ledger of the newest checkpoint; rank 0
    recent: list[np.ndarray] = field(default_factory=list)  # this rank's uids since then

    @property
    def head(self) -> Head:
        """The student's LM head; rows beyond its tokenizer are padding. Of a sharded student: behind its forward pass."""
        return Head(self.student.head_weight, self.student.head_bias, self.student.num_valid_ids)

    def losses_now(self) -> LossConfig:
        """The losses of the next step: schedules applied, numbers filled in that the run has measured."""
        return self.loss_state.losses_at(run_losses(self.config), self.progress.step, self.progress.response_tokens)

    def context_now(self) -> LossContext:
        """The context with the scale of the teacher's layers as measured so far."""
        if not self.context.layer_pairs:
            return self.context
        return replace(self.context, rms=self.loss_state.rms().to(self.device, non_blocking=True))

    def quantize_now(self) -> None:
        """In stage qat: int8 arithmetic from `quantization.start_step` on."""
        if self.config.stage == "qat":
            set_quantized(self.student.model, self.progress.step >= self.config.quantization.start_step)

    def autocast(self) -> torch.autocast:
        """Precision of the forward pass."""
        enabled = self.config.train.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds a share of the student only: then every forward pass is collective."""
        return _is_sharded(self.config.train, self.ranks)

    def num_passes(self, own: int) -> int:
        """Forward passes that this rank makes where it has use for so many: where the student is sharded as many as any."""
        return int(self.ranks.max(torch.tensor(own))) if self.is_sharded else own

    def whole_student(self) -> contextlib.AbstractContextManager[None]:
        """Within: the student in whole, for as many forward passes as each rank likes; no training. Collective."""
        if not self.is_sharded:
            return contextlib.nullcontext()
        self.num_passes(0)  # a rank may still wait for its teacher, longer than collectives of accelerators would for it
        return gathered(self.student)

    def exchange_gradients(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward: add the gradients up over the ranks at the end, or let them gather on this one; those
        of a sharded student are added up each time."""
        if isinstance(self.model, DistributedDataParallel) and not now:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def save(self) -> Path | None:
        """Write a checkpoint of this step. Collective; rank 0 writes and returns its folder."""
        uids = np.concatenate([*self.recent, np.empty(0, np.int64)])
        parts = self.ranks.gather((uids, rng_state()))
        self.recent.clear()
        tensors, optimizer = self._tensors()
        if not parts:
            return None
        ledger = np.sort(np.concatenate([self.consumed, *(part[0] for part in parts)]))
        twice = ledger[1:][ledger[1:] == ledger[:-1]]
        assert len(twice) == 0, f"{len(twice)} sequences were trained on twice, the first has uid {twice[0]}"
        self.consumed = ledger
        state = asdict(self.progress) | {
            "num_steps": self.num_steps,
            "world_size": self.ranks.world_size,
            "teacher": dict(self.teacher),
            "config": self.config.model_dump(mode="json"),
            "losses": self.loss_state.to_json(),
        }
        snapshot = Snapshot(
            student=self.student,
            tensors=tensors,
            optimizer=optimizer,
            ledger=ledger,
            rng=[part[1] for part in parts],
            state=state,
        )
        return save_checkpoint(self.run_folder, snapshot, self.config.train.keep_checkpoints)

    def _tensors(self) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | Path]:
        """Of a `Snapshot`: the student's tensors, if it is sharded, and the state of the optimizer. Collective."""
        if not self.is_sharded or self.ranks.group is None:
            return None, optimizer_tensors(self.student, self.optimizer)
        reshard(self.student)
        tensors = whole_tensors(self.student, keep=self.ranks.rank == 0)
        optimizer = optimizer_tensors(self.student, self.optimizer)
        if not optimizer:  # no step has been made
            return tensors, optimizer
        return tensors, save_shards(self.run_folder, self.progress.step, optimizer, self.ranks.group)


def make_trainer(
    config: Config,
    run_folder: Path,
    *,
    num_steps: int,
    teacher: Mapping[str, Any],
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    device: torch.device = torch.device("cpu"),  # noqa: B008 (frozen)
    context: LossContext | None = None,
    projections: Mapping[int, tuple[int, int]] | None = None,
) -> Trainer:
    """A trainer at the run's newest checkpoint, or at its beginning: at the end of the stage before, if there is one.
    Collective.

    `num_steps` is the length of the whole run. `context` is what the losses know beside batch and config, and `projections`
    (student layer -> width in, width out) names the layers that need one into the teacher's width. Errors:
    CheckpointError when the checkpoint is damaged or of another student or other heads, ValueError of `load_student`.
    """
    checkpoint = latest_checkpoint(run_folder)
    seed_everything(config.run.seed + ranks.rank)
    if checkpoint is None:
        student = _load(config, config.student)
    else:
        verify(checkpoint)
        as_saved = {"model": str(checkpoint / STUDENT), "tokenizer": None, "layers": None}
        as_saved |= {"random_weights": False, "stand_in": False}
        student = _load(config, config.student.model_copy(update=as_saved))
    context = context or LossContext()
    student.layers = tuple(context.layer_pairs)
    student.detach_self_evaluation = config.loss.self_evaluation_detach
    _give_heads(student, config, checkpoint, projections)
    if config.stage == "qat":
        prepare_int8(student.model, config.quantization)
    if config.train.gradient_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    model = _distributed(student, config.train, ranks, device)
    optimizer = make_optimizer(student, config.train)
    reference = None
    if needs_reference(config):
        reference = _load(config, config.student).eval().requires_grad_(False)
        _distributed(reference, config.train, ranks, device)
    trainer = Trainer(
        config=config,
        run_folder=run_folder,
        ranks=ranks,
        device=device,
        num_steps=num_steps,
        teacher=teacher,
        student=student,
        model=model,
        optimizer=optimizer,
        reference=reference,
        context=replace(
            context,
            projections=projections_of(student.heads),
            opening_ids=context.opening_ids.to(device),
            teacher_top=context.teacher_top and context.teacher_top.to(device),
            reference_head=reference and Head(reference.head_weight, reference.head_bias),
        ),
        loss_state=LossState(layer_squares=(0.0,) * context.num_teacher_layers),
    )
    if checkpoint is not None:
        _restore(trainer, checkpoint)
    return trainer


def _give_heads(
    student: Student, config: Config, checkpoint: Path | None, projections: Mapping[int, tuple[int, int]] | None
) -> None:
    """The heads of the active losses, and those of the stage before that no loss trains any more: they stay as they are."""
    before = handed_over(config)
    kept = heads_in(before / HEADS) if before is not None else set()
    losses = config.loss.weights
    untrained = {head for head in kept if not losses.keys() & set(HEAD_LOSSES[head])}
    wanted = losses | {HEAD_LOSSES[head][0]: 0.0 for head in untrained}
    student.heads = make_heads(student.hidden_size, wanted, projections, seed=config.run.seed)
    if checkpoint is not None:
        restore_heads(checkpoint, student)
    elif before is not None:
        take_over_heads(before, student, kept)
    for head in untrained:
        student.heads[head].requires_grad_(False)


def _load(config: Config, student_config: StudentConfig) -> Student:
    student = load_student(student_config, config.run.seed)
    if config.latent.stages:
        ids, last = latent_ids(student.tokenizer, config.latent), config.latent.stages[-1]
        loops = config.latent.loops if config.latent.mode == "continuous" else 0
        student.latent = LatentSpans(ids.begin, ids.slot, num_slots=last.steps * last.slots, loops=loops)
    return student


def make_optimizer(student: Student, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors (norms, biases) do not. Heads may have a peak learning rate of their own.

    A group's `lr_scale` is its share of the scheduled learning rate, which the loop sets before every step.
    """
    head_scale = (config.head_learning_rate or config.learning_rate) / config.learning_rate
    groups = [
        {
            "params": [p for p in module.parameters() if p.requires_grad and (p.ndim >= 2) == decays],
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr_scale": lr_scale,
        }
        for module, lr_scale in ((student.model, 1.0), (student.heads, head_scale))
        for decays in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, fused=True
    )


def _is_sharded(config: TrainConfig, ranks: Ranks) -> bool:
    return config.parallel_strategy == "fsdp" and ranks.world_size > 1


def _distributed(student: Student, config: TrainConfig, ranks: Ranks, device: torch.device) -> nn.Module:
    """The student on its device, in whole or this rank's share of it, and what to call for a forward pass. Collective."""
    if _is_sharded(config, ranks):
        shard(student, device, config.precision)
        return student
    student.to(device)
    if ranks.world_size == 1 or not any(parameter.requires_grad for parameter in student.parameters()):
        return student
    return DistributedDataParallel(
        student,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def _restore(trainer: Trainer, checkpoint: Path) -> None:
    state = read_state(checkpoint)
    trainer.progress = Progress(**{name: state[name] for name in asdict(Progress())})
    trainer.loss_state = LossState.from_json(state["losses"])
    restore_optimizer(checkpoint, trainer.student, trainer.optimizer)
    trainer.consumed = read_ledger(checkpoint)
    rng = read_rng(checkpoint, trainer.ranks.rank, trainer.ranks.world_size)
    if rng is None:
        seed_everything(trainer.config.run.seed + trainer.ranks.rank + trainer.progress.step * 1_000_003)
        logger.warning(
            "%s was written by %d workers, now there are %d: random states (dropout) start anew, all else goes on",
            checkpoint, state["world_size"], trainer.ranks.world_size,
        )  # fmt: skip
    else:
        restore_rng(rng)
    logger.info("go on from %s: step %d, %d sequences done", checkpoint, state["step"], state["sequences"])
