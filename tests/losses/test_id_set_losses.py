"""Losses on sets of ids: by hand, against the dense softmax, and whatever stands in entries that do not count."""

from __future__ import annotations

import math

import pytest
import torch

from raykd.losses.id_sets import (
    copy_mass_loss,
    distinct,
    id_set_weight,
    number_contradiction_loss,
    set_logprobs,
    tool_choice_loss,
)
from raykd.types import SetKind, Source

SETS = torch.tensor([[0.5, 0.25, 9.0], [0.2, 0.3, 0.1]], dtype=torch.float64).log()
PRESENT = torch.tensor([[True, True, False], [True, True, True]])
WRITTEN = torch.tensor([0.25, 0.2], dtype=torch.float64).log()
ONE = torch.ones(2)


def losses(sets, present, written, weight):
    return {
        "choice": tool_choice_loss(sets, present, written, weight, temperature=0.7),
        "copy": copy_mass_loss(sets, present, weight),
        "contradiction": number_contradiction_loss(sets, present, weight),
    }


def test_hand_computed_values():
    choice = tool_choice_loss(SETS, PRESENT, WRITTEN, ONE)
    assert choice.sum.item() == pytest.approx(-math.log(0.25 / 0.75) - math.log(0.2 / 0.6))
    hot = tool_choice_loss(SETS[:1], PRESENT[:1], WRITTEN[:1], ONE[:1], temperature=0.5)
    assert hot.sum.item() == pytest.approx(-math.log(0.25**2 / (0.5**2 + 0.25**2)))
    assert copy_mass_loss(SETS, PRESENT, ONE).sum.item() == pytest.approx(-math.log(0.75) - math.log(0.6))
    wrong = number_contradiction_loss(SETS, PRESENT, torch.tensor([0.0, 0.5]))
    assert wrong.sum.item() == pytest.approx(-0.5 * math.log(0.8 * 0.7 * 0.9))
    assert wrong.count == 0.5


def test_gradients_pass_finite_differences():
    for name in ("choice", "copy", "contradiction"):
        inputs = (SETS.clone().requires_grad_(), WRITTEN.clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda s, w, name=name: losses(s, PRESENT, w, ONE)[name].sum, inputs)
        losses(inputs[0], PRESENT, inputs[1], ONE)[name].sum.backward()
        assert inputs[0].grad is not None
        assert inputs[0].grad[PRESENT].abs().min() > 0


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_entries_that_do_not_count_are_not_looked_at(junk):
    sets = torch.cat([SETS.masked_fill(~PRESENT, junk), torch.full((2, 3), junk)]).requires_grad_()
    present = torch.cat([PRESENT, torch.tensor([[True] * 3, [False] * 3])])
    written = torch.cat([WRITTEN, torch.full((2,), junk)]).requires_grad_()
    clean = losses(SETS, PRESENT, WRITTEN, ONE)
    for name, loss in losses(sets, present, written, torch.tensor([1.0, 1.0, 0.0, 0.0])).items():
        assert loss.sum.item() == pytest.approx(clean[name].sum.item())
        assert loss.count == 2
        (gradient,) = torch.autograd.grad(loss.sum, sets)
        assert gradient.isfinite().all()
        assert (gradient[2:] == 0).all()
        assert gradient[0, 2] == 0


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0), (2, 3)])
def test_nothing_to_count_is_exactly_zero_with_its_graph(shape):
    sets = torch.zeros(shape, requires_grad=True)
    written = torch.zeros(shape[0], requires_grad=True)
    for loss in losses(sets, torch.zeros(shape, dtype=torch.bool), written, torch.zeros(shape[0])).values():
        assert (loss.sum, loss.count) == (0, 0)
        loss.sum.backward()
    assert sets.grad is not None
    assert not sets.grad.any()


def test_certainty_is_finite():
    certain = torch.tensor([[0.0, -torch.inf]], requires_grad=True)
    everything = torch.ones(1, 2, dtype=torch.bool)
    for loss in losses(certain, everything, torch.zeros(1), torch.ones(1)).values():
        (gradient,) = torch.autograd.grad(loss.sum, certain)
        assert loss.sum.isfinite()
        assert gradient.isfinite().all()
    assert copy_mass_loss(certain, everything, torch.ones(1)).sum == 0


def test_an_id_counts_once_and_the_filling_never():
    ids = torch.tensor([[5, 3, 5, -1, 3], [-1, -1, -1, -1, -1]])
    assert distinct(ids).tolist() == [[True, True, False, False, False], [False] * 5]


def test_only_sets_of_the_kind_that_the_student_did_not_write_count():
    kind = torch.tensor([SetKind.COPY, SetKind.COPY, SetKind.TOOL_CHOICE, SetKind.CONTRADICTION])
    source = torch.tensor([Source.TEACHER, Source.STUDENT, Source.GOLD, Source.GOLD])
    assert id_set_weight(kind, source, SetKind.COPY).tolist() == [1, 0, 0, 0]
    assert id_set_weight(kind, source, SetKind.TOOL_CHOICE).tolist() == [0, 0, 1, 0]


def test_through_the_head_it_is_the_dense_softmax_and_order_and_filling_change_nothing():
    torch.manual_seed(0)
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 5, -1], [2, 2, 0], [6, 3, 4]])
    written = torch.tensor([5, 0, 4])

    def total(ids, rows):
        q = set_logprobs(hidden[rows], head, ids[rows], written[rows], num_valid_ids=7, chunk_rows=2)
        return torch.stack([loss.sum for loss in losses(*q, torch.ones(len(rows))).values()])

    def dense(rows):
        logq = (hidden @ head.T).log_softmax(dim=1)
        sums = torch.zeros(3, dtype=torch.float64)
        for row in rows:
            members = logq[row, sorted({int(i) for i in ids[row]} - {-1})]
            choice = (members / 0.7).logsumexp(0) - logq[row, written[row]] / 0.7
            sums = sums + torch.stack([choice, -members.logsumexp(0), -torch.log1p(-members.exp()).sum()])
        return sums

    for rows in ([0, 1, 2], [2, 0, 1]):
        wide = torch.nn.functional.pad(ids.flip(1), (2, 1), value=-1)
        assert torch.allclose(total(wide, rows), dense(rows), rtol=1e-12)
    assert torch.allclose(total(ids, [0]) + total(ids, [1, 2]), dense([0, 1, 2]))
    ours = torch.autograd.grad(total(ids, [0, 1, 2]).sum(), (hidden, head))
    expected = torch.autograd.grad(dense([0, 1, 2]).sum(), (hidden, head))
    for found, wanted in zip(ours, expected, strict=True):
        assert torch.allclose(found, wanted)
