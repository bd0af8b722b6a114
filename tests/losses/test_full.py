"""raykd/losses/full.py: the divergence of the whole logits, of which only a chunk ever exists."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raykd.losses.full import full_kd_loss, full_kd_states, full_kd_weight
from raykd.losses.kd import dense_kd_loss
from raykd.types import Batch

N, H, H_TEACHER, V = 11, 6, 8, 29
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "tvd", "skewed_forward_kl", "skewed_reverse_kl"]


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher_hidden: Tensor
    norm: nn.Module
    teacher_weight: Tensor
    token_weight: Tensor


@pytest.fixture
def case() -> Case:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    norm = nn.RMSNorm(H_TEACHER, dtype=torch.float64)
    norm.weight.data = normal(H_TEACHER)
    token_weight = torch.tensor([1.0, 0.0, 0.5, 1.0, 2.0, 0.0, 1.0, 1.0, 0.25, 1.0, 1.0], dtype=torch.float64)
    return Case(normal(N, H), normal(V, H), normal(V), normal(N, H_TEACHER), norm, normal(V, H_TEACHER), token_weight)


def leaves(case: Case) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in (case.hidden, case.weight, case.bias)]


def run(case: Case, **options) -> tuple[Tensor, tuple[Tensor, ...]]:
    hidden, weight, bias = leaves(case)
    options = {"student_bias": bias, "chunk_rows": 4, **options}
    loss = full_kd_loss(hidden, weight, case.teacher_hidden, case.norm, case.teacher_weight, case.token_weight, **options)
    assert loss.count == case.token_weight.sum()
    return loss.sum.detach(), torch.autograd.grad(loss.sum, (hidden, weight, bias))


def dense(case: Case, num_ids: int = V, **options) -> tuple[Tensor, tuple[Tensor, ...]]:
    hidden, weight, bias = leaves(case)
    teacher_logits = (case.norm(case.teacher_hidden) @ case.teacher_weight.T)[:, :num_ids].detach()
    student_logits = (hidden @ weight.T + bias)[:, :num_ids]
    loss = dense_kd_loss(student_logits, teacher_logits, case.token_weight, **options)
    return loss.sum.detach(), torch.autograd.grad(loss.sum, (hidden, weight, bias))


def assert_same(got, want, tolerance: float = 1e-12) -> None:
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradients_are_those_of_the_real_logits(case: Case, divergence, temperature):
    options = {"divergence": divergence, "beta": 0.3, "temperature": temperature}
    assert_same(run(case, **options), dense(case, **options))


def test_gradients_pass_finite_differences(case: Case):
    g = torch.Generator().manual_seed(1)
    _, gradients = run(case)
    for index, name in enumerate(("hidden", "weight", "bias")):
        direction = torch.randn(getattr(case, name).shape, generator=g, dtype=torch.float64)
        ahead, back = (run(replace(case, **{name: getattr(case, name) + s * direction}))[0] for s in (1e-5, -1e-5))
        torch.testing.assert_close((ahead - back) / 2e-5, (gradients[index] * direction).sum(), atol=1e-7, rtol=1e-7)


def test_a_loss_computed_by_hand():
    # Two ids; the norm leaves (1, -1) as it is. Teacher: p = softmax(2 * (1, -1) / 2); student: uniform.
    p = torch.tensor([1.0, -1.0], dtype=torch.float64).softmax(0)
    expected = 4 * (p * (p.log() + torch.log(torch.tensor(2.0)))).sum()  # temperature 2 squared
    loss = full_kd_loss(
        torch.zeros(1, 3, dtype=torch.float64),
        torch.ones(2, 3, dtype=torch.float64),
        torch.tensor([[1.0, -1.0]]),
        nn.Identity(),
        2 * torch.eye(2, dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
        temperature=2.0,
    )
    torch.testing.assert_close(loss.mean(), expected)


def test_chunks_order_and_splitting_change_nothing(case: Case):
    whole = run(case)
    for chunk_rows in (1, N, 1000, None):
        assert_same(run(case, chunk_rows=chunk_rows), whole)
    rows = ("hidden", "teacher_hidden", "token_weight")
    order = torch.randperm(N)
    shuffled = run(replace(case, **{name: getattr(case, name)[order] for name in rows}))
    assert_same((shuffled[0], (shuffled[1][0][order.argsort()], *shuffled[1][1:])), whole)
    parts = [run(replace(case, **{name: getattr(case, name)[part] for name in rows})) for part in (slice(4), slice(4, N))]
    joined = torch.cat([part[1][0] for part in parts]), *(sum(part[1][i] for part in parts) for i in (1, 2))
    assert_same((sum(part[0] for part in parts), joined), whole)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_of_weight_zero_are_not_looked_at(case: Case, bad: float):
    whole = run(case)
    unused = (case.token_weight == 0)[:, None]
    spoilt = replace(
        case, hidden=case.hidden.masked_fill(unused, bad), teacher_hidden=case.teacher_hidden.masked_fill(unused, bad)
    )
    assert_same(run(spoilt), whole)


def test_nothing_supervised_is_zero_with_zero_gradients(case: Case):
    nothing = replace(case, token_weight=torch.zeros(N, dtype=torch.float64))
    for empty in (
        nothing,
        replace(nothing, teacher_hidden=torch.empty(N, 0)),
        replace(nothing, hidden=case.hidden[:0], teacher_hidden=case.teacher_hidden[:0], token_weight=torch.ones(0)),
    ):
        value, gradients = run(empty)
        assert value == 0
        assert all((gradient == 0).all() for gradient in gradients)


def test_padding_rows_of_either_head_take_no_part(case: Case):
    junk = torch.full((3, H_TEACHER), 5.0, dtype=torch.float64)
    longer = replace(case, teacher_weight=torch.cat([case.teacher_weight, junk]))
    assert_same(run(longer), dense(case))  # the teacher's head has more rows than the student's
    assert_same(run(longer, num_valid_ids=V - 4), dense(case, num_ids=V - 4))


def test_the_teacher_gets_no_gradient_and_evaluation_keeps_no_graph(case: Case):
    teacher = [case.teacher_hidden.clone().requires_grad_(), case.teacher_weight.clone().requires_grad_()]
    hidden = case.hidden.clone().requires_grad_()
    loss = full_kd_loss(hidden, case.weight, teacher[0], case.norm, teacher[1], case.token_weight)
    loss.sum.backward()
    assert hidden.grad is not None
    assert all(parameter.grad is None for parameter in [*teacher, *case.norm.parameters()])
    with torch.no_grad():
        value = full_kd_loss(hidden, case.weight, teacher[0], case.norm, teacher[1], case.token_weight).sum
    assert not value.requires_grad
    assert value == loss.sum


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    rows, hidden_size, vocab_size, chunk = 200, 4, 500, 10
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, requires_grad=True)
    states, teacher_weight = torch.randn(rows, hidden_size), torch.randn(vocab_size, hidden_size)
    with Watch():
        loss = full_kd_loss(hidden, weight, states, nn.Identity(), teacher_weight, torch.ones(rows), chunk_rows=chunk)
        loss.sum.backward()
    assert largest == chunk * vocab_size


def test_half_precision_states_and_a_bfloat16_student_stay_close(case: Case):
    want, _ = dense(case)
    single = {name: value.float() for name, value in vars(case).items() if isinstance(value, Tensor)}
    single["teacher_hidden"] = case.teacher_hidden.half()
    shipped = replace(case, **single, norm=copy.deepcopy(case.norm).float())
    assert run(shipped)[0].item() == pytest.approx(want.item(), rel=2e-3)
    rounded = replace(shipped, hidden=case.hidden.bfloat16())
    value, gradients = run(rounded)
    assert value.item() == pytest.approx(want.item(), rel=2e-2)
    assert gradients[0].dtype == torch.bfloat16


def make_batch(state_index: list[int], teacher_hidden: Tensor) -> Batch:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    index = torch.tensor([2, 3, 5, 6])
    return Batch(
        uid=torch.arange(2), input_ids=ids, attention_mask=ids == 0, marks=ids.int(), response_index=index,
        response_source=torch.zeros(4, dtype=torch.int8), topk_ids=torch.zeros(4, 1, dtype=torch.int64),
        topk_logprobs=torch.zeros(4, 1), log_tail=torch.zeros(4), has_teacher=torch.tensor([True, True, True, False]),
        state_index=torch.tensor(state_index, dtype=torch.int64), teacher_hidden=teacher_hidden,
    )  # fmt: skip


def test_a_token_is_predicted_by_the_last_layers_state_before_it():
    places = [0, 1, 2, 3, 5, 6]  # the first token of the second sequence has none
    hidden = torch.arange(2 * 6 * 3).reshape(2, 6, 3).half()
    batch = make_batch(places, hidden)
    states, weight = full_kd_states(batch), full_kd_weight(batch)
    assert [states[row].tolist() for row in (0, 1, 3)] == [hidden[1, places.index(at)].tolist() for at in (1, 2, 5)]
    assert weight.tolist() == [1, 1, 0, 0]  # the third has no state before it, the fourth no scores
    assert full_kd_weight(make_batch([0, 1], hidden[:, :2])).tolist() == [1, 0, 0, 0]  # nor any behind
    without = make_batch([], torch.empty(0, 0, 0))
    assert full_kd_states(without).shape == (4, 0)
    assert full_kd_weight(without).tolist() == [0, 0, 0, 0]
