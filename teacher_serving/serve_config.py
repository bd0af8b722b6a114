"""Every option of a shared teacher, typed, bounded and explained: the only place with their defaults.

In:  a mapping (from YAML: configs/teacher/*.yaml).
Out: a frozen ServeConfig, whose `teacher` is that of teacher_serving/config.py.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import Field, model_validator

from teacher_serving.config import HfTeacherConfig, Strict, VllmTeacherConfig

ENGINES = "Teacher"
"""Name of the deployment that holds the engines, in every application."""


class ServeConfig(Strict):
    """A teacher as a Ray Serve application: engines behind one address, shared by runs and sweeps."""

    teacher: Annotated[VllmTeacherConfig | HfTeacherConfig, Field(discriminator="kind")]
    """The engine. `num_replicas` of them run at least, and up to `max_replicas` where there is that much to do. `top_k`,
    `sampling` and `max_model_len` hold for requests that say nothing else; no request may ask for more K or context."""
    app: str = Field(default="teacher", pattern="^[A-Za-z0-9_-]+$")
    """Name of the application in its cluster: what `teacher.app` of a run names."""
    route: str = Field(default="/", pattern="^/([A-Za-z0-9_-]+)?$")
    """Where it stands below the address. A second teacher in the same cluster needs another app and another route."""
    host: str = "127.0.0.1"
    """Address that is listened on. Any but this machine's own (127.0.0.1, ::1, localhost) needs `api_key_env`."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port for HTTP."""
    api_key_env: str | None = Field(default=None, pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the API key; the key itself stands in no file and no log. None: no key.
    Whoever is in the cluster needs none."""

    max_request_bytes: int = Field(default=64 * 2**20, ge=1024)
    """Largest body of an HTTP request."""
    max_sequences: int = Field(default=1024, ge=1)
    """Sequences of one request: rows, or prompts times `n`."""
    request_timeout_s: float = Field(default=600.0, gt=0.0)
    """Seconds until an HTTP request without an answer ends with status 504."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests that one engine works at; its running batch has `teacher.max_num_seqs` sequences all the same."""
    max_queued_requests: int = Field(default=1024, ge=1)
    """Requests that wait beyond those; further ones are refused with status 503."""
    target_ongoing_requests: float | None = Field(default=None, gt=0.0)
    """Requests an engine should be busy with: with more an engine is added, with fewer one goes. None: what fills the
    running batch, teacher.max_num_seqs / teacher.batch_size."""
    upscale_delay_s: float = Field(default=10.0, ge=0.0)
    """Seconds that the load must last before engines are added."""
    downscale_delay_s: float = Field(default=300.0, ge=0.0)
    """Seconds that the load must be gone before engines end."""
    health_check_period_s: float = Field(default=5.0, gt=0.0)
    """Seconds between looks at every engine; a dead one is replaced."""
    health_check_timeout_s: float = Field(default=60.0, gt=0.0)
    """Seconds until an engine that does not answer the look counts as dead."""
    drain_timeout_s: float = Field(default=60.0, ge=0.0)
    """Seconds that requests in work have left when the service is stopped."""
    ray_address: str | None = None
    """Address of a running cluster; None: RAY_ADDRESS, else that of this machine, else a local Ray is started."""

    @property
    def requests_per_engine(self) -> float:
        """Requests that one engine should be busy with."""
        return self.target_ongoing_requests or max(1.0, self.teacher.max_num_seqs / self.teacher.batch_size)

    @model_validator(mode="after")
    def _strangers_need_a_key(self) -> ServeConfig:
        if self.api_key_env is None and not _is_local(self.host):
            raise ValueError(
                f"host={self.host} without api_key_env: whoever reaches this machine could use the teacher; name the "
                "environment variable that holds a key in api_key_env, or set host: 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _states_stay(self) -> ServeConfig:
        if self.teacher.hidden_layers:
            raise ValueError(
                f"teacher.hidden_layers={list(self.teacher.hidden_layers)}: a shared teacher does not ship hidden states; "
                "leave hidden_layers out, and use kind: vllm or hf in the runs that need them"
            )
        return self


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False
