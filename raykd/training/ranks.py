"""The train workers of a run as one group: who am I, how many are we, sums over all of us.

In: small tensors on the host. Out: their sums, the same on every rank. Alone (world_size 1) nothing is communicated.

Everything here goes over a CPU group: it is agreed while the accelerators work, and costs no device sync.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=24)
"""Ranks with rows wait here for the one that is still waiting for the teacher; a rank that died is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """This process among the `world_size` train workers."""

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None  # a CPU (gloo) group of all ranks; None: alone

    @classmethod
    def of_process_group(cls) -> Ranks:
        """All ranks of the initialised default group. Collective: every rank calls it."""
        if dist.get_world_size() == 1:
            return cls()
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(group, dist.ProcessGroup), "a group of all ranks includes this one"
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def sum(self, values: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
        """Sum scalars by name over all ranks, in float64 and one message. Every rank gives the same names."""
        names = sorted(values)
        total = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return dict(zip(names, total.unbind(), strict=True))

    def max(self, values: Tensor) -> Tensor:
        """The largest over all ranks, element by element, in float32 and on the device of `values`."""
        largest = values.float().cpu()
        if self.group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest.to(values.device)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value in the order of the ranks, on rank 0; an empty list on the others."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.gather_object(value, values if self.rank == 0 else None, dst=0, group=self.group)
        return values if self.rank == 0 else []

    def share(self, total: int) -> int:
        """This rank's part of `total` items; the first ranks take the remainder."""
        return total // self.world_size + (self.rank < total % self.world_size)
