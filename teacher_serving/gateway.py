"""The door of a shared teacher: HTTP in front of the engines, for runs on other clusters and for any OpenAI client.

In:  HTTP requests, with the key where there is one: /health, /v1/models, /v1/info, /v1/generate, /v1/score (Arrow IPC),
     /v1/completions, /v1/chat/completions (OpenAI's JSON).
Out: HTTP responses; every error as JSON {"error": {"message": …}} with a status that says whose it is: 4xx the sender's,
     5xx the teacher's.

What is wrong is refused here: the engines get only what they can answer. A request whose engine dies goes to another.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from teacher_serving.config import RequestConfig
from teacher_serving.openai_answers import chat_answer, completion_answer, error_answer, read_choices
from teacher_serving.openai_api import ApiError, Asked, Service, read_chat, read_completion
from teacher_serving.serve_config import ENGINES, ServeConfig
from teacher_serving.types import TeacherInfo
from teacher_serving.wire import MEDIA_TYPE, SCHEMAS, answer_bytes, read_request, read_settings

logger = logging.getLogger(__name__)

MAX_TRIES = 4
"""Engines that a request is given to, should they die with it."""
RETRY_AFTER_S = 5
"""What a client is told that meets a full queue."""


@dataclass(frozen=True)
class Opening:
    """What a gateway is made with; no key, only its hash."""

    config: ServeConfig
    key_digest: bytes | None


class Gateway:
    """Answers HTTP requests; a Ray Serve deployment that holds no model."""

    def __init__(self, opening: Opening, engines: DeploymentHandle) -> None:
        from transformers import AutoTokenizer

        self._config = opening.config
        self._key_digest = opening.key_digest
        self._engines = engines
        self._tokenizer = AutoTokenizer.from_pretrained(self._config.teacher.model)
        self._info: TeacherInfo | None = None
        self._routes: dict[tuple[str, str], Callable[[Request], Awaitable[Response]]] = {
            ("GET", "/v1/models"): self._models,
            ("GET", "/v1/info"): self._describe,
            ("POST", "/v1/info"): self._describe,
            ("POST", "/v1/generate"): self._generate,
            ("POST", "/v1/score"): self._score,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/v1/chat/completions"): self._chat,
        }

    async def __call__(self, request: Request) -> Response:
        """One HTTP request."""
        path = request.scope["path"].removeprefix(request.scope.get("root_path", "").rstrip("/"))
        if path == "/health":
            return await self._health()
        try:
            self._check_key(request)
            handler = self._route(request.method, path)
            return await asyncio.wait_for(handler(request), self._config.request_timeout_s)
        except ApiError as error:
            return _refusal(error.status, str(error), error.code)
        except TimeoutError:
            return _refusal(504, f"no answer within request_timeout_s={self._config.request_timeout_s:g}")
        except (BackPressureError, DeploymentUnavailableError):
            return _refusal(503, "the teacher has no place for another request; try again later", "overloaded")

    def _check_key(self, request: Request) -> None:
        if self._key_digest is None:
            return
        given = request.headers.get("authorization", "")
        if not given:
            raise ApiError(401, "no API key came with the request; expected the header `Authorization: Bearer <key>`")
        if not hmac.compare_digest(digest_of(given.removeprefix("Bearer ").strip()), self._key_digest):
            raise ApiError(401, "the API key is not the one of this service")

    def _route(self, method: str, path: str) -> Callable[[Request], Awaitable[Response]]:
        if handler := self._routes.get((method, path)):
            return handler
        others = sorted({allowed for allowed, known in self._routes if known == path})
        if others:
            raise ApiError(405, f"found {method} {path}, expected {' or '.join(others)}")
        paths = ", ".join(dict.fromkeys(known for _, known in self._routes))
        raise ApiError(404, f"there is nothing at {path}; expected one of /health, {paths}")

    # ---- what can be asked

    async def _health(self) -> Response:
        """Whether there is an engine; needs no key."""
        status = await asyncio.to_thread(serve.status)
        engines = status.applications[self._config.app].deployments[ENGINES]
        states = {str(getattr(state, "value", state)): count for state, count in engines.replica_states.items()}
        well = states.get("RUNNING", 0) > 0
        answer = {"status": "ok" if well else "no engine is running", "engines": states}
        return JSONResponse(answer, 200 if well else 503)

    async def _models(self, request: Request) -> Response:
        info = await self._own_info()
        model = {"id": info.teacher_id, "object": "model", "owned_by": "raykd", "max_model_len": info.max_model_len}
        return JSONResponse({"object": "list", "data": [model]})

    async def _describe(self, request: Request) -> Response:
        """The TeacherInfo of the service's settings or of those in the body, and the limits of requests."""
        body = await self._body(request)
        info = await self._ask("describe", self._settings(body) if body else None)
        config = self._config
        limits = {name: getattr(config, name) for name in ("max_request_bytes", "max_sequences", "request_timeout_s")}
        return JSONResponse({"info": asdict(info), "top_k": config.teacher.top_k, "limits": limits})

    async def _generate(self, request: Request) -> Response:
        return await self._answer_table("generate", request)

    async def _score(self, request: Request) -> Response:
        return await self._answer_table("score", request)

    async def _answer_table(self, method: str, request: Request) -> Response:
        try:
            rows, settings = await asyncio.to_thread(read_request, await self._body(request), SCHEMAS[method])
        except ApiError:
            raise
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        if rows.num_rows > self._config.max_sequences:
            raise ApiError(413, f"found {rows.num_rows} rows, expected at most {self._config.max_sequences} in a request")
        answers = await self._ask(method, rows, settings)
        return Response(await asyncio.to_thread(answer_bytes, answers), media_type=MEDIA_TYPE)

    async def _completions(self, request: Request) -> Response:
        asked = read_completion(await self._json(request), await self._service(), self._tokenizer, secrets.randbits(62))
        return await self._choices(asked, completion_answer, "cmpl")

    async def _chat(self, request: Request) -> Response:
        asked = read_chat(await self._json(request), await self._service(), self._tokenizer, secrets.randbits(62))
        return await self._choices(asked, chat_answer, "chatcmpl")

    async def _choices(self, asked: Asked, answer: Callable[..., dict[str, Any]], prefix: str) -> Response:
        table: pa.Table = await self._ask("generate", asked.table(), asked.request)
        choices = await asyncio.to_thread(read_choices, asked, table, self._tokenizer)
        name = f"{prefix}-{secrets.token_hex(12)}"
        return JSONResponse(answer(asked, choices, (await self._own_info()).teacher_id, name, int(time.time())))

    # ---- on the way there

    async def _ask(self, method: str, *args: object) -> Any:
        """What an engine answers. Errors: ApiError 400 where it refuses the request, 503 where every engine dies with it."""
        for _ in range(MAX_TRIES):
            try:
                return await getattr(self._engines, method).remote(*args)
            except RayTaskError as error:
                if isinstance(error.cause, ValueError):
                    raise ApiError(400, str(error.cause)) from None
                raise
            except RayActorError as error:
                logger.warning("an engine died with a request, which goes to another one: %s", str(error).splitlines()[0])
        raise ApiError(503, f"{MAX_TRIES} engines died with this request")

    async def _own_info(self) -> TeacherInfo:
        if self._info is None:
            self._info = await self._ask("describe")
        assert self._info is not None, "an engine has told"
        return self._info

    async def _service(self) -> Service:
        return Service(await self._own_info(), self._config.teacher.request, self._config.max_sequences)

    def _settings(self, body: bytes) -> RequestConfig:
        try:
            return read_settings(body)
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    async def _json(self, request: Request) -> Any:
        body = await self._body(request)
        try:
            return json.loads(body)
        except ValueError as error:
            raise ApiError(400, f"the body is no JSON: {error}") from None

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than it may be long."""
        limit = self._config.max_request_bytes
        told = request.headers.get("content-length", "")
        parts, length = [], int(told) if told.isdigit() else 0
        if length <= limit:
            length = 0
            async for part in request.stream():
                parts.append(part)
                length += len(part)
                if length > limit:
                    break
        if length > limit:
            raise ApiError(413, f"the body has {length} bytes or more, expected at most {limit} (max_request_bytes)")
        return b"".join(parts)


def _refusal(status: int, message: str, code: str | None = None) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_answer(status, message, code), status, headers)


def digest_of(key: str) -> bytes:
    """Hash of a key: what is compared, and all that is kept of it."""
    return hashlib.sha256(key.encode()).digest()
