"""raykd/losses/intermediate.py: which layers belong together, and how far their states are apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from raykd.losses.intermediate import (
    intermediate_layer_loss,
    intermediate_weight,
    layer_pairs,
    projection_shapes,
    rms_of,
    update_rms,
)
from raykd.types import Batch, Mark

B, T, HS, HT = 2, 5, 3, 4


@pytest.mark.parametrize(
    ("layer_map", "num_student", "num_teacher", "shipped", "pairs"),
    [
        ("uniform", 4, 28, (0, 9, 18, 27), {0: 0, 1: 1, 2: 2, 3: 3}),
        ("uniform", 4, 28, (27,), {3: 0}),  # one layer: the end stays the end
        ("uniform", 4, 28, (14,), {2: 0}),  # 1.56, to the nearest
        ("uniform", 4, 28, (13, 27), {1: 0, 3: 1}),  # by depth, not by number
        ("uniform", 3, 7, tuple(range(7)), {0: 0, 1: 3, 2: 6}),  # several claim a layer: the nearest stays
        ("uniform", 7, 3, (0, 1, 2), {0: 0, 3: 1, 6: 2}),
        ("uniform", 1, 5, (0, 4), {0: 0}),
        ("uniform", 5, 1, (0,), {4: 0}),
        ("last_k", 6, 28, (5, 27), {4: 0, 5: 1}),
        ({3: 27, 1: 9}, 4, 28, (9, 27), {1: 0, 3: 1}),
        ({0: 9, 1: 9}, 4, 28, (9, 27), {0: 0, 1: 0}),
    ],
)
def test_layers_are_paired(layer_map, num_student, num_teacher, shipped, pairs):
    found = layer_pairs(layer_map, num_student, num_teacher, shipped)
    assert found == pairs
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    ("layer_map", "shipped", "words"),
    [
        ("uniform", (), r"teacher\.hidden_layers is empty"),
        ("uniform", (28,), r"teacher layers \[28\] do not exist; expected 0 to 27"),
        ("last_k", (1, 2, 3, 4, 5), "5 teacher layers.*the student has 4"),
        ({4: 9}, (9,), r"student layers \[4\] do not exist; expected 0 to 3"),
        ({-1: 9}, (9,), r"student layers \[-1\]"),
        ({1: 30}, (9,), r"teacher layers \[30\] do not exist"),
        ({1: 10}, (9,), r"teacher layers \[10\], but teacher\.hidden_layers=\[9\]"),
        ({}, (9,), "layer_map is empty"),
    ],
)
def test_a_map_that_cannot_be_is_refused_with_the_numbers(layer_map, shipped, words):
    with pytest.raises(ValueError, match=words):
        layer_pairs(layer_map, 4, 28, shipped)


def test_projections_are_only_for_other_widths():
    assert projection_shapes({1: 0, 3: 1}, 64, 128) == {1: (64, 128), 3: (64, 128)}
    assert projection_shapes({1: 0}, 64, 64) == {}


def states(seed: int = 0, *, layers: int = 2) -> tuple[list[Tensor], Tensor, Tensor, dict[str, nn.Linear]]:
    g = torch.Generator().manual_seed(seed)
    student = [torch.randn(B, T, HS, generator=g, dtype=torch.float64) for _ in range(layers)]
    teacher = 3 * torch.randn(layers, B, T, HT, generator=g, dtype=torch.float64)
    projections: dict[str, nn.Linear] = {}
    for layer in range(layers):
        projections[str(layer)] = linear = nn.Linear(HS, HT, bias=False, dtype=torch.float64)
        linear.weight.data = torch.randn(HT, HS, generator=g, dtype=torch.float64)
    mask = torch.ones(B, T)
    mask[0, 3:] = 0
    mask[1, 0] = 0.5
    return student, teacher, mask, projections


RMS = torch.tensor([2.0, 0.5])
PAIRS = {0: 1, 1: 0}


def test_a_loss_computed_by_hand():
    student = torch.tensor([[[3.0, 0.0], [9.0, 9.0]]])
    teacher = torch.tensor([[[[0.0, 4.0], [1.0, 1.0]]], [[[3.0, 4.0], [1.0, 1.0]]]])
    mask = torch.tensor([[1.0, 0.0]])
    rms = torch.tensor([2.0, 5.0])
    options = {"mse_weight": 2.0, "cosine_weight": 10.0}
    # Layer 0 to teacher 1: (0, 4) apart over RMS 5: 16/25/2 = 0.32; cosine 9/15 = 0.6.
    one = intermediate_layer_loss([student], teacher, mask, {0: 1}, {}, rms, **options)
    assert one.sum.item() == pytest.approx(2 * 0.32 + 10 * 0.4)
    assert one.count == 1
    # Layer 1 to teacher 0: (3, -4) apart over RMS 2: 25/4/2 = 3.125; cosine 0. The mean over the two pairs.
    two = intermediate_layer_loss([student, student], teacher, mask, {0: 1, 1: 0}, {}, rms, **options)
    assert two.sum.item() == pytest.approx((2 * 0.32 + 10 * 0.4 + 2 * 3.125 + 10) / 2)


def test_the_two_parts_are_different_things():
    # Right direction, wrong length: the cosine is content, the squared error is not. (After a LayerNorm they are one.)
    teacher = torch.randn(1, B, T, HS)
    student = [2 * teacher[0]]
    ones = torch.ones(B, T)
    parts = [
        intermediate_layer_loss(student, teacher, ones, {0: 0}, {}, torch.ones(1), mse_weight=m, cosine_weight=1 - m)
        for m in (1.0, 0.0)
    ]
    assert parts[0].mean() > 0.5
    assert parts[1].mean().abs() < 1e-6


def test_gradients_pass_finite_differences_and_reach_student_and_projections_only():
    student, teacher, mask, projections = states()
    leaves = [tensor.requires_grad_() for tensor in student]
    teacher.requires_grad_()
    weights = [projections[str(layer)].weight for layer in range(2)]

    def loss(*tensors: Tensor) -> Tensor:
        return intermediate_layer_loss(list(tensors[:2]), teacher, mask, PAIRS, projections, RMS).sum

    assert torch.autograd.gradcheck(loss, (*leaves, *weights))
    loss(*leaves, *weights).backward()
    assert teacher.grad is None
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in (*leaves, *weights))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_tokens_of_weight_zero_are_not_looked_at(bad: float):
    student, teacher, mask, projections = states()
    unused = (mask == 0)[..., None]

    def run(student: list[Tensor], teacher: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in student]
        weights = [projections[str(layer)].weight for layer in range(2)]
        loss = intermediate_layer_loss(leaves, teacher, mask, PAIRS, projections, RMS)
        return loss.sum.detach(), *torch.autograd.grad(loss.sum, [*leaves, *weights])

    want = run(student, teacher)
    got = run([tensor.masked_fill(unused, bad) for tensor in student], teacher.masked_fill(unused, bad))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert (got[1][0, 3:] == 0).all()


def test_padding_order_and_splitting_change_nothing():
    student, teacher, mask, projections = states()

    def run(rows, pad: int = 0) -> Tensor:
        def padded(tensor: Tensor, axis: int) -> Tensor:
            shape = list(tensor.shape)
            shape[axis] = pad
            return torch.cat([tensor, torch.full(shape, torch.nan)], dim=axis)

        loss = intermediate_layer_loss(
            [padded(tensor[rows], 1) for tensor in student], padded(teacher[:, rows], 2),
            torch.nn.functional.pad(mask[rows], (0, pad)), PAIRS, projections, RMS,
        )  # fmt: skip
        return torch.stack([loss.sum.detach(), loss.count.double()])

    whole = run([0, 1])
    torch.testing.assert_close(run([1, 0], pad=3), whole)
    torch.testing.assert_close(run([0]) + run([1]), whole)


@pytest.mark.parametrize("has_states", [True, False])
def test_nothing_compared_is_zero_with_zero_gradients(has_states: bool):
    student, teacher, mask, projections = states()
    if not has_states:
        teacher = torch.empty(0, B, T, 0)
    leaves = [tensor.requires_grad_() for tensor in student]
    weights = [projections[str(layer)].weight for layer in range(2)]
    loss = intermediate_layer_loss(leaves, teacher, torch.zeros_like(mask), PAIRS, projections, RMS)
    assert loss.sum == 0
    assert loss.count == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss.sum, [*leaves, *weights]))


def test_half_precision_states_are_compared_in_single():
    _, teacher, mask, _ = states()
    teacher = 3e4 * teacher.half().clamp(-2, 2)  # squares would overflow
    student = [teacher[1].bfloat16(), teacher[0].bfloat16()]
    loss = intermediate_layer_loss(student, teacher, mask, PAIRS, {}, torch.tensor([3e4, 3e4]))
    assert loss.sum.dtype == torch.float32
    assert 0 < loss.mean() < 1e-3


def test_the_rms_is_that_of_all_tokens_seen_whatever_the_order_and_the_split():
    _, teacher, mask, _ = states()
    mask = (mask > 0).float()
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    whole = update_rms(zeros, teacher, mask)
    expected = [teacher[layer][mask > 0].square().mean().sqrt().item() for layer in range(2)]
    assert rms_of(whole).tolist() == pytest.approx(expected)
    by_rank = sum(update_rms(zeros, teacher[:, rows], mask[rows]) for rows in ([0], [1]))  # as an all-reduce adds
    in_turn = update_rms(update_rms(zeros, teacher[:, 1:], mask[1:]), teacher[:, :1], mask[:1])
    for other in (by_rank, in_turn):
        torch.testing.assert_close(other, whole)
    spoilt = teacher.masked_fill((mask == 0)[..., None], torch.nan)
    assert torch.equal(update_rms(zeros, spoilt, mask), whole)
    assert rms_of(zeros).tolist() == [1, 1]
    assert torch.equal(update_rms(whole, teacher, torch.zeros_like(mask)), whole)


def test_compared_tokens_are_real_ones_with_a_state():
    state_index = torch.tensor([0, 2, 3, 4])  # the token at 1 has none, such as a slot that the teacher never read
    marks = torch.tensor([[0, int(Mark.LATENT), int(Mark.RESPONSE)], [0, int(Mark.RESPONSE), 0]], dtype=torch.int32)
    n = 2
    batch = Batch(
        uid=torch.arange(2), input_ids=torch.zeros(2, 3, dtype=torch.int64),
        attention_mask=torch.tensor([[True, True, True], [True, True, False]]), marks=marks,
        response_index=torch.tensor([2, 4]), response_source=torch.zeros(n, dtype=torch.int8),
        topk_ids=torch.zeros(n, 1, dtype=torch.int64), topk_logprobs=torch.zeros(n, 1), log_tail=torch.zeros(n),
        has_teacher=torch.ones(n, dtype=torch.bool), state_index=state_index, teacher_hidden=torch.ones(1, 4, 4).half(),
    )  # fmt: skip
    assert intermediate_weight(batch, "all").tolist() == [1, 1, 1, 1]
    assert intermediate_weight(batch, "response").tolist() == [0, 1, 0, 1]
    without = replace(batch, state_index=torch.empty(0, dtype=torch.int64), teacher_hidden=torch.empty(0, 0, 0))
    assert intermediate_weight(without, "all").tolist() == []
