"""The one shift and the one division, and which token feeds which loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raykd.loss_config import LossConfig
from raykd.losses.combine import combine, loss_counts
from raykd.losses.context import Head
from raykd.losses.cross_entropy import json_argument_loss
from raykd.losses.kd import dense_kd_loss, sparse_kd_loss
from raykd.types import Batch, LossReport, Mark, Source, StudentOutput

B, T, V, H, K = 4, 10, 23, 6, 5
EVERYTHING = LossConfig(
    kd=1.0, ce_teacher=0.5, ce_truth=0.7, tool_name=2.0, json_argument=1.5, integration_copy=0.3, json_key_weight=0.25
)
SOURCES = (Source.GOLD, Source.TEACHER, Source.STUDENT, Source.TEACHER)


def make_batch() -> Batch:
    """Four sequences of different lengths and authors; the last has no teacher scores."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([10, 7, 9, 5])
    position = torch.arange(T).expand(B, T)
    marks = torch.zeros(B, T, dtype=torch.int32)
    marks[(position >= 3) & (position < lengths[:, None])] = Mark.RESPONSE
    for column, mark in ((3, Mark.TOOL_NAME), (4, Mark.ARGUMENT_STRUCTURE), (5, Mark.ARGUMENT_KEY | Mark.ARGUMENT_VALUE)):
        marks[:, column] |= mark * (marks[:, column] != 0)
    marks[0, 6] |= Mark.INTEGRATION
    index = marks.flatten().nonzero()[:, 0]
    row = index // T
    teacher = torch.randn(len(index), V, generator=g).double().mul(2.0).log_softmax(dim=1)
    order = teacher.argsort(dim=1, descending=True)
    has_teacher = row != 3
    return Batch(
        uid=torch.arange(B),
        input_ids=torch.randint(0, V, (B, T), generator=g),
        attention_mask=position < lengths[:, None],
        marks=marks,
        response_index=index,
        response_source=torch.tensor(SOURCES, dtype=torch.int8)[row],
        topk_ids=order[:, :K].masked_fill(~has_teacher[:, None], 0),
        topk_logprobs=teacher.gather(1, order[:, :K]).masked_fill(~has_teacher[:, None], -torch.inf),
        log_tail=teacher.gather(1, order[:, K:]).logsumexp(dim=1).masked_fill(~has_teacher, 0.0),
        has_teacher=has_teacher,
        tool_name_weight=torch.ones(len(index)),
    )


