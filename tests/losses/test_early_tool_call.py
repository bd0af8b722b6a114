"""Starts of turns from marks, and the loss on them by hand."""

from __future__ import annotations

import math

import pytest
import torch

from raykd.losses.early_tool_call import EarlyCallWeights, early_tool_call_loss, early_tool_call_weight, turn_starts
from raykd.types import Mark, Source

R, NAME, LATENT = int(Mark.RESPONSE), int(Mark.RESPONSE | Mark.TOOL_NAME), int(Mark.LATENT)
# Row 0: a turn with a call, a tool result, an answer up to the last column. Row 1: an answer, then padding.
MARKS = torch.tensor([[0, R, NAME, R, 0, R, R], [0, R, R, 0, 0, 0, 0]])


def index_of(marks: torch.Tensor) -> torch.Tensor:
    return ((marks.flatten() & R) != 0).nonzero()[:, 0]


def test_every_run_of_response_tokens_is_a_turn():
    starts = turn_starts(MARKS, index_of(MARKS))
    assert starts.first.tolist() == [0, 3, 5]
    assert starts.has_call.tolist() == [True] * 3 + [False] * 4
    assert starts.index_in_turn.tolist() == [0, 1, 2, 0, 1, 0, 1]


def test_a_latent_span_is_a_preamble_of_its_turn():
    marks = torch.tensor([[0, R, LATENT, LATENT, R, R, NAME], [0, R, LATENT, R, 0, R, 0]])
    starts = turn_starts(marks, index_of(marks))
    # Row 0: <bot> slot slot <eot> word name. Row 1: <bot> slot <eot> and nothing else, then a turn of one word.
    assert starts.index_in_turn.tolist() == [-1, -1, 0, 1, -1, -1, 0]
    assert starts.first.tolist() == [2, 6]
    assert starts.has_call.tolist() == [True] * 4 + [False] * 3


def test_only_the_first_tokens_of_turns_with_a_call_get_cross_entropy_and_student_text_nothing():
    source = torch.tensor([Source.TEACHER] * 5 + [Source.STUDENT] * 2)
    weights = early_tool_call_weight(MARKS, index_of(MARKS), source, num_tokens=2, ce_weight=0.5, prior_weight=2.0)
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
    nothing = turn_starts(torch.zeros(2, 3, dtype=torch.int32), torch.empty(0, dtype=torch.int64))
    assert [len(part) for part in nothing] == [0, 0, 0]


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
        marks = torch.nn.functional.pad(MARKS[rows], (0, padding))
        index = index_of(marks)
        weights = early_tool_call_weight(marks, index, torch.zeros(len(index)), num_tokens=2)
        width = marks.shape[1]
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
