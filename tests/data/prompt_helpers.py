"""Made-up prompts and answers for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raykd.config import Config
from raykd.data.prompt_rows import RowRules, ShardResult, Work, prepare_shards
from raykd.data.readers import Shard, cut, find_files
from teacher_serving.types import TEACHER_OUTPUT_SCHEMA


def conversation(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


def write_lines(path: Path, rows: Sequence[dict[str, Any] | bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def shards_of(path: Path, shard_bytes: int = 1 << 20) -> list[Shard]:
    return [shard for file in find_files(path, "data.prompts") for shard in cut(file, shard_bytes)]


def prepare(tmp_path: Path, rows: list, model: Path, **rules: Any) -> ShardResult:
    (shard,) = shards_of(write_lines(tmp_path / "in" / "a.jsonl", rows))
    settings = {"completions": "teacher", "max_tokens": 200, "on_long_prompt": "reject", **rules}
    work = [Work(shard, str(tmp_path / "train-0"), held_out=False)]
    (result,) = prepare_shards(work, RowRules(tokenizer=str(model), **settings))
    return result


def answers(uids: list[int], fingerprint: str = "f") -> pa.Table:
    """Rows whose every value follows from the uid."""
    rng = np.random.default_rng(0)
    rows = []
    for uid in uids:
        length, k = int(rng.integers(1, 9)), 3
        rows.append(
            {
                "uid": uid,
                "prompt_ids": [uid % 100],
                "output_ids": list(range(length)),
                "topk_ids": [uid % 1000] * length * k,
                "topk_logprobs": np.full(length * k, -(uid % 7), np.float16),
                "log_tail": [-1.5] * length,
                "sampled_logprob": [-0.5] * length,
                "top_k": k,
                "finish_reason": "stop",
                "teacher_id": "t",
                "teacher_fingerprint": fingerprint,
                "weight_version": "0",
            }
        )
    return pa.Table.from_pylist(rows, schema=TEACHER_OUTPUT_SCHEMA)


def config_for(tmp_path: Path, model: Path, *, teacher: dict[str, Any] | None = None, **data: Any) -> Config:
    """A run in `tmp_path` on its train.jsonl, with a small teacher in plain transformers."""
    own = {"kind": "hf", "model": str(model), "device": "cpu", "top_k": 4, "batch_size": 4, "sampling": {"max_tokens": 6}}
    return Config.model_validate(
        {
            "run": {"name": "run", "dir": str(tmp_path), "seed": 3},
            "teacher": own | (teacher or {}),
            "student": {"model": str(model)},
            "data": {"prompts": str(tmp_path / "train.jsonl"), **data},
        }
    )
