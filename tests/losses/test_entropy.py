"""kd weighted by the teacher's entropy: bounds, the calibrated range, and that distillation is never switched off."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from raykd.loss_config import LossConfig
from raykd.losses.entropy import EntropyCalibration, entropy_weight, kd_weight, teacher_entropy
from raykd.types import Batch

TOKEN = LossConfig(kd_entropy="token", kd_entropy_calibration_steps=3)


def batch_of(topk_logprobs: Tensor, log_tail: Tensor, has_teacher: Tensor | None = None) -> Batch:
    count = len(log_tail)
    ones = torch.ones(1, count + 1, dtype=torch.int64)
    return Batch(
        uid=torch.zeros(1, dtype=torch.int64),
        input_ids=ones,
        attention_mask=ones.bool(),
        marks=torch.nn.functional.pad(ones[:, 1:], (1, 0)).int(),
        response_index=torch.arange(1, count + 1),
        response_source=torch.ones(count, dtype=torch.int8),
        topk_ids=torch.zeros(topk_logprobs.shape, dtype=torch.int64),
        topk_logprobs=topk_logprobs,
        log_tail=log_tail,
        has_teacher=torch.ones(count, dtype=torch.bool) if has_teacher is None else has_teacher,
    )


def random_batch(count: int, sharpness: float, seed: int = 0) -> Batch:
    """Tokens whose entropies are spread around a level that falls with `sharpness`."""
    g = torch.Generator().manual_seed(seed)
    scale = sharpness * torch.rand(count, 1, generator=g).double()
    logprobs = (torch.randn(count, 50, generator=g).double() * scale).log_softmax(dim=1).sort(descending=True).values
    return batch_of(logprobs[:, :8], logprobs[:, 8:].logsumexp(dim=1))


def calibrated(batches: list[list[Batch]], config: LossConfig = TOKEN) -> EntropyCalibration:
    state = EntropyCalibration()
    for step in batches:
        now = state.applied(config)  # what a training loop has at hand
        state = state.updated(state.measure(step, now), now)
    return state


def test_entropy_by_hand_with_a_tail_and_with_missing_entries():
    logprobs = torch.tensor([[0.5, 0.25, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).double().log()
    log_tail = torch.tensor([0.25, 0.0, 1.0]).double().log()
    want = torch.tensor([1.5 * math.log(2), 0.0, 0.0]).double()
    torch.testing.assert_close(teacher_entropy(logprobs, log_tail), want)


def test_the_tail_bucket_bounds_the_entropy_of_the_whole_vocabulary_from_below():
    logits = torch.randn(40, 200, generator=torch.Generator().manual_seed(1)).double() * 3
    full = logits.log_softmax(dim=1).sort(descending=True).values
    truth = -(full.exp() * full).sum(dim=1)
    for k in (1, 5, 50, 199):
        tail = full[:, k:].logsumexp(dim=1)
        found = teacher_entropy(full[:, :k], tail)
        assert (found <= truth + 1e-12).all()
        assert (truth <= found + tail.exp() * math.log(200 - k) + 1e-12).all()


def test_the_weight_rises_linearly_from_the_floor_to_one():
    entropy = torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0])
    torch.testing.assert_close(entropy_weight(entropy, 1.0, 3.0, 0.4), torch.tensor([0.4, 0.4, 0.7, 1.0, 1.0]))
    assert entropy_weight(entropy, 2.0, 2.0, 0.4).tolist() == [1.0] * 5


def test_text_of_low_entropy_keeps_distillation_on_even_with_a_range_far_above_it():
    batch = random_batch(100, sharpness=60.0)
    assert teacher_entropy(batch.topk_logprobs, batch.log_tail).quantile(0.5) < 0.1
    far = TOKEN.model_copy(update={"kd_entropy_range": (2.0, 8.0)})
    assert (kd_weight(batch, EntropyCalibration().applied(far)) == TOKEN.kd_entropy_floor).float().mean() > 0.9
    measured = calibrated([[batch]] * 3).applied(TOKEN)
    weight = kd_weight(batch, measured)
    assert weight.min() == TOKEN.kd_entropy_floor
    assert weight.max() == 1.0
    assert 0.05 < (weight == 1.0).float().mean() < 0.2


def test_the_range_is_the_10th_and_90th_percentile_of_the_first_steps():
    steps = [[random_batch(400, sharpness=6.0, seed=seed)] for seed in range(5)]
    entropies = [teacher_entropy(b.topk_logprobs, b.log_tail) for step in steps[:3] for b in step]
    want = torch.cat(entropies).quantile(torch.tensor([0.1, 0.9]).double()).tolist()
    assert calibrated(steps[:2]).range(TOKEN) is None
    assert (kd_weight(steps[0][0], calibrated(steps[:2]).applied(TOKEN)) == 1.0).all()
    measured = calibrated(steps[:3])
    assert measured.range(TOKEN) == pytest.approx(want, rel=0.05)
    assert calibrated(steps).range(TOKEN) == measured.range(TOKEN)  # later steps no longer move it
    assert measured.applied(TOKEN).kd_entropy_range == measured.range(TOKEN)


def test_ranks_agree_however_the_step_is_split_and_unscored_tokens_do_not_count():
    whole = random_batch(60, sharpness=6.0)
    unscored = torch.zeros(20, dtype=torch.bool)
    padding = batch_of(torch.full((20, 8), -torch.inf).double(), torch.zeros(20).double(), unscored)

    def part(rows: slice) -> Batch:
        return batch_of(whole.topk_logprobs[rows], whole.log_tail[rows])

    state = EntropyCalibration()
    ranks = [state.measure(batches, TOKEN) for batches in ([part(slice(45)), padding], [part(slice(45, 60))], [])]
    alone = state.measure([whole], TOKEN)
    summed = {name: sum(rank[name] for rank in ranks) for name in alone}
    assert all(rank.keys() == alone.keys() for rank in ranks)
    assert summed == pytest.approx(alone)
    assert summed["entropy/count"] == 60
    assert kd_weight(padding, calibrated([[whole]] * 3).applied(TOKEN)).sum() == 0


def test_the_running_mean_scales_kd_between_its_floor_and_its_whole():
    run = LossConfig(kd=2.0, kd_entropy="run", kd_entropy_range=(0.5, 1.5), kd_entropy_floor=0.25, kd_entropy_decay=0.5)
    state = EntropyCalibration()
    assert state.applied(run).kd == 2.0  # nothing known yet
    for mean in (1.5, 0.5):
        state = state.updated({"entropy/sum": 10 * mean, "entropy/count": 10.0}, run)
    assert state.mean == 1.0
    assert state.applied(run).kd == pytest.approx(2.0 * (0.25 + 0.75 * 0.5))
    idle = state.updated({"entropy/sum": 0.0, "entropy/count": 0.0}, run)
    assert idle == state
    low = replace(state, mean=0.01)
    assert low.applied(run).kd == pytest.approx(2.0 * 0.25)


def test_the_state_survives_a_checkpoint():
    state = calibrated([[random_batch(30, 6.0)]] * 2)
    assert EntropyCalibration(**json.loads(json.dumps(asdict(state)))) == state


def test_without_the_option_nothing_is_measured_and_nothing_changes():
    off = LossConfig()
    state = EntropyCalibration()
    assert state.measure([random_batch(5, 1.0)], off) == {}
    assert state.updated({}, off) == state
    assert state.applied(off) == off


def test_an_unordered_range_is_refused():
    with pytest.raises(
        ValueError, match=r"kd_entropy_range=\[8.0, 2.0\]: expected two entropies in nats, the lower one first"
    ):
        LossConfig(kd_entropy_range=(8.0, 2.0))
