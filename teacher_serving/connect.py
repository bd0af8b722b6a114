"""The one way to a teacher: connect(config) -> Teacher.

In:  a TeacherConfig.
Out: a Teacher with its model loaded; only the chosen engine's library is imported.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from teacher_serving.config import (
    BaseTeacherConfig,
    HfTeacherConfig,
    HttpTeacherConfig,
    LocalTeacherConfig,
    ServedTeacherConfig,
    SeveralTeachersConfig,
    SimulatedTeacherConfig,
    VllmTeacherConfig,
)
from teacher_serving.identity import describe
from teacher_serving.types import Teacher, TeacherInfo

C = TypeVar("C", bound=BaseTeacherConfig)


def connect(
    config: VllmTeacherConfig
    | HfTeacherConfig
    | HttpTeacherConfig
    | ServedTeacherConfig
    | SeveralTeachersConfig
    | SimulatedTeacherConfig,
    *,
    ledger: Path | None = None,
) -> Teacher:
    """Load the teacher of this config. `ledger`: where one that is paid for writes what it has cost (spending.py).

    Raises ValueError where its folder or settings cannot work, before anything is loaded.
    """
    info = describe(config)
    if isinstance(config, HttpTeacherConfig):
        from teacher_serving.http_client import HttpTeacher

        return HttpTeacher(config, info, ledger)
    if isinstance(config, ServedTeacherConfig):
        from teacher_serving.served_client import ServedTeacher

        return ServedTeacher(config, info)
    if isinstance(config, SeveralTeachersConfig):
        from teacher_serving.several import SeveralTeachers

        return SeveralTeachers(config, info, ledger)
    if isinstance(config, SimulatedTeacherConfig):
        from teacher_serving.simulated import SimulatedTeacher

        return SimulatedTeacher(config, info)
    if config.device == "auto":
        import torch

        config = resolve_device(config, has_gpu=torch.cuda.is_available())
    if isinstance(config, VllmTeacherConfig):
        if config.device == "cpu":
            for name, value in cpu_environment(config).items():
                os.environ.setdefault(name, value)
        from teacher_serving.vllm_engine import VllmEngine

        return VllmEngine(config, info)
    from teacher_serving.hf_engine import HfEngine

    return HfEngine(config, info)


def contact(config: BaseTeacherConfig, info: TeacherInfo, *, scoring: bool) -> str:
    """What a teacher behind an API says it gives, before work starts; empty for all others.

    `scoring`: it is to score given text. Raises ValueError where it does not answer or cannot do what the config wants.
    """
    if isinstance(config, SeveralTeachersConfig):
        from teacher_serving.several import contact_several

        return contact_several(config, scoring=scoring)
    if not isinstance(config, HttpTeacherConfig):
        return ""
    from teacher_serving import http_client

    return http_client.contact(config, info, scoring=scoring)


def resolve_device(config: C, *, has_gpu: bool) -> C:
    """The config with `device: auto` replaced by what there is."""
    if not isinstance(config, LocalTeacherConfig) or config.device != "auto":
        return config
    return type(config).model_validate({**config.model_dump(), "device": "cuda" if has_gpu else "cpu"})


def cpu_environment(config: LocalTeacherConfig) -> dict[str, str]:
    """Environment in which a CPU engine starts in seconds and leaves other processes their cores.

    Must be set before vllm and torch are imported, so actors get it as their runtime environment. What this process's
    own environment says of the engine's settings stays.
    """
    settings = {
        "TORCHDYNAMO_DISABLE": "1",  # else each new shape compiles a C++ kernel, a quarter of a minute the first time
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process instead of three
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every engine pins the same cores
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    chosen = {name: os.environ.get(name, value) for name, value in settings.items()}
    return {"OMP_NUM_THREADS": str(config.num_threads), **chosen}
