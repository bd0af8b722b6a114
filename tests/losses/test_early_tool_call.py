"""The loss on the first tokens of turns, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raykd.data.collate import collate_kd_batch
from raykd.losses.early_tool_call import EarlyCallWeights, early_tool_call_loss, early_tool_call_weight
from raykd.types import Batch, Example, Mark, Source

R, NAME = int(Mark.RESPONSE), int(Mark.RESPONSE | Mark.TOOL_NAME)
# Row 0: a turn with a call, a tool result, an answer up to the last column. Row 1: an answer, then padding.
MARKS = torch.tensor([[0, R, NAME, R, 0, R, R], [0, R, R, 0, 0, 0, 0]])


def batch_of(marks: torch.Tensor, source: Source = Source.TEACHER) -> Batch:
    """A sequence per row of marks [B, T], the last one written by `source`, the others by the teacher."""
    rows = []
    for row, row_marks in enumerate(marks):
        num = int(((row_marks & R) != 0).sum())
        rows.append(
            Example(
                uid=row, source=source if row == len(marks) - 1 else Source.TEACHER,
                input_ids=np.ones(len(row_marks), np.int32), marks=row_marks.numpy().astype(np.uint16),
                topk_ids=np.zeros((num, 0), np.int32), topk_logprobs=np.zeros((num, 0), np.float16),
                log_tail=np.zeros(0, np.float32),
            )
        )  # fmt: skip
    return collate_kd_batch(rows, pad_id=0)


def test_only_the_first_tokens_of_turns_with_a_call_get_cross_entropy_and_student_text_nothing():
    batch = batch_of(MARKS, source=Source.STUDENT)
    weights = early_tool_call_weight(batch, num_tokens=2, ce_weight=0.5, prior_weight=2.0)
    assert weights.ce.tolist() == [0.5, 0.5, 0, 0, 0, 0, 0]
    assert weights.prior.tolist() == [2.0, 2.0, 0.0]
    assert weights.has_call.tolist() == [True, False, False]
    assert weights.count == 5.0


WEIGHTS = EarlyCallWeights(
    first=torch.tensor([0, 2]),
    has_call=torch.tensor([True, False]),
    prior=torch.tensor([1.0, 2.0]),
    ce=torch.tensor([0.5, 0.5, 0.0]),
)


def test_mass_on_the_openings_where_a_call_follows_and_off_them_where_none_does():
    openings = torch.tensor([[0.2, 0.3], [0.1, 0.3]]).log()
    loss = early_tool_call_loss(openings, torch.tensor([-1.0, -3.0, torch.nan]), WEIGHTS)
    assert loss.sum.item() == pytest.approx(math.log(2) - 2 * math.log(0.6) + 0.5 * 4)
    assert loss.count == WEIGHTS.count == 4.0


def test_every_opening_gets_gradient_in_proportion_to_its_probability():
    openings = torch.tensor([[0.2, 0.3], [0.1, 0.3]]).log().requires_grad_()
    early_tool_call_loss(openings, torch.zeros(3), WEIGHTS).sum.backward()
    assert openings.grad is not None
    torch.testing.assert_close(openings.grad, torch.tensor([[-0.4, -0.6], [1 / 3, 1.0]]))


def test_no_turns_and_unweighted_turns_give_zero_with_their_graph():
    openings = torch.tensor([[torch.nan, -1.0], [-torch.inf, -torch.inf]], requires_grad=True)
    targets = torch.tensor([-1.0, torch.nan, -torch.inf], requires_grad=True)
    unweighted = WEIGHTS._replace(prior=torch.zeros(2), ce=torch.zeros(3))
    none = EarlyCallWeights(
        torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool), torch.empty(0), torch.zeros(3)
    )
    for logprobs, weights in ((openings, unweighted), (openings[:0], none)):
        loss = early_tool_call_loss(logprobs, targets, weights)
        assert (loss.sum, loss.count, loss.mean()) == (0, 0, 0)
        for gradient in torch.autograd.grad(loss.mean(), (openings, targets), materialize_grads=True):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_certainty_and_impossibility_stay_finite_where_the_loss_is():
    openings = torch.tensor([[0.0], [0.0]], requires_grad=True)
    loss = early_tool_call_loss(openings, torch.zeros(3), WEIGHTS)
    (gradient,) = torch.autograd.grad(loss.sum, openings)
    assert loss.sum.isfinite()
    assert gradient.isfinite().all()


def test_padding_order_and_splitting_change_nothing():
    torch.manual_seed(0)
    logprobs = -torch.rand(2, 9).double() - 0.1  # by position, so that a token keeps its own however it is packed
    openings = -torch.rand(2, 9, 3).double() - 1.2

    def loss(rows: list[int], padding: int = 0) -> torch.Tensor:
        batch = batch_of(torch.nn.functional.pad(MARKS[rows], (0, padding)))
        weights = early_tool_call_weight(batch, num_tokens=2)
        width, index = batch.input_ids.shape[1], batch.response_index
        row, column = torch.tensor(rows)[index // width], index % width
        at_first = openings[row[weights.first], column[weights.first]]
        result = early_tool_call_loss(at_first, logprobs[row, column], weights)
        return torch.stack([result.sum, result.count.double()])

    whole = loss([0, 1])
    torch.testing.assert_close(loss([1, 0], padding=2), whole)
    torch.testing.assert_close(loss([0]) + loss([1]), whole)


def test_gradients_pass_finite_differences():
    torch.manual_seed(0)
    openings = (-torch.rand(2, 3).double() - 1.2).requires_grad_()
    targets = (-torch.rand(3).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda o, t: early_tool_call_loss(o, t, WEIGHTS).mean(), (openings, targets))
