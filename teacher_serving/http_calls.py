"""An HTTP API asked with patience: so many requests at a time and a second, again where it was not ready, within a budget.

In:  an HttpTeacherConfig; JSON bodies from coroutines on its own event loop, which `run` starts from any thread.
Out: JSON answers, or an error that says who can mend it: EndpointError the user, for all requests alike; RefusedError
     nobody, this one request is wrong; NoAnswerError time, there was none within the tries; BudgetSpentError money.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Coroutine, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from teacher_serving.config import HttpTeacherConfig
from teacher_serving.spending import Clock, Pace, Spending

logger = logging.getLogger(__name__)

T = TypeVar("T")

BACKOFF_S = 1.0
"""Before the second try, doubled before each further one."""
LONGEST_WAIT_S = 60.0
LONGEST_RETRY_AFTER_S = 600.0
NOT_READY = (408, 429)
"""HTTP states below 500 that another try may mend."""
MESSAGE_CHARACTERS = 300


class EndpointError(ValueError):
    """The endpoint cannot be used as configured: no request would be answered."""


class RefusedError(Exception):
    """The endpoint refuses this request, and would again."""


class NoAnswerError(Exception):
    """The endpoint had no answer within the tries."""


class Endpoint:
    """A client of one API. Thread-safe where `run` is used; close it when done."""

    def __init__(self, config: HttpTeacherConfig, ledger: Path | None = None, clock: Clock = Clock()) -> None:  # noqa: B008 (frozen)
        self._config = config
        self._address = config.address.rstrip("/")
        self._key = read_key(config.api_key_env, "teacher.api_key_env")
        self._clock = clock
        share = config.max_replicas or config.num_replicas  # of the limits per second: this is one of so many actors
        self._requests = Pace(config.requests_per_s and config.requests_per_s / share, clock)
        self._tokens = Pace(config.tokens_per_s and config.tokens_per_s / share, clock)
        self._not_before = clock.now()  # by the word of the server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http-teacher", daemon=True)
        self._thread.start()
        self._session, self._connections, self._spending = self.run(self._open(ledger))

    async def _open(self, ledger: Path | None) -> tuple[aiohttp.ClientSession, asyncio.Semaphore, Spending]:
        session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=aiohttp.ClientTimeout(total=self._config.request_timeout_s),
            connector=aiohttp.TCPConnector(limit=0),  # a place among the connections is waited for without a timeout
            trust_env=True,  # proxies
        )
        return session, asyncio.Semaphore(self._config.connections), Spending(self._config.budget, ledger)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What the coroutine returns, from any thread but the loop's own; blocks."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        """End connections and loop. Idempotent."""
        if not self._loop.is_closed():
            self.run(self._session.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def complete(self, body: Mapping[str, Any], prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
        """The answer to one request of /completions that reads so many tokens and writes at most so many.

        Errors: those at the head of this file.
        """
        worst, used = (prompt_tokens, max_tokens), (0, 0)
        async with self._connections:
            await self._spending.reserve(*worst)
            try:
                await self._tokens.take(sum(worst))
                reply = await self.ask("POST", "/completions", body)
                usage = reply.get("usage") or {}
                used = (usage.get("prompt_tokens") or worst[0], usage.get("completion_tokens", worst[1]))
                return reply
            finally:
                self._tokens.give_back(max(0, sum(worst) - sum(used)))
                await self._spending.settle(worst, used)

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the API answers with, after as many tries as it takes. Errors: see `complete`."""
        problem, tries = "", self._config.max_retries + 1
        for attempt in range(tries):
            if attempt:
                logger.info("%s: %s; trying again", self._address + path, problem)
                await self._clock.sleep(backoff_s(attempt, self._clock.chance()))
            await self._wait_for_the_server()
            await self._requests.take(1)
            try:
                async with self._session.request(method, self._address + path, json=body, allow_redirects=False) as reply:
                    data = await reply.read()
            except TimeoutError:
                problem = f"nothing came within request_timeout_s={self._config.request_timeout_s:g}"
                continue
            except aiohttp.ClientError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if reply.status == 200:
                if isinstance(answer := _parsed(data), dict):
                    return answer
                problem = f"no JSON object, but {self._shown(data)!r}"
                continue
            problem = f"HTTP {reply.status}: {self._shown(data)}"
            if reply.status < 500 and reply.status not in NOT_READY:
                raise self._refusal(reply.status, path, problem)
            self._heed(reply.headers)
        raise NoAnswerError(f"no answer in {tries} tries, the last: {problem}")

    async def _wait_for_the_server(self) -> None:
        while (wait := self._not_before - self._clock.now()) > 0:
            await self._clock.sleep(wait)

    def _heed(self, headers: Mapping[str, str]) -> None:
        """Let no request begin before the time that the server has named."""
        wait = min(retry_after_s(headers), LONGEST_RETRY_AFTER_S)
        self._not_before = max(self._not_before, self._clock.now() + wait)

    def _refusal(self, status: int, path: str, problem: str) -> Exception:
        where, name = self._address + path, self._config.api_key_env
        if status in (401, 403):
            return key_refused(where, problem, name)
        if status < 400 or status in (404, 405):
            return EndpointError(
                f"{where} is not an API's ({problem}); expected teacher.address={self._config.address} with /models and "
                "/completions below it, such as http://HOST:PORT/v1, and a model that is served there"
            )
        return RefusedError(f"the server refuses the request: {problem}")

    def _shown(self, data: bytes) -> str:
        """The server's words, short, without the key."""
        words = server_words(data)
        return (words.replace(self._key, "***") if self._key else words)[:MESSAGE_CHARACTERS]


def read_key(name: str | None, option: str) -> str | None:
    """The key in the environment variable that `option` names. Raises EndpointError where it is named but not set."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise EndpointError(
            f"{option}={name}, but the environment has no such variable, or an empty one; put the key into it, or leave "
            f"{option} out"
        )
    return key


def key_refused(where: str, problem: str, name: str | None) -> EndpointError:
    """What the user hears whose key (in the environment variable `name`; None: there is none) is not taken."""
    if name is None:
        return EndpointError(
            f"{where} asks for an API key ({problem}); name the environment variable with it in teacher.api_key_env"
        )
    return EndpointError(
        f"{where} refuses the API key ({problem}); put a valid one into the environment variable {name} "
        "(teacher.api_key_env)"
    )


def server_words(data: bytes) -> str:
    """The server's own words in an answer that is none."""
    answer = _parsed(data)
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return str(text or data.decode("utf-8", "replace")).strip()


def backoff_s(attempt: int, chance: float) -> float:
    """Seconds before try `attempt` (the first repetition is 1): doubled each time, at least half of it left to chance, so
    that clients which failed together do not come back together."""
    longest = min(BACKOFF_S * 2 ** (attempt - 1), LONGEST_WAIT_S)
    return longest * (0.5 + 0.5 * chance)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait (Retry-After: a number, or a date to be compared with its own); 0: it does not."""
    said = headers.get("Retry-After", "").strip()
    if said.replace(".", "", 1).isdigit():
        return float(said)
    try:
        return max(0.0, (parsedate_to_datetime(said) - parsedate_to_datetime(headers.get("Date", ""))).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None
