"""Grades what a model answers to the demo's prompts while its recipe is being tuned; the demo's full judge is
`raykd.evaluate`.

In: a transformers model and prompt rows with gold fields. Out: a `Grade`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from raykd.demo.tokenizer import render

_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Grade:
    """Shares in [0, 1]: `exact` of rows with gold calls, `decision` (call or not) of all rows, `by_kind` of rows whose
    calls are exact and whose answer, if no call is due, is the gold answer word for word."""

    exact: float
    decision: float
    by_kind: dict[str, float]

    def __str__(self) -> str:
        kinds = "  ".join(f"{kind} {share:.3f}" for kind, share in self.by_kind.items())
        return f"exact {self.exact:.4f}  decision {self.decision:.4f}  |  {kinds}"


def calls_of(text: str) -> list[Any]:
    """The calls a completion makes, parsed; one that is no JSON is kept as its text."""
    calls = []
    for body in _CALL.findall(text):
        try:
            calls.append(json.loads(body))
        except json.JSONDecodeError:
            calls.append(body)
    return calls


def grade_texts(rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> Grade:
    """Grade one completion per row. Calls must be equal in name, arguments, types, number and order."""
    exact, decision, by_kind = [], [], defaultdict(list)
    for row, text in zip(rows, texts, strict=True):
        # As JSON, because Python holds True == 1 == 1.0.
        same = json.dumps(calls_of(text), sort_keys=True) == json.dumps(row["gold_calls"], sort_keys=True)
        decision.append(("<tool_call>" in text) == bool(row["gold_calls"]))
        if row["gold_calls"]:
            exact.append(same)
        by_kind[row["kind"]].append(same if row["gold_calls"] else text == row["gold_answer"])
    shares = {kind: sum(hits) / len(hits) for kind, hits in sorted(by_kind.items())}
    return Grade(sum(exact) / max(1, len(exact)), sum(decision) / len(decision), shares)


@torch.inference_mode()
def complete_greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]], batch_size: int = 100
) -> list[str]:
    """Greedy completions of prompt rows, at most 128 tokens each, without the closing <|im_end|>."""
    model.eval()
    writer: Any = model  # the type stubs hide `generate`
    prompts = [render(tokenizer, row, prompt=True) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    texts = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer([prompts[i] for i in chosen], padding=True, padding_side="left", return_tensors="pt")
        output = writer.generate(**batch, do_sample=False, max_new_tokens=128)
        new = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, new, strict=True):
            texts[index] = text
    return texts


def grade_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]]) -> Grade:
    """Grade the model's greedy completions."""
    return grade_texts(rows, complete_greedy(model, tokenizer, rows))
