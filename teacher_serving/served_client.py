"""A shared teacher (serve.py) behind the Teacher protocol: the same rows as from an engine of its own, and no model here.

In:  tables of PROMPT_SCHEMA (generate) or SEQUENCE_SCHEMA (score), from several threads at once.
Out: tables of TEACHER_OUTPUT_SCHEMA in the order of the request.

Two ways there: the engines' own handle in the same Ray cluster (`app`), tables through the object store; or HTTP
(`address`), tables as Arrow IPC. What is wrong with either is said by `describe_served`, before anything is loaded.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import pyarrow as pa
import ray
import requests
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from teacher_serving.config import RequestConfig, ServedTeacherConfig
from teacher_serving.http_calls import (
    MESSAGE_CHARACTERS,
    NOT_READY,
    EndpointError,
    backoff_s,
    key_refused,
    read_key,
    retry_after_s,
    server_words,
)
from teacher_serving.identity import vocabulary_fingerprint
from teacher_serving.serve_config import ENGINES
from teacher_serving.types import PROMPT_SCHEMA, SEQUENCE_SCHEMA, TEACHER_OUTPUT_SCHEMA, TeacherDeadError, TeacherInfo
from teacher_serving.wire import MAX_TOKENS, MEDIA_TYPE, read_table, request_bytes

logger = logging.getLogger(__name__)


class NotNowError(Exception):
    """No answer this time; another try may have one, after `wait_s` seconds at the earliest."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


class Line(Protocol):
    """A way to the service. Errors: EndpointError for what the user can mend, NotNowError for what time may."""

    def describe(self, request: RequestConfig) -> TeacherInfo:
        """Who answers requests of these settings."""
        ...

    def ask(self, method: str, rows: pa.Table, request: RequestConfig) -> pa.Table:
        """What the service answers to `generate` or `score`."""
        ...


def describe_served(config: ServedTeacherConfig) -> TeacherInfo:
    """What the service can deliver with the settings of this config. Errors: EndpointError."""
    try:
        info = _line(config).describe(config.request)
    except NotNowError as error:
        raise EndpointError(
            f"{_where(config)} does not answer ({error}); expected a teacher that is served there (python -m "
            "teacher_serving.serve): start it, or correct the setting"
        ) from error
    own = vocabulary_fingerprint(config.tokenizer)
    if own != info.vocabulary_fingerprint:
        raise EndpointError(
            f"{_where(config)} serves {info.teacher_id!r} with another vocabulary ({info.vocabulary_fingerprint}) than the "
            f"tokenizer in {config.tokenizer} ({own}); set teacher.tokenizer to the folder of the served model (several "
            "teachers must have the same vocabulary)"
        )
    return replace(info, teacher_id=config.teacher_id or info.teacher_id)


class ServedTeacher:
    """A client of one service. Thread-safe."""

    def __init__(self, config: ServedTeacherConfig, info: TeacherInfo) -> None:
        self.info = info
        self._config = config
        self._line = _line(config)

    def generate(self, prompts: pa.Table) -> pa.Table:
        """Write a completion for every row of PROMPT_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order.

        Raises TeacherDeadError where the service does not answer within the tries, or is another teacher by now.
        """
        optional = [MAX_TOKENS] if MAX_TOKENS.name in prompts.column_names else []
        return self._answers("generate", prompts, pa.schema([*PROMPT_SCHEMA, *optional]))

    def score(self, sequences: pa.Table) -> pa.Table:
        """Top-k at every output position of SEQUENCE_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order. Errors: as
        generate."""
        return self._answers("score", sequences, SEQUENCE_SCHEMA)

    def probe(self) -> None:
        """Nothing: the service has done it."""

    def close(self) -> None:
        """Nothing: connections end with the process."""

    def _answers(self, method: str, rows: pa.Table, schema: pa.Schema) -> pa.Table:
        if not rows.num_rows:
            return TEACHER_OUTPUT_SCHEMA.empty_table()
        rows = rows.select(schema.names).cast(schema).combine_chunks()
        answers = self._patiently(lambda: self._line.ask(method, rows, self._config.request))
        found = answers["teacher_fingerprint"].unique().to_pylist()
        if found != [self.info.fingerprint]:
            raise TeacherDeadError(
                f"{_where(self._config)} is another teacher than at the start of the run: fingerprint {found}, expected "
                f"{self.info.fingerprint}"
            )
        place = answers.schema.get_field_index("teacher_id")
        return answers.set_column(place, "teacher_id", pa.repeat(self.info.teacher_id, answers.num_rows))

    def _patiently(self, ask: Callable[[], pa.Table]) -> pa.Table:
        tries = self._config.max_retries + 1
        for attempt in range(1, tries + 1):
            try:
                return ask()
            except NotNowError as error:
                logger.info("%s: %s; try %d of %d", _where(self._config), error, attempt, tries)
                if attempt == tries:
                    raise TeacherDeadError(
                        f"{_where(self._config)} had no answer in {tries} tries, the last: {error}"
                    ) from error
                time.sleep(max(error.wait_s, backoff_s(attempt, random.random())))
        raise AssertionError("the last try returns or raises")


