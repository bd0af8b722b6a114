"""Every loss through `combine`: gradients where it claims them; splitting and padding change nothing; empty means 0."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raykd.data.collate import collate_kd_batch
from raykd.data.pairs import rejected_half
from raykd.loss_config import LOSSES, LossConfig
from raykd.losses.combine import combine, loss_counts
from raykd.losses.context import Head, LossContext, TeacherTop
from raykd.losses.sweep import sweep_weights
from raykd.types import Batch, Example, LossReport, Mark, SetKind, Source, StudentOutput
from tests.conftest import needs_gpu

V, H, K, TEACHER_H = 40, 6, 5, 4
EOS, BOT, EOT = 1, 2, 3
PAIRS = {0: 0, 1: 1}
EVERYTHING = LossConfig.model_validate(
    {name: 0.5 + 0.1 * index for index, name in enumerate(LOSSES)}
    | {"halt_class_weights": (1.0, 2.0), "caws_tier": 1, "early_tool_tokens": 3}
)


def make_example(uid: int, source: Source, rng: np.random.Generator, length: int, **fields) -> Example:
    """Prompt of two tokens, then the response with marks of every kind, id sets, grammar and teacher states."""
    ids = rng.integers(4, V, length).astype(np.int32)
    marks = np.full(length, Mark.RESPONSE, np.uint16)
    marks[:2] = 0
    for position, mark in enumerate((Mark.TOOL_NAME, Mark.ARGUMENT_KEY, Mark.ARGUMENT_VALUE, Mark.INTEGRATION, Mark.CLAIM)):
        marks[3 + position] |= mark
    if source == Source.GOLD:
        marks[4] |= Mark.CODE_MODE
        marks[5] |= Mark.DIRECT_TOOL
    marks[-2] |= Mark.DECISION
    marks[-1] |= Mark.DECISION
    ids[-1] = EOS
    response = length - 2
    logprobs = torch.from_numpy(rng.normal(size=(response, V))).mul(2).log_softmax(dim=1).sort(dim=1, descending=True)
    top = logprobs.values[:, :K].to(torch.float16)
    return Example(
        uid=uid,
        source=source,
        input_ids=ids,
        marks=marks,
        topk_ids=logprobs.indices[:, :K].numpy().astype(np.int32),
        topk_logprobs=top.numpy(),
        log_tail=torch.log1p(-top.float().exp().sum(dim=1)).numpy(),
        quality=0.3 + 0.1 * uid,
        halt_targets=np.array([0.0, 1.0], np.float32),
        set_position=np.array([3, 4, 5], np.int32),
        set_kind=np.array([SetKind.TOOL_CHOICE, SetKind.COPY, SetKind.CONTRADICTION], np.int8),
        set_sizes=np.array([3, 2, 2], np.int32),
        set_ids=np.array([ids[3], 3, 2, ids[4], 3, 2, 3], np.int32),
        grammar_position=np.array([4, 5], np.int32),
        grammar_row=np.array([0, 1], np.int32),
        grammar_masks=rng.integers(-(2**31), 2**31, (2, 2)).astype(np.int32),
        teacher_hidden=rng.normal(size=(2, length, TEACHER_H)).astype(np.float16),
        **fields,
    )


def make_examples() -> list[Example]:
    """One sequence of each author, one sampled from the student with a reward, one of a pair and its other."""
    rng = np.random.default_rng(0)
    paired = [
        make_example(10 + sign, Source.GOLD, rng, 11, pair=sign * 7, reference_logprob=-20.0 + sign) for sign in (1, -1)
    ]
    return [
        make_example(1, Source.TEACHER, rng, 12),
        make_example(2, Source.GOLD, rng, 10),
        make_example(3, Source.STUDENT, rng, 13, advantage=0.7, target_length=4.0),
        *paired,
    ]


class Model(nn.Module):
    """A student in miniature: causal sums, two layers, heads, projections; float64."""

    reference: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(V, H)
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(2))
        self.head = nn.Linear(H, V)
        self.register_buffer("reference", torch.randn(V, H))  # embedding and head of a frozen student
        self.halt = nn.Linear(H, 2)
        self.quality = nn.Linear(H, 1)
        self.projections = nn.ModuleDict({str(layer): nn.Linear(H, TEACHER_H, bias=False) for layer in PAIRS})
        self.double()

    def forward(self, batch: Batch) -> StudentOutput:
        hidden = self.embedding(batch.input_ids).cumsum(dim=1).tanh()
        states = []
        for layer in self.layers:
            hidden = layer(hidden).tanh()
            states.append(hidden)
        flat = hidden.flatten(0, 1)
        return StudentOutput(
            hidden,
            tuple(states),
            self.halt(flat[batch.decision_index]),
            self.quality(flat[batch.end_index])[:, 0],
            self.reference[batch.input_ids].cumsum(dim=1).tanh(),
        )


def context_of(model: Model) -> LossContext:
    torch.manual_seed(2)
    return LossContext(
        eos_id=EOS,
        bot_id=BOT,
        eot_id=EOT,
        opening_ids=torch.tensor([5, 6, 7]),
        layer_pairs=PAIRS,
        projections=model.projections,
        num_teacher_layers=2,
        rms=torch.tensor([1.5, 0.7]),
        teacher_top=TeacherTop(nn.LayerNorm(TEACHER_H), torch.randn(V, TEACHER_H), None),
        reference_head=Head(model.reference, torch.linspace(-1, 1, V).double()),
    )


def run(
    groups: list[list[Example]], config: LossConfig, padding: int = 0, rollout_clip: float | None = None
) -> tuple[list[LossReport], dict[str, Tensor]]:
    """One optimizer step over these micro-batches; reports and gradients."""
    model = Model()
    context = dataclasses.replace(context_of(model), rollout_clip=rollout_clip)
    batches = [padded(collate_kd_batch(group, pad_id=0), padding) for group in groups]
    counts: dict[str, Tensor] = {}
    for batch in batches:
        for name, count in loss_counts(batch, config, context).items():
            counts[name] = counts.get(name, torch.zeros(())) + count
    reports = []
    for batch in batches:
        reports.append(combine(batch, model(batch), Head(model.head.weight, model.head.bias), config, counts, context))
        reports[-1].total.backward()
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    return reports, gradients


def padded(batch: Batch, padding: int) -> Batch:
    """The same with more columns of padding."""
    if not padding:
        return batch
    width = batch.input_ids.shape[1]
    moved = {
        name: getattr(batch, name) // width * (width + padding) + getattr(batch, name) % width
        for name in ("response_index", "end_index", "decision_index", "state_index")
    }
    wider = {
        name: nn.functional.pad(getattr(batch, name), (0, padding)) for name in ("input_ids", "attention_mask", "marks")
    }
    return dataclasses.replace(batch, **moved, **wider)


def alone(name: str, **options) -> LossConfig:
    return LossConfig(**({"kd": 0.0} | {name: 1.0}), halt_class_weights=(1.0, 2.0), caws_tier=1, **options)


CASES = [alone(name) for name in LOSSES] + [
    alone("kd", kd_support="full"),
    alone("self_evaluation", self_evaluation_kind="mse"),
]


@pytest.mark.parametrize("config", CASES, ids=lambda config: next(iter(config.weights)))
def test_a_loss_alone_has_tokens_a_value_and_a_gradient(config):
    [report], gradients = run([make_examples()], config)
    assert report.parts.keys() == config.terms.keys()
    assert all(part.count > 0 for part in report.parts.values())
    assert torch.isfinite(report.total)
    parts = [weight * report.parts[name].sum / report.parts[name].count for name, weight in config.terms.items()]
    torch.testing.assert_close(report.total.detach(), torch.stack(parts).sum())
    assert sum(gradient.abs().sum() for gradient in gradients.values()) > 1e-6
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("support", ["topk_tail", "full"])
def test_splitting_padding_and_order_change_nothing(support):
    config = EVERYTHING.model_copy(update={"kd_support": support})
    examples = make_examples()
    [whole], gradients = run([examples], config)
    pair = examples[3:]
    for groups, padding in (
        ([[examples[0]], [examples[1]], [examples[2]], pair], 0),
        ([[*pair, examples[2]], [examples[1], examples[0]]], 3),
        ([examples[::-1]], 2),
    ):
        reports, others = run(groups, config, padding)
        for name in config.terms:
            torch.testing.assert_close(
                torch.stack([report.parts[name].sum for report in reports]).sum(), whole.parts[name].sum, msg=name
            )
        torch.testing.assert_close(torch.stack([report.total.detach() for report in reports]).sum(), whole.total.detach())
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", LOSSES)
def test_with_nothing_to_learn_a_loss_is_exactly_0_and_keeps_its_graph(name):
    example = Example(
        uid=1,
        source=Source.STUDENT,
        input_ids=np.arange(6, dtype=np.int32),
        marks=np.array([0, 0, 1, 1, 1, 1], np.uint16),
        topk_ids=np.zeros((4, 0), np.int32),
        topk_logprobs=np.zeros((4, 0), np.float16),
        log_tail=np.empty(0, np.float32),
    )
    config = alone(name)
    [report], gradients = run([[example]], config)
    if name != "caws_compliance":  # its rules hold for all text
        assert all(part.sum == part.count == 0 for part in report.parts.values())
        assert all((gradient == 0).all() for gradient in gradients.values())
    assert report.total.requires_grad


OWN_TEXT = {"kd", "intermediate_layer", "self_evaluation", "halt", "halt_ponder", "caws_compliance"}
"""Losses that also look at text of the student's: none of them takes its words for a target."""


