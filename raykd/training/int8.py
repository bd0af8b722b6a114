"""What stage qat does before its first step: the range of activations is folded into the weights (student/smoothing.py).

In:  the micro-batches of the first step. Out: the same student, easier to quantise; alike on all ranks.
"""

from __future__ import annotations

import logging

import torch

from raykd.student.quantization import set_quantized
from raykd.student.smoothing import activation_maxima, smooth
from raykd.training.trainer import Trainer
from raykd.types import Batch

logger = logging.getLogger(__name__)


@torch.no_grad()
def smooth_student(trainer: Trainer, batches: list[Batch]) -> None:
    """Fold by `quantization.smoothing`, from the activations of the first step; nothing where it is 0. Collective."""
    alpha, student = trainer.config.quantization.smoothing, trainer.student
    if trainer.config.stage != "qat" or not alpha or trainer.progress.step or trainer.config.simulates("step"):
        return
    set_quantized(student.model, False)
    with activation_maxima(student.model) as maxima, trainer.autocast():
        for batch in batches:
            for ids, length in zip(batch.input_ids, batch.attention_mask.sum(dim=1).tolist(), strict=True):
                own = ids[None, :length]  # alone: what stands at padding is no activation of any text
                student(own.to(trainer.device), latent_width=student.latent_width(own))
    for output in maxima.values():
        output.largest = trainer.ranks.max(output.largest)
    folded = smooth(student.model, maxima, alpha)
    trainer.quantize_now()
    logger.info("activations of %d norms folded into the weights behind them (alpha %g)", len(folded), alpha)
