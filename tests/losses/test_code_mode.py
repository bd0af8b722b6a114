"""Code against direct calls: per token by hand, and the preference between the sequences of a pair."""

from __future__ import annotations

import math

import pytest
import torch

from raykd.losses.code_mode import CodeModePreferenceLoss, code_mode_metric_weights, eligible_share
from raykd.types import Mark, Source

CODE, DIRECT, TEXT = int(Mark.CODE_MODE), int(Mark.DIRECT_TOOL), int(Mark.RESPONSE)
ALONE, NO_REFERENCE = torch.zeros(2, dtype=torch.int64), torch.full((2,), torch.nan)


def test_likelihood_of_code_and_unlikelihood_of_direct_calls():
    logprobs = torch.tensor([0.5, 0.25, 0.1, 0.9]).log()
    marks, rows = torch.tensor([CODE, CODE, DIRECT, TEXT]), torch.tensor([0, 0, 1, 1])
    loss = CodeModePreferenceLoss(positive_weight=1.0, negative_weight=2.0)
    result = loss(logprobs, marks, rows, ALONE, NO_REFERENCE)
    assert result.sum.item() == pytest.approx(math.log(2) + math.log(4) - 2 * math.log(0.9))
    assert (result.count, loss.num_pairs(ALONE, NO_REFERENCE)) == (4.0, 0.0)
    only_code = CodeModePreferenceLoss(negative_weight=0.0)(logprobs, marks, rows, ALONE, NO_REFERENCE)
    assert only_code.sum.item() == pytest.approx(math.log(8))
    assert only_code.count == 2


def test_the_gradient_names_the_token_and_is_bounded():
    """The written token's logit rises in code and falls in a direct call, by no more than its probability's distance."""
    logits = torch.zeros(2, 5, requires_grad=True)
    logprobs = logits.log_softmax(dim=1)[:, 2]
    CodeModePreferenceLoss()(
        logprobs, torch.tensor([CODE, DIRECT]), torch.tensor([0, 1]), ALONE, NO_REFERENCE
    ).sum.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0], torch.tensor([0.2, 0.2, -0.8, 0.2, 0.2]))
    torch.testing.assert_close(logits.grad[1], torch.tensor([-0.05, -0.05, 0.2, -0.05, -0.05]))
    certain = torch.zeros(1, requires_grad=True)
    result = CodeModePreferenceLoss()(certain, torch.tensor([DIRECT]), torch.tensor([0]), ALONE, NO_REFERENCE)
    (gradient,) = torch.autograd.grad(result.sum, certain)
    assert result.sum.isfinite()
    assert gradient.isfinite().all()


PAIR = torch.tensor([-7, 7, 0, 9])
REFERENCE = torch.tensor([-3.0, -4.0, torch.nan, -1.0])
ROWS = torch.tensor([0, 0, 1, 1, 2, 3])
MARKS = torch.tensor([DIRECT, DIRECT, CODE, CODE, CODE, CODE])


def test_a_pair_is_judged_by_its_margin_over_the_reference():
    logprobs = torch.tensor([-1.0, -1.0, -1.5, -1.0, -0.5, -0.25])
    loss = CodeModePreferenceLoss(beta=0.5)
    result = loss(logprobs, MARKS, ROWS, PAIR, REFERENCE)
    margin = (-2.5 + 4.0) - (-2.0 + 3.0)
    # Rows 2 and 3 (the other half of pair 9 is not here) count by their tokens.
    assert result.sum.item() == pytest.approx(math.log1p(math.exp(-0.5 * margin)) + 0.75)
    assert (result.count, loss.num_pairs(PAIR, REFERENCE)) == (3.0, 1.0)


def test_preference_raises_the_preferred_response_and_lowers_the_other():
    logprobs = torch.full((6,), -1.0, requires_grad=True)
    CodeModePreferenceLoss(beta=0.5)(logprobs, torch.zeros_like(MARKS), ROWS, PAIR, REFERENCE).sum.backward()
    assert logprobs.grad is not None
    margin = 0.5 * ((-2.0 + 4.0) - (-2.0 + 3.0))
    step = 0.5 / (1 + math.exp(margin))
    torch.testing.assert_close(logprobs.grad, torch.tensor([step, step, -step, -step, 0.0, 0.0]))


@pytest.mark.parametrize("unknown", [0, 1])
def test_a_pair_without_reference_counts_by_its_tokens(unknown):
    logprobs = torch.full((4,), -0.5)
    reference = torch.tensor([-3.0, -4.0])
    reference[unknown] = torch.nan
    result = CodeModePreferenceLoss()(logprobs, MARKS[:4], ROWS[:4], torch.tensor([-7, 7]), reference)
    assert result.count == 4
    assert result.sum.item() == pytest.approx(1.0 - 2 * math.log1p(-math.exp(-0.5)))


def test_nothing_eligible_gives_zero_with_its_graph():
    logprobs = torch.tensor([torch.nan, -torch.inf], requires_grad=True)
    result = CodeModePreferenceLoss()(logprobs, torch.tensor([TEXT, TEXT]), torch.tensor([0, 1]), ALONE, NO_REFERENCE)
    (gradient,) = torch.autograd.grad(result.mean(), logprobs)
    assert (result.sum, result.count) == (0, 0)
    assert torch.equal(gradient, torch.zeros(2))


def test_order_and_splitting_between_pairs_change_nothing():
    torch.manual_seed(0)
    logprobs = -torch.rand(6).double() - 0.1

    def loss(sequences: list[int]) -> torch.Tensor:
        tokens = torch.cat([torch.nonzero(torch.eq(ROWS, s))[:, 0] for s in sequences])
        rows = torch.cat([torch.full((int((torch.eq(ROWS, s)).sum()),), i) for i, s in enumerate(sequences)])
        result = CodeModePreferenceLoss()(logprobs[tokens], MARKS[tokens], rows, PAIR[sequences], REFERENCE[sequences])
        return torch.stack([result.sum, result.count.double()])

    whole = loss([0, 1, 2, 3])
    torch.testing.assert_close(loss([3, 1, 2, 0]), whole)
    torch.testing.assert_close(loss([1, 0]) + loss([2, 3]), whole)


def test_gradients_pass_finite_differences():
    torch.manual_seed(0)
    logprobs = (-torch.rand(6).double() - 0.1).requires_grad_()
    loss = CodeModePreferenceLoss(positive_weight=0.5, negative_weight=2.0, beta=0.3)
    marks = torch.tensor([DIRECT, DIRECT, CODE, CODE, CODE, DIRECT])
    assert torch.autograd.gradcheck(lambda x: loss(x, marks, ROWS, PAIR, REFERENCE).mean(), logprobs)


def test_metrics_tell_eligible_sequences_and_both_kinds_of_tokens():
    marks = torch.tensor([CODE, CODE, DIRECT, TEXT, DIRECT])
    source = torch.tensor([Source.GOLD, Source.GOLD, Source.TEACHER, Source.TEACHER, Source.STUDENT])
    weights = code_mode_metric_weights(marks)
    assert weights["code_mode_logprob"].tolist() == [1, 1, 0, 0, 0]
    assert weights["direct_tool_logprob"].tolist() == [0, 0, 1, 0, 1]
    share = eligible_share(marks, source, torch.tensor([0, 0, 1, 2, 3]), 4)
    assert (share.sum, share.count) == (2, 3), "a rejected text is not one of those to follow"
    nobody = eligible_share(marks[:0], source[:0], torch.empty(0, dtype=torch.int64), 0)
    assert (nobody.sum, nobody.count) == (0, 0)
