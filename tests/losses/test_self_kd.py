"""self_kd by hand: the divergence from a frozen student, through `combine`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raykd.data.collate import collate_kd_batch
from raykd.losses.combine import combine, loss_counts
from raykd.losses.context import Head
from raykd.types import Source, StudentOutput
from tests.losses.test_all_losses import Model, alone, context_of, make_examples

CONFIG = alone("self_kd")


def self_kd(model: Model, output: StudentOutput, examples) -> Tensor:
    batch, context = collate_kd_batch(examples, pad_id=0), context_of(model)
    head = Head(model.head.weight, model.head.bias)
    return combine(batch, output, head, CONFIG, loss_counts(batch, CONFIG, context), context).total


def test_it_is_the_mean_kl_over_the_tokens_of_texts_to_follow():
    model, examples = Model(), make_examples()
    batch, context = collate_kd_batch(examples, pad_id=0), context_of(model)
    assert context.reference_head is not None
    assert (batch.response_source == Source.STUDENT).any(), "some tokens are to be left out"
    with torch.no_grad():
        output = model(batch)
        found = self_kd(model, output, examples)
        rows = (batch.response_index - 1)[batch.response_source != Source.STUDENT]
        assert output.reference_hidden is not None
        reference = (
            output.reference_hidden.flatten(0, 1)[rows] @ context.reference_head.weight.T + context.reference_head.bias
        )
        student = model.head(output.hidden.flatten(0, 1)[rows])
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(found, expected)


def test_a_student_that_is_as_it_was_has_neither_loss_nor_gradient():
    model, examples = Model(), make_examples()
    output = model(collate_kd_batch(examples, pad_id=0))
    same = replace(output, reference_hidden=output.hidden.detach())
    context_head = Head(model.head.weight.detach().clone(), model.head.bias.detach().clone())
    batch, context = collate_kd_batch(examples, pad_id=0), replace(context_of(model), reference_head=context_head)
    head = Head(model.head.weight, model.head.bias)
    total = combine(batch, same, head, CONFIG, loss_counts(batch, CONFIG, context), context).total
    total.backward()
    assert total.item() == pytest.approx(0.0, abs=1e-12)
    assert all(p.grad is None or p.grad.abs().max() < 1e-9 for p in model.parameters())
