"""Losses of rules and scores: latent spans, claims, rewards."""

from __future__ import annotations

import math

import pytest
import torch

from raykd.losses.scored import (
    caws_compliance_loss,
    caws_terms,
    claim_extraction_loss,
    claim_extraction_weight,
    leave_one_out_advantages,
    policy_gradient_loss,
)
from raykd.types import Mark, Source

BOT, EOT, EOS, WORD = 1, 2, 3, 9


def terms(ids: list[int], sequences: list[int] | None = None, max_spans: int | torch.Tensor = 1) -> list[str]:
    """Which sentinels must not be written at each token, as letters."""
    found = caws_terms(
        torch.tensor(ids), torch.tensor(sequences or [0] * len(ids)), bot_id=BOT, eot_id=EOT, max_spans=max_spans
    )
    return ["".join(letter for letter, on in zip("beE", row, strict=True) if on) for row in found.tolist()]


def test_end_of_span_is_forbidden_outside_one_and_end_of_text_inside():
    assert terms([WORD, BOT, EOT, WORD, EOS], max_spans=9) == ["e", "e", "E", "e", "e"]
    # A second <bot> inside a span and a stray <eot> leave the balance as it is.
    assert terms([BOT, BOT, EOT, EOT, BOT, WORD], max_spans=9) == ["e", "E", "E", "e", "e", "E"]


def test_begin_of_span_is_forbidden_once_the_budget_is_used():
    assert terms([BOT, EOT, WORD, EOS], max_spans=1) == ["e", "bE", "be", "be"]
    assert terms([WORD, WORD], max_spans=0) == ["be", "be"]
    assert terms([BOT, BOT, EOT, BOT, EOT], max_spans=2) == ["e", "E", "E", "e", "bE"], "<bot><bot><eot> is one span"


def test_sequences_do_not_see_one_another():
    ids, sequences = [BOT, WORD, BOT, EOT, WORD], [0, 0, 1, 1, 1]
    limits = torch.tensor([3, 1])
    assert terms(ids, sequences, limits) == terms(ids[:2], max_spans=3) + terms(ids[2:], max_spans=1)
    assert terms([], [], 1) == []


def test_caws_loss_is_the_unlikelihood_of_the_forbidden_sentinels():
    logprobs = torch.tensor([[0.5, 0.1, 0.2], [0.3, 0.25, 0.1]]).log()
    loss = caws_compliance_loss(logprobs, torch.tensor([[False, True, False], [True, False, True]]))
    assert loss.sum.item() == pytest.approx(-math.log(0.9) - math.log(0.7) - math.log(0.9), rel=1e-6)
    assert loss.count == 2


def test_caws_loss_ignores_what_no_rule_looks_at_and_is_finite_at_certainty():
    logprobs = torch.tensor([[0.0, torch.nan, -torch.inf]], requires_grad=True)
    loss = caws_compliance_loss(logprobs, torch.tensor([[True, False, True]]))
    loss.mean().backward()
    assert loss.sum.isfinite()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    assert logprobs.grad[0, 1] == 0


def test_the_gradient_lowers_the_forbidden_sentinel():
    logits = torch.zeros(1, 10, requires_grad=True)
    sentinels = logits.log_softmax(dim=1)[:, [BOT, EOT, EOS]]
    caws_compliance_loss(sentinels, torch.tensor([[True, False, False]])).mean().backward()
    assert logits.grad is not None
    assert logits.grad[0, BOT] > 0
    assert (logits.grad[0, BOT + 1 :] < 0).all()


def test_claim_loss_mixes_cross_entropy_and_divergence_on_claim_tokens():
    ce, kl = torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([0.5, 0.25, torch.inf])
    loss = claim_extraction_loss(ce, kl, torch.tensor([1.0, 0.5, 0.0]), ce_share=0.25)
    assert loss.sum.item() == pytest.approx(0.25 * (1 + 1) + 0.75 * (0.5 + 0.125))
    assert loss.count == 1.5
    only_ce = claim_extraction_loss(ce, torch.full((3,), torch.nan), torch.tensor([1.0, 0.0, 0.0]), ce_share=1.0)
    assert (only_ce.sum, only_ce.count) == (1.0, 1.0)


def test_claims_of_the_student_are_no_targets():
    marks = torch.tensor([Mark.CLAIM, Mark.CLAIM, Mark.RESPONSE, Mark.CLAIM | Mark.INTEGRATION])
    source = torch.tensor([Source.TEACHER, Source.STUDENT, Source.GOLD, Source.GOLD])
    assert claim_extraction_weight(marks, source).tolist() == [1, 0, 0, 1]


