"""The legal mass: equal to the dense formula, exact where it is nearly 1, whatever the chunks."""

from __future__ import annotations

import pytest
import torch

from raykd.losses.grammar import json_grammar_loss, json_grammar_weight
from raykd.types import Source


def packed(legal: torch.Tensor) -> torch.Tensor:
    """bool [U, V] -> int32 [U, ceil(V/32)]."""
    words = torch.zeros(len(legal), -(-legal.shape[1] // 32), dtype=torch.int64)
    for row, index in legal.nonzero().tolist():
        words[row, index // 32] |= 1 << (index % 32)
    return words.where(words < 2**31, words - 2**32).to(torch.int32)


@pytest.fixture
def case():
    torch.manual_seed(1)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(70, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(70, dtype=torch.float64, requires_grad=True)
    legal = torch.rand(3, 70) < 0.4
    legal[2] = torch.arange(70) < 60  # all of 60 valid ids
    legal[0, 31] = legal[1, 63] = True  # sign bits of the words
    index = torch.tensor([0, 1, 1, 2, 0])
    return hidden, head, bias, legal, index


def dense(hidden, head, bias, legal, weight, num_valid_ids=70):
    logits = (hidden @ head.T + bias)[:, :num_valid_ids]
    mass = (logits.softmax(dim=1) * legal[:, :num_valid_ids]).sum(dim=1)
    return -(mass.log() * weight).sum()


@pytest.mark.parametrize("num_valid_ids", [None, 60])
@pytest.mark.parametrize("chunk_rows", [1, 2, 9])
def test_it_is_the_dense_formula_with_its_gradients(case, chunk_rows, num_valid_ids):
    hidden, head, bias, legal, index = case
    weight = torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0])
    loss = json_grammar_loss(
        hidden, head, index, packed(legal), weight, bias=bias, num_valid_ids=num_valid_ids, chunk_rows=chunk_rows
    )
    expected = dense(hidden, head, bias, legal[index], weight.double(), num_valid_ids or 70)
    assert torch.allclose(loss.sum, expected, rtol=1e-12)
    assert loss.count == 4.5
    inputs = (hidden, head, bias)
    for ours, wanted in zip(torch.autograd.grad(loss.sum, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert torch.allclose(ours, wanted, atol=1e-12)
        assert wanted.abs().max() > 0


def test_ids_beyond_the_masks_are_illegal(case):
    hidden, head, bias, legal, index = case
    legal = legal[:, :64].clone()
    loss = json_grammar_loss(hidden, head, index, packed(legal), torch.ones(5), bias=bias)
    beyond = torch.nn.functional.pad(legal, (0, 6))
    assert torch.allclose(loss.sum, dense(hidden, head, bias, beyond[index], torch.ones(5)))


def test_gradients_pass_finite_differences(case):
    hidden, head, bias, legal, index = case

    def value(hidden, head, bias):
        return 3 * json_grammar_loss(hidden, head, index, packed(legal), torch.ones(5), bias=bias, chunk_rows=2).sum

    inputs = (hidden, head, bias)
    # Not gradcheck: it differentiates twice, which this loss refuses.
    gradients = torch.autograd.grad(value(hidden, head, bias), inputs)
    with torch.no_grad():
        for which, gradient in enumerate(gradients):
            step = torch.randn_like(inputs[which]) * 1e-5
            ahead = value(*(x + step if i == which else x for i, x in enumerate(inputs)))
            behind = value(*(x - step if i == which else x for i, x in enumerate(inputs)))
            assert ((ahead - behind) / 2).item() == pytest.approx((gradient * step).sum().item(), rel=1e-5)


def test_a_tiny_illegal_mass_is_not_rounded_away():
    hidden, head = torch.ones(1, 1, requires_grad=True), torch.tensor([[30.0], [0.0]])
    loss = json_grammar_loss(
        hidden, head, torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int32), torch.ones(1)
    )
    assert loss.sum.item() == pytest.approx(torch.tensor(-30.0).exp().item(), rel=1e-5)
    loss.sum.backward()
    assert hidden.grad is not None
    assert hidden.grad.item() == pytest.approx(-30 * loss.sum.item(), rel=1e-5)


def test_without_tokens_it_is_zero_with_its_graph_and_rows_of_weight_zero_are_not_looked_at(case):
    hidden, head, _, legal, index = case
    empty = json_grammar_loss(hidden[:0], head, index[:0], torch.empty(0, 0, dtype=torch.int32), torch.empty(0))
    assert (empty.sum, empty.count) == (0, 0)
    (gradient,) = torch.autograd.grad(empty.sum, head)
    assert not gradient.any()
    legal = torch.cat([legal, torch.zeros(1, 70, dtype=torch.bool)])  # nothing legal: infinite, if it counted
    loss = json_grammar_loss(hidden, head, torch.full((5,), 3), packed(legal), torch.zeros(5))
    assert (loss.sum, loss.count) == (0, 0)
    assert not torch.autograd.grad(loss.sum, hidden)[0].any()
    with torch.no_grad():
        assert json_grammar_loss(hidden, head, index, packed(legal), torch.ones(5)).sum > 0


def test_tokens_of_the_student_have_no_weight():
    assert json_grammar_weight(torch.tensor([Source.GOLD, Source.STUDENT, Source.TEACHER])).tolist() == [1, 0, 1]
