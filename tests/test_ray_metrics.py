import json
import re
import threading
import time
from pathlib import Path

import pytest
import ray
from ray.util.metrics import Counter, Gauge

from raykd import ray_metrics
from raykd.ray_metrics import RayMetrics, metric_name
from raykd.tracing import _WORDS, Tracer

DASHBOARD = json.loads((Path(__file__).parents[1] / "configs" / "grafana" / "raykd.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


class Recorded:
    """Stands in for Ray's metrics: what was told, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: dict[str, list[tuple[float, dict[str, str]]]] = {}
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray_metrics, "REFRESH_S", 3600.0)
        for kind, method in ((Gauge, "set"), (Counter, "inc")):
            monkeypatch.setattr(kind, method, self.note)

    @property
    def note(self):
        told = self.values
        return lambda metric, value, tags: told.setdefault(metric.info["name"], []).append((value, tags))


def test_names_of_metrics_jsonl_become_names_that_prometheus_takes():
    assert metric_name("validation/loss/kd") == "raykd_validation_loss_kd"
    assert metric_name("top-1 share") == "raykd_top_1_share"


def test_gauges_and_counters_carry_run_and_stage_and_counters_only_grow(monkeypatch):
    recorded = Recorded(monkeypatch)
    metrics = RayMetrics("my-run", "kd")
    metrics.set("lead/tokens", 0.0)
    metrics.set("lead/tokens", 12.5)
    metrics.add("rows/kept", 3)
    metrics.add("rows/kept", 0)  # which Ray would refuse
    metrics.close()
    tags = {"run": "my-run", "stage": "kd"}
    assert recorded.values == {"raykd_lead_tokens": [(0.0, tags), (12.5, tags)], "raykd_rows_kept": [(3, tags)]}


def test_gauges_are_told_again_until_they_are_closed_for_ray_forgets_them(monkeypatch):
    recorded = Recorded(monkeypatch)
    monkeypatch.setattr(ray_metrics, "REFRESH_S", 0.001)
    others = set(threading.enumerate())
    metrics = RayMetrics("my-run", "kd")
    metrics.set("step", 1)
    metrics.set("step", 2)
    told = recorded.values["raykd_step"]
    while len(told) < 5:
        time.sleep(0.001)
    [thread] = set(threading.enumerate()) - others
    metrics.close()
    thread.join()
    assert {value for value, _ in told[1:]} == {2}


def test_a_tracer_in_a_process_of_rays_tells_all_that_it_logs_and_elsewhere_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as inner:
        recorded = Recorded(inner)
        with Tracer(tmp_path / "my-run", config={"stage": "qat"}) as tracer:
            tracer.log(7, {"loss/kd": 0.5, "grad_norm": float("nan"), "skipped_steps": 0})
    tags = {"run": "my-run", "stage": "qat"}
    told = {"raykd_step": [(7, tags)], "raykd_loss_kd": [(0.5, tags)], "raykd_skipped_steps": [(0, tags)]}
    assert recorded.values == told
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(Gauge, "set", recorded.note)
    with Tracer(tmp_path / "other") as tracer:
        tracer.log(1, {"loss/kd": 0.5})
    assert recorded.values == told


def test_the_grafana_dashboard_is_whole():
    panels = DASHBOARD["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["definition"] == "label_values(ray_raykd_step, run)"
    for panel in panels:
        assert all(
            target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            for target in panel["targets"]
        )
        assert all('run=~"$run"' in target["expr"] for target in panel["targets"])
    places = {
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    }
    assert len(places) == sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in panels), "panels overlap"


SHOWN = [*_WORDS, "learning_rate", "grad_norm", "seconds", "step", "loss/kd", "validation/loss/self_kd", "lead/tokens"]
SHOWN += ["rows/rejected", "rows/kept_total", "rows/cached_total"]
SHOWN += ["teacher/tokens_total", "teacher/seconds_total", "teacher/wait_seconds_total"]


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_user_watches_is_on_the_grafana_dashboard(name):
    """Of the other direction, that it asks for nothing that is not exported, tests/e2e/test_job_submit.py has the proof."""
    text = "\n".join(QUERIES)
    patterns = re.findall(r'__name__=~"([^"]+)"', text)
    exported = f"ray_{metric_name(name)}"
    assert f"{exported}{{" in text or any(re.fullmatch(pattern, exported) for pattern in patterns)
