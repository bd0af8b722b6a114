"""The head operation against dense float64 autograd, in both of its executions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from raykd.losses.head import HeadRows, head_logprobs, head_loss
from tests.conftest import needs_gpu

N, H, V, C = 37, 8, 50, 6
EXECUTIONS = ("recompute", "gradient_in_forward")
DEVICES = ("cpu", pytest.param("cuda", marks=needs_gpu))


@dataclass(frozen=True)
class Case:
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    ids: Tensor  # [N, C]
    support: Tensor  # [N, C]
    logprob_weight: Tensor  # [N, C] the loss is a weighted sum of all outputs
    tail_weight: Tensor  # [N]
    num_valid_ids: int | None = None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        moved = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        for name in ("hidden", "weight", "bias"):
            if name in moved:
                moved[name] = moved[name].to(dtype)
        return replace(self, **moved)


@dataclass(frozen=True)
class Result:
    loss: Tensor
    logprobs: Tensor
    log_tail: Tensor
    gradients: list[Tensor]  # of hidden, weight, bias


def make_case(num_rows: int = N) -> Case:
    """Rows with and without support; the last column is a label, a repeated id in every other row."""
    g = torch.Generator().manual_seed(0)
    ids = (
        torch.stack([torch.randperm(V, generator=g)[:C] for _ in range(num_rows)]) if num_rows else torch.zeros(0, C).long()
    )
    support = torch.rand(num_rows, C, generator=g) > 0.3
    support[3:4] = False
    support[:, -1] = False
    ids[::2, -1] = ids[::2, 0]
    return Case(
        hidden=torch.randn(num_rows, H, generator=g).double(),
        weight=torch.randn(V, H, generator=g).double(),
        bias=torch.randn(V, generator=g).double(),
        ids=ids,
        support=support,
        logprob_weight=torch.randn(num_rows, C, generator=g).double(),
        tail_weight=torch.randn(num_rows, generator=g).double(),
    )


def loss_of(case: Case, logprobs: Tensor, log_tail: Tensor, rows: slice = slice(None)) -> Tensor:
    weighted = (logprobs * case.logprob_weight[rows].to(logprobs.dtype)).sum()
    # An empty tail is worth -inf; a loss that is finite leaves it out.
    tail = log_tail.masked_fill(log_tail == -torch.inf, 0.0)
    return weighted + (tail * case.tail_weight[rows].to(tail.dtype)).sum()


def dense(case: Case) -> Result:
    leaves = [t.double().requires_grad_() for t in (case.hidden, case.weight, case.bias) if t is not None]
    logits = leaves[0] @ leaves[1].T
    if case.bias is not None:
        logits = logits + leaves[2]
    if case.num_valid_ids is not None:
        logits = logits[:, : case.num_valid_ids]
    logprobs = logits.log_softmax(dim=1)
    inside = torch.zeros(logprobs.shape, dtype=torch.bool, device=logits.device)
    for row, (ids, support) in enumerate(zip(case.ids, case.support, strict=True)):
        inside[row, ids[support]] = True
    selected, log_tail = logprobs.gather(1, case.ids), logprobs.masked_fill(inside, -torch.inf).logsumexp(dim=1)
    loss = loss_of(case, selected, log_tail)
    return Result(loss.detach(), selected.detach(), log_tail.detach(), list(torch.autograd.grad(loss, leaves)))


def ours(case: Case, execution: str, chunk_rows: int | None = 10, scale: float = 1.0) -> Result:
    leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias) if t is not None]
    bias = leaves[2] if case.bias is not None else None
    options = {"bias": bias, "chunk_rows": chunk_rows, "num_valid_ids": case.num_valid_ids}
    if execution == "recompute":
        logprobs, log_tail = head_logprobs(leaves[0], leaves[1], case.ids, case.support, **options)
        loss = loss_of(case, logprobs, log_tail)
    else:
        seen: list[HeadRows] = []

        def rows_loss(head: HeadRows) -> tuple[Tensor, Tensor]:
            seen.append(head)
            loss = loss_of(case, head.logprobs, head.log_tail, head.rows)
            return loss, loss.detach()[None]

        loss, statistics = head_loss(leaves[0], leaves[1], case.ids, case.support, rows_loss, **options)
        assert torch.equal(statistics[0], loss.detach())
        logprobs, log_tail = torch.cat([c.logprobs for c in seen]), torch.cat([c.log_tail for c in seen])
    (scale * loss).backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return Result(loss.detach(), logprobs.detach(), log_tail.detach(), gradients)


def assert_same(got: Result, want: Result, tolerance: float) -> None:
    """Relative error of every output; absolute for values around 0."""
    for a, b in zip(
        [got.logprobs, got.log_tail, *got.gradients], [want.logprobs, want.log_tail, *want.gradients], strict=True
    ):
        a, b = a.double(), b.double()
        finite = b > -torch.inf
        assert torch.equal(finite, a > -torch.inf)
        error = (a - b)[finite].norm() / b[finite].norm().clamp(min=1e-30)
        assert error <= tolerance, f"relative error {error:.1e} > {tolerance:.0e} in a tensor {list(a.shape)}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 6e-3)], ids=str
)
def test_values_and_gradients_equal_dense_float64_autograd(dtype, tolerance, execution, device):
    case = make_case().to(dtype, device)
    got = ours(case, execution)
    assert got.logprobs.dtype == got.log_tail.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(gradient.dtype == dtype for gradient in got.gradients)
    assert_same(got, dense(case), tolerance)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_chunk_size_changes_nothing(execution):
    case = make_case()
    for chunk_rows in (1, 7, N, 1000, None):
        assert_same(ours(case, execution, chunk_rows), ours(case, execution, 10), 1e-13)


def test_gradients_pass_finite_differences():
    case = replace(make_case(5), tail_weight=torch.zeros(5))
    leaves = [t.requires_grad_() for t in (case.hidden, case.weight, case.bias) if t is not None]

    def outputs(hidden, weight, bias):
        return head_logprobs(hidden, weight, case.ids, case.support, bias=bias, chunk_rows=2)

    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_tail_of_one_billionth_is_exact_in_value_and_gradient(execution, device):
    # One-hot hidden states: row r has the logits weight[:, r]. Two ids share all but 1e-9 of the mass.
    weight = torch.linspace(-1.0, 1.0, V)[:, None].repeat(1, H)
    weight[:2] = 24.5
    case = Case(
        hidden=torch.eye(H),
        weight=weight,
        bias=None,
        ids=torch.tensor([[0, 1]]).expand(H, 2).contiguous(),
        support=torch.ones(H, 2, dtype=torch.bool),
        logprob_weight=torch.zeros(H, 2),
        tail_weight=torch.ones(H),
    ).to(torch.float32, device)
    want = dense(case)
    assert want.log_tail.exp().max() < 2e-9
    got = ours(case, execution)
    assert_same(got, want, 1e-6)
    for got_tail, want_tail in zip(got.gradients[1][2:], want.gradients[1][2:], strict=True):
        torch.testing.assert_close(got_tail.double(), want_tail, rtol=1e-5, atol=0)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_support_id_that_is_repeated_counts_once(execution):
    case = make_case()
    ids, support = case.ids.clone(), case.support.clone()
    ids[:, 1], support[:, :3] = ids[:, 0], True
    case = replace(case, ids=ids, support=support)
    assert_same(ours(case, execution), dense(case), 1e-12)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_support_of_the_whole_vocabulary_leaves_no_tail_and_finite_gradients(execution):
    case = make_case()
    ids = torch.stack([torch.randperm(V) for _ in range(N)])
    support = torch.ones(N, V, dtype=torch.bool)
    support[5, : V // 2] = False
    case = replace(case, ids=ids, support=support, logprob_weight=torch.randn(N, V).double())
    got = ours(case, execution)
    assert (got.log_tail == -torch.inf).sum() == N - 1
    assert_same(got, dense(case), 1e-12)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_padding_rows_of_the_head_have_no_probability_and_no_gradient(execution):
    case = replace(make_case(), num_valid_ids=40)
    case = replace(case, ids=case.ids.clamp(max=39))
    got = ours(case, execution)
    assert_same(got, dense(case), 1e-12)
    assert torch.equal(got.gradients[1][40:], torch.zeros(V - 40, H).double())
    outside, _ = head_logprobs(case.hidden, case.weight, torch.full((N, 1), 45), torch.ones(N, 1).bool(), num_valid_ids=40)
    assert (outside == -torch.inf).all()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_no_rows_give_no_loss_and_zero_gradients(execution):
    got = ours(make_case(0), execution)
    assert got.loss == 0
    assert got.logprobs.shape == (0, C)
    assert all((gradient == 0).all() for gradient in got.gradients)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_tied_weight_gets_the_gradients_of_both_of_its_uses(execution):
    case = make_case()

    def gradient(use_ours: bool) -> Tensor:
        weight = case.weight.clone().requires_grad_()
        hidden = torch.nn.functional.embedding(case.ids[:, 0], weight).tanh()
        if not use_ours:
            logprobs = (hidden @ weight.T).log_softmax(dim=1).gather(1, case.ids)
            return torch.autograd.grad((logprobs * case.logprob_weight).sum(), weight)[0]
        if execution == "recompute":
            logprobs, _ = head_logprobs(hidden, weight, case.ids, case.support, chunk_rows=10)
            loss = (logprobs * case.logprob_weight).sum()
        else:
            loss, _ = head_loss(
                hidden, weight, case.ids, case.support,
                lambda head: ((head.logprobs * case.logprob_weight[head.rows]).sum(), torch.zeros(1)), chunk_rows=10,
            )  # fmt: skip
        loss.backward()
        assert weight.grad is not None
        return weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_frozen_head_still_passes_the_gradient_on_to_the_hidden_states(execution):
    case = make_case()
    hidden = case.hidden.clone().requires_grad_()
    if execution == "recompute":
        loss = loss_of(case, *head_logprobs(hidden, case.weight, case.ids, case.support, bias=case.bias))
    else:
        loss, _ = head_loss(
            hidden, case.weight, case.ids, case.support,
            lambda head: (loss_of(case, head.logprobs, head.log_tail, head.rows), torch.zeros(1)), bias=case.bias,
        )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(hidden.grad, dense(case).gradients[0])


def test_scaling_the_loss_after_the_sweep_scales_its_gradients():
    case = make_case()
    got, want = ours(case, "gradient_in_forward", scale=-0.25), dense(case)
    assert_same(replace(got, gradients=[g * -4 for g in got.gradients]), want, 1e-12)


def test_taking_the_gradient_of_head_loss_twice_is_refused():
    case = make_case()
    weight = case.weight.clone().requires_grad_()
    loss, _ = head_loss(case.hidden, weight, case.ids, case.support, lambda head: (head.log_tail.sum(), torch.zeros(1)))
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="use head_logprobs"):
        loss.backward()


def test_without_gradients_the_same_loss_comes_without_a_graph():
    case = make_case()
    weight = case.weight.clone().requires_grad_()

    def rows_loss(head: HeadRows) -> tuple[Tensor, Tensor]:
        assert not head.logprobs.requires_grad
        return loss_of(case, head.logprobs, head.log_tail, head.rows), torch.zeros(1)

    with torch.no_grad():
        loss, _ = head_loss(case.hidden, weight, case.ids, case.support, rows_loss, bias=case.bias, chunk_rows=10)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, dense(case).loss)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_cpu_autocast_leaves_the_operation_in_float32(execution):
    case = make_case().to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(case, execution)
    assert_same(got, ours(case, execution), 1e-12)


def test_top_logprob_is_that_of_the_most_likely_id_inside_or_outside_the_support():
    case = make_case()
    assert case.bias is not None
    logprobs = (case.hidden @ case.weight.T + case.bias).log_softmax(dim=1)
    support = case.support.clone()
    ids = case.ids.clone()
    ids[::3, 0], support[::3, 0] = logprobs.argmax(dim=1)[::3], True
    seen = []

    def rows_loss(head: HeadRows) -> tuple[Tensor, Tensor]:
        seen.append(head.top_logprob)
        return head.log_tail.sum(), torch.zeros(1)

    head_loss(case.hidden, case.weight, ids, support, rows_loss, bias=case.bias, chunk_rows=10)
    torch.testing.assert_close(torch.cat(seen), logprobs.amax(dim=1))


# --- on a GPU -------------------------------------------------------------------------------------------------------------


def special_cases() -> dict[str, Case]:
    """What the operation treats apart."""
    case = make_case()
    whole = torch.ones(N, V, dtype=torch.bool)
    whole[5, : V // 2] = False
    return {
        "no_bias": replace(case, bias=None),
        "one_row": make_case(1),
        "no_rows": make_case(0),
        "padding": replace(case, num_valid_ids=40, ids=case.ids.clamp(max=39)),
        "whole_vocabulary": replace(
            case,
            ids=torch.stack([torch.randperm(V) for _ in range(N)]),
            support=whole,
            logprob_weight=torch.randn(N, V).double(),
        ),
    }


@needs_gpu
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 6e-3)], ids=str
)
@pytest.mark.parametrize("name", special_cases())
def test_on_a_gpu_special_cases_are_those_of_dense_float64_autograd(name, dtype, tolerance, execution):
    case = special_cases()[name].to(dtype, "cuda")
    assert_same(ours(case, execution), dense(case), tolerance)


@needs_gpu
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_on_a_gpu_autocast_computes_in_bfloat16_with_float32_logits_and_gradients(execution):
    case = make_case().to(torch.float32, "cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = ours(case, execution)
    assert got.logprobs.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in got.gradients)
    assert_same(got, dense(case), 2e-2)
    rounded = case.to(torch.bfloat16, "cuda")  # what the products see; the bias is added in float32
    rounded = replace(rounded, bias=case.bias)
    values = dense(rounded)
    torch.testing.assert_close(got.logprobs.double(), values.logprobs, rtol=1e-5, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_on_a_gpu_the_host_never_waits(execution):
    case = make_case().to(torch.bfloat16, "cuda")
    inputs = case.hidden.requires_grad_(), case.weight.requires_grad_(), case.ids, case.support
    torch.cuda.set_sync_debug_mode("error")
    try:
        if execution == "recompute":
            loss = loss_of(case, *head_logprobs(*inputs, chunk_rows=10))
        else:
            loss, _ = head_loss(*inputs, lambda head: (loss_of(case, *head[:2], head.rows), head[1][:1]), chunk_rows=10)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert case.weight.grad is not None
