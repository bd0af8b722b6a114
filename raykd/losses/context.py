"""What losses need besides batch and configuration: the student's head, ids with a meaning, the teacher's head.

Made once per run (ids, teacher's head, layer pairs) and updated once per step (`rms`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Head(NamedTuple):
    """An LM head: weight [V, H], bias [V] if it has one, and the number of ids where the last rows are padding."""

    weight: Tensor
    bias: Tensor | None = None
    num_valid_ids: int | None = None


class TeacherTop(NamedTuple):
    """What turns the teacher's last hidden state into logits (kd_support=full)."""

    norm: nn.Module
    weight: Tensor  # [V, H_teacher]
    bias: Tensor | None = None

    def to(self, device: torch.device) -> TeacherTop:
        """The same on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return TeacherTop(self.norm.to(device), self.weight.to(device), bias)


@dataclass(frozen=True)
class LossContext:
    """Defaults serve losses that need nothing of the kind."""

    eos_id: int | None = None  # ends an assistant turn
    bot_id: int | None = None  # opens a latent span
    eot_id: int | None = None  # closes it
    opening_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # [S] ids that open a tool call
    layer_pairs: Mapping[int, int] = field(default_factory=dict)  # student layer -> index of the shipped teacher layer
    projections: Mapping[str, nn.Module] | nn.ModuleDict = field(default_factory=dict)  # by str(student layer)
    num_teacher_layers: int = 0  # L: layers whose states the teacher ships
    rms: Tensor = field(default_factory=lambda: torch.empty(0))  # [L] of the shipped teacher layers
    teacher_top: TeacherTop | None = None
    reference_head: Head | None = None  # of the student as the run began (self_kd)
    rollout_clip: float | None = None  # PPO's clip where sampled answers are trained on more than once; None: only once
