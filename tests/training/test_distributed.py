"""How many workers there may be, and what a worker hears of the end that is coming."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.train.v2.api.preemption import PreemptionInfo

from raykd.training import distributed, worker
from raykd.training.mishaps import terminated


def test_every_notice_of_an_early_end_is_news_once(monkeypatch: pytest.MonkeyPatch):
    notices = SimpleNamespace(preemption_info=None)
    monkeypatch.setattr(worker, "get_train_context", lambda: SimpleNamespace(preemption_context=notices))
    is_news = worker.notice_of_the_end()
    assert [is_news(), is_news()] == [False, False]
    notices.preemption_info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})
    assert [is_news(), is_news()] == [True, False]
    notices.preemption_info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0], "b": [1]})
    assert [is_news(), is_news()] == [True, False]
    monkeypatch.setattr(terminated, "is_set", lambda: True)
    assert [is_news(), is_news()] == [True, False]


@pytest.mark.parametrize(
    ("cluster", "workers"),
    [
        ({"CPU": 64.0, "GPU": 8.0}, 4),  # all that are wanted
        ({"CPU": 64.0, "GPU": 4.0}, 3),  # one GPU is the teacher's
        ({"CPU": 5.0, "GPU": 8.0}, 2),  # 1.5 of the CPUs are teachers' and extractors'
        ({"CPU": 1.0, "GPU": 8.0}, 1),  # too small a cluster: Ray Train waits for a larger one
    ],
)
def test_an_elastic_run_leaves_room_for_its_teachers(monkeypatch: pytest.MonkeyPatch, cluster, workers):
    monkeypatch.setattr(distributed.ray, "cluster_resources", lambda: cluster)
    scaling = distributed.LeavingRoom(
        num_workers=(1, 4), use_gpu=True, resources_per_worker={"CPU": 1.5, "GPU": 1}, rest={"CPU": 1.5, "GPU": 1.0}
    )
    assert (scaling.min_workers, scaling.max_workers) == (1, workers)
