"""One engine of a shared teacher: what a Ray Serve replica hosts.

In:  tables of PROMPT_SCHEMA (generate) or SEQUENCE_SCHEMA (score), and how the client wants them answered.
Out: tables of TEACHER_OUTPUT_SCHEMA in the order of the request, the very rows that a teacher of those settings gives in
     its client's own actors.

Ray Serve calls the methods on as many threads as requests are in work, and `check_health` between them. A process whose
engine is dead ends, and Ray Serve starts another: the requests it was at are made again by who made them.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable

import pyarrow as pa
from ray.util.metrics import Counter, Histogram

from teacher_serving.arrow import Answer, answers_table
from teacher_serving.config import HfTeacherConfig, RequestConfig, VllmTeacherConfig
from teacher_serving.connect import connect
from teacher_serving.faults import planned_fault
from teacher_serving.identity import describe, read_fingerprints
from teacher_serving.types import Engine, TeacherDeadError, TeacherInfo

MAX_KNOWN_REQUESTS = 1024
"""Settings of requests whose fingerprint is kept."""
SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]


class TeacherReplica:
    """Hosts one engine; thread-safe."""

    def __init__(self, config: VllmTeacherConfig | HfTeacherConfig) -> None:
        self._config = config
        self._files = read_fingerprints(config)
        self._infos: dict[RequestConfig, TeacherInfo] = {}
        engine = connect(config)
        assert isinstance(engine, Engine), f"{type(engine).__name__} takes no settings of its clients"
        self._engine = engine
        self._engine.probe()
        self._calls = itertools.count(1)  # counts right on several threads
        self._fault = planned_fault("teacher", "exit")
        keys = ("teacher", "method")
        self._requests = Counter("raykd_served_requests", "Requests answered.", tag_keys=keys)
        self._failed_rows = Counter("raykd_served_failed_rows", "Rows that have no answer.", tag_keys=keys)
        self._tokens = Counter("raykd_served_tokens", "Tokens written or scored.", tag_keys=keys)
        self._seconds = Histogram("raykd_served_request_seconds", "Seconds a request took.", SECONDS, tag_keys=keys)

    def describe(self, request: RequestConfig | None = None) -> TeacherInfo:
        """Who answers requests of these settings. Raises ValueError where they ask for what there is not."""
        request = request or self._config.request
        if request not in self._infos:
            if len(self._infos) >= MAX_KNOWN_REQUESTS:
                self._infos.clear()
            self._infos[request] = self._describe(request)
        return self._infos[request]

    def _describe(self, request: RequestConfig) -> TeacherInfo:
        if request.top_k > self._config.top_k:
            raise ValueError(
                f"top_k={request.top_k} is more than the {self._config.top_k} that this teacher gives; lower top_k, or "
                "serve it with a higher teacher.top_k"
            )
        limit = self._engine.info.max_model_len
        if (request.max_model_len or 0) > limit:
            raise ValueError(
                f"max_model_len={request.max_model_len} is more than the {limit} that this teacher is served with; expected "
                f"at most {limit}"
            )
        settings = {**request.model_dump(), "max_model_len": request.context(limit)}
        return describe(type(self._config).model_validate(self._config.model_dump() | settings), self._files)

    def generate(self, prompts: pa.Table, request: RequestConfig | None = None) -> pa.Table:
        """Write a completion for every row of PROMPT_SCHEMA. Errors: those of `describe`."""
        return self._answer("generate", self._engine.generate_answers, prompts, request)

    def score(self, sequences: pa.Table, request: RequestConfig | None = None) -> pa.Table:
        """Top-k at every output position of SEQUENCE_SCHEMA. Errors: those of `describe`."""
        return self._answer("score", self._engine.score_answers, sequences, request)

    def _answer(
        self,
        method: str,
        ask: Callable[[pa.Table, RequestConfig], list[Answer]],
        rows: pa.Table,
        request: RequestConfig | None,
    ) -> pa.Table:
        request = request or self._config.request
        info = self.describe(request)
        began = time.monotonic()
        number = next(self._calls)
        if self._fault is not None and self._fault.strikes(batch=number):
            os._exit(1)
        try:
            answers = ask(rows, request)
        except TeacherDeadError as error:
            self._end(str(error))
            raise
        tags = {"teacher": info.teacher_id, "method": method}
        self._requests.inc(1, tags)
        self._seconds.observe(time.monotonic() - began, tags)
        for counter, count in (
            (self._tokens, sum(len(answer.output_ids) for answer in answers)),
            (self._failed_rows, sum(answer.finish_reason.startswith("error") for answer in answers)),
        ):
            if count:
                counter.inc(count, tags)
        return answers_table(rows, answers, info, request.top_k, self._config.weight_version)

    async def check_health(self) -> None:
        """What Ray Serve calls every few seconds. A coroutine, so that it waits for no thread of a request."""
        if problem := self._engine.problem():
            self._end(problem)

    def _end(self, problem: str) -> None:
        print(f"teacher replica {os.getpid()} ends, its engine is dead: {problem}", file=sys.stderr, flush=True)
        os._exit(1)
