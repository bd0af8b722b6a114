"""A teacher without a model: takes the time of one and answers with payload of the real size.

In:  tables of PROMPT_SCHEMA (generate) or SEQUENCE_SCHEMA (score), as for any teacher.
Out: tables of TEACHER_OUTPUT_SCHEMA in the order of the request, after the time that `tokens_per_s` says.

The text is prose that ends in a tool call, in the teacher's own tokens; its length is drawn for every prompt from a
log-normal distribution. The scores are sorted, distinct and of mass below 1, and mean nothing. Everything follows from
uid and seed, so that a prompt has the same answer in every run, whichever replica it is put to.

Shape letters: P prompt tokens, T output tokens, K top-k entries, V vocabulary, M rows of the pool that scores are cut from,
L shipped layers, H hidden size.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from teacher_serving.arrow import NO_STATES, Answer, ListColumn, answers_table, find_problems, request_seed, shipped_states
from teacher_serving.config import SimulatedTeacherConfig
from teacher_serving.identity import read_text_config, read_tokenizer
from teacher_serving.types import TeacherInfo, token_limits

POOL_ROWS = 4096
LENGTH_SPREAD = 0.6
"""Standard deviation of the logarithm of a response's length: nine of ten lie between a third of the mean and twice it."""
PROSE = (
    "The question asks for a value that the tools can look up, so I first check which of them fits and what it needs. "
    "The name is given, the date is not; today's is meant. "
)
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"name": "Oslo", "date": "2024-05-17", "limit": 3}}\n</tool_call>'


class SimulatedTeacher:
    """Behind the Teacher protocol; calls from several threads share the places of one engine's running batch."""

    def __init__(self, config: SimulatedTeacherConfig, info: TeacherInfo) -> None:
        self.info = info
        self._config = config
        self._places = Places(config.max_num_seqs, config.tokens_per_s)
        tokenizer = read_tokenizer(Path(config.model))
        self._prose, self._call = (
            np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32) for text in (PROSE, CALL)
        )
        self._pool = score_pool(config.top_k, info.vocab_size, config.sampling.seed)
        self._hidden_size = read_text_config(Path(config.model))["hidden_size"] if config.hidden_layers else 0

    def generate(self, prompts: pa.Table) -> pa.Table:
        """Write a completion for every row of PROMPT_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order."""
        problems = find_problems(prompts, self.info, context=self.info.max_model_len)
        prompt, uids = ListColumn.of(prompts, "prompt_ids"), prompts.column("uid").to_pylist()
        limits = token_limits(prompts, self._config.sampling.max_tokens)
        answers = []
        for row, problem in enumerate(problems):
            rng = self._random(uids[row])
            room = min(limits[row], self.info.max_model_len - int(prompt.lengths[row]))
            output, finish = (np.empty(0, np.int32), "") if problem else self._write(rng, room)
            answers.append(Answer.error(problem) if problem else self._scored(rng, output, finish, int(prompt.lengths[row])))
        return self._table(prompts, answers)

    def score(self, sequences: pa.Table) -> pa.Table:
        """Top-k at every output position of SEQUENCE_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order."""
        problems = find_problems(sequences, self.info, context=self.info.max_model_len)
        prompt, output = ListColumn.of(sequences, "prompt_ids"), ListColumn.of(sequences, "output_ids")
        uids = sequences.column("uid").to_pylist()
        answers = [
            Answer.error(problem)
            if problem
            else self._scored(self._random(uids[row]), output.row(row), "given", int(prompt.lengths[row]))
            for row, problem in enumerate(problems)
        ]
        return self._table(sequences, answers)

    def probe(self) -> None:
        """Nothing: there is no memory to run out of."""

    def close(self) -> None:
        """Nothing: there is no model to release."""

    def _random(self, uid: int) -> np.random.Generator:
        return np.random.default_rng(request_seed(self._config.sampling.seed, uid, attempt=0))

    def _write(self, rng: np.random.Generator, room: int) -> tuple[np.ndarray, str]:
        """A text [T] of drawn length, and how it ends: with a call and the end of the turn, or cut off at `room`."""
        # The mean of a log-normal is exp(mu + sigma**2 / 2).
        mu = math.log(self._config.response_tokens) - LENGTH_SPREAD**2 / 2
        length = max(1, round(rng.lognormal(mu, LENGTH_SPREAD)))
        end = np.array([*self._call, *self.info.eos_token_ids[:1]], np.int32)[-length:]
        prose = np.resize(np.roll(self._prose, -rng.integers(len(self._prose))), length - len(end))
        text = np.concatenate((prose, end)).astype(np.int32)
        return (text, "stop") if length <= room else (text[:room], "length")

    def _scored(self, rng: np.random.Generator, output_ids: np.ndarray, finish: str, num_prompt: int) -> Answer:
        """The answer with scores [T, K + 1], the token itself in front and on rank 1, as a teacher that is sure of it."""
        length, (pool_ids, pool_logprobs) = len(output_ids), self._pool
        rows = (rng.integers(POOL_ROWS) + np.arange(length)) % POOL_ROWS
        ids = pool_ids[rows]
        ids[:, :2] = output_ids[:, None]
        spare = pool_ids[rows, 1]  # of the K + 1 distinct ids of a row the one that is in no column now
        ids[:, 2:] = np.where(ids[:, 2:] == output_ids[:, None], spare[:, None], ids[:, 2:])
        pieces = [(ids, pool_logprobs[rows])] if length else []
        return Answer(output_ids, pieces, finish, self._states(num_prompt + length))

    def _states(self, num_tokens: int) -> np.ndarray:
        if not self._hidden_size:
            return NO_STATES
        states = np.zeros((len(self._config.hidden_layers), num_tokens, self._hidden_size), np.float16)
        return shipped_states(states, num_tokens)

    def _table(self, rows: pa.Table, answers: Sequence[Answer]) -> pa.Table:
        """The table, when an engine would have it: the slowest of the rows decides."""
        start = time.monotonic()
        table = answers_table(rows, answers, self.info, self._config.top_k, self._config.weight_version)
        done = self._places.take(start, [len(answer.output_ids) for answer in answers])
        time.sleep(max(0.0, done - time.monotonic()))
        return table


