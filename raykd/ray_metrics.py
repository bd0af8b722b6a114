"""Numbers of a run as Ray metrics: every node of the cluster has them at its Prometheus endpoint, as `ray_raykd_<name>`.

In:  numbers by name, in any process of Ray's: what rank 0 logs (tracing.py), rows and tokens that extractors see, the lead
     of the teacher (data/stream.py).
Out: gauges and counters with the tags `run` and `stage`; a counter's name ends in `_total`. configs/grafana/raykd.json
     shows them.

To set one takes microseconds; a thread of Ray's sends them. Ray forgets a gauge that nobody has set for two of its report
intervals (20 seconds), and steps may take longer: so each is set again every second while its process lives. Where no Ray
runs, nothing happens.
"""

from __future__ import annotations

import re
import threading

import ray
from ray.util.metrics import Counter, Gauge

TAGS = ("run", "stage")
REFRESH_S = 1.0


def metric_name(name: str) -> str:
    """Name of a number of metrics.jsonl among Ray's metrics.

    >>> metric_name("loss/kd")
    'raykd_loss_kd'
    """
    return "raykd_" + re.sub(r"\W", "_", name)


class RayMetrics:
    """What one process tells of a run, until it closes. Each metric is made when it is first used."""

    def __init__(self, run: str, stage: str) -> None:
        self._tags = {"run": run, "stage": stage}
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, float] = {}  # of the gauges
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._counters: dict[str, Counter] = {}
        self._is_on = ray.is_initialized()

    def set(self, name: str, value: float) -> None:
        """What it is now; the name as in metrics.jsonl. Its unit is the last word of the name, where it has one."""
        if not self._is_on:
            return
        with self._lock:
            if not self._gauges:
                threading.Thread(target=self._refresh, name="ray-metrics", daemon=True).start()
            if name not in self._gauges:
                self._gauges[name] = Gauge(metric_name(name), tag_keys=TAGS)
            self._values[name] = value
            self._gauges[name].set(value, self._tags)

    def _refresh(self) -> None:
        while not self._is_closed.wait(REFRESH_S):
            with self._lock:
                for name, value in self._values.items():
                    self._gauges[name].set(value, self._tags)

    def close(self) -> None:
        """Let Ray forget the gauges."""
        self._is_closed.set()

    def add(self, name: str, amount: float) -> None:
        """So much more of what only grows. Counts of a process begin at 0 anew when it is restarted."""
        if self._is_on and amount > 0:  # Ray refuses 0
            if name not in self._counters:
                self._counters[name] = Counter(metric_name(name), tag_keys=TAGS)
            self._counters[name].inc(amount, self._tags)