def test_the_student_is_never_taught_its_own_words():
    student = dataclasses.replace(make_examples()[2], advantage=float("nan"), target_length=float("nan"))
    marks = student.marks.copy()
    marks[4] |= Mark.CODE_MODE
    student = dataclasses.replace(student, marks=marks)
    for name in set(LOSSES) - OWN_TEXT:
        [report], _ = run([[student]], alone(name))
        assert all(part.count == 0 for part in report.parts.values()), name


def test_trust_in_tool_names_weakens_them_and_is_not_divided_out():
    trusted, doubted = (
        [dataclasses.replace(example, tool_name_weight=weight) for example in make_examples()] for weight in (1.0, 0.5)
    )
    for name in ("tool_name", "tool_choice"):
        [whole], _ = run([trusted], alone(name))
        [half], _ = run([doubted], alone(name))
        assert half.parts[name].count == whole.parts[name].count
        torch.testing.assert_close(half.total, whole.total / 2)


def test_each_part_of_a_loss_is_divided_by_its_own_tokens():
    [report], _ = run([make_examples()], alone("code_mode_preference", code_mode_positive_weight=0.0))
    parts = report.parts
    assert parts["code_mode_preference/pair"].count == 1
    expected = sum(parts[f"code_mode_preference/{part}"].mean() for part in ("direct", "pair"))
    torch.testing.assert_close(report.total.detach(), expected)


