"""How far the teacher may run ahead of the trainer: back-pressure for Ray Data, counted in bytes.

In:  what Ray Data knows of its stages; the bound, in the DataContext. Out: whether the teacher may be given another batch.

Every process of a dataset's gets its DataContext, and with it this module: it imports nothing that takes long to load.
"""

from __future__ import annotations

from functools import cached_property

from ray.data._internal.execution.backpressure_policy import BackpressurePolicy

from raykd.ray_metrics import RayMetrics

LEAD_KEY = "raykd.max_lead_bytes"
TOKEN_KEY = "raykd.bytes_per_token"
RUN_KEY = "raykd.run_and_stage"
GATED_STAGES = ("Teacher", "Prompts", "OfflineReader")
"""What makes completions, the first that a stream has: names of classes, as they stand in the names of Ray's operators."""


class LeadPolicy(BackpressurePolicy):
    """No new batch for the teacher while too much of its output waits for the trainer.

    Ray Data's own back-pressure keeps the store from overflowing but lets the teacher run ahead by as much as fits.
    This counts what is alive: output of the teacher and of all stages behind it, up to the blocks that train workers
    hold, and what the running calls will add. It counts bytes, those of prompts too, so that the lead in tokens stays
    below the bound. Lives in the process that executes the dataset.
    """

    def can_add_input(self, op) -> bool:
        """Whether the stage may start another batch; true for all but the first one that makes completions."""
        if op is not self._gated():
            return True
        lead = self._lead_bytes(op)
        self._metrics.set("lead/tokens", lead / self._data_context.get_config(TOKEN_KEY))
        return lead < self._data_context.get_config(LEAD_KEY)

    @cached_property
    def _metrics(self) -> RayMetrics:
        return RayMetrics(*self._data_context.get_config(RUN_KEY))

    def _gated(self):
        ops = {name: op for op in self._topology for name in GATED_STAGES if name in op.name}
        return next((ops[name] for name in GATED_STAGES if name in ops), None)

    def _lead_bytes(self, op) -> float:
        behind, found = 0.0, False
        for other in self._topology:  # in the order of the stages
            found = found or other is op
            if found:
                behind += self._resource_manager.get_mem_op_outputs(other)
        return behind + op.metrics.num_tasks_running * (op.metrics.average_bytes_per_output or 0)
