"""What a run needs of GPUs, by arithmetic alone: for the clusters of `--plan` that nobody has at hand.

In:  Config, parameters of teacher and student. Out: for 1, 8 and 64 GPUs how the run would be laid out, and GiB per GPU.

Workers hold weights, gradients, Adam's moments (float32), their share of them where the student is sharded, in bfloat16 the
copies of the weights that autocast makes, the activations of a micro-batch, and the buffers of the head operation; teachers
their weights, and as KV cache what is left of `gpu_memory_utilization`. Allocator and CUDA context are not in it: leave a
tenth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.table import Table
from transformers import AutoConfig, PretrainedConfig

from raykd.config import Config
from raykd.losses.head import buffer_bytes
from raykd.student.model import count_parameters
from teacher_serving.config import LocalTeacherConfig, VllmTeacherConfig

CLUSTERS = (1, 8, 64)
BYTES_PER_TRAINED_PARAMETER = 16  # float32 weights, gradients and two Adam moments
BYTES_PER_GATHERED_PARAMETER = 8  # float32 weights and gradients
BYTES_PER_FROZEN_PARAMETER = 4
BYTES_PER_COPIED_PARAMETER = 2  # bfloat16, made by autocast and kept for the backward pass
GPU_SIZES = (24, 48, 80, 141)  # GB of common ones
USABLE = 0.9


@dataclass(frozen=True)
class Layout:
    """How a number of GPUs is shared out; `workers` 0: too few of them."""

    num_gpus: int
    workers: int
    teachers: int  # replicas
    gpus_per_teacher: int


class StudentSize(NamedTuple):
    """Parameters of the student."""

    parameters: int
    gathered: int  # in whole at a time on a worker that holds a share of the student
    vocab_size: int
    hidden_size: int


def layout(config: Config, num_gpus: int) -> Layout:
    """Workers and teachers in the ratio of the config, on so many GPUs. Without prompts, and where they run elsewhere, there
    are no teachers."""
    each = gpus_of_engine(config)
    wanted = config.teacher.num_replicas * each if config.data.prompts else 0
    share = wanted / (wanted + config.train.num_workers)
    teachers = max(1, int(num_gpus * share) // each) if wanted else 0
    return Layout(num_gpus, max(0, num_gpus - teachers * each), teachers, each)


def gpus_of_engine(config: Config) -> int:
    """GPUs of one teacher engine; 0 for one that runs elsewhere."""
    if isinstance(config.teacher, VllmTeacherConfig):
        return config.teacher.tensor_parallel_size
    return int(isinstance(config.teacher, LocalTeacherConfig))


def worker_bytes(
    config: Config, student: StudentSize, activations_per_token: int, num_workers: int, *, reference: bool = False
) -> float:
    """Memory of one of so many train workers. `reference`: a loss compares with the student as it began, frozen."""
    needed = trained_bytes(config, student, num_workers) + activation_bytes(config, activations_per_token)
    needed += head_bytes(config, student)
    return needed + (frozen_bytes(config, student, num_workers) if reference else 0)


def trained_bytes(config: Config, student: StudentSize, num_workers: int) -> float:
    """The student's weights, gradients and Adam moments on one of so many workers, and what autocast copies of them."""
    if config.train.parallel_strategy == "ddp" or num_workers == 1:
        copied = BYTES_PER_COPIED_PARAMETER if config.train.precision == "bfloat16" else 0
        return student.parameters * (BYTES_PER_TRAINED_PARAMETER + copied)
    share = student.parameters * BYTES_PER_TRAINED_PARAMETER / num_workers
    return share + student.gathered * BYTES_PER_GATHERED_PARAMETER


def frozen_bytes(config: Config, student: StudentSize, num_workers: int) -> float:
    """The frozen student's weights on one of so many workers."""
    if config.train.parallel_strategy == "ddp" or num_workers == 1:
        return student.parameters * BYTES_PER_FROZEN_PARAMETER
    return (student.parameters / num_workers + student.gathered) * BYTES_PER_FROZEN_PARAMETER


def activations_per_token(config: Config, architecture: PretrainedConfig) -> int:
    """Values that a token keeps for the backward pass, an estimate: about 12 hidden-size and 4 MLP-size ones a layer, with
    checkpointing one layer's and every layer's input. Under autocast the residual stream and what the norms keep count
    twice, being float32 beside bfloat16, and so does each matrix's own copy of its input."""
    hidden, in_bfloat16 = architecture.hidden_size, config.train.precision == "bfloat16"
    per_layer = (22 if in_bfloat16 else 12) * hidden + 4 * getattr(architecture, "intermediate_size", 4 * hidden)
    if config.train.gradient_checkpointing:
        return per_layer + architecture.num_hidden_layers * hidden * (2 if in_bfloat16 else 1)
    return per_layer * architecture.num_hidden_layers


def activation_bytes(config: Config, activations_per_token: int) -> float:
    """What a micro-batch keeps for its backward pass."""
    dtype = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
    return config.train.max_tokens_per_micro_batch * activations_per_token * dtype.itemsize


def head_bytes(config: Config, student: StudentSize) -> float:
    """What the loss takes at a time: chunks of logits, and the head's float32 gradient until it is added to that of the last
    micro-batch."""
    itemsize = torch.bfloat16.itemsize if config.train.precision == "bfloat16" else torch.float32.itemsize
    chunks = buffer_bytes(config.train.max_tokens_per_micro_batch, student.vocab_size, itemsize)
    return chunks + student.vocab_size * student.hidden_size * torch.float32.itemsize


def teacher_bytes(config: Config, gpus_per_teacher: int) -> float:
    """Memory of the teacher's weights on one of its GPUs."""
    assert isinstance(config.teacher, LocalTeacherConfig), "a teacher that runs elsewhere takes no memory here"
    architecture = AutoConfig.from_pretrained(config.teacher.model)
    dtype = architecture.dtype if config.teacher.dtype == "auto" else getattr(torch, config.teacher.dtype)
    itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else torch.bfloat16.itemsize
    return count_parameters(architecture) * itemsize / gpus_per_teacher


def by_cluster(config: Config, student: StudentSize, activations_per_token: int, *, reference: bool) -> Table:
    """A row for every number of GPUs in CLUSTERS. `reference`: see `worker_bytes`."""
    table = Table(box=None)
    for column in ("GPUs", "workers", "teachers", "sequences a step", "GiB a worker", "GiB a teacher"):
        table.add_column(column, justify="right")
    for num_gpus in CLUSTERS:
        plan = layout(config, num_gpus)
        if not plan.workers:
            table.add_row(str(num_gpus), *"–––", f"needs {plan.gpus_per_teacher + 1} GPUs")
            continue
        needed = worker_bytes(config, student, activations_per_token, plan.workers, reference=reference)
        of_teacher = teacher_bytes(config, plan.gpus_per_teacher) if plan.teachers else 0.0
        table.add_row(
            str(num_gpus),
            str(plan.workers),
            f"{plan.teachers} x {plan.gpus_per_teacher}",
            f"{config.train.sequences_per_step / plan.workers:.3g}",
            f"{needed / 2**30:.1f} ({_smallest(needed)})",
            f"{of_teacher / 2**30:.1f} + KV cache" if plan.teachers else "–",
        )
    return table


def _smallest(num_bytes: float) -> str:
    """The smallest common GPU that holds so much."""
    fitting = [size for size in GPU_SIZES if num_bytes <= USABLE * size * 1e9]
    return f"{fitting[0]} GB" if fitting else f"more than {GPU_SIZES[-1]} GB: does not fit one GPU"