def test_a_loss_beside_the_sweep_is_finite_where_the_teacher_names_the_whole_vocabulary():
    def of_all(example: Example) -> Example:
        rows = len(example.topk_ids)
        return dataclasses.replace(
            example, topk_ids=np.tile(np.arange(V, dtype=np.int32), (rows, 1)),
            topk_logprobs=np.full((rows, V), -np.log(V), np.float16), log_tail=np.full(rows, -np.inf, np.float32),
        )  # fmt: skip

    [report], gradients = run([[of_all(example) for example in make_examples()[:2]]], alone("halt"))
    assert torch.isfinite(report.total)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_the_rejected_half_of_a_pair_is_a_target_of_the_preference_alone():
    half = dataclasses.replace(rejected_half(make_examples()[1]), pair=-7)
    for name in set(LOSSES) - {"caws_compliance"}:  # whose rules hold for all text
        [report], _ = run([[half]], alone(name))
        counts = {term: float(part.count) for term, part in report.parts.items() if part.count}
        assert counts == ({"code_mode_preference/direct": 1.0} if name == "code_mode_preference" else {}), name
        assert not any(metric.count for name, metric in report.metrics.items() if name != "direct_tool_logprob")


@pytest.mark.parametrize("tier_of_run", [1, 2, 3])
def test_latent_spans_are_limited_by_the_tier_of_the_sample_or_of_the_run(tier_of_run):
    example = make_examples()[1]
    ids = example.input_ids.copy()
    ids[2:8] = [BOT, EOT] * 3
    examples = [dataclasses.replace(example, input_ids=ids, caws_tier=tier) for tier in (0, 1, 2, 3)]
    batch = collate_kd_batch(examples, 0)
    config = LossConfig(kd=0.0, caws_compliance=1.0, caws_tier=tier_of_run)
    weights = sweep_weights(batch, config, LossContext(eos_id=EOS, bot_id=BOT, eot_id=EOT))
    no_bot = weights["caws_compliance"][:, 0].reshape(4, -1).sum(dim=1).tolist()
    allowed = {1: 8, 2: 7, 3: 3}  # of eight tokens, those where a further <bot> is forbidden; a span takes two
    assert no_bot == [allowed[tier] for tier in (tier_of_run, 1, 2, 3)]


