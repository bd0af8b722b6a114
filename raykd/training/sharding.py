"""A student in parts (FSDP2): every worker keeps its share of each weight, gradient and Adam moment.

In:  a student in whole on the host, before an optimizer knows it. Out: the same modules, whose parameters are DTensors, cut
     along their first dimension; their values in whole where a checkpoint or a sampler asks for them.

A decoder layer is gathered when its forward or its backward pass begins, and freed behind it. All else (embeddings, final
norm, LM head, the heads of losses) is one group. It is gathered with the forward pass and stays until the backward pass is
through: so the losses find the LM head's weight in whole, as a plain tensor, tied to the embeddings or not. Gradients are
reduced in every backward pass, so that no worker ever holds those of more than a few layers in whole.

Each forward pass is collective. All workers make equally many: a worker with fewer micro-batches goes on with idle ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from raykd.student.model import Student, decoder_layers


def shard(student: Student, device: torch.device, precision: Literal["float32", "bfloat16"]) -> None:
    """Cut the student into one part for each worker, in place, and bring this worker's to `device`. Collective.

    What is frozen and in no layer stays in whole. Weights, gradients and the optimizer stay in float32. With `precision`
    bfloat16 layers are gathered in that type: what autocast would make of their matrices, but at half the memory and
    traffic, and not kept for the backward pass. (The gains of their norms are rounded too.)
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # FSDP takes the current one
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = decoder_layers(student.model)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=_policy(precision))
    in_layers = set(layers.parameters())
    frozen = {p for p in student.parameters() if p not in in_layers and not p.requires_grad}
    fully_shard(student, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    student.to(device)
    training = student.training
    # A first forward pass, of one token: FSDP takes the module that is called first for the root of the others.
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        student.eval()(torch.zeros(1, 1, dtype=torch.int64, device=device))
    student.train(training)
    reshard(student)


def _policy(precision: Literal["float32", "bfloat16"]) -> MixedPrecisionPolicy:
    if precision == "float32":
        return MixedPrecisionPolicy()
    # Inputs are left as they are: the residual stream is float32, as under autocast alone.
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


@contextlib.contextmanager
def gathered(student: Student) -> Iterator[None]:
    """Within: the student in whole on every worker, whose forward passes are its own affair. Collective at both ends.

    For inference: 4 bytes a parameter (2 in layers with bfloat16) beside this worker's share.
    """
    groups = [module for module in student.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(group is not student, recurse=False)
            group.reshard()


def whole_tensors(student: Student, *, keep: bool) -> dict[str, Tensor]:
    """The student's `state_dict` in whole on the host, where `keep`; empty elsewhere. Collective: one tensor at a time."""
    whole: dict[int, Tensor] = {}  # tied weights once
    named = student.state_dict(keep_vars=True)  # shares; a parameter that has two names is one object here
    for value in named.values():
        if id(value) not in whole:
            tensor = value.full_tensor() if isinstance(value, DTensor) else value
            whole[id(value)] = tensor.detach().cpu() if keep else torch.empty(0)
    return {name: whole[id(value)] for name, value in named.items()} if keep else {}


def reshard(student: nn.Module) -> None:
    """Have this worker's shares registered as the student's parameters: after a forward pass without a backward one, the
    parameters outside of the layers are still in whole."""
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a norm of `max_norm`, in place; returns the norm before, over the shares of all workers."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