def _where(config: ServedTeacherConfig) -> str:
    return f"teacher.app={config.app}" if config.app is not None else f"teacher.address={config.address}"


def _line(config: ServedTeacherConfig) -> Line:
    return HandleLine(config) if config.app is not None else HttpLine(config)


class HandleLine:
    """The engines of an application in the same cluster."""

    def __init__(self, config: ServedTeacherConfig) -> None:
        assert config.app is not None, "checked in ServedTeacherConfig"
        self._timeout_s = config.request_timeout_s
        if not ray.is_initialized():
            try:
                ray.init(address="auto", logging_level=logging.WARNING)
            except ConnectionError as error:
                raise EndpointError(
                    f"teacher.app={config.app} names an application of the Ray cluster, but there is no cluster here; start "
                    "the teacher (python -m teacher_serving.serve) or name its teacher.address"
                ) from error
        apps = serve.status().applications
        if config.app not in apps:
            raise EndpointError(
                f"teacher.app={config.app}: the cluster has no such application, found {sorted(apps) or 'none at all'}; "
                "start it with python -m teacher_serving.serve, or correct the name"
            )
        self._engines = serve.get_deployment_handle(ENGINES, app_name=config.app)

    def describe(self, request: RequestConfig) -> TeacherInfo:
        """Who answers requests of these settings."""
        return self._call("describe", request)

    def ask(self, method: str, rows: pa.Table, request: RequestConfig) -> pa.Table:
        """What an engine answers."""
        return self._call(method, rows, request)

    def _call(self, method: str, *args: object) -> Any:
        def wait() -> Any:
            return getattr(self._engines, method).remote(*args).result(timeout_s=self._timeout_s)

        try:
            with ThreadPoolExecutor(1) as thread:  # Ray Train asks on an event loop, where Ray Serve refuses to wait
                return thread.submit(wait).result()
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise EndpointError(f"the teacher refuses the request: {error.cause}") from None
            raise
        except RayActorError as error:
            raise NotNowError(f"an engine died with the request: {str(error).splitlines()[0]}") from error
        except (BackPressureError, DeploymentUnavailableError, TimeoutError) as error:
            raise NotNowError(f"{type(error).__name__}: {error}") from error


class HttpLine:
    """A service anywhere, by HTTP."""

    def __init__(self, config: ServedTeacherConfig) -> None:
        assert config.address is not None, "checked in ServedTeacherConfig"
        self._config = config
        self._address = config.address.rstrip("/")
        key = read_key(config.api_key_env, "teacher.api_key_env")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session = requests.Session()

    def describe(self, request: RequestConfig) -> TeacherInfo:
        """Who answers requests of these settings."""
        try:
            answer = self._post("/v1/info", request.model_dump_json().encode(), "application/json").json()
            info, limits = answer["info"], answer["limits"]
            info = TeacherInfo(**info | {"eos_token_ids": tuple(info["eos_token_ids"])})
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, EndpointError):
                raise
            raise EndpointError(
                f"{self._address}/v1/info answers, but not as a shared teacher ({type(error).__name__}: {error}); expected "
                "the address and route of python -m teacher_serving.serve"
            ) from error
        if self._config.batch_size > limits["max_sequences"]:
            raise EndpointError(
                f"teacher.batch_size={self._config.batch_size}, but {self._address} takes at most {limits['max_sequences']} "
                "sequences in a request (max_sequences); lower batch_size"
            )
        return info

    def ask(self, method: str, rows: pa.Table, request: RequestConfig) -> pa.Table:
        """What the service answers."""
        reply = self._post(f"/v1/{method}", request_bytes(rows, request), MEDIA_TYPE)
        try:
            return read_table(reply.content).cast(TEACHER_OUTPUT_SCHEMA)
        except ValueError as error:  # pa.ArrowInvalid is one
            raise EndpointError(f"{self._address}/v1/{method} does not answer in TEACHER_OUTPUT_SCHEMA: {error}") from error

    def _post(self, path: str, body: bytes, media_type: str) -> requests.Response:
        try:
            reply = self._session.post(
                self._address + path,
                data=body,
                headers={**self._headers, "Content-Type": media_type},
                timeout=(10.0, self._config.request_timeout_s),
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise NotNowError(f"{type(error).__name__}: {error}") from error
        status = reply.status_code
        if status == 200:
            return reply
        problem = f"HTTP {status}: {server_words(reply.content)[:MESSAGE_CHARACTERS]}"
        if status >= 500 or status in NOT_READY:
            raise NotNowError(problem, retry_after_s(reply.headers))
        if status == 401:
            raise key_refused(self._address, problem, self._config.api_key_env)
        if status < 400 or status in (404, 405):
            raise EndpointError(
                f"{self._address}{path} is not a shared teacher's ({problem}); expected the address and route of python -m "
                "teacher_serving.serve (for any other OpenAI-compatible server: kind: http)"
            )
        raise EndpointError(f"{self._address}{path} refuses the request: {problem}")
