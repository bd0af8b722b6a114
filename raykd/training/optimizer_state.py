"""The optimizer's state in a checkpoint: whole, or in shares that any number of workers can read.

In:  the student and its optimizer. Out: `optimizer.safetensors`, or `optimizer/` with a file of every worker
     (torch.distributed.checkpoint); and the optimizer filled from either.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint import save as save_distributed
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from raykd.student.model import Student
from raykd.training.checkpoint import SHARDS, CheckpointError, cannot_write


def save_shards(run_folder: Path, step: int, optimizer: dict[str, Tensor], group: dist.ProcessGroup) -> Path:
    """Write this worker's share of the optimizer's state, for the checkpoint of `step`; returns the folder of all shares.

    Collective over the CPU group. Errors: CheckpointError on all ranks when writing fails on one.
    """
    parent = run_folder / "checkpoints"
    folder = parent / f".shards-checkpoint-{step}"
    if dist.get_rank(group) == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that died while writing
    dist.barrier(group)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save_distributed(optimizer, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        shutil.rmtree(folder, ignore_errors=True)
        cause = next(failure for failure, _ in error.failures.values())
        raise cannot_write(parent / f"checkpoint-{step}", cause) from cause
    return folder


def optimizer_tensors(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of the optimizer as `<parameter>|<key>` -> tensor; empty before the first step."""
    return {
        f"{name}|{key}": value
        for name, parameter in student.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(folder: Path, student: Student, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer the state in a checkpoint, whole or in shares of any number of workers; no rank waits for another.

    Errors: CheckpointError when it is not of exactly these parameters.
    """
    where = folder / SHARDS if (folder / SHARDS).is_dir() else folder
    reader = HuggingFaceStorageReader(str(where))
    metadata = reader.read_metadata()
    shapes = {
        name: list(value.size)
        for name, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata) and "|" in name  # the others are of files beside it
    }
    parameters = {name: value for name, value in student.named_parameters() if value.requires_grad}
    tensors: dict[str, Any] = {}
    for name, parameter in parameters.items() if shapes else ():
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = moments | {"step": torch.zeros((), device=parameter.device)}
        tensors |= {f"{name}|{key}": value for key, value in optimizer.state[parameter].items()}
    if shapes.keys() != tensors.keys():
        differing = sorted(shapes.keys() ^ tensors.keys())
        raise CheckpointError(f"{where} has the optimizer of another model: it differs in {differing[:5]}")
    for name, value in tensors.items():
        if shapes[name] != list(value.shape):
            raise CheckpointError(f"{where}: found shape {shapes[name]} for {name}, expected {list(value.shape)}")
    planner = DefaultLoadPlanner()
    planner.set_up_planner(tensors, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    reader.read_data(planner.create_local_plan(), planner).wait()  # into these tensors
