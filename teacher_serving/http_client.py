"""A teacher behind an OpenAI-compatible endpoint.

In:  tables of PROMPT_SCHEMA (generate) or SEQUENCE_SCHEMA (score), from several threads at once.
Out: tables of TEACHER_OUTPUT_SCHEMA in the order of the request; a row that could not be answered is an error row.

What the endpoint gives is found out by a few requests for one token: whether prompts may be token ids, and how many
log-probabilities a position gets, which is a setting of the server. Rows hold as many (`top_k`), and the exact log of the
rest (`log_tail`). An endpoint without any gives text alone, for top_k: 0.

Shape letters: P prompt tokens, T output tokens, K top-k entries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from teacher_serving.arrow import Answer, ListColumn, answers_table, find_problems, request_seed
from teacher_serving.config import HttpTeacherConfig
from teacher_serving.http_calls import Endpoint, EndpointError, NoAnswerError, RefusedError
from teacher_serving.http_completions import Offer, ReplyError, Wording, choice_of
from teacher_serving.identity import read_tokenizer
from teacher_serving.spending import BudgetSpentError, Clock
from teacher_serving.types import NOT_ASKED, TeacherInfo, token_limits

PROBE_TEXT = "The answer"


class HttpTeacher:
    """An endpoint behind the Teacher protocol. Thread-safe; close it when done."""

    def __init__(
        self,
        config: HttpTeacherConfig,
        info: TeacherInfo,
        ledger: Path | None = None,
        clock: Clock = Clock(),  # noqa: B008 (frozen)
    ) -> None:
        """`ledger`: where actors and runs that share a budget write what they spend.

        Errors: EndpointError where the endpoint, its key or its model is not what the config says.
        """
        self.info = info
        self._config = config
        self._tokenizer = read_tokenizer(Path(config.tokenizer))
        self._endpoint = Endpoint(config, ledger, clock)
        try:
            served_model(config, self._endpoint)
            self.offer = self._endpoint.run(self._find_offer())
        except BaseException:
            self._endpoint.close()
            raise
        self._wording = self._worded(self.offer)

    def generate(self, prompts: pa.Table) -> pa.Table:
        """Write a completion for every row of PROMPT_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order.

        Errors: EndpointError where the endpoint answers nobody any more (its key, its model).
        """
        prompt, uids = ListColumn.of(prompts, "prompt_ids"), prompts.column("uid").to_pylist()
        sampling = self._config.sampling
        limits = token_limits(prompts, sampling.max_tokens)

        async def write(row: int) -> Answer:
            ids = prompt.row(row)
            max_tokens = min(limits[row], self.info.max_model_len - len(ids))
            seed = None if sampling.temperature == 0.0 else request_seed(sampling.seed, uids[row], 0)
            body = self._wording.to_write(ids, max_tokens, seed)
            return self._wording.read_written(await self._endpoint.complete(body, len(ids), max_tokens))

        return self._answer(prompts, write, context=self.info.max_model_len)

    def score(self, sequences: pa.Table) -> pa.Table:
        """Top-k at every output position of SEQUENCE_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order.

        With `top_k: 0` nobody is asked. Errors: as generate.
        """
        prompt, output = (ListColumn.of(sequences, name) for name in ("prompt_ids", "output_ids"))

        async def score(row: int) -> Answer:
            if not (self.offer.top_k and output.lengths[row]):
                return Answer(output.row(row), (), "given")
            ids = np.concatenate((prompt.row(row), output.row(row)))
            reply = await self._endpoint.complete(self._wording.to_score(ids), len(ids), 1)
            return self._wording.read_scored(reply, int(prompt.lengths[row]), ids)

        return self._answer(sequences, score, context=self.info.max_model_len - 1)  # it takes one step after the text

    def probe(self) -> None:
        """Nothing: what the endpoint can do was found out at the start, and its memory is its own affair."""

    def close(self) -> None:
        """End the connections. Idempotent."""
        self._endpoint.close()

    def check_scoring(self) -> None:
        """Errors: EndpointError where the endpoint does not score given text."""
        ids = np.array(self._probe_ids() * 2, np.int32)
        try:
            reply = self._endpoint.run(self._endpoint.complete(self._wording.to_score(ids), len(ids), 1))
            self._wording.read_scored(reply, 1, ids)
        except (RefusedError, ReplyError) as error:
            raise EndpointError(
                f"{self._config.address} does not score given text (prompt_logprobs): {error}; a stock vLLM does, or set "
                "data.completions=teacher to have it write"
            ) from error

    # ---- asking

    def _answer(self, rows: pa.Table, ask: Callable[[int], Awaitable[Answer]], *, context: int) -> pa.Table:
        problems = find_problems(rows, self.info, context=context)

        async def one(row: int, problem: str | None) -> Answer:
            if problem is not None:
                return Answer.error(problem)
            try:
                answer = await ask(row)
            except (RefusedError, NoAnswerError, ReplyError) as error:
                return Answer.error(str(error))
            except BudgetSpentError as error:
                return Answer.error(f"{NOT_ASKED}: {error}")
            self._check_ids(answer)
            return answer

        async def all_rows() -> list[Answer]:
            return await asyncio.gather(*(one(row, problem) for row, problem in enumerate(problems)))

        return self._table(rows, self._endpoint.run(all_rows()))

    def _check_ids(self, answer: Answer) -> None:
        largest = max(int(ids.max(initial=-1)) for ids in (answer.output_ids, *(ids for ids, _ in answer.pieces)))
        if largest >= self.info.vocab_size:
            raise EndpointError(
                f"{self._config.model} at {self._config.address} answers with token id {largest}, but the vocabulary in "
                f"{self._config.tokenizer} has {self.info.vocab_size} ids; set teacher.tokenizer to the folder of the model "
                "that is served there, with its config.json"
            )

    def _table(self, rows: pa.Table, answers: Sequence[Answer]) -> pa.Table:
        """The answers as rows, each with the K that came."""
        widths = np.array([a.pieces[0][0].shape[1] - 1 if a.pieces else self.offer.top_k for a in answers], np.int64)
        tables, places = [], []
        for top_k in np.unique(widths) if len(widths) else [self.offer.top_k]:
            place = np.flatnonzero(widths == top_k)
            own = [answers[row] for row in place]
            tables.append(answers_table(rows.take(place), own, self.info, int(top_k), self._config.weight_version))
            places.append(place)
        if len(tables) == 1:
            return tables[0]
        return pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(places)))).combine_chunks()

    # ---- what the endpoint gives

    def _worded(self, offer: Offer) -> Wording:
        given = self._config.sampling.stop_token_ids
        return Wording(self._config, self._tokenizer, self.info.eos_token_ids if given is None else given, offer)

    def _probe_ids(self) -> list[int]:
        return self._tokenizer.encode(PROBE_TEXT, add_special_tokens=False).ids[:1] or [0]

    async def _one_token(self, offer: Offer) -> dict[str, Any]:
        """The answer to a request for one token, which is on no budget. Errors: RefusedError, EndpointError."""
        body = self._worded(offer).to_write(np.array(self._probe_ids(), np.int32), 1, None)
        try:
            return await self._endpoint.ask("POST", "/completions", body)
        except NoAnswerError as error:
            raise EndpointError(f"{self._config.model} at {self._config.address} completes nothing: {error}") from error

    async def _find_offer(self) -> Offer:
        """Ask for one token in the ways that endpoints differ in, vLLM's first. Errors: EndpointError."""
        refusals = []
        for extensions, by_ids in ((True, True), (False, True), (True, False), (False, False)):
            try:
                choice = choice_of(await self._one_token(Offer(by_ids, extensions, top_k=0)))
            except (RefusedError, ReplyError) as error:
                refusals.append(error)
                continue
            offer = Offer(by_ids, extensions and choice.get("token_ids") is not None, top_k=0)
            if not offer.extensions:
                self._check_plain()
            return replace(offer, top_k=await self._largest_top_k(offer)) if self._config.top_k else offer
        raise EndpointError(f"{self._config.model} at {self._config.address} completes no prompt: {refusals[0]}")

    def _check_plain(self) -> None:
        sampling = self._config.sampling
        if sampling.sample_top_k or sampling.stop_token_ids is not None:
            raise EndpointError(
                f"sampling.sample_top_k={sampling.sample_top_k} and sampling.stop_token_ids={sampling.stop_token_ids}, but "
                f"{self._config.address} knows neither (it is no vLLM); leave them out"
            )

    async def _largest_top_k(self, offer: Offer) -> int:
        """K that the server gives, at most that of the config: servers limit it, and refuse what is above.

        Errors: EndpointError where it gives none, or names tokens by their text.
        """
        given, refused, asked = 0, self._config.top_k + 1, self._config.top_k
        reason = ""
        while refused - given > 1:
            try:
                reply = await self._one_token(replace(offer, top_k=asked))
                answer = self._worded(replace(offer, top_k=asked)).read_written(reply)
            except (RefusedError, ReplyError) as error:
                refused, reason = asked, str(error)
            else:
                width = answer.pieces[0][0].shape[1] - 1
                if width < asked:  # the server does not say no, it gives fewer
                    return width
                given = asked
            asked = (given + refused) // 2
        if not given:
            raise EndpointError(
                f"{self._config.model} at {self._config.address} gives no log-probabilities by token id ({reason}); set "
                "teacher.top_k=0 to learn from its text alone (loss.kd=0, loss.ce_teacher above 0)"
            )
        return given


