"""Faults strike where they are planned, and once where they shall."""

from __future__ import annotations

from pathlib import Path

import pytest

from teacher_serving.faults import VARIABLE, Fault, planned_delay, planned_fault


def test_a_fault_strikes_at_its_count_and_only_the_first_to_get_there(tmp_path: Path):
    fault = Fault.parse(f"teacher:exit@batch=3;once={tmp_path / 'struck'}")
    assert not fault.strikes(batch=2)
    assert not fault.strikes(step=3)
    assert fault.strikes(batch=3)
    assert not fault.strikes(batch=3)
    assert Fault.parse("teacher:exit@batch=3").strikes(batch=3)


def test_the_environment_plans_for_one_component_and_action(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert planned_fault("teacher", "exit") is None
    monkeypatch.setenv(VARIABLE, "teacher:exit@batch=3")
    assert planned_fault("teacher", "exit") == Fault("teacher", "exit", "batch", 3)
    assert planned_fault("teacher", "empty") is None
    assert planned_fault("train", "exit") is None
    monkeypatch.setenv(VARIABLE, "teacher:exit@batch=3 worker:exit@step=5 teacher:slow@ms=250")
    assert planned_fault("worker", "exit") == Fault("worker", "exit", "step", 5)
    assert (planned_delay("teacher"), planned_delay("worker")) == (0.25, 0.0)


@pytest.mark.parametrize("text", ["teacher", "teacher:exit", "teacher:exit@batch", "teacher:exit@batch=x"])
def test_a_text_that_plans_nothing_is_refused(text: str):
    with pytest.raises(ValueError, match="expected <component>"):
        Fault.parse(text)
