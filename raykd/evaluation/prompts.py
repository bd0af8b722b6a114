"""The held-out prompts a model is judged on, with what the data says about the right answers.

In:  the files of data.held_out: rows as for training, and optionally `gold_calls`, `gold_values` and `kind`; rows of
     data.offline too, whose response then stands for the gold calls where it is asked how many calls a prompt needs.
Out: `JudgedPrompts`. Raises EvaluationError where there is nothing to judge on or the gold is not what it should be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raykd.config import Config
from raykd.data.chat import tokenize_row
from raykd.data.code_mode import tool_use
from raykd.data.conversation import RowError, from_json_text, read_calls
from raykd.data.readers import RawRow, SourceFile, cut, find_files, read_rows
from raykd.evaluation.answer_scores import prefers_code
from raykd.evaluation.metrics import Gold
from teacher_serving.types import TeacherInfo

WHOLE_FILE = 1 << 62  # bytes of a shard: files are read here one by one


class EvaluationError(ValueError):
    """There is nothing that could be judged; a number would be made up."""


@dataclass(frozen=True)
class JudgedPrompt:
    """One held-out prompt."""

    uid: int  # its place in the list
    key: str  # the row's own id, or file:line
    kind: str | None  # what the row calls its kind
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    prompt_ids: np.ndarray  # int32 [P]
    gold: Gold
    caws_tier: int = 2  # that its answer is to keep
    prefers_code: bool = False  # the tools should be called through code (raykd/data/code_mode.py)


@dataclass(frozen=True)
class JudgedPrompts:
    """The prompts, and where they come from."""

    prompts: list[JudgedPrompt]
    path: str
    sha256: str  # of the files' bytes
    num_rows: int
    rejected: list[str]  # reason of every row that cannot be used

    def table(self) -> pa.Table:
        """The prompts as a request to a teacher, with the conversation beside the ids."""
        return pa.table(
            {
                "uid": pa.array([prompt.uid for prompt in self.prompts], pa.int64()),
                "prompt_ids": pa.array([prompt.prompt_ids for prompt in self.prompts], pa.list_(pa.int32())),
                "messages_json": [json.dumps(prompt.messages, ensure_ascii=False) for prompt in self.prompts],
                "tools_json": [json.dumps(prompt.tools, ensure_ascii=False) for prompt in self.prompts],
            }
        )


def load_judged_prompts(config: Config, teacher: TeacherInfo) -> JudgedPrompts:
    """Read, check and tokenise the held-out prompts; if they are more than evaluate.max_prompts, a sample drawn by run.seed.

    A model that is judged writes the next assistant turn, however it was trained, so recorded turns at the end are dropped.
    """
    if config.data.held_out is None:
        raise EvaluationError("data.held_out is not set: expected a file of prompts that the student was not trained on")
    max_prompt_tokens = teacher.max_model_len - config.evaluate.max_tokens
    if max_prompt_tokens < 1:
        raise EvaluationError(
            f"evaluate.max_tokens={config.evaluate.max_tokens} fills the teacher's whole context of {teacher.max_model_len} "
            "tokens: lower it, or raise teacher.max_model_len"
        )
    files = find_files(config.data.held_out, "data.held_out")
    tokenizer = AutoTokenizer.from_pretrained(config.teacher.tokenizer_folder)
    rows = all_rows(files)
    prompts, rejected = [], []
    for where, row in sample(rows, config):
        try:
            if row.error:
                raise RowError(row.error)
            prompts.append(_judged(row.value, where, len(prompts), tokenizer, max_prompt_tokens, config))
        except RowError as error:
            rejected.append(f"{where}: {error}")
    _check(prompts, rejected, config)
    return JudgedPrompts(prompts, str(config.data.held_out), sha256_of(files), len(rows), rejected)


def all_rows(files: list[SourceFile]) -> list[tuple[str, RawRow]]:
    """All rows of the files, each with its place, file:line."""
    shards = [(file, shard) for file in files for shard in cut(file, WHOLE_FILE)]
    return [(f"{file.name}:{row.line}", row) for file, shard in shards for row in read_rows(shard)]


def sample(rows: list[tuple[str, RawRow]], config: Config) -> list[tuple[str, RawRow]]:
    """At most evaluate.max_prompts rows, drawn by run.seed, in their order."""
    chosen = np.random.default_rng(config.run.seed).permutation(len(rows))[: config.evaluate.max_prompts]
    return [rows[index] for index in sorted(chosen.tolist())]


def _judged(
    row: Mapping[str, Any],
    where: str,
    uid: int,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    config: Config,
) -> JudgedPrompt:
    key = str(row["id"]) if row.get("id") is not None else where
    prompt = tokenize_row(
        tokenizer,
        row,
        uid=uid,
        key=key,
        completions="teacher",
        max_tokens=max_prompt_tokens,
        overlong=config.data.on_long_prompt,
        held_out=True,
    ).prompt
    messages, gold = json.loads(prompt.messages_json), Gold(calls=_gold_calls(row), values=_gold_values(row))
    response = row.get("teacher_text")
    num_calls = tool_use(response).num_calls if gold.calls is None and isinstance(response, str) else len(gold.calls or ())
    return JudgedPrompt(
        uid=uid,
        key=key,
        kind=None if row.get("kind") is None else str(row["kind"]),
        messages=messages,
        tools=json.loads(prompt.tools_json),
        prompt_ids=prompt.prompt_ids,
        gold=gold,
        caws_tier=prompt.caws_tier or config.loss.caws_tier,
        prefers_code=prefers_code(messages, num_calls, config.code_mode),
    )


def _gold_calls(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Calls as {"name", "arguments"}, from that form or the OpenAI form, arguments as an object or its JSON text."""
    if row.get("gold_calls") is None:
        return None
    calls = [call["function"] for call in read_calls(row["gold_calls"], "gold_calls")]
    for call in calls:
        if not isinstance(call["arguments"], Mapping):
            raise RowError(f"gold_calls: found arguments {call['arguments']!r}, expected an object or its JSON text")
    return calls


def _gold_values(row: Mapping[str, Any]) -> list[Any] | None:
    values = from_json_text(row.get("gold_values"), "gold_values")
    if values is not None and not isinstance(values, list):
        raise RowError(f"gold_values is {type(values).__name__}, expected a list")
    return values


def _check(prompts: list[JudgedPrompt], rejected: list[str], config: Config) -> None:
    share = len(rejected) / max(1, len(prompts) + len(rejected))
    if share > config.data.max_rejected_fraction:
        raise EvaluationError(
            f"{len(rejected)} of {len(prompts) + len(rejected)} held-out rows of {config.data.held_out} cannot be used, "
            f"more than data.max_rejected_fraction={config.data.max_rejected_fraction}; the first: {rejected[0]}"
        )
    if not prompts:
        raise EvaluationError(f"data.held_out={config.data.held_out} holds no prompt: expected at least one row")


def sha256_of(files: list[SourceFile]) -> str:
    """Hash of the bytes of all files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
