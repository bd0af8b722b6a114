"""Expected length against enumeration; stops and excess by hand."""

from __future__ import annotations

import math

import pytest
import torch

from raykd.losses.length_aware import expected_length, length_aware_kd_loss, stop_weight
from raykd.types import Source

NAN = torch.nan


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def length_by_enumeration(hazards: list[float]) -> float:
    """Sum over every length that can come up of length times probability; what is left at the end counts as cut off."""
    expected, alive = 0.0, 1.0
    for length, hazard in enumerate(hazards, start=1):
        last = length == len(hazards)
        expected += length * alive * (1.0 if last else hazard)
        alive *= 1.0 - hazard
    return expected


def test_expected_length_is_that_of_enumeration():
    hazards = [[0.1, 0.5, 0.9], [1e-6], [0.3, 0.3, 0.3, 0.3]]
    flat = logs(*(hazard for sequence in hazards for hazard in sequence))
    found = expected_length(flat, torch.tensor([0, 0, 0, 1, 2, 2, 2, 2]), 3)
    torch.testing.assert_close(found, torch.tensor([length_by_enumeration(h) for h in hazards], dtype=torch.float64))
    assert expected_length(flat[:2], torch.tensor([2, 2]), 4).tolist() == pytest.approx([0, 0, 1.9, 0])


def test_a_sequence_behind_many_certain_stops_keeps_its_precision():
    flat = torch.cat([torch.full((5000,), -1e-7), torch.tensor([0.1, 0.5, 0.9]).log()])
    sequences = torch.cat([torch.zeros(5000, dtype=torch.int64), torch.ones(3, dtype=torch.int64)])
    assert expected_length(flat, sequences, 2)[1].item() == pytest.approx(2.35, abs=1e-5)


def test_stops_are_the_cross_entropy_of_the_end_of_turn():
    eos = logs(0.1, 0.5, 0.2, 0.25)
    is_stop = stop_weight(torch.tensor([7, 3, 3, 3]), torch.tensor([Source.TEACHER] * 3 + [Source.STUDENT]), eos_id=3)
    assert is_stop.tolist() == [0, 1, 1, 0]
    loss = length_aware_kd_loss(eos, is_stop, torch.tensor([0, 0, 1, 2]), torch.full((3,), NAN))
    assert loss.sum.item() == pytest.approx(math.log(2) + math.log(5))
    assert loss.count == 2


def test_excess_beyond_the_hinge_costs_its_slope():
    eos = logs(0.0, 0.0, 0.0, 0.5, 0.5, 0.5)  # four tokens for sure and then 1/2, and 1.5 tokens
    rows = torch.tensor([0, 0, 0, 0, 1, 1])
    targets = torch.tensor([2.0, 1.0])
    loss = length_aware_kd_loss(eos, torch.zeros(6), rows, targets, hinge=0.5, slope=2.0)
    assert loss.sum.item() == pytest.approx(2.0 * (4 / 2 - 1 - 0.5) + 2.0 * 0.0)
    assert loss.count == 2
    assert length_aware_kd_loss(eos, torch.zeros(6), rows, torch.tensor([4.0, 2.0])).sum == 0, "not longer: no cost"


def test_completeness_excuses_length():
    eos = logs(0.0, 0.0, 0.0, 0.0)
    rows, targets = torch.tensor([0, 0, 1, 1]), torch.tensor([NAN, 1.0])  # the first is complete
    loss = length_aware_kd_loss(eos, torch.zeros(4), rows, targets, hinge=0.0)
    assert (loss.sum.item(), loss.count) == (1.0, 1.0)


def test_length_has_a_gradient_towards_stopping():
    logits = torch.zeros(3, requires_grad=True, dtype=torch.float64)
    eos = torch.nn.functional.logsigmoid(logits)
    length_aware_kd_loss(eos, torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.tensor([1.0])).mean().backward()
    assert logits.grad is not None
    assert (logits.grad[:2] < 0).all()
    assert logits.grad[2] == 0, "the last token's hazard decides nothing that was seen"


def test_what_is_neither_stop_nor_rollout_is_not_looked_at():
    eos = torch.tensor([NAN, -torch.inf, -0.7], requires_grad=True)
    loss = length_aware_kd_loss(
        eos, torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0, 0, 1]), torch.tensor([NAN, NAN]), hinge=0.0
    )
    (gradient,) = torch.autograd.grad(loss.mean(), eos)
    assert (loss.sum.item(), loss.count) == (pytest.approx(0.7), 1.0)
    assert gradient.tolist() == [0.0, 0.0, -1.0]
    nothing = length_aware_kd_loss(eos, torch.zeros(3), torch.tensor([0, 0, 1]), torch.tensor([NAN, NAN]))
    (gradient,) = torch.autograd.grad(nothing.mean(), eos)
    assert (nothing.sum, nothing.count, gradient.tolist()) == (0, 0, [0.0, 0.0, 0.0])


def test_splitting_and_order_of_sequences_change_nothing():
    torch.manual_seed(0)
    eos = -torch.rand(9).double() - 0.2
    rows = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    targets, stops = torch.tensor([1.0, NAN, 2.0]), torch.tensor([0.0] * 4 + [1.0] + [0.0] * 4)

    def loss(sequences: list[int]) -> torch.Tensor:
        tokens = torch.cat([torch.nonzero(rows == s)[:, 0] for s in sequences])
        renumbered = torch.cat([torch.full((int((rows == s).sum()),), i) for i, s in enumerate(sequences)])
        result = length_aware_kd_loss(eos[tokens], stops[tokens], renumbered, targets[sequences], hinge=0.0)
        return torch.stack([result.sum, result.count.double()])

    whole = loss([0, 1, 2])
    torch.testing.assert_close(loss([2, 0, 1]), whole)
    torch.testing.assert_close(loss([0]) + loss([1, 2]), whole)


def test_gradients_pass_finite_differences():
    torch.manual_seed(0)
    eos = (-torch.rand(6).double() - 0.5).requires_grad_()
    rows, targets = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([1.0, NAN])
    stops = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    assert torch.autograd.gradcheck(lambda x: length_aware_kd_loss(x, stops, rows, targets).mean(), eos)
    assert torch.autograd.gradcheck(lambda x: expected_length(x, rows, 2), eos)
