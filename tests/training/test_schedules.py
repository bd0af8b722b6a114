from __future__ import annotations

import pytest

from raykd.config import TrainConfig
from raykd.loss_config import LossConfig, Schedule
from raykd.training.schedules import learning_rate, scheduled, scheduled_value


def course(num_steps: int, **options) -> list[float]:
    config = TrainConfig(learning_rate=1.0, **options)
    return [learning_rate(step, num_steps, config) for step in range(num_steps)]


def test_warm_up_rises_linearly_and_its_first_step_already_moves():
    assert course(6, warmup_steps=4, schedule="constant") == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_linear_falls_from_the_peak_to_its_floor_in_the_last_step():
    rates = course(7, warmup_steps=2, schedule="linear", min_learning_rate_fraction=0.2)
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_halfway_in_the_middle_and_at_its_floor_in_the_last_step():
    rates = course(5, schedule="cosine", min_learning_rate_fraction=0.1)
    assert rates == pytest.approx([1.0, 0.1 + 0.9 * 0.8535534, 0.55, 0.1 + 0.9 * 0.1464466, 0.1])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_steps_after_the_last_keep_the_floor(schedule):
    config = TrainConfig(learning_rate=1.0, schedule=schedule, min_learning_rate_fraction=0.1)
    assert learning_rate(50, 10, config) == pytest.approx(0.1)


def test_a_run_of_one_step_uses_the_peak():
    assert course(1) == [1.0]


def loss_config(**schedules: Schedule) -> LossConfig:
    return LossConfig(kd_support="topk_renorm", schedules=schedules)


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        (Schedule(kind="constant", start=0.3), [0.3, 0.3, 0.3, 0.3, 0.3]),
        (Schedule(kind="linear", start=1.0, end=0.2, over=4), [1.0, 0.8, 0.6, 0.4, 0.2]),
        (Schedule(kind="cosine", start=0.0, end=2.0, over=4), [0.0, 2 * 0.1464466, 1.0, 2 * 0.8535534, 2.0]),
        (Schedule(kind="staged", stages=((1, 0.1), (3, 0.5), (4, 0.9))), [0.1, 0.5, 0.5, 0.9, 0.9]),
    ],
    ids=lambda value: value.kind if isinstance(value, Schedule) else None,
)
def test_a_schedule_runs_its_course_and_stays_at_its_end(schedule, want):
    assert [scheduled_value(schedule, time) for time in range(5)] == pytest.approx(want)
    assert scheduled_value(schedule, 10_000_000) == pytest.approx(want[-1])


def test_weights_and_the_temperature_follow_steps_or_tokens_and_nothing_else_changes():
    config = loss_config(
        kd_temperature=Schedule(kind="linear", start=2.0, end=1.0, over=10),
        ce_teacher=Schedule(kind="linear", by="tokens", start=0.0, end=1.0, over=1000),
    )
    now = scheduled(config, step=5, tokens=250)
    assert (now.kd_temperature, now.ce_teacher) == (1.5, 0.25)
    assert now.model_dump(exclude={"kd_temperature", "ce_teacher"}) == config.model_dump(
        exclude={"kd_temperature", "ce_teacher"}
    )
    assert (config.kd_temperature, config.ce_teacher) == (1.0, 0.0)


def test_a_loss_whose_schedule_is_at_zero_is_still_counted():
    config = loss_config(ce_teacher=Schedule(kind="staged", stages=((10, 0.0), (20, 1.0))))
    assert scheduled(config, 0, 0).weights.keys() == scheduled(config, 15, 0).weights.keys() == {"kd", "ce_teacher"}


def test_a_resumed_run_goes_on_where_it_was():
    config = loss_config(kd=Schedule(kind="cosine", by="tokens", start=1.0, end=0.1, over=900))
    uninterrupted, now = [], config
    for step in range(10):  # values of earlier steps leave no trace: from the saved config or from the last step's
        now = scheduled(now, step, 100 * step)
        uninterrupted.append(now.kd)
    assert [scheduled(config, step, 100 * step).kd for step in range(6, 10)] == uninterrupted[6:]
    assert len(set(uninterrupted)) == 10


def test_a_schedule_that_would_leave_the_bounds_of_its_number_is_refused():
    with pytest.raises(ValueError, match=r"loss.schedules.kd has -1.0; expected numbers of at least 0"):
        loss_config(kd=Schedule(kind="linear", start=1.0, end=-1.0, over=5))
    with pytest.raises(ValueError, match=r"loss.schedules.kd_temperature has 0.0; expected numbers above 0"):
        loss_config(kd_temperature=Schedule(kind="staged", stages=((5, 2.0), (9, 0.0))))
