"""Sums by weight, and the log of a complement."""

from __future__ import annotations

import math

import pytest
import torch

from raykd.losses.reduction import log1mexp, masked_sum


@pytest.mark.parametrize(
    ("x", "expected"), [(-1e-12, math.log(1e-12)), (math.log(0.25), math.log(0.75)), (-40.0, -4.248354255e-18)]
)
def test_log1mexp_is_exact_near_zero_and_far_from_it(x, expected):
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-9)


def test_log1mexp_is_finite_at_both_ends_in_value_and_gradient():
    x = torch.tensor([0.0, 1e-9, -torch.inf, -0.5, -math.log(2)], requires_grad=True)
    value = log1mexp(x)
    value.sum().backward()
    assert x.grad is not None
    assert value.isfinite().all()
    assert x.grad.isfinite().all()
    assert value[2] == 0
    assert x.grad[2] == 0
    assert x.grad[3].item() == pytest.approx(-1 / math.expm1(0.5), rel=1e-6)


def test_log1mexp_has_the_gradient_of_finite_differences():
    x = torch.tensor([-1e-3, -0.3, -0.6, -0.8, -5.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(log1mexp, (x,))


def test_a_value_of_weight_zero_contributes_exactly_nothing():
    values = torch.tensor([1.0, torch.nan, torch.inf, 2.0], requires_grad=True)
    loss = masked_sum(values, torch.tensor([0.5, 0.0, 0.0, 1.0]))
    loss.sum.backward()
    assert loss.sum.item() == 2.5
    assert loss.count.item() == 1.5
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.0, 0.0, 1.0]
