"""What the data says about a held-out prompt beside its gold: the tier it is to keep, whether code should be written."""

from __future__ import annotations

import json

from raykd.config import Config
from raykd.demo.code_mode import generate_pairs
from raykd.evaluation.prompts import load_judged_prompts
from teacher_serving.identity import describe
from tests.conftest import DEMO_TEACHER

CALLS = [{"name": "find", "arguments": {"city": city}} for city in ("Rome", "Oslo")]


def test_tier_and_preference_for_code_come_with_the_row(tmp_path):
    (pair,) = generate_pairs(1, seed=0, split="held_out")
    offered = {"messages": pair["messages"], "tools": pair["tools"]}
    rows = [
        pair,  # no gold calls: its response makes two
        offered | {"gold_calls": CALLS, "caws_tier": 1},
        offered | {"gold_calls": CALLS[:1]},
        offered,  # nothing says that a call is needed
        {"messages": pair["messages"][1:], "tools": pair["tools"], "gold_calls": CALLS, "metadata": {"caws_tier": 3}},
    ]
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "teacher": {"kind": "hf", "model": str(DEMO_TEACHER)},
        "student": {"model": str(DEMO_TEACHER)},
        "data": {"prompts": "none", "held_out": str(path)},
        "evaluate": {"max_tokens": 100},
    }
    config = Config.model_validate(settings)
    prompts = load_judged_prompts(config, describe(config.teacher)).prompts
    assert [prompt.prefers_code for prompt in prompts] == [True, True, False, False, False]
    assert [prompt.caws_tier for prompt in prompts] == [2, 1, 2, 2, 3]
    config = Config.model_validate(settings | {"code_mode": {"min_tools": 1}})
    prompts = load_judged_prompts(config, describe(config.teacher)).prompts
    assert [prompt.prefers_code for prompt in prompts] == [True, True, True, False, False]
