"""A pool's record of how often its teachers ended."""

from __future__ import annotations

from teacher_serving.lives import Lives


def test_ends_are_counted_for_each_teacher_until_it_has_answered():
    record = Lives()
    assert record.begin("a") == (0, "")
    assert record.begin("a") == (1, "")
    record.say("a", "its engine is dead")
    assert record.begin("b") == (0, "")
    assert record.begin("a") == (2, "its engine is dead")
    record.settle("a")
    assert record.begin("a") == (1, "its engine is dead")
