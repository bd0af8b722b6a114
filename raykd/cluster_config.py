"""Options of the cluster: which one, and how fast its teachers and workers are, for plans and for stand-ins. A part of
config.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raykd.loss_config import Section

Simulated = Literal["teacher", "step", "both"]


class RayConfig(Section):
    """The cluster. Inside `ray job submit` and next to a running head node nothing needs to be set."""

    address: str | None = None
    """Address of a running cluster; None: RAY_ADDRESS, else a local Ray is started."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a local Ray; None: the machine's, at least 8 (they are bookkeeping, not pinning)."""
    object_store_bytes: int | None = Field(default=None, ge=80_000_000)
    """Object store of a local Ray; None: Ray's default."""
    dashboard: bool = True
    """Start the dashboard with a local Ray."""


class RatesConfig(Section):
    """Rates and lengths of a run that nobody has made yet. metrics.jsonl of a short one on a few GPUs has them."""

    teacher_tokens_per_s: float = Field(default=2000.0, gt=0, allow_inf_nan=False)
    """Completion tokens that one teacher engine writes a second, all its sequences together."""
    worker_tokens_per_s: float = Field(default=20_000.0, gt=0, allow_inf_nan=False)
    """Tokens, those of prompts too, that one train worker goes through a second, forward and backward."""
    prompt_tokens: int = Field(default=1024, ge=1)
    """Mean length of a prompt, for --plan. A simulated run has the real ones."""
    response_tokens: int = Field(default=256, ge=1)
    """Mean length of a completion."""
