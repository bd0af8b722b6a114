from __future__ import annotations

import pytest

from raykd.config import TrainConfig
from raykd.training.schedules import learning_rate


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
