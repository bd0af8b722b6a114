"""Teachers that end again and again before they have answered: told apart from accidents, and ended with the run.

In:  the starts, answers and last words of the actors of one pool, which Ray starts again however often they end.
Out: TeacherLostError, once one of them has ended more than `teacher.max_restarts` times in a row.
"""

from __future__ import annotations

import threading
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class TeacherLostError(ValueError):
    """A teacher cannot live with its settings or with what it is asked."""


class Lives:
    """A pool's record, outside of the processes that end: an actor."""

    def __init__(self) -> None:
        self._num_starts: dict[str, int] = {}
        self._last_words: dict[str, str] = {}

    def begin(self, teacher: str) -> tuple[int, str]:
        """A teacher starts: how often in a row it has ended by now, and what it said the last time that it said anything."""
        self._num_starts[teacher] = self._num_starts.get(teacher, 0) + 1
        return self._num_starts[teacher] - 1, self._last_words.get(teacher, "")

    def settle(self, teacher: str) -> None:
        """It has answered: what happens to it from now on is another story."""
        self._num_starts[teacher] = 1

    def say(self, teacher: str, words: str) -> None:
        """Why it is about to end."""
        self._last_words[teacher] = words


def record_of_lives() -> Any:
    """A handle of a new record, on the node of whoever asks, which lasts as long as the run. Should its own process end, it
    begins anew."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(**options)(Lives).remote()


class Life:
    """One of a teacher actor's lives, from its start on. Thread-safe."""

    def __init__(self, record: Any, max_restarts: int, calls_at_once: int) -> None:
        """`calls_at_once`: calls that the actor may have been given when it ended, and is given again now."""
        self._record, self._max_restarts, self._calls_at_once = record, max_restarts, calls_at_once
        self._teacher = ray.get_runtime_context().get_actor_id()
        self._num_ended, self._last_words = ray.get(record.begin.remote(self._teacher))
        self._num_answers = 0
        self._lock = threading.Lock()

    @property
    def is_hopeless(self) -> bool:
        """It has ended too often for another try."""
        return self._num_ended > self._max_restarts

    def refuse(self) -> TeacherLostError:
        """What to end the run with when it is hopeless."""
        why = self._last_words or "without a word, as when the machine has no memory left"
        return TeacherLostError(
            f"a teacher ended {self._num_ended} times in a row before it had answered anything ({why}); "
            f"teacher.max_restarts={self._max_restarts} allows {self._max_restarts}. Look into the logs of its actor, and "
            "for a prompt that it cannot bear; give it more memory, lower teacher.max_num_seqs, or raise "
            "teacher.max_restarts"
        )

    def answered(self) -> None:
        """A call was answered. Among twice as many as it is given at once are those that it ended with before."""
        with self._lock:
            self._num_answers += 1
            if self._num_answers == 2 * self._calls_at_once:
                self._record.settle.remote(self._teacher)

    def ends(self, words: str) -> None:
        """The process is about to end."""
        ray.get(self._record.say.remote(self._teacher, words))
