"""What ends a worker, told apart: the user's mistakes, a disk without room, a request to end."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from raykd.training.mishaps import NoRoomError, save_on_sigterm, terminated, users_mistake


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_the_users_mistake_is_found_at_the_root_of_what_ray_raises():
    mistake = ValueError("rows are unusable")
    in_a_task = RayTaskError("Extractor", "traceback", mistake).as_instanceof_cause()
    assert users_mistake(raised_from(RuntimeError("the stream ended"), in_a_task)) is mistake
    assert users_mistake(UserExceptionWithTraceback(mistake, "traceback")) is mistake
    assert users_mistake(RuntimeError("killed")) is None
    assert users_mistake(FileNotFoundError(errno.ENOENT, "No such file or directory")) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_without_room_is_the_users_to_mend_and_told_with_the_folder_and_what_is_free(tmp_path: Path, number: int):
    full = OSError(number, os.strerror(number))
    for error in (full, RayTaskError("Extractor", "traceback", full).as_instanceof_cause()):
        found = users_mistake(error, tmp_path)
        assert isinstance(found, NoRoomError)
        assert f"a file in {tmp_path} cannot be written: {os.strerror(number)}" in str(found)
        assert f"MiB are free in {tmp_path}: make room and go on with --resume" in str(found)
    named = OSError(number, os.strerror(number), "/data/rejected.jsonl")
    assert str(users_mistake(named, tmp_path)).startswith("/data/rejected.jsonl cannot be written")


def test_sigterm_asks_for_a_checkpoint_the_first_time_only():
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        save_on_sigterm()
        os.kill(os.getpid(), signal.SIGTERM)
        assert terminated.is_set()
        assert not heard
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
        terminated.clear()
