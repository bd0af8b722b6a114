"""What holds for every loss, every divergence and every support alike, on the step of training that they are part of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from raykd.data.collate import collate_kd_batch
from raykd.loss_config import LOSSES, Divergence, LossConfig, Support
from raykd.losses.combine import combine, loss_counts
from raykd.losses.context import Head
from raykd.training.ranks import Ranks
from raykd.types import Example, Mark, Source
from tests.losses.test_all_losses import EVERYTHING, K, Model, alone, context_of, make_examples, run

KD = [
    alone("kd", kd_divergence=divergence, kd_support=support, kd_beta=0.3)
    for divergence in get_args(Divergence)
    for support in get_args(Support)
    if (divergence, support) != ("reverse_kl", "topk_zero")  # infinite
]
KD += [alone("kd", kd_temperature=2.5, kd_support=support) for support in ("topk_renorm", "full")]
CASES = [
    *[alone(name) for name in LOSSES],
    alone("self_evaluation", self_evaluation_kind="mse"),
    alone("ce_teacher", ce_teacher_target="argmax"),
    *KD,
]
BARE = Example(
    uid=99,
    source=Source.STUDENT,
    input_ids=np.arange(4, 10, dtype=np.int32),
    marks=np.array([0, 0, *[Mark.RESPONSE] * 4], np.uint16),
    topk_ids=np.empty((4, 0), np.int32),
    topk_logprobs=np.empty((4, 0), np.float16),
    log_tail=np.empty(0, np.float32),
)
"""Nothing in it that a loss could look at."""


def name_of(config: LossConfig) -> str:
    name = next(iter(config.weights))
    return f"{name}, {config.kd_divergence}, {config.kd_support}" if name == "kd" else name


def directional_derivatives(config: LossConfig) -> tuple[float, float]:
    """Along a random direction of all parameters: by autograd, and by finite differences, in float64."""
    model, batch = Model(), collate_kd_batch(make_examples(), pad_id=0)
    context = context_of(model)

    def loss() -> Tensor:
        head = Head(model.head.weight, model.head.bias)
        return combine(batch, model(batch), head, config, loss_counts(batch, config, context), context).total

    loss().backward()
    torch.manual_seed(0)
    with torch.no_grad():
        steps = [(p, 1e-6 * torch.randn_like(p)) for p in model.parameters()]
        expected = sum((p.grad * step).sum().item() for p, step in steps if p.grad is not None)
        ends = []
        for scale in (1.0, -2.0):
            for p, step in steps:
                p += scale * step
            ends.append(loss().item())
    return 1e6 * expected, 1e6 * (ends[0] - ends[1]) / 2


@pytest.mark.parametrize("config", CASES, ids=name_of)
def test_the_gradient_is_that_of_finite_differences(config):
    by_autograd, by_differences = directional_derivatives(config)
    assert abs(by_autograd) > 1e-5
    assert by_differences == pytest.approx(by_autograd, rel=1e-4)


@pytest.mark.parametrize("config", CASES, ids=name_of)
def test_padding_order_and_micro_batches_change_nothing(config):
    one, two, three, *pair = make_examples()
    [whole], gradients = run([[one, two, three, *pair]], config)
    for groups, padding in (([[one], [two], [three], pair], 0), ([[*pair, three], [two, one]], 3)):
        reports, others = run(groups, config, padding)
        torch.testing.assert_close(torch.stack([report.total.detach() for report in reports]).sum(), whole.total.detach())
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("config", [case for case in CASES if "caws_compliance" not in case.weights], ids=name_of)
def test_an_empty_mask_gives_exactly_0_with_a_zero_gradient(config):  # the rules of caws_compliance hold for all text
    [report], gradients = run([[BARE]], config)
    assert report.total.requires_grad
    assert report.total == 0
    assert all(part.count == 0 for part in report.parts.values())
    assert all((gradient == 0).all() for gradient in gradients.values())


def with_gaps(example: Example) -> Example:
    """Missing entries anywhere in the rows of the top k, the first among them; one row without any."""
    logprobs = example.topk_logprobs.copy()
    rows = np.arange(len(logprobs))
    logprobs[rows, rows % K] = -np.inf
    logprobs[rows[::2], (rows[::2] + 2) % K] = -np.inf
    logprobs[1] = -np.inf
    return replace(example, topk_logprobs=logprobs)


@pytest.mark.parametrize("config", CASES, ids=name_of)
def test_missing_entries_inside_the_top_k_leave_value_and_gradient_finite(config):
    [report], gradients = run([[with_gaps(example) for example in make_examples()]], config)
    assert report.total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(metric.sum.isfinite() for metric in report.metrics.values())


@pytest.mark.parametrize("config", CASES, ids=name_of)
def test_missing_entries_at_the_end_of_the_top_k_are_as_good_as_a_smaller_k(config):
    wide, narrow = [], []
    for example in make_examples():
        logprobs = example.topk_logprobs.copy()
        logprobs[:, 3:] = -np.inf
        wide.append(replace(example, topk_logprobs=logprobs))
        narrow.append(replace(example, topk_logprobs=logprobs[:, :3], topk_ids=example.topk_ids[:, :3]))
    [one], gradients = run([wide], config)
    [other], others = run([narrow], config)
    torch.testing.assert_close(one.total, other.total)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name])


@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_every_divergence_is_0_between_equals_and_positive_otherwise(divergence):
    """Through the whole step: a teacher that is the student itself."""
    config = alone("kd", kd_divergence=divergence, kd_beta=0.3)
    model, example = Model(), make_examples()[0]
    batch = collate_kd_batch([example], pad_id=0)
    logprobs = model.head(model(batch).hidden.flatten(0, 1)[batch.response_index - 1]).log_softmax(dim=1).detach()
    best = logprobs.topk(K, dim=1)
    tail = torch.log1p(-best.values.exp().sum(dim=1))
    same = replace(batch, topk_ids=best.indices, topk_logprobs=best.values, log_tail=tail)
    head = Head(model.head.weight, model.head.bias)
    for scores, low, high in ((same, -1e-9, 1e-9), (batch, 1e-2, 100.0)):
        assert low <= combine(scores, model(scores), head, config, loss_counts(scores, config)).total.item() <= high


def shares() -> list[list[list[list[Example]]]]:
    """Ways to give the micro-batches of a step to two workers; in the last, one of them has nothing to learn from."""
    one, two, three, *pair = make_examples()
    return [[[[one], pair], [[two, three]]], [[[one, two, three, *pair]], [[BARE]]]]


ON_WORKERS = [EVERYTHING, *(alone(name) for name in LOSSES), alone("kd", kd_support="full")]


def run_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    ranks = Ranks.of_process_group()
    for index, config in enumerate(ON_WORKERS):
        for number, share in enumerate(shares()):
            gradients = gradients_on_workers(config, share, ranks)
            if rank == 0:
                torch.save(gradients, f"{folder}/{index}-{number}.pt")
    dist.destroy_process_group()


def gradients_on_workers(config: LossConfig, share: list[list[list[Example]]], ranks: Ranks) -> dict[str, Tensor]:
    """Gradients of one step over this rank's micro-batches and the other's.

    All losses together through DDP; a loss alone does not reach all parameters, so that they are added up here.
    """
    model, through_ddp = Model(), config is EVERYTHING
    replica, context = DistributedDataParallel(model) if through_ddp else model, context_of(model)
    batches = [collate_kd_batch(group, pad_id=0) for group in share[ranks.rank]]
    counted = [loss_counts(batch, config, context) for batch in batches]
    counts = ranks.sum({name: sum(count[name].item() for count in counted) for name in config.terms})
    for index, batch in enumerate(batches):
        if isinstance(replica, DistributedDataParallel):
            replica.require_backward_grad_sync = index == len(batches) - 1
        head = Head(model.head.weight, model.head.bias)
        report = combine(batch, replica(batch), head, config, counts, context)
        (report.total * (ranks.world_size if through_ddp else 1)).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    if not through_ddp:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    return gradients


def test_workers_change_nothing_for_any_loss_also_where_one_has_nothing_to_learn_from(tmp_path: Path):
    torch.multiprocessing.spawn(run_worker, (str(tmp_path),), nprocs=2)
    for index, config in enumerate(ON_WORKERS):
        for number, share in enumerate(shares()):
            _, expected = run([[example for groups in share for group in groups for example in group]], config)
            for name, gradient in torch.load(tmp_path / f"{index}-{number}.pt").items():
                message = f"{name_of(config)}: {name}"
                atol = 1e-8 * max(expected[name].abs().max().item(), 1e-3)  # no loss hides behind a larger one
                torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=atol, msg=message)
