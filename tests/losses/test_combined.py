"""The plain-tensor face of the losses: the same numbers as the training loop's, and clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raykd.loss_config import LossConfig
from raykd.losses.combine import combine, loss_counts
from raykd.losses.combined import IGNORE, combined_kd_loss
from raykd.losses.context import Head
from raykd.losses.cross_entropy import json_argument_weight
from raykd.types import Mark, Source, StudentOutput, TokenLoss
from tests.losses.test_combine import EVERYTHING, SOURCES, H, K, T, V, make_batch

BATCH = make_batch()
RESPONSE = (BATCH.marks & int(Mark.RESPONSE)) != 0
LABELS = BATCH.input_ids.masked_fill(~RESPONSE, IGNORE)
SOURCE = torch.tensor(SOURCES)
MASKS = {
    "tool_name": (BATCH.marks & int(Mark.TOOL_NAME)) != 0,
    "json_argument": json_argument_weight(BATCH.marks, torch.ones(4, 1), key_weight=0.25),
    "integration_copy": (BATCH.marks & int(Mark.INTEGRATION)) != 0,
}


def unpacked(values: Tensor, fill: float) -> Tensor:
    """[N, ...] of the response tokens -> [B, T, ...]."""
    flat = torch.full((LABELS.numel(), *values.shape[1:]), fill, dtype=values.dtype)
    flat[BATCH.response_index] = values
    return flat.unflatten(0, LABELS.shape)


TOPK: dict[str, Any] = {
    "topk_ids": unpacked(BATCH.topk_ids, 0),
    "topk_logprobs": unpacked(BATCH.topk_logprobs, -torch.inf),
    "log_tail": unpacked(BATCH.log_tail, 0.0),
}


def student() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(*LABELS.shape, H, generator=g).double(), torch.randn(V, H, generator=g).double()


@pytest.mark.parametrize(
    "options",
    [{}, {"divergence": "reverse_kl"}, {"divergence": "jsd", "beta": 0.2, "support": "topk_renorm", "temperature": 2.0}],
    ids=str,
)
def test_numbers_and_gradients_are_those_of_the_training_loop(options):
    hidden, head = student()
    config = EVERYTHING.model_copy(update={f"kd_{name}": value for name, value in options.items()})
    hidden.requires_grad_()
    report = combine(BATCH, StudentOutput(hidden), Head(head), config, loss_counts(BATCH, config))
    (want,) = torch.autograd.grad(report.total, hidden)
    losses = combined_kd_loss(hidden @ head.T, LABELS, config.weights, source=SOURCE, masks=MASKS, **TOPK, **options)
    (got,) = torch.autograd.grad(losses["total"], hidden)
    assert losses.keys() == {"total", *config.weights}
    torch.testing.assert_close(losses["total"], report.total)
    torch.testing.assert_close(got, want)
    for name, part in report.parts.items():
        torch.testing.assert_close(losses[name], part.mean(), check_dtype=False)
        assert not losses[name].requires_grad


def test_teacher_logits_give_what_all_of_the_vocabulary_as_top_k_gives():
    hidden, head = student()
    logits = hidden @ head.T
    teacher = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).double()
    # Column t of the logits predicts t+1, column t of the scores is about t.
    logprobs, ids = teacher.log_softmax(dim=2).roll(1, dims=1).sort(dim=2, descending=True)
    dense = combined_kd_loss(logits, LABELS, {"kd": 1.0}, teacher_logits=teacher)
    sparse = combined_kd_loss(logits, LABELS, {"kd": 1.0}, topk_ids=ids, topk_logprobs=logprobs)
    torch.testing.assert_close(dense["total"], sparse["total"], rtol=1e-6, atol=1e-6)
    few = combined_kd_loss(logits, LABELS, {"kd": 1.0}, topk_ids=ids[..., :K], topk_logprobs=logprobs[..., :K])
    assert 0 < few["total"] < dense["total"]


def test_text_of_the_student_gets_kd_and_never_cross_entropy():
    hidden, head = student()
    logits = (hidden @ head.T).requires_grad_()
    every: dict[str, Any] = {
        "ce_teacher": 1.0,
        "ce_truth": 1.0,
        "tool_name": 1.0,
        "json_argument": 1.0,
        "integration_copy": 1.0,
    }
    losses = combined_kd_loss(logits, LABELS, every, source=Source.STUDENT, masks=MASKS)
    (gradient,) = torch.autograd.grad(losses["total"], logits)
    assert losses["total"] == 0
    assert (gradient == 0).all()
    assert combined_kd_loss(logits, LABELS, {"kd": 1.0}, source=Source.STUDENT, **TOPK)["kd"] > 0
    # And the training loop: rows 0 to 3 are gold, teacher's, student's, teacher's.
    hidden.requires_grad_()
    config = LossConfig(kd=0.0, **every)
    report = combine(BATCH, StudentOutput(hidden), Head(head), config, loss_counts(BATCH, config))
    (gradient,) = torch.autograd.grad(report.total, hidden)
    assert (gradient[2] == 0).all()
    assert (gradient[[0, 1, 3]].abs().sum(dim=(1, 2)) > 0).all()
    by_source = combined_kd_loss(logits, LABELS, {"ce_teacher": 1.0, "ce_truth": 1.0}, source=SOURCE)
    assert by_source["ce_truth"] == combined_kd_loss(logits[:1], LABELS[:1], {"ce_truth": 1.0}, source=Source.GOLD)["total"]


def test_padding_order_and_what_is_not_supervised_change_nothing():
    hidden, head = student()
    logits = hidden @ head.T
    want = combined_kd_loss(logits, LABELS, EVERYTHING.weights, source=SOURCE, masks=MASKS, **TOPK)
    order = torch.tensor([2, 0, 3, 1])

    def other(values: Tensor, fill: float) -> Tensor:
        pad = [0, 0] * (values.ndim - 2) + [0, 3]
        return torch.nn.functional.pad(values[order], pad, value=fill)

    poisoned = logits.clone()
    poisoned[:, :-1][~RESPONSE[:, 1:]] = torch.nan  # logits that predict nothing supervised
    poisoned[:, -1] = torch.inf
    topk: dict[str, Any] = {name: other(values, 0) for name, values in TOPK.items()}
    got = combined_kd_loss(
        other(poisoned, torch.nan),
        other(LABELS, IGNORE),
        EVERYTHING.weights,
        source=SOURCE[order],
        masks={name: other(mask, 0) for name, mask in MASKS.items()},
        **topk,
    )
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


def test_weights_of_zero_or_less_switch_a_loss_off_and_need_no_data():
    hidden, head = student()
    weights = {"kd": 0.0, "tool_name": -1.0, "ce_teacher": 2.0}
    losses = combined_kd_loss(hidden @ head.T, LABELS, weights)
    assert losses.keys() == {"total", "ce_teacher"}
    torch.testing.assert_close(losses["total"], 2 * losses["ce_teacher"])


def test_losses_computed_elsewhere_join_the_total():
    hidden, head = student()
    halt = TokenLoss(torch.tensor(3.0, requires_grad=True), torch.tensor(2.0))
    losses = combined_kd_loss(hidden @ head.T, LABELS, {"ce_teacher": 1.0, "halt": 4.0}, others={"halt": halt})
    torch.testing.assert_close(losses["total"], losses["ce_teacher"] + 4 * 1.5, check_dtype=False)


def test_nothing_supervised_is_zero_with_a_zero_gradient():
    hidden, head = student()
    logits = (hidden @ head.T).requires_grad_()
    nothing = torch.full_like(LABELS, IGNORE)
    dense: dict[str, Any] = {"teacher_logits": torch.zeros_like(logits)}
    for teacher in (TOPK, dense):
        losses = combined_kd_loss(logits, nothing, {"kd": 1.0, "ce_teacher": 1.0}, **teacher)
        (gradient,) = torch.autograd.grad(losses["total"], logits)
        assert losses["total"] == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("support", ["topk_tail", "topk_renorm"])
def test_finite_differences_agree_with_missing_entries_among_the_top_k(support):
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 4, 6, generator=g).double().requires_grad_()
    labels = torch.randint(0, 6, (2, 4), generator=g)
    ids = torch.rand(2, 4, 6, generator=g).argsort(dim=2)[..., :3]
    logprobs = torch.randn(2, 4, 6, generator=g).double().log_softmax(dim=2).gather(2, ids)
    logprobs[0, 1, 2] = logprobs[1, 2] = -torch.inf
    ids[0, 1, 2] = ids[0, 1, 0]  # what a missing entry names does not matter
    weights = {"kd": 1.0, "ce_teacher": 0.3}

    def total(x: Tensor) -> Tensor:
        return combined_kd_loss(x, labels, weights, topk_ids=ids, topk_logprobs=logprobs, support=support)["total"]

    assert torch.autograd.gradcheck(total, (logits,))


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"kd": 1.0}, {}, r"weights\['kd'\]=1.0 but there is no teacher: found neither teacher_logits nor topk_ids"),
        ({"kd": 1.0}, {"topk_ids": TOPK["topk_ids"]}, "there is no teacher"),
        ({"kl": 1.0}, {}, "weights has 'kl'; expected kd, ce_teacher"),
        ({"halt": 1.0}, {}, "weights has 'halt'"),
        ({"kd": 0.0}, {}, "every weight is 0 or less"),
        ({"tool_name": 1.0}, {}, r"weights\['tool_name'\]=1.0 without masks\['tool_name'\]"),
        ({"tool_name": 1.0}, {"masks": {"tool_name": RESPONSE[:, 1:]}}, rf"is \[4, {T - 1}\]; expected \[4, {T}\]"),
        ({"kd": 1.0}, TOPK | {"temperature": 2.0}, "use kd_temperature=1 or kd_support=topk_renorm"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_what_to_do(weights, options, message):
    hidden, head = student()
    with pytest.raises(ValueError, match=message):
        combined_kd_loss(hidden @ head.T, LABELS, weights, **options)


def test_a_total_that_is_no_number_raises_with_the_part_it_comes_from():
    hidden, head = student()
    logits = hidden @ head.T
    logits[0, 5, 0] = torch.nan
    with pytest.raises(ValueError, match="the total is nan; expected a finite number, look for the cause in ce_truth=nan"):
        combined_kd_loss(logits, LABELS, {"ce_truth": 1.0}, source=SOURCE)
    assert combined_kd_loss(logits, LABELS, {"ce_teacher": 1.0}, source=SOURCE)["total"].isfinite()
