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
    """Weight [M], float32, of the tokens that have a teacher's state: 1 on those whose states are compared.

    `response` spares the loss the first token, whose state many models blow up to hundreds of times the others' length.
    """
    if tokens == "all":
        return torch.ones_like(batch.state_index, dtype=torch.float32)
    return ((batch.marks.flatten()[batch.state_index] & int(Mark.RESPONSE)) != 0).float()


def update_rms(old: Tensor, states: Tensor, weight: Tensor) -> Tensor:
    """The statistic behind `rms_of` [L, 2] (float64: sum over tokens of the mean square, tokens) with more tokens added.

    A plain sum: `update_rms(zeros, ...)` of several micro-batches or ranks may be added up (all-reduced) in any order.

    Args:
        states: [L, ..., H] of the teacher; values at tokens of weight 0 are not looked at.
        weight: [...] of each token.
    """
    norm = torch.linalg.vector_norm(states, dim=-1, dtype=torch.promote_types(states.dtype, torch.float32)).double()
    square = norm.square() / max(states.shape[-1], 1)
    square = (square * weight).masked_fill(weight == 0, 0.0).flatten(1).sum(dim=1)
    return old + torch.stack([square, weight.sum(dtype=torch.float64).expand_as(square)], dim=1)


def rms_of(statistic: Tensor) -> Tensor:
    """RMS [L] (float32) of every teacher layer from the statistic [L, 2]; 1 where nothing was seen."""
    square, count = statistic.unbind(dim=1)
    mean = square / count.clamp(min=1.0)
    return torch.where(mean > 0, mean.sqrt(), 1.0).float()


def intermediate_layer_loss(
    student_states: Sequence[Tensor],
    teacher_states: Tensor,
    weight: Tensor,
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
        student_states: [..., H_student] for each student layer of `pairs`, in its order.
        teacher_states: [L, ..., H_teacher] of the shipped layers; L = 0: none, then `weight` must be 0.
        weight: [...] of each token; states at tokens of weight 0 are not looked at, also inf and NaN.
        pairs: student layer -> index into L, see `layer_pairs`.
        projections: str(student layer) -> map to the teacher's width, where the widths differ.
        rms: [L] of the teacher's layers, see `rms_of`.
    """
    assert len(student_states) == len(pairs), f"states of {len(student_states)} layers for {len(pairs)} layer pairs"
    unused = (weight == 0)[..., None]
    total = torch.zeros_like(weight, dtype=torch.float32)
    for (layer, index), states in zip(pairs.items(), student_states, strict=True):
        states = states.masked_fill(unused, 1.0)  # before any arithmetic: the gradient of a masked NaN would be NaN
        student = projections[str(layer)](states) if str(layer) in projections else states
        student = student.to(torch.promote_types(student.dtype, torch.float32))
        teacher = torch.ones_like(student)
        if len(teacher_states):
            teacher = teacher_states[index].detach().to(student.dtype).masked_fill(unused, 1.0)
        assert student.shape == teacher.shape, (
            f"student layer {layer} has states {list(student.shape)}, the teacher's are {list(teacher.shape)}"
        )
        scale = rms[index] if len(teacher_states) else 1.0
        difference = student - teacher
        squared = (difference * difference).sum(dim=-1) / (scale * scale * student.shape[-1])
        total = total + mse_weight * squared + cosine_weight * (1.0 - _cosine(student, teacher))
    return masked_sum(total / len(pairs), weight)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine [...] of vectors [..., H]: three sums, in a tenth of the time of torch's own with its gradient."""
    squares = [(x * x).sum(dim=-1).clamp(min=1e-12) for x in (a, b)]
    return (a * b).sum(dim=-1) / (squares[0] * squares[1]).sqrt()
