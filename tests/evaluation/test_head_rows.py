"""Recorded drafts become rows on which heads are judged: what is a prompt, what stands between drafts, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raykd.config import Config
from raykd.demo.offline import MAX_LOOPS, WISHES, generate_rows
from raykd.evaluation.head_rows import load_head_rows
from raykd.types import Mark
from teacher_serving.identity import describe
from tests.conftest import DEMO_TEACHER

ASK = {"role": "user", "content": "Name a city."}
AGAIN = {"role": "user", "content": "Once more, better."}


def drafts(*scores: float, **keys) -> list[dict]:
    """A conversation in which each draft is judged, and a better one asked for."""
    messages = [ASK]
    for loop, score in enumerate(scores):
        messages += [{"role": "assistant", "content": f"Draft {loop}", "loop": loop, "judge_score": score, **keys}, AGAIN]
    return messages[:-1]


def load(tmp_path: Path, rows: list[dict], *, held_out: bool = False, **sections):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluate = {"max_prompts": 50} if held_out else {"refinements": str(path), "max_prompts": 50}
    settings = {
        "teacher": {"kind": "hf", "model": str(DEMO_TEACHER), "max_model_len": 640},
        "student": {"model": str(DEMO_TEACHER)},
        "data": {"prompts": "none", "held_out": str(path)},
        "evaluate": evaluate,
    }
    config = Config.model_validate(settings | sections)
    return load_head_rows(config, describe(config.teacher))


def test_drafts_keep_their_scores_and_limits_and_know_their_prompt(tmp_path, demo_tokenizer):
    rows = [
        {"messages": drafts(0.2, 0.9, 0.92, caws_tier=3, max_loops=3)},
        {"messages": [*drafts(0.9, 0.9), ASK, *drafts(0.5, max_loops=5)[1:]], "caws_tier": 1},
        {"messages": [ASK, {"role": "assistant", "content": "Oslo"}]},  # says nothing of heads
    ]
    found = load(tmp_path, rows)
    assert found is not None
    assert [(own.row, own.first, own.tier, own.cap, own.scores.tolist()) for own in found.refinements] == [
        (0, 0, 3, 3, [0.2, 0.9, 0.92]),
        (1, 0, 1, 1, [0.9, 0.9]),
        (1, 2, 1, 1, [0.5]),
    ]
    assert found.examples["halt_targets"].to_pylist() == [[0, 0, 1], [1, 1, 1]]
    assert found.examples["quality"].to_pylist() == pytest.approx([0.92, 0.5])
    ids = found.examples["input_ids"][1].values.to_numpy()
    starts = [own.start for own in found.refinements[1:]]
    texts = [demo_tokenizer.decode(ids[:start]) for start in starts]
    assert all(text.endswith("<|im_start|>assistant\n") for text in texts)
    assert texts[0].count("Draft") == 0
    assert texts[1].count("Draft") == 2
    between = demo_tokenizer.decode(found.between)
    assert between == f"\n<|im_start|>user\n{AGAIN['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert found.source["num_rows"] == 2


def test_the_demos_refinements_are_all_found_among_its_other_rows(tmp_path, demo_tokenizer):
    rows = list(generate_rows(30, 3, "held_out"))
    found = load(tmp_path, rows)
    assert found is not None
    assert len(found.refinements) == found.examples.num_rows == 10
    assert all(own.cap == MAX_LOOPS and 2 <= own.num_loops <= MAX_LOOPS for own in found.refinements)
    assert any(wish in demo_tokenizer.decode(found.between) for wish in WISHES)
    for own in found.refinements:
        marks = found.examples["marks"][own.row].values.to_numpy()
        assert int(((marks & Mark.DECISION) != 0).sum()) == own.num_loops
        assert marks[own.start] & Mark.RESPONSE
        assert not marks[own.start - 1] & Mark.RESPONSE


def test_held_out_prompts_serve_as_far_as_they_hold_drafts(tmp_path):
    prompt = {"messages": [ASK], "gold_calls": [], "kind": "plain"}
    found = load(tmp_path, [prompt, {"messages": drafts(0.9, 0.95)}, prompt], held_out=True)
    assert found is not None
    assert found.examples.num_rows == 1
    assert load(tmp_path, [prompt, prompt], held_out=True) is None


def test_one_draft_alone_says_nothing_of_how_a_second_one_is_asked_for(tmp_path):
    found = load(tmp_path, [{"messages": drafts(0.9)}])
    assert found is not None
    assert np.array_equal(found.between, [])


def test_a_single_loop_and_a_scored_response_are_rows_without_a_refinement(tmp_path):
    loop = {"loop_index": 1, "judge_score": 0.9, "prev_score": 0.89, "max_loops": 3}
    rows = [
        {"messages": [ASK], "teacher_text": "Oslo", "metadata": loop},
        {"messages": [ASK], "teacher_text": "Rome", "teacher_quality_score": 0.7},
    ]
    found = load(tmp_path, rows)
    assert found is not None
    assert found.refinements == []
    assert found.examples["halt_targets"].to_pylist() == [[1.0], []]
    assert found.examples["quality"].to_pylist()[1] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"messages": [ASK, {"role": "assistant", "content": "Oslo"}]}], "found no row with judged drafts"),
        ([{"messages": drafts(0.5, 1.5)}], r"1 of 1 rows .* cannot be used .*judge_score is 1.5"),
        ([{"messages": drafts(0.5)}, {"messages": [ASK, *drafts(0.5, 0.6)[3:]]}], "1 of 2 rows .*loop is 1"),
        ([{"messages": [{"role": "user", "content": "word " * 900}, *drafts(0.5)]}], r"expected at most 640"),
    ],
)
def test_a_file_that_cannot_serve_is_an_error_that_says_why(tmp_path, rows, reason):
    with pytest.raises(ValueError, match=reason):
        load(tmp_path, rows)