def test_leave_one_out_baseline_is_the_mean_of_the_others():
    advantages = leave_one_out_advantages(torch.tensor([[1.0, 0.0, 0.5], [2.0, 2.0, 2.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[0.75, -0.75, 0.0], [0.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="1 sample per prompt"):
        leave_one_out_advantages(torch.ones(3, 1))


def test_reinforce_by_hand():
    """Two tokens, softmax (1/4, 3/4); token 0 was sampled with advantage 2: d/dz = -2 * (onehot - q)."""
    logits = torch.tensor([[0.25, 0.75]]).log().requires_grad_()
    loss = policy_gradient_loss(logits.log_softmax(dim=1)[:, 0], torch.tensor([2.0]))
    assert loss.sum.item() == pytest.approx(-2 * math.log(0.25))
    loss.mean().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.5, 1.5]]))


def test_at_equal_weights_the_ratio_has_the_gradient_of_reinforce():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantage = torch.tensor([0.5, -1.0, torch.nan])
    old = torch.tensor([-1.0, -2.0, torch.nan])
    (plain,) = torch.autograd.grad(policy_gradient_loss(logprobs, advantage).mean(), logprobs)
    (ratio,) = torch.autograd.grad(policy_gradient_loss(logprobs, advantage, old).mean(), logprobs)
    torch.testing.assert_close(plain, torch.tensor([-0.25, 0.5, 0.0]))
    torch.testing.assert_close(ratio, plain)


def test_the_ratio_is_clipped_only_in_the_advantages_direction():
    old = torch.zeros(4)
    logprobs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    loss = policy_gradient_loss(logprobs, torch.tensor([1.0, 1.0, -1.0, -1.0]), old, clip=0.2)
    assert loss.sum.item() == pytest.approx(-1.2 - 0.5 + 1.5 + 0.8)
    (gradient,) = torch.autograd.grad(loss.sum, logprobs)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.5, 1.5, 0.0]))


def test_nothing_selected_gives_zero_with_its_graph():
    logprobs = torch.full((3,), -2.0, requires_grad=True)
    losses = [
        caws_compliance_loss(logprobs[:, None].expand(3, 3), torch.zeros(3, 3, dtype=torch.bool)),
        claim_extraction_loss(logprobs, logprobs, torch.zeros(3), ce_share=0.5),
        policy_gradient_loss(logprobs, torch.full((3,), torch.nan)),
        policy_gradient_loss(logprobs[:0], torch.empty(0)),
    ]
    for loss in losses:
        assert (loss.sum, loss.count, loss.mean()) == (0, 0, 0)
        (gradient,) = torch.autograd.grad(loss.mean(), logprobs)
        assert torch.equal(gradient, torch.zeros(3))


def test_splitting_by_sequence_and_order_change_nothing():
    torch.manual_seed(0)
    ids = torch.tensor([BOT, WORD, EOT, EOS, WORD, BOT, EOS])
    sequences = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    logprobs = -torch.rand(7, 3).double() - 0.1

    def loss(rows: slice | list[int]) -> torch.Tensor:
        selected = caws_terms(ids[rows], sequences[rows], bot_id=BOT, eot_id=EOT, max_spans=1)
        result = caws_compliance_loss(logprobs[rows], selected)
        return torch.stack([result.sum, result.count.double()])

    whole = loss(slice(None))
    torch.testing.assert_close(loss(slice(0, 4)) + loss(slice(4, 7)), whole)
    torch.testing.assert_close(loss([4, 5, 6, 0, 1, 2, 3]), whole)


def test_gradients_pass_finite_differences():
    torch.manual_seed(0)
    values = (-torch.rand(4, 3).double() - 0.05).requires_grad_()
    selected = torch.rand(4, 3) > 0.4
    weight = torch.tensor([1.0, 0.0, 0.5, 1.0])
    advantage = torch.tensor([0.5, -1.0, torch.nan, 2.0])
    old = values[:, 0].detach() + torch.tensor([0.05, -0.1, 0.0, 0.4])
    for loss in (
        lambda x: caws_compliance_loss(x, selected),
        lambda x: claim_extraction_loss(x[:, 0], x[:, 1], weight, ce_share=0.3),
        lambda x: policy_gradient_loss(x[:, 0], advantage),
        lambda x: policy_gradient_loss(x[:, 0], advantage, old),
    ):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x).mean(), values)
