"""What goes wrong around a train worker: what only the user can mend, notice of an early end, and faults on purpose.

In:  errors that end a worker; SIGTERM; the faults that crash tests plan (teacher_serving/faults.py).
Out: the user's mistake at the root of an error; callables that the loop asks before a step.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from teacher_serving.faults import planned_delay, planned_fault

T = TypeVar("T")

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SMALL_FILE = 20_000
"""Bytes that a worker may write to a file where a full disk is played."""

terminated = threading.Event()
"""Set by SIGTERM, where `save_on_sigterm` was called in this process."""


class NoRoomError(ValueError):
    """A file cannot be written, for want of room."""


def users_mistake(error: BaseException | None, folder: Path = Path()) -> ValueError | None:
    """What only the user can mend at the root of `error`, through Ray's wrapping: a ValueError, or a disk without room (of
    the run's `folder`, where the error names no file); None when it is of another kind."""
    for found in _chain(error):
        if isinstance(found, OSError) and found.errno in NO_ROOM:
            return _no_room(found, folder)
        if isinstance(found, ValueError):
            while isinstance(cause := getattr(found, "cause", None), ValueError):
                found = cause
            return found
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        # Of a failed task, of a failed train worker, of all others.
        error = getattr(error, "cause", None) or getattr(error, "_base_exc", None) or error.__cause__


def _no_room(error: OSError, folder: Path) -> NoRoomError:
    return NoRoomError(
        f"{error.filename or f'a file in {folder}'} cannot be written: {error.strerror}; "
        f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free in {folder}: make room and go on with --resume"
    )


def save_on_sigterm() -> None:
    """Have SIGTERM ask for a checkpoint; a second one ends the process. For the main thread of a worker."""

    def note(number: int, frame: object) -> None:
        terminated.set()
        signal.signal(number, before)

    before = signal.signal(signal.SIGTERM, note)


def off_the_main_thread(function: Callable[[], T]) -> Future[T]:
    """Call it on a thread. On the main one Ray Train would replace our answer to SIGINT by its own, which aborts."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="ray-train", daemon=True).start()
    return future


def planned_faults(stop_file: Path) -> Callable[[int], None]:
    """What crash tests have happen before a step (teacher_serving/faults.py): `worker:exit@step=5` dies on the spot,
    `worker:wait@step=5` waits until the run is asked to stop, or killed, `worker:full_disk@step=5` can write no large file
    from then on, `worker:slow@ms=200` takes longer over every step."""
    exits, waits, fills = (planned_fault("worker", action) for action in ("exit", "wait", "full_disk"))
    delay = planned_delay("worker")

    def before_step(step: int) -> None:
        time.sleep(delay)
        if exits is not None and exits.strikes(step=step):
            os._exit(1)
        if fills is not None and fills.strikes(step=step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        while waits is not None and waits.strikes(step=step) and not stop_file.exists():
            time.sleep(0.05)

    return before_step