def contact(config: HttpTeacherConfig, info: TeacherInfo, *, scoring: bool) -> str:
    """Ask the endpoint, a few tokens in all, whether it can do what the config wants; in words what it gives.

    `scoring`: it is to score given text. Errors: EndpointError, in a few seconds where nothing answers.
    """
    teacher = HttpTeacher(_hasty(config), info)
    try:
        if scoring and config.top_k:
            teacher.check_scoring()
    finally:
        teacher.close()
    given = teacher.offer.top_k
    amount = f"top-{given}" if given == config.top_k else f"top-{given} of the {config.top_k} asked for, the server's limit"
    what = amount if config.top_k else "text alone (sequence-level distillation)"
    by_text = "" if teacher.offer.extensions else "; its text is tokenised here"
    return f"{config.model} at {config.address} gives {what}{by_text}"


def served_context(config: HttpTeacherConfig) -> int:
    """Tokens of context that the endpoint says its model has; it is asked once.

    Errors: EndpointError where it does not say it, or does not answer.
    """
    return _served_context(config.model_dump_json())


@lru_cache(maxsize=8)
def _served_context(config_json: str) -> int:
    config = HttpTeacherConfig.model_validate_json(config_json)
    endpoint = Endpoint(_hasty(config))
    try:
        said = served_model(config, endpoint).get("max_model_len")
    finally:
        endpoint.close()
    if not said:
        raise EndpointError(
            f"{config.address} does not say how long the context of {config.model} is; set teacher.max_model_len"
        )
    return int(said)


