"""Divergences against brute force, their limits, and gradients that are never NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raykd.losses.head import head_logprobs
from raykd.losses.kd import Divergence, dense_kd_loss, sparse_kd_loss

N, V, K = 5, 12, 4
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skewed_forward_kl", "skewed_reverse_kl")
SUPPORTS = ("topk_tail", "topk_renorm", "topk_zero")
OPTIONS = [(d, s) for d in DIVERGENCES for s in SUPPORTS if (d, s) != ("reverse_kl", "topk_zero")]


def logits(seed: int, num_ids: int = V) -> Tensor:
    return torch.randn(N, num_ids, generator=torch.Generator().manual_seed(seed)).double() * 1.5


def topk(teacher: Tensor, student: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of sparse_kd_loss from full log-probabilities [N, V]."""
    order = teacher.argsort(dim=1, descending=True)
    inside, outside = order[:, :k], order[:, k:]

    def tail(logprobs: Tensor) -> Tensor:
        return logprobs.gather(1, outside).logsumexp(dim=1)

    return student.gather(1, inside), tail(student), teacher.gather(1, inside), tail(teacher)


def brute_force(p: Tensor, q: Tensor, divergence: str, beta: float) -> Tensor:
    """The textbook formula [N] on probabilities [N, C]; 0 log 0 = 0."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / b).log(), 0.0).sum(dim=1)

    m = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "tvd": lambda: (p - q).abs().sum(dim=1) / 2,
        "skewed_forward_kl": lambda: kl(p, beta * p + (1 - beta) * q),
        "skewed_reverse_kl": lambda: kl(q, beta * q + (1 - beta) * p),
    }[divergence]()


def test_forward_kl_of_two_tokens_by_hand():
    # Teacher: ids with 1/2 and 1/4, tail 1/4. Student: 1/4, 1/4, tail 1/2; on the second token equal to the teacher.
    half, quarter = math.log(0.5), math.log(0.25)
    loss = sparse_kd_loss(
        torch.tensor([[quarter, quarter], [half, quarter]]),
        torch.tensor([half, quarter]),
        torch.tensor([[half, quarter], [half, quarter]]),
        torch.tensor([quarter, quarter]),
        torch.tensor([1.0, 3.0]),
    )
    # 1/2 ln 2 + 0 + 1/4 ln 1/2
    torch.testing.assert_close(loss.sum, torch.tensor(0.25 * math.log(2.0)))
    assert loss.count == 4
    torch.testing.assert_close(loss.mean(), torch.tensor(0.0625 * math.log(2.0)))


@pytest.mark.parametrize("beta", [0.5, 0.2])
@pytest.mark.parametrize(("divergence", "support"), OPTIONS)
def test_every_divergence_and_support_equals_brute_force(divergence, support, beta):
    teacher, student = logits(0).log_softmax(dim=1), logits(1).log_softmax(dim=1)
    arguments = topk(teacher, student, K)
    q, q_tail, p, p_tail = (a.exp() for a in arguments)
    if support == "topk_renorm":
        p, q = p / p.sum(dim=1, keepdim=True), q / q.sum(dim=1, keepdim=True)
    elif support == "topk_zero":
        p = torch.cat([p / p.sum(dim=1, keepdim=True), torch.zeros(N, 1)], dim=1)
        q = torch.cat([q, q_tail[:, None]], dim=1)
    else:
        p, q = torch.cat([p, p_tail[:, None]], dim=1), torch.cat([q, q_tail[:, None]], dim=1)
    weight = torch.rand(N).double()
    loss = sparse_kd_loss(*arguments, weight, divergence=divergence, support=support, beta=beta)
    torch.testing.assert_close(loss.sum, (brute_force(p, q, divergence, beta) * weight).sum())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dense_loss_equals_brute_force_at_any_temperature(divergence):
    teacher, student, weight = logits(0), logits(1), torch.rand(N).double()
    loss = dense_kd_loss(student, teacher, weight, divergence=divergence, beta=0.3, temperature=2.5)
    want = brute_force((teacher / 2.5).softmax(dim=1), (student / 2.5).softmax(dim=1), divergence, 0.3) * 2.5**2
    torch.testing.assert_close(loss.sum, (want * weight).sum())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_divergence_of_a_distribution_from_itself_is_zero(divergence):
    same = logits(0).log_softmax(dim=1)
    for support in ("topk_tail", "topk_renorm"):
        loss = sparse_kd_loss(*topk(same, same, K), torch.ones(N), divergence=divergence, support=support)
        assert abs(loss.sum) < 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_tail_bucket_is_a_lower_bound_that_reaches_the_full_divergence_at_k_equal_v(divergence):
    teacher, student = logits(0).log_softmax(dim=1), logits(1).log_softmax(dim=1)
    full = dense_kd_loss(student, teacher, torch.ones(N), divergence=divergence).sum
    values = [sparse_kd_loss(*topk(teacher, student, k), torch.ones(N), divergence=divergence).sum for k in range(1, V + 1)]
    assert all(a <= b + 1e-12 for a, b in zip(values, [*values[1:], full], strict=True))
    torch.testing.assert_close(values[-1], full)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_renormalised_at_k_equal_v_has_the_dense_gradient_with_temperature_squared(divergence):
    teacher, weight = logits(0), torch.rand(N).double()

    def gradient(sparse: bool) -> Tensor:
        student = logits(1).requires_grad_()
        if sparse:
            arguments = topk(teacher.log_softmax(dim=1), student.log_softmax(dim=1), V)
            loss = sparse_kd_loss(*arguments, weight, divergence=divergence, support="topk_renorm", temperature=3.0)
        else:
            loss = dense_kd_loss(student, teacher, weight, divergence=divergence, temperature=3.0)
        return torch.autograd.grad(loss.sum, student)[0]

    torch.testing.assert_close(gradient(sparse=True), gradient(sparse=False))


def test_the_forward_kl_gradient_at_a_temperature_is_temperature_times_the_difference():
    teacher, student = logits(0), logits(1).requires_grad_()
    loss = dense_kd_loss(student, teacher, torch.ones(N), temperature=2.0)
    want = 2.0 * ((student / 2).softmax(dim=1) - (teacher / 2).softmax(dim=1))
    torch.testing.assert_close(torch.autograd.grad(loss.sum, student)[0], want)


def test_the_gradient_of_a_teacher_whose_masses_do_not_add_up_to_one_scales_the_student_by_their_sum():
    teacher = logits(0).log_softmax(dim=1) + math.log(0.9)
    student = logits(1).requires_grad_()
    loss = sparse_kd_loss(*topk(teacher, student.log_softmax(dim=1), V - 1), torch.ones(N))
    want = 0.9 * student.softmax(dim=1) - teacher.exp()
    torch.testing.assert_close(torch.autograd.grad(loss.sum, student)[0], want)


def test_jsd_at_beta_0_and_1_is_the_exact_kl():
    arguments = topk(logits(0).log_softmax(dim=1), logits(1).log_softmax(dim=1), K)
    limits: list[tuple[float, Divergence]] = [(0.0, "forward_kl"), (1.0, "reverse_kl")]
    for beta, name in limits:
        jsd = sparse_kd_loss(*arguments, torch.ones(N), divergence="jsd", beta=beta)
        torch.testing.assert_close(jsd.sum, sparse_kd_loss(*arguments, torch.ones(N), divergence=name).sum)


@pytest.mark.parametrize(("divergence", "support"), OPTIONS)
def test_gradients_pass_finite_differences(divergence, support):
    teacher = logits(0).log_softmax(dim=1)

    def loss(student: Tensor) -> Tensor:
        q, q_tail, p, p_tail = topk(teacher, student.log_softmax(dim=1), K)
        p = p.index_fill(1, torch.tensor([2]), -torch.inf)  # a missing entry
        return sparse_kd_loss(q, q_tail, p, p_tail, torch.arange(N), divergence=divergence, support=support, beta=0.3).sum

    assert torch.autograd.gradcheck(loss, logits(1).requires_grad_())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dense_gradients_pass_finite_differences_at_any_temperature(divergence):
    weight = torch.arange(N)
    absent = torch.tensor([3])  # an id that does not exist

    def loss(student: Tensor) -> Tensor:
        student, teacher = (x.index_fill(1, absent, -torch.inf) for x in (student, logits(0)))
        return dense_kd_loss(student, teacher, weight, divergence=divergence, beta=0.3, temperature=2.5).sum

    assert torch.autograd.gradcheck(loss, logits(1).requires_grad_())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dense_logits_of_weight_zero_are_not_looked_at(divergence, bad):
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    clean, student, teacher = logits(1).requires_grad_(), logits(1), logits(0)
    teacher[1], student[3], teacher[3, 2] = bad, bad, bad
    student.requires_grad_()
    want = dense_kd_loss(clean, logits(0), weight, divergence=divergence)
    loss = dense_kd_loss(student, teacher, weight, divergence=divergence)
    assert loss.sum == want.sum
    assert torch.equal(torch.autograd.grad(loss.sum, student)[0], torch.autograd.grad(want.sum, clean)[0])


@pytest.mark.parametrize(("divergence", "support"), OPTIONS)
def test_missing_entries_are_as_good_as_a_smaller_k(divergence, support):
    teacher = logits(0).log_softmax(dim=1)
    ids = teacher.argsort(dim=1, descending=True)[:, : K + 2]
    given = teacher.gather(1, ids)
    given[:, K:] = -torch.inf
    tail = topk(teacher, teacher, K)[3]

    def run(k: int) -> tuple[Tensor, Tensor]:
        student = logits(1).requires_grad_()
        logprobs, log_tail = head_logprobs(student, torch.eye(V).double(), ids[:, :k], given[:, :k] > -torch.inf)
        loss = sparse_kd_loss(logprobs, log_tail, given[:, :k], tail, torch.ones(N), divergence=divergence, support=support)
        return loss.sum.detach(), torch.autograd.grad(loss.sum, student)[0]

    for with_missing, without in zip(run(K + 2), run(K), strict=True):
        torch.testing.assert_close(with_missing, without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("divergence", "support"), OPTIONS)
def test_no_input_of_minus_infinity_or_nan_gives_a_gradient_that_is_not_finite(divergence, support, dtype):
    inf = -torch.inf
    teacher = torch.tensor([[-0.1, inf, -3.0], [inf, inf, inf], [-0.5, -1.0, -4.0], [0.0, inf, inf], [math.nan] * 3])
    teacher_tail = torch.tensor([inf, 0.0, inf, inf, math.nan], dtype=dtype)
    student = torch.tensor([[-0.7, -1.0, -2.0]] * 5, dtype=dtype).requires_grad_()
    student_tail = torch.tensor([-1.5, -0.1, inf, -60.0, -1.0], dtype=dtype).requires_grad_()
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    loss = sparse_kd_loss(
        student, student_tail, teacher.to(dtype), teacher_tail, weight, divergence=divergence, support=support
    )
    assert loss.sum.isfinite()
    loss.sum.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    if support == "topk_renorm":  # does not look at the tail
        assert student_tail.grad is None
    else:
        assert student_tail.grad is not None
        assert student_tail.grad.isfinite().all()
    assert (student.grad[4] == 0).all()
    assert student.grad[0, 1] == 0


@pytest.mark.parametrize(("divergence", "support"), OPTIONS)
def test_an_empty_selection_is_exactly_zero_with_a_zero_gradient(divergence, support):
    teacher, student = logits(0), logits(1).requires_grad_()
    arguments = topk(teacher.log_softmax(dim=1), student.log_softmax(dim=1), K)
    sparse = sparse_kd_loss(*arguments, torch.zeros(N), divergence=divergence, support=support)
    dense = dense_kd_loss(student, teacher, torch.zeros(N), divergence=divergence)
    for loss in (sparse, dense):
        (gradient,) = torch.autograd.grad(loss.mean(), student, retain_graph=True)
        assert (loss.sum, loss.mean(), loss.count) == (0, 0, 0)
        assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 2.0}, r"kd_temperature=2.0 with kd_support=topk_tail: the teacher's normaliser"),
        ({"temperature": 2.0, "support": "topk_zero"}, r"the student's normaliser"),
        ({"temperature": 0.0}, "kd_temperature is 0.0; expected a positive number"),
        ({"beta": 1.5}, "kd_beta is 1.5; expected a number from 0 to 1"),
        ({"divergence": "kl"}, "kd_divergence is 'kl'; expected one of forward_kl"),
        ({"support": "full"}, "kd_support is 'full'; expected topk_tail"),
        ({"support": "topk_zero", "divergence": "reverse_kl"}, "is infinite"),
        ({"support": "topk_zero", "divergence": "jsd", "beta": 1.0}, "is infinite"),
    ],
)
def test_options_that_have_no_meaning_are_refused_with_the_reason(options, message):
    arguments = topk(logits(0).log_softmax(dim=1), logits(1).log_softmax(dim=1), K)
    with pytest.raises(ValueError, match=message):
        sparse_kd_loss(*arguments, torch.ones(N), **options)