def test_the_policy_gradient_is_clipped_where_answers_serve_more_than_once():
    answer = make_examples()[2]
    model, batch = Model(), collate_kd_batch([answer], 0)
    logits = model.head(model(batch).hidden.flatten(0, 1)[batch.response_index - 1])
    now = logits.log_softmax(dim=1).gather(1, batch.response_ids[:, None])[:, 0].detach().numpy()
    config = alone("policy_gradient")
    _, reinforce = run([[answer]], config)

    def gradients(old: np.ndarray, clip: float | None) -> dict[str, Tensor]:
        return run([[dataclasses.replace(answer, sampled_logprobs=old.astype(np.float32))]], config, rollout_clip=clip)[1]

    for name, gradient in gradients(now, 0.2).items():
        torch.testing.assert_close(gradient, reinforce[name], rtol=1e-5, atol=1e-9)
    for name, gradient in gradients(now - 1.0, None).items():  # fresh answers: nobody asks what they were worth
        torch.testing.assert_close(gradient, reinforce[name])
    assert all((gradient == 0).all() for gradient in gradients(now - 0.25, 0.2).values())
    assert any((gradient != 0).any() for gradient in gradients(now - 0.25, 0.3).values())


# --- on a GPU -------------------------------------------------------------------------------------------------------------


def run_on(device: str, config: LossConfig, *, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in float32, or under autocast to bfloat16; the host may not wait for a GPU anywhere."""
    model = Model().float().to(device)
    context, batch = context_of(model), collate_kd_batch(make_examples(), pad_id=0)
    counts = {name: count.to(device) for name, count in loss_counts(batch, config, context).items()}
    top, reference = context.teacher_top, context.reference_head
    assert top is not None
    assert reference is not None
    assert reference.bias is not None
    context = dataclasses.replace(
        context,
        opening_ids=context.opening_ids.to(device),
        rms=context.rms.to(device),
        teacher_top=top.to(torch.device(device)),
        reference_head=reference._replace(bias=reference.bias.float().to(device)),
    )
    batch, head = batch.to(device), Head(model.head.weight, model.head.bias)
    torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
    try:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            total = combine(batch, model(batch), head, config, counts, context).total
        total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return total.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [*CASES, EVERYTHING], ids=lambda config: next(iter(config.weights)))
def test_on_a_gpu_a_loss_is_what_it_is_on_the_cpu_and_the_host_never_waits(config, autocast):
    total, gradients = run_on("cpu", config)
    on_gpu, gpu_gradients = run_on("cuda", config, autocast=autocast)
    assert gpu_gradients.keys() == gradients.keys()
    # bfloat16 has 8 bits: an error of 2^-9 in every state, layer after layer, and in the gradient of every logit.
    of_total, of_gradients = (5e-3, 2e-2) if autocast else (1e-5, 1e-5)
    assert abs(on_gpu - total) <= of_total * abs(total)
    together = torch.cat([gradient.flatten() for gradient in gradients.values()])
    found = torch.cat([gradient.flatten() for gradient in gpu_gradients.values()])
    assert (found - together).norm() <= of_gradients * together.norm()