def served_model(config: HttpTeacherConfig, endpoint: Endpoint) -> dict[str, Any]:
    """What the endpoint says of the config's model. Errors: EndpointError where there is no such model, or no answer."""
    try:
        reply = endpoint.run(endpoint.ask("GET", "/models"))
    except (NoAnswerError, RefusedError) as error:
        raise EndpointError(
            f"{config.address} does not answer: {error}; start the server, or set teacher.address"
        ) from error
    models = {model["id"]: model for model in reply.get("data", ())}
    if config.model not in models:
        raise EndpointError(
            f"{config.address} serves no model {config.model!r}, but {', '.join(sorted(models)) or 'none'}; set "
            "teacher.model to the name of one"
        )
    limit = models[config.model].get("max_model_len")
    if limit and config.max_model_len is not None and config.max_model_len > limit:
        raise EndpointError(
            f"teacher.max_model_len={config.max_model_len} is more than the {limit} tokens that {config.address} has for "
            f"{config.model}; expected at most {limit}"
        )
    return models[config.model]


def _hasty(config: HttpTeacherConfig) -> HttpTeacherConfig:
    """The config for a first look, where somebody waits: one repetition, and no answer for half a minute is none."""
    return config.model_copy(
        update={"max_retries": min(config.max_retries, 1), "request_timeout_s": min(config.request_timeout_s, 30.0)}
    )
