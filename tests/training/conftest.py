from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.tiny_run import save_student


@pytest.fixture(scope="session")
def student_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("student")
    save_student(path)
    return path
