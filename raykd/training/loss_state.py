"""What the losses learn about the run as it goes: entropies of the teacher, how often loops halt, scale of teacher layers.

In:  the batches of a step, on the host. Out: sums that the ranks add up, and the LossConfig and RMS of the next step.

All ranks hold the same state; it is part of the checkpoint, so that a resumed run goes on with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from raykd.config import Config
from raykd.loss_config import LossConfig, Schedule
from raykd.losses.entropy import EntropyCalibration
from raykd.losses.heads import halt_class_counts, inverse_frequency, running_frequency
from raykd.losses.intermediate import intermediate_weight, rms_of, update_rms
from raykd.training.schedules import scheduled
from raykd.types import Batch


def run_losses(config: Config) -> LossConfig:
    """The losses of a run: the halt loss waits for `halt.warmup_steps`."""
    wait = config.halt.warmup_steps
    if not wait or "halt" not in config.loss.weights or "halt" in config.loss.schedules:
        return config.loss
    late = Schedule(kind="staged", stages=((wait, 0.0), (wait + 1, config.loss.halt)))
    return config.loss.model_copy(update={"schedules": config.loss.schedules | {"halt": late}})


@dataclass(frozen=True)
class LossState:
    """Running statistics, alike on all ranks."""

    entropy: EntropyCalibration = field(default_factory=EntropyCalibration)
    halt_frequency: tuple[float, float] = (0.5, 0.5)  # running shares of (continue, halt)
    layer_squares: tuple[float, ...] = ()  # sums over tokens of the mean square of each shipped teacher layer
    layer_tokens: float = 0.0

    @property
    def num_layers(self) -> int:
        """Shipped teacher layers that intermediate_layer looks at."""
        return len(self.layer_squares)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> LossState:
        return LossState(
            EntropyCalibration(**value["entropy"]),
            tuple(value["halt_frequency"]),
            tuple(value["layer_squares"]),
            value["layer_tokens"],
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def measure(self, batches: Iterable[Batch], losses: LossConfig) -> dict[str, float]:
        """Sums over this rank's share of a step; the names are the same on every rank, also on one without batches."""
        batches = list(batches)
        sums = self.entropy.measure(batches, losses)
        if "halt" in losses.weights:
            counts = sum((halt_class_counts(batch.halt_targets) for batch in batches), torch.zeros(2))
            sums |= {"halt/continue": counts[0].item(), "halt/halt": counts[1].item()}
        if "intermediate_layer" in losses.weights:
            statistic = torch.zeros(self.num_layers, 2, dtype=torch.float64)
            for batch in batches:
                if len(batch.state_index):
                    weight = intermediate_weight(batch, losses.intermediate_tokens)
                    statistic = update_rms(statistic, batch.teacher_hidden, weight)
            sums |= {f"layer/{index}": value for index, value in enumerate(statistic[:, 0].tolist())}
            sums["layer/tokens"] = statistic[0, 1].item()
        return sums

    def updated(self, sums: Mapping[str, Tensor | float], losses: LossConfig) -> LossState:
        """The state with a step whose measures, summed over all ranks, are `sums`."""
        state = replace(self, entropy=self.entropy.updated(sums, losses))
        if "halt/halt" in sums:
            counts = [float(sums["halt/continue"]), float(sums["halt/halt"])]
            proceed, halt = running_frequency(self.halt_frequency, counts)
            state = replace(state, halt_frequency=(proceed, halt))
        if "layer/tokens" in sums:
            squares = enumerate(self.layer_squares)
            state = replace(
                state,
                layer_squares=tuple(old + float(sums[f"layer/{index}"]) for index, old in squares),
                layer_tokens=self.layer_tokens + float(sums["layer/tokens"]),
            )
        return state

    def losses_at(self, losses: LossConfig, step: int, tokens: int) -> LossConfig:
        """The config of a step: schedules applied, and numbers filled in that only the run knows."""
        losses = self.entropy.applied(scheduled(losses, step, tokens))
        if losses.halt_class_weights is None:
            losses = losses.model_copy(update={"halt_class_weights": inverse_frequency(self.halt_frequency)})
        return losses

    def rms(self) -> Tensor:
        """RMS [L] of the shipped teacher layers."""
        squares = torch.tensor(self.layer_squares, dtype=torch.float64)
        return rms_of(torch.stack([squares, torch.full_like(squares, self.layer_tokens)], dim=1))
