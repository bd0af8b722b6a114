"""A shared teacher in the tests' Ray cluster, on a free port."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import serve

from teacher_serving.serve import check_cluster, read_key_digest, start, stop
from teacher_serving.serve_config import ServeConfig


@contextmanager
def shared_teacher(**options: Any) -> Iterator[ServeConfig]:
    """The application, until the end of the block; the options are those of ServeConfig."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = check_cluster(ServeConfig(app="shared", port=port, **options))
    start(config, read_key_digest(config))
    try:
        yield config
    finally:
        stop(config)
        serve.shutdown()
