"""Offline rows for tests, and what reading them gives."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from prompt_helpers import write_lines

from raykd.data.chat import Completions, tokenize_row
from raykd.data.dataset import KDDataset
from raykd.types import Example

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
PROMPT = "<|im_start|>user\nWetter?<|im_end|>\n<|im_start|>assistant\n"
ROW = {"prompt": PROMPT, "teacher_text": CALL}
TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]
CHAT = [
    {"role": "user", "content": "Wetter in Köln?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Köln"}}}]},
    {"role": "tool", "content": '{"temperature": 21.5}'},
    {"role": "assistant", "content": "Es sind 21,5 Grad."},
]


def read(tmp_path, rows, tokenizer, **options):
    return KDDataset([write_lines(tmp_path / "a.jsonl", rows)], tokenizer, **options)


def only(tmp_path, row, tokenizer, **options):
    (example,) = read(tmp_path, [row], tokenizer, strict=True, **options)
    return example


def same(one: Example, other: Example):
    assert repr(one) == repr(other)
    for name in ("input_ids", "marks", "topk_ids", "topk_logprobs", "log_tail"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def teacher_rows(tokenizer, k=3):
    """Rows as the stream makes them before they become examples: two that the teacher wrote, one recorded conversation."""
    rng = np.random.default_rng(0)
    rows = []
    kinds: list[tuple[list, Completions]] = [(CHAT[:1], "teacher"), (CHAT[:3], "teacher"), (CHAT, "recorded")]
    for uid, (messages, completions) in enumerate(kinds):
        row = {"messages": messages, "tools": TOOLS}
        prompt = tokenize_row(tokenizer, row, uid=uid, key=str(uid), completions=completions, max_tokens=999).prompt
        written = tokenizer([CALL, "Es sind 21,5 Grad."][uid % 2] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        output = written if prompt.recorded_ids is None else prompt.recorded_ids
        logprobs = np.log(rng.dirichlet(np.ones(k + 1), len(output)))
        logprobs[0, 1] = -np.inf
        rows.append(
            {
                "uid": uid + 70,
                "key": f"k{uid}",
                "messages_json": prompt.messages_json,
                "tools_json": prompt.tools_json,
                "prompt_ids": prompt.prompt_ids,
                "output_ids": output,
                "response_mask": prompt.response_mask,
                "topk_ids": rng.integers(0, 999, len(output) * k).astype(np.int32),
                "topk_logprobs": logprobs[:, :k].astype(np.float16).ravel(),
                "log_tail": logprobs[:, k].astype(np.float32),
                "top_k": k,
                "finish_reason": "stop",
                "teacher_id": "t",
            }
        )
    half = pa.list_(pa.float16())
    table = pa.Table.from_pylist(rows)
    for name, kind in (
        ("topk_logprobs", half),
        ("log_tail", pa.list_(pa.float32())),
        ("response_mask", pa.list_(pa.bool_())),
    ):
        table = table.set_column(table.schema.get_field_index(name), name, pa.array([row[name] for row in rows], kind))
    return table