def take(batch: Batch, sequences: list[int], width: int = T, padding: int = 0) -> Batch:
    """Some sequences of a batch, in any order, cut or padded to another width."""
    keep = torch.cat([(batch.response_index // T == s).nonzero()[:, 0] for s in sequences])
    new_row = {s: i for i, s in enumerate(sequences)}
    rows = torch.tensor([new_row[int(r)] for r in batch.response_index[keep] // T])

    def resize(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t[sequences][:, :width], (0, padding))

    packed = {
        n: getattr(batch, n)[keep]
        for n in ("response_source", "topk_ids", "topk_logprobs", "log_tail", "has_teacher", "tool_name_weight")
    }
    return Batch(
        uid=batch.uid[sequences],
        input_ids=resize(batch.input_ids),
        attention_mask=resize(batch.attention_mask),
        marks=resize(batch.marks),
        response_index=rows * (width + padding) + batch.response_index[keep] % T,
        **packed,
    )


def make_model() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    embedding = torch.randn(V, H, generator=g).double().requires_grad_()
    return embedding, torch.randn(V, H, generator=g).double().requires_grad_()


def run(
    batches: list[Batch], config: LossConfig = EVERYTHING, num_valid_ids: int | None = None, **options
) -> tuple[list[LossReport], list[Tensor]]:
    """One optimizer step: counts over all micro-batches first, then forward and backward of each."""
    embedding, head = make_model()
    counts: dict[str, Tensor] = {}
    for batch in batches:
        for name, count in loss_counts(batch, config).items():
            counts[name] = counts.get(name, torch.zeros(())) + count
    reports = []
    for batch in batches:
        hidden = torch.nn.functional.embedding(batch.input_ids, embedding).cumsum(dim=1).tanh()
        reports.append(combine(batch, StudentOutput(hidden), Head(head, None, num_valid_ids), config, counts, **options))
        reports[-1].total.backward()
    gradients = [p.grad for p in (embedding, head) if p.grad is not None]
    return reports, gradients


def test_the_total_is_the_weighted_sum_of_parts_over_their_own_counts():
    batch = make_batch()
    (report,), _ = run([batch])
    config = EVERYTHING
    assert report.parts.keys() == config.terms.keys()
    want = sum(config.terms[name] * part.sum / part.count for name, part in report.parts.items())
    torch.testing.assert_close(report.total.detach(), want)
    counts = loss_counts(batch, config)
    assert {n: c.item() for n, c in counts.items()} == {n: p.count.item() for n, p in report.parts.items()}
    # Response tokens per sequence: 7, 4, 6, 2. Calls of the student's own sequence are no targets.
    assert counts == {
        "kd": 17, "ce_teacher": 6, "ce_truth": 7, "tool_name": 3, "json_argument": 3 + 2, "integration_copy": 1,
    }  # fmt: skip


def test_every_part_equals_its_loss_on_dense_logits():
    batch = make_batch()
    (report,), _ = run([batch])
    embedding, head = make_model()
    hidden = torch.nn.functional.embedding(batch.input_ids, embedding).cumsum(dim=1).tanh()
    logprobs = (hidden @ head.T).log_softmax(dim=2)
    predicting = logprobs.flatten(0, 1)[batch.response_index - 1].detach()  # [N, V]
    label = predicting.gather(1, batch.response_ids[:, None])[:, 0]
    source, marks = batch.response_source, batch.response_marks
    student_tail = (1 - predicting.gather(1, batch.topk_ids).exp().sum(dim=1)).log()
    kd = sparse_kd_loss(
        predicting.gather(1, batch.topk_ids), student_tail, batch.topk_logprobs, batch.log_tail, batch.has_teacher
    )
    own = source == Source.STUDENT
    want = {
        "kd": kd.sum,
        "ce_teacher": -label[source == Source.TEACHER].sum(),
        "ce_truth": -label[source == Source.GOLD].sum(),
        "tool_name": -label[((marks & Mark.TOOL_NAME) != 0) & ~own].sum(),
        "json_argument": json_argument_loss(label, marks, source, key_weight=0.25).sum,
        "integration_copy": -label[(marks & Mark.INTEGRATION) != 0].sum(),
    }
    for name, value in want.items():
        torch.testing.assert_close(report.parts[name].sum, value)


@pytest.mark.parametrize(
    "parts",
    [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3, 2, 1, 0]], [[2], [0, 3, 1]]],
    ids=["two", "four", "reordered", "uneven"],
)
def test_however_a_step_is_split_its_loss_and_gradients_are_the_same(parts):
    batch = make_batch()
    (whole,), want = run([batch])
    reports, got = run([take(batch, part) for part in parts])
    torch.testing.assert_close(sum(r.total.detach() for r in reports), whole.total.detach())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for name, metric in whole.metrics.items():
        torch.testing.assert_close(sum(r.metrics[name].sum for r in reports), metric.sum)
        torch.testing.assert_close(sum(r.metrics[name].count for r in reports), metric.count)


def test_padding_and_the_chunk_size_change_nothing():
    batch = make_batch()
    (whole,), want = run([batch])
    for (report,), got in (run([take(batch, [0, 1, 2, 3], padding=6)]), run([batch], chunk_rows=3)):
        torch.testing.assert_close(report.total.detach(), whole.total.detach())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_the_hidden_state_of_one_position_earlier_predicts_a_token():
    batch = make_batch()
    config = LossConfig(kd=0.0, ce_truth=1.0, ce_teacher=1.0)
    # hidden[t] is the one-hot code of token t+1: right exactly if the loss looks one position back.
    following = torch.roll(batch.input_ids, -1, dims=1)
    hidden = torch.nn.functional.one_hot(following, V).double() * 50
    report = combine(batch, StudentOutput(hidden), Head(torch.eye(V).double()), config, loss_counts(batch, config))
    assert report.total < 1e-12
    assert report.metrics["response_accuracy"].mean() == 1
    unshifted = torch.nn.functional.one_hot(batch.input_ids, V).double() * 50
    wrong = combine(batch, StudentOutput(unshifted), Head(torch.eye(V).double()), config, loss_counts(batch, config))
    assert wrong.total > 10


def test_accuracies_are_of_the_most_likely_token_over_the_marked_tokens():
    batch = make_batch()
    (report,), _ = run([batch])
    embedding, head = make_model()
    hidden = torch.nn.functional.embedding(batch.input_ids, embedding).cumsum(dim=1).tanh()
    logprobs = (hidden @ head.T).log_softmax(dim=2).flatten(0, 1)[batch.response_index - 1].detach()
    best = logprobs.argmax(dim=1)
    target = batch.response_source != Source.STUDENT
    named = target & ((batch.response_marks & Mark.TOOL_NAME) != 0)
    scored = batch.has_teacher
    want = {
        "response_accuracy": (best == batch.response_ids)[target],
        "tool_name_accuracy": (best == batch.response_ids)[named],
        "response_nll": -logprobs.gather(1, batch.response_ids[:, None])[:, 0][target],
        "teacher_agreement": (best == batch.topk_ids[:, 0])[scored],
        "teacher_topk_mass": batch.topk_logprobs.exp().sum(dim=1)[scored],
        "student_topk_mass": logprobs.exp().gather(1, batch.topk_ids).sum(dim=1)[scored],
    }
    for name, values in want.items():
        torch.testing.assert_close(report.metrics[name].sum, values.double().sum())
        assert report.metrics[name].count == len(values)
    torch.testing.assert_close(report.metrics["teacher_kl"].sum, report.parts["kd"].sum)


def test_the_argmax_target_is_the_teachers_most_likely_token_wherever_it_scored_anothers_text():
    batch = make_batch()
    config = LossConfig(kd=0.0, ce_teacher=1.0, ce_teacher_target="argmax")
    # A student that puts its mass on the teacher's favourite, and not on what was written.
    hidden = torch.zeros(B * T, V).double()
    hidden[batch.response_index - 1] = torch.nn.functional.one_hot(batch.topk_ids[:, 0], V).double() * 50
    output = StudentOutput(hidden.unflatten(0, (B, T)))
    report = combine(batch, output, Head(torch.eye(V).double()), config, loss_counts(batch, config))
    assert report.total < 1e-12
    assert report.parts["ce_teacher"].count == 7 + 4
    assert report.metrics["teacher_agreement"].mean() == 1
    sampled = config.model_copy(update={"ce_teacher_target": "sampled"})
    assert combine(batch, output, Head(torch.eye(V).double()), sampled, loss_counts(batch, sampled)).total > 10


def test_a_batch_without_teacher_scores_trains_on_the_other_losses():
    batch = take(make_batch(), [3], width=5)
    empty = {"topk_ids": batch.topk_ids[:, :0], "topk_logprobs": batch.topk_logprobs[:, :0]}
    for config in (EVERYTHING, EVERYTHING.model_copy(update={"ce_teacher_target": "argmax"})):
        (with_k,), want = run([batch], config)
        (without_k,), got = run([replace(batch, **empty)], config)
        assert with_k.parts["kd"].sum == without_k.parts["kd"].sum == 0
        torch.testing.assert_close(with_k.total, without_k.total)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_a_batch_without_response_tokens_gives_zero_and_zero_gradients():
    batch = make_batch()
    none = torch.zeros(0, dtype=torch.int64)
    empty = replace(
        batch,
        marks=torch.zeros_like(batch.marks),
        response_index=none,
        **{
            n: getattr(batch, n)[:0]
            for n in ("response_source", "topk_ids", "topk_logprobs", "log_tail", "has_teacher", "tool_name_weight")
        },
    )
    (report,), gradients = run([empty])
    assert report.total == 0
    assert len(gradients) == 2
    assert all((g == 0).all() for g in gradients)


def test_evaluation_without_gradients_gives_the_same_report():
    batch = make_batch()
    (want,), _ = run([batch])
    embedding, head = make_model()
    hidden = torch.nn.functional.embedding(batch.input_ids, embedding).cumsum(dim=1).tanh()
    with torch.no_grad():
        got = combine(batch, StudentOutput(hidden), Head(head), EVERYTHING, loss_counts(batch, EVERYTHING))
    assert not got.total.requires_grad
    torch.testing.assert_close(got.total, want.total.detach())
    for name, part in want.parts.items():
        assert not part.sum.requires_grad
        torch.testing.assert_close(got.parts[name].sum, part.sum)


def test_the_options_of_kd_reach_the_loss():
    batch = make_batch()
    config = LossConfig(kd=1.0, kd_divergence="jsd", kd_beta=0.2, kd_support="topk_renorm", kd_temperature=2.0)
    (report,), _ = run([batch], config)
    embedding, head = make_model()
    hidden = torch.nn.functional.embedding(batch.input_ids, embedding).cumsum(dim=1).tanh()
    logits = (hidden @ head.T).flatten(0, 1)[batch.response_index - 1].detach()
    scored = batch.has_teacher
    want = dense_kd_loss(
        logits.gather(1, batch.topk_ids)[scored],
        batch.topk_logprobs[scored],
        torch.ones(int(scored.sum())),
        divergence="jsd", beta=0.2, temperature=2.0,
    )  # fmt: skip
    torch.testing.assert_close(report.parts["kd"].sum, want.sum)