class Places:
    """The running batch of an engine: so many sequences at once, each at an even share of the rate. Thread-safe.

    So an engine makes its rate only while all places are taken, and a long text keeps its call waiting, as in a real one.
    """

    def __init__(self, num_places: int, tokens_per_s: float) -> None:
        self._seconds_per_token = num_places / tokens_per_s
        self._free_at = [0.0] * num_places  # a heap
        self._lock = threading.Lock()

    def take(self, now: float, lengths: Sequence[int]) -> float:
        """Give every text the place that is free first; returns when the last one is written."""
        done = now
        with self._lock:
            for length in lengths:
                start = max(now, self._free_at[0])
                heapq.heapreplace(self._free_at, start + length * self._seconds_per_token)
                done = max(done, start + length * self._seconds_per_token)
        return done


def score_pool(top_k: int, vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that scores are cut from: ids [M, K + 1] int32, distinct in a row, and logprobs [M, K + 1] float32.

    Column 0 of the log-probabilities is the token's own, the others are the K in rank order: powers of the rank, 0.9 to
    0.999 together, or more where few tokens are left for the rest.
    """
    rng = np.random.default_rng(seed)
    first = rng.integers(vocab_size, size=(POOL_ROWS, 1))
    stride = rng.integers(1, max(2, vocab_size // (top_k + 1)), size=(POOL_ROWS, 1))
    # With K = V the last column is the first again, and so in the top-k once all the same: column 0 is not in it.
    ids = (first + stride * np.arange(top_k + 1)) % vocab_size
    weights = (1.0 + np.arange(top_k)) ** -rng.uniform(1.0, 2.0, (POOL_ROWS, 1))
    shares = weights / weights.sum(axis=1, keepdims=True)
    # None of the V - K other tokens has more than the last of the K: together they cannot have more than that allows.
    least_mass = 1 / (1 + (vocab_size - top_k) * shares[:, -1:])
    logprobs = np.log(shares * np.maximum(least_mass, rng.uniform(0.9, 0.999, (POOL_ROWS, 1))))
    return ids.astype(np.int32), np.concatenate((logprobs[:, :1], logprobs), axis=1).astype(np.float32)
