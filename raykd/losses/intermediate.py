"""Hidden states of the student against those of the teacher, layer by layer.

In:  states of chosen student layers, states of the shipped teacher layers, which of them belong together.
Out: TokenLoss; per token the mean over the pairs of weight * squared error and weight * (1 - cosine). No unit.

States are divided by the RMS of the teacher's layer, a running statistic over the run, before the squared error: so layers
count alike, and a student whose states have the right direction but the wrong length still has something to learn.
Source: FitNets (Romero et al., 2015) with the layer maps and the cosine of MiniLLM-style recipes; the scaling is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.losses.reduction import masked_sum
from raykd.types import Batch, Mark, TokenLoss

LayerMap = Literal["uniform", "last_k"] | Mapping[int, int]


def layer_pairs(
    layer_map: LayerMap, num_student_layers: int, num_teacher_layers: int, shipped: Sequence[int]
) -> dict[int, int]:
    """Student layer -> index into `shipped`, in rising order of student layers. Layers count from 0.

    Args:
        layer_map: student layer -> teacher layer; or `uniform`: each shipped layer with the student layer of the same
            relative depth, both ends pinned (where several fall on one student layer, the nearest stays); or `last_k`: the
            student's last len(shipped) layers onto the shipped ones, in order.
        shipped: teacher layers whose states there are, in rising order.

    Raises:
        ValueError: nothing is shipped, a layer does not exist or is not shipped, or last_k has more layers than the student.
    """
    if not shipped:
        raise ValueError("teacher.hidden_layers is empty; expected the teacher layers that loss.layer_map compares with")
    _check_range("teacher.hidden_layers", shipped, "teacher", num_teacher_layers)
    if layer_map == "uniform":
        return _uniform_pairs(num_student_layers, num_teacher_layers, shipped)
    if layer_map == "last_k":
        if len(shipped) > num_student_layers:
            raise ValueError(
                f"loss.layer_map=last_k with {len(shipped)} teacher layers in teacher.hidden_layers, but the student has "
                f"{num_student_layers} layers; name at most {num_student_layers}"
            )
        first = num_student_layers - len(shipped)
        return {first + index: index for index in range(len(shipped))}
    assert not isinstance(layer_map, str), f"unknown layer map {layer_map!r}"
    if not layer_map:
        raise ValueError("loss.layer_map is empty; expected student layer -> teacher layer, uniform or last_k")
    _check_range("loss.layer_map", list(layer_map), "student", num_student_layers)
    _check_range("loss.layer_map", list(layer_map.values()), "teacher", num_teacher_layers)
    missing = sorted(set(layer_map.values()) - set(shipped))
    if missing:
        raise ValueError(
            f"loss.layer_map compares with teacher layers {missing}, but teacher.hidden_layers={list(shipped)} does not "
            "ship them; add them there"
        )
    return {student: list(shipped).index(layer_map[student]) for student in sorted(layer_map)}


def _check_range(option: str, layers: Sequence[int], whose: str, num_layers: int) -> None:
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong:
        raise ValueError(
            f"{option}: {whose} layers {wrong} do not exist; expected 0 to {num_layers - 1}, because the {whose} has "
            f"{num_layers} layers"
        )


def _uniform_pairs(num_student_layers: int, num_teacher_layers: int, shipped: Sequence[int]) -> dict[int, int]:
    if num_teacher_layers == 1:  # first and last: the student's last layer, which the teacher's output is nearest to
        return {num_student_layers - 1: 0}
    student_end, teacher_end = num_student_layers - 1, num_teacher_layers - 1
    nearest: dict[int, tuple[int, int]] = {}  # student layer -> (distance in depth, index)
    for index, layer in enumerate(shipped):
        student = (2 * layer * student_end + teacher_end) // (2 * teacher_end)  # rounded to the nearest, halves up
        distance = abs(layer * student_end - student * teacher_end)
        nearest[student] = min(nearest.get(student, (distance, index)), (distance, index))
    return {student: index for student, (_, index) in sorted(nearest.items())}


def projection_shapes(pairs: Mapping[int, int], student_hidden: int, teacher_hidden: int) -> dict[int, tuple[int, int]]:
    """(student width, teacher width) of the learned projection of each student layer; none where the widths are equal."""
    return {} if student_hidden == teacher_hidden else dict.fromkeys(pairs, (student_hidden, teacher_hidden))


def intermediate_weight(batch: Batch, tokens: Literal["all", "response"]) -> Tensor:
    """Weight [B, T], float32: 1 on the tokens whose states are compared. A teacher's state of zeros is none.

    `response` spares the loss the first token, whose state many models blow up to hundreds of times the others' length.
    """
    chosen = batch.attention_mask if tokens == "all" else (batch.marks & int(Mark.RESPONSE)) != 0
    if not len(batch.teacher_hidden):
        return torch.zeros_like(chosen, dtype=torch.float32)
    return (chosen & (batch.teacher_hidden[-1] != 0).any(dim=-1)).float()


def update_rms(old: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """The statistic behind `rms_of` [L, 2] (float64: sum over tokens of the mean square, tokens) with more tokens added.

    A plain sum: `update_rms(zeros, ...)` of several micro-batches or ranks may be added up (all-reduced) in any order.

    Args:
        states: [L, B, T, H] of the teacher; values at tokens of weight 0 are not looked at.
        mask: [B, T].
    """
    kept = states.masked_fill((mask == 0)[..., None], 0.0).float()
    square = (kept.square().mean(dim=-1) * mask.float()).sum(dim=(1, 2), dtype=torch.float64)
    count = mask.sum(dtype=torch.float64).expand_as(square)
    return old + torch.stack([square, count], dim=1)


def rms_of(statistic: Tensor) -> Tensor:
    """RMS [L] (float32) of every teacher layer from the statistic [L, 2]; 1 where nothing was seen."""
    square, count = statistic.unbind(dim=1)
    mean = square / count.clamp(min=1.0)
    return torch.where(mean > 0, mean.sqrt(), 1.0).float()


def intermediate_layer_loss(
    student_states: Sequence[Tensor],
    teacher_states: Tensor,
    mask: Tensor,
    pairs: Mapping[int, int],
    projections: Mapping[str, nn.Module] | nn.ModuleDict,
    rms: Tensor,
    *,
    mse_weight: float = 1.0,
    cosine_weight: float = 1.0,
) -> TokenLoss:
    """Distance between hidden states, averaged over the layer pairs. Gradients reach student and projections only.

    Per pair and token: mse_weight * |P s / rms - t / rms|^2 / width + cosine_weight * (1 - cos(P s, t)).

    Args:
        student_states: [B, T, H_student] for each student layer of `pairs`, in its order.
        teacher_states: [L, B, T, H_teacher] of the shipped layers; L = 0: none, then `mask` must be 0.
        mask: [B, T] weight of each token; states at tokens of weight 0 are not looked at, also inf and NaN.
        pairs: student layer -> index into L, see `layer_pairs`.
        projections: str(student layer) -> map to the teacher's width, where the widths differ.
        rms: [L] of the teacher's layers, see `rms_of`.
    """
    assert len(student_states) == len(pairs), f"states of {len(student_states)} layers for {len(pairs)} layer pairs"
    unused = (mask == 0)[..., None]
    total = torch.zeros_like(mask, dtype=torch.float32)
    for (layer, index), states in zip(pairs.items(), student_states, strict=True):
        states = states.masked_fill(unused, 1.0)  # before any arithmetic: the gradient of a masked NaN would be NaN
        student = projections[str(layer)](states) if str(layer) in projections else states
        student = student.to(torch.promote_types(student.dtype, torch.float32))
        teacher = torch.ones_like(student)
        if len(teacher_states):
            teacher = teacher_states[index].detach().masked_fill(unused, 1.0).to(student.dtype)
        assert student.shape == teacher.shape, (
            f"student layer {layer} has states {list(student.shape)}, the teacher's are {list(teacher.shape)}"
        )
        scale = rms[index] if len(teacher_states) else 1.0
        squared = ((student - teacher) / scale).square().mean(dim=-1)
        cosine = F.cosine_similarity(student, teacher, dim=-1)
        total = total + mse_weight * squared + cosine_weight * (1.0 - cosine)
    return masked_sum(total / len(pairs), mask)
