"""Cross-entropies by hand: which tokens count, with which weight."""

from __future__ import annotations

import pytest
import torch

import raykd.losses
from raykd.losses import cross_entropy as ce
from raykd.losses.reduction import masked_sum
from raykd.types import Mark, Source

LOGPROBS = torch.tensor([-1.0, -2.0, -4.0, -8.0])
RESPONSE = int(Mark.RESPONSE)


def marks(*bits: int) -> torch.Tensor:
    return torch.tensor([RESPONSE | bit for bit in bits], dtype=torch.int32)


def sources(*values: Source) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


GOLD4 = sources(*[Source.GOLD] * 4)


def test_cross_entropy_goes_by_who_wrote_the_text():
    source = sources(Source.GOLD, Source.TEACHER, Source.TEACHER, Source.STUDENT)
    for loss, total, count in ((ce.ce_truth_loss, 1.0, 1.0), (ce.ce_teacher_loss, 6.0, 2.0)):
        result = loss(LOGPROBS, source)
        assert (result.sum, result.count) == (total, count)
    scored = torch.tensor([True, True, False, True])
    assert ce.ce_teacher_argmax_weight(source, scored).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("loss", "mark"),
    [(raykd.losses.tool_name_loss, Mark.TOOL_NAME), (raykd.losses.integration_copy_loss, Mark.INTEGRATION)],
)
def test_process_losses_count_marked_tokens_of_any_author_but_the_student(loss, mark):
    source = sources(Source.GOLD, Source.TEACHER, Source.TEACHER, Source.STUDENT)
    result = loss(LOGPROBS, marks(mark, 0, mark | Mark.ARGUMENT_KEY, mark), source)
    assert (result.sum, result.count, result.mean()) == (5.0, 2.0, 2.5)


def test_an_argument_token_takes_the_largest_weight_of_its_classes():
    both = Mark.ARGUMENT_STRUCTURE | Mark.ARGUMENT_VALUE
    bits = marks(Mark.ARGUMENT_STRUCTURE, Mark.ARGUMENT_KEY, both, Mark.TOOL_NAME)
    result = raykd.losses.json_argument_loss(LOGPROBS, bits, GOLD4, structure_weight=0.5, key_weight=0.25, value_weight=2.0)
    assert (result.sum, result.count) == (0.5 * 1 + 0.25 * 2 + 2.0 * 4, 2.75)
    everything = raykd.losses.json_argument_loss(LOGPROBS, bits, GOLD4)
    assert (everything.sum, everything.count) == (7.0, 3.0)


def test_an_argument_class_of_weight_zero_is_not_counted():
    bits = marks(Mark.ARGUMENT_STRUCTURE, Mark.ARGUMENT_KEY, Mark.ARGUMENT_STRUCTURE | Mark.ARGUMENT_KEY, 0)
    result = raykd.losses.json_argument_loss(LOGPROBS, bits, GOLD4, structure_weight=0.0)
    assert (result.sum, result.count) == (6.0, 2.0)


def test_nothing_marked_gives_exactly_zero_with_its_graph():
    logprobs = LOGPROBS.clone().requires_grad_()
    result = raykd.losses.tool_name_loss(logprobs, marks(0, 0, 0, 0), GOLD4)
    assert (result.sum, result.count, result.mean()) == (0, 0, 0)
    result.mean().backward()
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad, torch.zeros(4))


def test_values_of_weight_zero_are_not_looked_at():
    values = torch.tensor([1.0, torch.nan, torch.inf], requires_grad=True)
    result = masked_sum(values, torch.tensor([0.5, 0.0, 0.0]))
    result.sum.backward()
    assert (result.sum, result.count) == (0.5, 0.5)
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("split", [1, 2, 3])
def test_splitting_ordering_and_padding_change_nothing(split):
    bits = marks(Mark.ARGUMENT_STRUCTURE, Mark.ARGUMENT_KEY, Mark.ARGUMENT_VALUE, Mark.ARGUMENT_KEY)

    def loss(rows: list[int], padding: int = 0) -> torch.Tensor:
        logprobs = torch.cat([LOGPROBS[rows], torch.full((padding,), -99.0)])
        padded = torch.cat([bits[rows], torch.zeros(padding, dtype=torch.int32)])
        source = torch.zeros(len(rows) + padding, dtype=torch.int8)
        result = raykd.losses.json_argument_loss(logprobs, padded, source, key_weight=0.5)
        return torch.stack([result.sum, result.count])

    whole = loss([0, 1, 2, 3])
    assert torch.equal(loss([3, 1, 0, 2], padding=3), whole)
    assert torch.equal(loss([0, 1, 2, 3][:split]) + loss([0, 1, 2, 3][split:]), whole)


def test_gradients_pass_finite_differences():
    bits = marks(Mark.TOOL_NAME, Mark.ARGUMENT_KEY, Mark.ARGUMENT_VALUE, Mark.INTEGRATION)
    logprobs = LOGPROBS.double().requires_grad_()
    for loss in (raykd.losses.tool_name_loss, raykd.losses.json_argument_loss, raykd.losses.integration_copy_loss):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, bits, GOLD4).mean(), logprobs)
    for loss in (ce.ce_truth_loss, ce.ce_teacher_loss):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, GOLD4).mean(), logprobs)
