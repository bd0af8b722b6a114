"""What a teacher is asked and what it answers, as Arrow tables. No logic beyond the schemas.

In:  a table of PROMPT_SCHEMA (generate) or SEQUENCE_SCHEMA (score).
Out: a table of TEACHER_OUTPUT_SCHEMA, rows in the order of the request.

Shape letters: P prompt tokens, T output tokens, K top-k entries, V vocabulary, L shipped layers, H hidden size.
Log-probabilities are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import pyarrow as pa

if TYPE_CHECKING:
    from teacher_serving.arrow import Answer
    from teacher_serving.config import RequestConfig

PROMPT_SCHEMA = pa.schema(
    [
        ("uid", pa.int64()),
        ("prompt_ids", pa.list_(pa.int32())),  # [P]
    ]
)
"""A column `max_tokens` (int32) beside these takes the place of `sampling.max_tokens`, row by row."""

FOR_TEACHER = "for_teacher"
"""Column beside those of a request that names, of several teachers (several.py), the one that is to answer the row."""

SEQUENCE_SCHEMA = pa.schema(
    [
        ("uid", pa.int64()),
        ("prompt_ids", pa.list_(pa.int32())),  # [P]
        ("output_ids", pa.list_(pa.int32())),  # [T] given text whose every position is scored
    ]
)

TEACHER_OUTPUT_SCHEMA = pa.schema(
    [
        ("uid", pa.int64()),
        ("prompt_ids", pa.list_(pa.int32())),  # [P]
        ("output_ids", pa.list_(pa.int32())),  # [T]
        ("topk_ids", pa.list_(pa.int32())),  # [T*K] rank order, the sampled token's duplicate column dropped
        ("topk_logprobs", pa.list_(pa.float16())),  # [T*K] raw, temperature 1, full vocabulary; missing = -inf
        ("log_tail", pa.list_(pa.float32())),  # [T] log of the mass outside the K, before the cast to half
        ("sampled_logprob", pa.list_(pa.float32())),  # [T] of the emitted (or given) token
        ("top_k", pa.int32()),
        ("finish_reason", pa.string()),  # stop | length | given (scored text) | error: ... (nothing came back)
        ("teacher_id", pa.string()),
        ("teacher_fingerprint", pa.string()),  # hash of model, tokenizer and sampling
        ("weight_version", pa.string()),
        ("num_hidden_layers_shipped", pa.int32()),  # L; 0 without hidden_states
        # [L*(P+T)*H] output of the layers `hidden_layers` at every token; NaN at the last one, which has none
        ("hidden_states", pa.list_(pa.float16())),
    ]
)


@dataclass(frozen=True)
class TeacherInfo:
    """What a teacher can deliver; known from its files, before any weight is loaded."""

    teacher_id: str
    fingerprint: str  # model + tokenizer + sampling: the key of cached output
    vocabulary_fingerprint: str  # of the id-to-token map
    vocab_size: int  # rows of the LM head
    max_model_len: int  # tokens, prompt and output together
    eos_token_ids: tuple[int, ...]


NOT_ASKED = "not asked"
"""Begins the reason of an error row that nobody was asked for: the teacher's budget is spent."""


class Teacher(Protocol):
    """A model that writes and scores. Methods may be called from several threads at once."""

    info: TeacherInfo

    def generate(self, prompts: pa.Table) -> pa.Table:
        """Write a completion for every row of PROMPT_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order."""
        ...

    def score(self, sequences: pa.Table) -> pa.Table:
        """Top-k at every output position of SEQUENCE_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order."""
        ...

    def probe(self) -> None:
        """Score one sequence of full length, so that too little memory shows now and not in an hour."""
        ...

    def close(self) -> None:
        """Release the model. Idempotent."""
        ...


@runtime_checkable
class Engine(Teacher, Protocol):
    """A teacher that holds its model itself, and answers each request as that request says."""

    def generate_answers(self, prompts: pa.Table, request: RequestConfig | None = None) -> list[Answer]:
        """As generate, an Answer a row in full precision. `request`: in place of the config's own settings."""
        ...

    def score_answers(self, sequences: pa.Table, request: RequestConfig | None = None) -> list[Answer]:
        """As score, an Answer a row in full precision. `request`: in place of the config's own settings."""
        ...

    def problem(self) -> str | None:
        """Why this teacher can answer nothing any more; None while it can."""
        ...


def token_limits(prompts: pa.Table, max_tokens: int) -> list[int]:
    """Most tokens that each row may be answered with: its own number where it has one, else `max_tokens`."""
    return prompts["max_tokens"].to_pylist() if "max_tokens" in prompts.column_names else [max_tokens] * prompts.num_rows


class TeacherDeadError(RuntimeError):
    """The engine is gone and answers nothing any more: only a new process helps."""
