"""Losses of the halt and the self-evaluation head: values by hand, gradients, and what unknown targets must not do."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from raykd.losses.heads import (
    expected_loops,
    halt_class_counts,
    halt_head_loss,
    halt_head_weight,
    inverse_frequency,
    num_refined,
    running_frequency,
    self_evaluation_loss,
    self_evaluation_weight,
)

NAN = math.nan


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def test_the_halt_loss_is_the_cross_entropy_by_hand():
    points = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    loss = halt_head_loss(points, torch.tensor([1.0, 0.25]), class_weights=(1.0, 2.0))
    by_hand = 2 * -math.log(0.75) + (0.75 * 1 + 0.25 * 2) * math.log(2)
    assert loss.sum.item() == pytest.approx(by_hand)
    assert loss.count.item() == pytest.approx(2 + 0.75 + 0.5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_on_hard_targets_the_halt_loss_is_torchs(smoothing):
    points, classes = logits(7, 2), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    loss = halt_head_loss(points, classes.double(), class_weights=(0.7, 1.9), label_smoothing=smoothing)
    weight = torch.tensor([0.7, 1.9], dtype=torch.float64)
    expected = functional.cross_entropy(points, classes, weight=weight, label_smoothing=smoothing)
    torch.testing.assert_close(loss.mean(), expected, check_dtype=False)


def test_gradients_are_the_finite_differences():
    targets = torch.tensor([1.0, 0.3, NAN, 0.0], dtype=torch.float64)
    quality = torch.tensor([0.9, NAN, 0.0, 0.5], dtype=torch.float64)
    sequence = torch.tensor([0, 0, 1, 1])
    assert torch.autograd.gradcheck(
        lambda x: halt_head_loss(x, targets, class_weights=(0.5, 2.0), label_smoothing=0.1).sum, logits(4, 2)
    )
    assert torch.autograd.gradcheck(lambda x: expected_loops(x, sequence).sum, logits(4, 2))
    assert torch.autograd.gradcheck(lambda x: self_evaluation_loss(x, quality, kind="bce").sum, logits(4))
    assert torch.autograd.gradcheck(lambda x: self_evaluation_loss(x, quality, kind="mse").sum, logits(4))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, NAN])
def test_what_an_unknown_target_is_read_from_changes_nothing(bad):
    points = logits(3, 2).detach()
    points[1] = bad
    points.requires_grad_()
    halt = halt_head_loss(points, torch.tensor([1.0, NAN, 0.0]), class_weights=(1.0, 3.0), label_smoothing=0.1)
    kept = halt_head_loss(points[[0, 2]], torch.tensor([1.0, 0.0]), class_weights=(1.0, 3.0), label_smoothing=0.1)
    assert halt.sum.item() == kept.sum.item()
    assert halt.count.item() == kept.count.item() == 4.0
    halt.sum.backward()
    assert points.grad is not None
    assert points.grad[1].tolist() == [0.0, 0.0]
    assert points.grad[[0, 2]].abs().min() > 0
    for kind in ("bce", "mse"):
        quality_logits = torch.tensor([0.3, bad], requires_grad=True)
        self_evaluation_loss(quality_logits, torch.tensor([0.5, NAN]), kind=kind).sum.backward()
        assert quality_logits.grad is not None
        assert quality_logits.grad[0].isfinite()
        assert quality_logits.grad[1] == 0.0


@pytest.mark.parametrize("size", [0, 2])
def test_without_known_targets_the_sums_are_zero_and_keep_their_graph(size):
    points, sequence_logits, unknown = logits(size, 2), logits(size), torch.full((size,), NAN)
    for loss in (halt_head_loss(points, unknown, label_smoothing=0.1), self_evaluation_loss(sequence_logits, unknown)):
        assert loss.sum.item() == loss.count.item() == loss.mean().item() == 0.0
        loss.sum.backward()
    assert points.grad is not None
    assert sequence_logits.grad is not None
    assert not points.grad.any()
    assert not sequence_logits.grad.any()
    assert expected_loops(logits(0, 2), torch.empty(0, dtype=torch.long)).mean().item() == 0.0


def test_order_and_splitting_of_the_points_change_nothing():
    points, targets = logits(6, 2), torch.tensor([1.0, 0.0, NAN, 0.4, 1.0, 0.0])
    whole = halt_head_loss(points, targets, class_weights=(1.0, 2.0))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = halt_head_loss(points[order], targets[order], class_weights=(1.0, 2.0))
    parts = [halt_head_loss(points[part], targets[part], class_weights=(1.0, 2.0)) for part in (slice(2), slice(2, 6))]
    for sums in (shuffled.sum, parts[0].sum + parts[1].sum):
        torch.testing.assert_close(sums, whole.sum)
    torch.testing.assert_close(parts[0].count + parts[1].count, whole.count)


def test_counts_are_known_before_the_forward_pass():
    targets, quality = torch.tensor([1.0, 0.25, NAN]), torch.tensor([0.2, NAN, 1.0])
    assert (
        halt_head_weight(targets, (1.0, 3.0)).sum() == halt_head_loss(logits(3, 2), targets, class_weights=(1.0, 3.0)).count
    )
    assert self_evaluation_weight(quality).sum() == self_evaluation_loss(logits(3), quality).count == 2
    assert num_refined(torch.tensor([0, 0, 4])) == expected_loops(logits(3, 2), torch.tensor([0, 0, 4])).count == 2


def test_expected_loops_are_the_enumerated_ones():
    points, sequence = logits(5, 2), torch.tensor([3, 3, 3, 8, 8])
    halt = points.detach().softmax(-1)[:, 1].tolist()
    first = 1 + (1 - halt[0]) + (1 - halt[0]) * (1 - halt[1])  # whether the last loop would halt plays no part
    second = 1 + (1 - halt[3])
    loss = expected_loops(points, sequence)
    assert loss.sum.item() == pytest.approx(first + second)
    loss.sum.backward()
    assert points.grad is not None
    assert (points.grad[[0, 1, 3], 1] < 0).all()  # a higher halt logit shortens the refinement
    assert not points.grad[[2, 4]].any()
    certain = torch.tensor([[0.0, 1e4], [0.0, 0.0], [1e4, 0.0]], requires_grad=True)
    loss = expected_loops(certain, torch.tensor([0, 0, 0]))
    loss.sum.backward()
    assert loss.sum.item() == 1.0
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


def test_the_self_evaluation_loss_by_hand():
    loss = self_evaluation_loss(torch.tensor([math.log(4.0), 5.0]), torch.tensor([0.5, NAN]))
    assert loss.sum.item() == pytest.approx(-0.5 * math.log(0.8) - 0.5 * math.log(0.2))
    squared = self_evaluation_loss(torch.tensor([math.log(4.0), 5.0]), torch.tensor([0.5, NAN]), kind="mse")
    assert squared.sum.item() == pytest.approx(0.09)


def test_rare_classes_weigh_more_and_a_step_without_targets_changes_nothing():
    counts = halt_class_counts(torch.tensor([1.0, 0.0, 0.25, NAN]))
    assert counts.tolist() == [1.75, 1.25]
    assert running_frequency([0.5, 0.5], [9.0, 1.0], decay=0.9) == pytest.approx([0.54, 0.46])
    assert running_frequency([0.3, 0.7], [0.0, 0.0]) == [0.3, 0.7]
    assert inverse_frequency([0.5, 0.5]) == (1.0, 1.0)
    assert inverse_frequency([0.8, 0.2]) == pytest.approx((0.625, 2.5))
    assert inverse_frequency([1.0, 0.0]) == (0.5, 10.0)


def test_bfloat16_logits_are_summed_in_float32():
    assert halt_head_loss(logits(3, 2).bfloat16(), torch.ones(3)).sum.dtype == torch.float32
