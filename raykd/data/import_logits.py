"""Packed top-k logits as others publish them, to examples.

In:  a `.safetensors` or `.npz` file of these arrays, sequences end to end, N tokens in all:

| array | shape | |
|---|---|---|
| `input_ids` | [N] | token ids |
| `topk_ids`, `topk_logprobs` | [N, K] | row t: the teacher's likeliest ids for token t + 1 of the sequence, nats |
| `log_tail` | [N] | log of the mass outside the K; computed where it is missing |
| `sequence_lengths` | [S] | tokens of each sequence; missing: one sequence of N |
| `prompt_lengths` | [S] | tokens before the response; missing: 1 |

Out: `Example`s with the uid of their content; the last row of a sequence predicts nothing and is left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.numpy import load_file

from raykd.data.examples import example_from_row
from raykd.data.offline_rows import RowReader
from raykd.data.offline_scores import LEAST_TAIL, MASS_TOLERANCE
from raykd.data.readers import DataError
from raykd.data.uids import hash_uid
from raykd.types import Example


def import_packed_logits(path: str | Path, reader: RowReader, teacher_id: str = "") -> list[Example]:
    """The examples of a file; `teacher_id` names who the scores are from.

    Raises DataError for arrays that are missing or do not fit one another, ids outside the vocabulary, numbers that are no
    log-probabilities, and sequences that give no example.
    """
    arrays = _load(Path(path))
    ids, lengths, prompts = arrays["input_ids"], arrays["sequence_lengths"], arrays["prompt_lengths"]
    starts = np.cumsum(lengths) - lengths
    rows = []
    for number, (start, length, prompt) in enumerate(zip(starts.tolist(), lengths.tolist(), prompts.tolist(), strict=True)):
        scored = slice(start + prompt - 1, start + length - 1)  # the rows that predict the response
        rows.append(
            {
                "uid": number,
                "messages_json": "[]",
                "tools_json": "[]",
                "prompt_ids": ids[start : start + prompt],
                "output_ids": ids[start + prompt : start + length],
                "topk_ids": arrays["topk_ids"][scored].ravel(),
                "topk_logprobs": arrays["topk_logprobs"][scored].astype(np.float16).ravel(),
                "log_tail": arrays["log_tail"][scored].astype(np.float32),
                "top_k": arrays["topk_ids"].shape[1],
                "finish_reason": "given",
                "teacher_id": teacher_id,
            }
        )
    _check_ids(path, arrays, reader.num_ids)
    built, rejected = reader.build(pa.Table.from_pylist(rows, schema=_SCHEMA))
    if rejected.num_rows:
        first = rejected.to_pylist()[0]
        raise DataError(f"{path}: {rejected.num_rows} sequences give no example; sequence {first['uid']}: {first['reason']}")
    examples = [example_from_row(built, index) for index in range(built.num_rows)]
    return [replace(example, uid=hash_uid(example.input_ids.astype(np.int32))) for example in examples]


_SCHEMA = pa.schema(
    [
        ("uid", pa.int64()),
        ("messages_json", pa.string()),
        ("tools_json", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("output_ids", pa.list_(pa.int32())),
        ("topk_ids", pa.list_(pa.int32())),
        ("topk_logprobs", pa.list_(pa.float16())),
        ("log_tail", pa.list_(pa.float32())),
        ("top_k", pa.int32()),
        ("finish_reason", pa.string()),
        ("teacher_id", pa.string()),
    ]
)


def _load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, the optional ones filled in, their shapes checked."""
    if not path.is_file() or path.suffix not in (".npz", ".safetensors"):
        raise DataError(f"{path}: expected a .npz or .safetensors file of packed logits")
    arrays = dict(np.load(path)) if path.suffix == ".npz" else load_file(path)
    missing = [name for name in ("input_ids", "topk_ids", "topk_logprobs") if name not in arrays]
    if missing:
        raise DataError(f"{path}: no array {', '.join(missing)}; found {', '.join(sorted(arrays))}")
    num_tokens = len(arrays["input_ids"])
    arrays.setdefault("sequence_lengths", np.array([num_tokens]))
    lengths = arrays["sequence_lengths"].astype(np.int64)
    arrays["sequence_lengths"] = lengths
    arrays["prompt_lengths"] = arrays.get("prompt_lengths", np.ones(len(lengths))).astype(np.int64)
    shapes = {name: array.shape for name, array in arrays.items()}
    top_k = shapes["topk_ids"][-1]
    expected = {"input_ids": (num_tokens,), "topk_ids": (num_tokens, top_k), "topk_logprobs": (num_tokens, top_k)}
    expected |= {"prompt_lengths": lengths.shape} | ({"log_tail": (num_tokens,)} if "log_tail" in arrays else {})
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise DataError(f"{path}: {name} has shape {list(shapes[name])}, expected {list(shape)}")
    if lengths.sum() != num_tokens or (arrays["prompt_lengths"] < 1).any() or (arrays["prompt_lengths"] >= lengths).any():
        raise DataError(
            f"{path}: sequence_lengths add up to {lengths.sum()} of {num_tokens} tokens, prompt_lengths go from "
            f"{arrays['prompt_lengths'].min()}; expected all tokens, and prompts of 1 to length - 1"
        )
    mass = np.exp(arrays["topk_logprobs"].astype(np.float64)).sum(axis=1)
    if not (mass <= 1 + MASS_TOLERANCE).all():
        raise DataError(f"{path}: topk_logprobs are no log-probabilities: those of one token add up to {mass.max():.3g}")
    arrays.setdefault("log_tail", np.log(np.maximum(1 - mass, LEAST_TAIL)))
    return arrays


def _check_ids(path: str | Path, arrays: dict[str, np.ndarray], vocab_size: int) -> None:
    for name in ("input_ids", "topk_ids"):
        low, high = arrays[name].min(), arrays[name].max()
        if low < 0 or high >= vocab_size:
            raise DataError(f"{path}: {name} go from {low} to {high}, expected 0 to {vocab_size - 1}: the tokenizer's")
