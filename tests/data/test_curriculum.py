"""The latent curriculum: which steps are found, and that rewriting moves every column of an example together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from raykd.config import Config
from raykd.data.collate import collate_kd_batch
from raykd.data.curriculum import Curriculum, LatentIds, curriculum_rng, find_steps, latent_ids, rewrite, stage_at
from raykd.data.detokenize import decode_tokens
from raykd.data.examples import example_from_row, examples_to_table
from raykd.sample_config import LatentConfig, LatentStage
from raykd.types import Example, Mark, SetKind, Source
from tests.conftest import DEMO_TEACHER

ALWAYS = LatentStage(steps=2, slots=3, probability=1.0)
TEXT = "Let us see.\nStep 1: two and two are 4.\nStep 2: 4 and 3 are 7.\nStep 3: nothing else.\n\nThe answer is 7."


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_TEACHER)
    tokenizer.add_tokens(["<bot>", "<eot>", "<slot>"])
    return tokenizer


@pytest.fixture(scope="module")
def ids(tokenizer) -> LatentIds:
    return latent_ids(tokenizer, LatentConfig())


def make_example(
    tokenizer, text: str, prompt: str = "How much is it?", after: str = "", top_k: int = 3, **columns
) -> Example:
    """A prompt, a response and perhaps a message after it; every score and state tells which token it belongs to."""
    parts = [tokenizer.encode(part, add_special_tokens=False) for part in (prompt, text, after)]
    marks = np.repeat(np.array([0, Mark.RESPONSE, 0], np.uint16), [len(part) for part in parts])
    num_tokens, num_response = len(marks), len(parts[1])
    number = np.flatnonzero(marks)
    return Example(
        **{
            "uid": 5,
            "source": Source.TEACHER,
            "input_ids": np.array([*parts[0], *parts[1], *parts[2]], np.int32),
            "marks": marks,
            "topk_ids": (number[:, None] + np.arange(top_k)).astype(np.int32),
            "topk_logprobs": np.tile(-(number[:, None] + 1.0), top_k).astype(np.float16).reshape(num_response, top_k),
            "log_tail": -number.astype(np.float32) if top_k else np.empty(0, np.float32),
            "teacher_hidden": np.tile(np.arange(1, num_tokens + 1, dtype=np.float16)[:, None], (2, 1, 2)),
            **columns,
        }
    )


def always(example: Example, ids: LatentIds, tokenizer, stage: LatentStage = ALWAYS, **options) -> Example:
    return rewrite(example, stage, ids, curriculum_rng(0, example.uid, 0), tokenizer, **options)


def text_of(tokenizer, example: Example, start: int = 0, end: int | None = None) -> str:
    return decode_tokens(tokenizer, example.input_ids[start:end]).text


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (TEXT, ["Step 1: two and two are 4.\n", "Step 2: 4 and 3 are 7.\n", "Step 3: nothing else.\n\n"]),
        ("1. add\n   carry\n2) done\nSo 7.", ["1. add\n   carry\n", "2) done\n"]),
        ("STEP 1. a\n\nmore of it\n\n step 2: b", ["STEP 1. a\n\nmore of it\n\n", " step 2: b"]),
        ("1. a\n1. again\n2. b", ["1. a\n1. again\n", "2. b"]),
        ("Step 2: no first\nStep 3: c", []),
        ("In step 1: no line of its own; 3.5 is no step either\n1.5 nor this", []),
        ("First of all, Stepping stones 1: none", []),
        ("", []),
    ],
)
def test_steps_are_numbered_lines_and_the_last_ends_with_its_line(text, want):
    assert [text[start:end] for start, end in find_steps(text)] == want


def test_the_first_steps_become_a_balanced_span_and_the_answer_is_there_once(tokenizer, ids):
    example = make_example(tokenizer, TEXT)
    new = always(example, ids, tokenizer)
    slots = "<slot>" * 6
    want = f"How much is it?Let us see.\n<bot>{slots}<eot>Step 3: nothing else.\n\nThe answer is 7."
    assert text_of(tokenizer, new) == want
    begin = int(np.flatnonzero(new.input_ids == ids.begin)[0])
    assert new.marks[begin : begin + 8].tolist() == [Mark.RESPONSE, *[Mark.LATENT] * 6, Mark.RESPONSE]
    assert (new.marks & Mark.LATENT != 0).tolist() == (new.input_ids == ids.slot).tolist()


def test_the_sentinels_are_supervised_without_teacher_scores_and_the_slots_not_at_all(tokenizer, ids):
    new = always(make_example(tokenizer, TEXT), ids, tokenizer)
    batch = collate_kd_batch([new], pad_id=0)
    labels = batch.response_ids
    sentinels = (labels == ids.begin) | (labels == ids.end)
    assert int(sentinels.sum()) == 2
    assert not batch.has_teacher[sentinels].any()
    assert batch.has_teacher[~sentinels].all()
    assert not (labels == ids.slot).any()
    assert (batch.log_tail[sentinels] == 0).all()


def test_the_state_behind_the_span_is_the_one_behind_the_steps(tokenizer, ids):
    example = make_example(tokenizer, TEXT)
    new = always(example, ids, tokenizer)
    end = int(np.flatnonzero(new.input_ids == ids.end)[0])
    states = new.teacher_hidden[0, :, 0]
    assert states[end] == states[end + 1] - 1  # that of the last replaced token: it predicts what follows
    assert np.isnan(states[end - 7 : end]).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    intro=st.text(max_size=12),
    steps=st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), max_size=15), max_size=5),
    answer=st.text(st.characters(exclude_categories=("Cs", "Nd")), max_size=20),
    stage=st.builds(LatentStage, steps=st.integers(1, 3), slots=st.integers(1, 3), probability=st.just(1.0)),
    data=st.data(),
)
def test_without_the_span_the_rest_is_the_original_in_every_column(tokenizer, ids, intro, steps, answer, stage, data):
    lines = "".join(f"\nStep {number}: {step}" for number, step in enumerate(steps, start=1))
    example = make_example(
        tokenizer, f"{intro}{lines}\n\n{answer}.", after="<|im_end|>\n", top_k=data.draw(st.integers(0, 2))
    )
    responses = np.flatnonzero(example.marks)
    positions = np.sort(np.array(data.draw(st.lists(st.sampled_from(responses.tolist()), max_size=6)), np.int32))
    sizes = np.arange(1, len(positions) + 1, dtype=np.int32)
    example = replace(
        example,
        set_position=positions,
        set_kind=np.full(len(positions), SetKind.COPY, np.int8),
        set_sizes=sizes,
        set_ids=np.repeat(positions, sizes).astype(np.int32),  # tells which token the set belongs to
    )
    new = always(example, ids, tokenizer, stage)
    if new is example:
        return
    start = int(np.flatnonzero(new.input_ids == ids.begin)[0])
    inserted = stage.steps * stage.slots + 2
    removed = len(example.input_ids) + inserted - len(new.input_ids)
    stop = start + removed
    assert text_of(tokenizer, example, start, stop).lstrip().startswith("Step 1: ")
    for name, axis in (("input_ids", 0), ("marks", 0), ("teacher_hidden", 1)):
        old, now = (np.moveaxis(getattr(e, name), axis, 0) for e in (example, new))
        assert np.array_equal(now[:start], old[:start])
        assert np.array_equal(now[start + inserted :], old[stop:])
    cut = [i for i, token in enumerate(responses) if start <= token < stop]
    for name in ("topk_ids", "topk_logprobs", *(["log_tail"] if len(example.log_tail) else [])):
        now = getattr(new, name)
        assert np.array_equal(np.delete(now, [cut[0], cut[0] + 1], axis=0), np.delete(getattr(example, name), cut, axis=0))
    assert len(new.topk_ids) == int((new.marks & Mark.RESPONSE != 0).sum())
    outside = [p for p in positions.tolist() if not start <= p < stop]
    owners = new.teacher_hidden[0, new.set_position, 0].astype(int) - 1  # the token's place before
    assert owners.tolist() == outside
    assert new.set_ids.tolist() == np.repeat(outside, new.set_sizes).tolist()
    assert_same(example_from_row(examples_to_table([new]), 0), new)


def assert_same(a: Example, b: Example) -> None:
    for name, value in vars(b).items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(getattr(a, name), value, equal_nan=value.dtype.kind == "f"), name


def test_grammar_and_decisions_behind_the_span_move_with_their_tokens(tokenizer, ids):
    example = make_example(tokenizer, TEXT)
    last = len(example.input_ids) - 1
    marks = example.marks.copy()
    marks[last - 1] |= Mark.ARGUMENT_VALUE
    marks[last] |= Mark.DECISION
    example = replace(
        example,
        marks=marks,
        halt_targets=np.array([1.0], np.float32),
        grammar_position=np.array([last - 1], np.int32),
        grammar_row=np.zeros(1, np.int32),
        grammar_masks=np.ones((1, 4), np.int32),
    )
    new = always(example, ids, tokenizer)
    assert new.grammar_position.tolist() == [len(new.input_ids) - 2]
    batch = collate_kd_batch([example, new], pad_id=0)
    assert batch.grammar_mask.tolist() == [0, 1]
    assert (batch.input_ids.flatten()[batch.decision_index] == example.input_ids[-1]).all()
    assert batch.halt_targets.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "change",
    [
        {"source": Source.STUDENT},
        {"held_out": True},
        {"pair": 3},
    ],
    ids=str,
)
def test_texts_that_would_be_other_examples_stay_as_they_are(tokenizer, ids, change):
    example = make_example(tokenizer, TEXT, **change)
    assert always(example, ids, tokenizer) is example


def test_too_few_steps_steps_with_calls_and_tokens_across_the_ends_leave_the_example_alone(tokenizer, ids):
    example = make_example(tokenizer, TEXT)
    assert always(example, ids, tokenizer, LatentStage(steps=4, slots=1, probability=1.0)) is example
    called = example.marks.copy()
    called[int(np.flatnonzero(example.marks)[0]) + 12] |= Mark.TOOL_NAME
    with_call = replace(example, marks=called)
    assert always(with_call, ids, tokenizer) is with_call
    # A step that the data ends in the middle of a word, and so of a token.
    assert (
        always(example, ids, tokenizer, cot_steps=["Step 1: two and two are 4.", "Step 2: 4 and 3 are 7.\nStep 3: noth"])
        is example
    )


def test_steps_named_by_the_data_are_replaced_word_for_word(tokenizer, ids):
    text = "I add two and two.\nI take three from it.\nOne."
    example = make_example(tokenizer, text)
    assert always(example, ids, tokenizer) is example
    named = always(example, ids, tokenizer, cot_steps=["I add two and two.", "I take three from it."])
    assert text_of(tokenizer, named) == f"How much is it?<bot>{'<slot>' * 6}<eot>One."
    assert always(example, ids, tokenizer, cot_steps=["I take three from it.", "I add two and two."]) is example
    carried = replace(example, cot_steps=np.array(["I add two and two.", "I take three from it."], object))
    table = Curriculum((ALWAYS,), ids, 0, tokenizer).apply(examples_to_table([carried, example]), [0, 0])
    assert [text_of(tokenizer, example_from_row(table, row)) for row in (0, 1)] == [
        text_of(tokenizer, named), text_of(tokenizer, example),
    ]  # fmt: skip


def test_only_the_first_turn_with_enough_steps_is_rewritten(tokenizer, ids):
    first, second = make_example(tokenizer, "Hm.\n\n"), make_example(tokenizer, TEXT)
    columns = ("input_ids", "marks", "topk_ids", "topk_logprobs", "log_tail")
    joined = replace(
        second,
        **{c: np.concatenate([getattr(e, c) for e in (first, second, second)]) for c in columns},
        teacher_hidden=np.concatenate([e.teacher_hidden for e in (first, second, second)], axis=1),
    )
    new = always(joined, ids, tokenizer)
    assert (new.input_ids == ids.begin).sum() == (new.input_ids == ids.end).sum() == 1
    assert text_of(tokenizer, new).endswith(text_of(tokenizer, second))


def test_the_draw_depends_on_seed_row_and_epoch_and_on_nothing_else(tokenizer, ids):
    half = LatentStage(steps=1, slots=1, probability=0.5)
    example = make_example(tokenizer, TEXT)

    def drawn(seed: int, epoch: int) -> list[bool]:
        rngs = [curriculum_rng(seed, uid, epoch) for uid in range(-60, 60)]
        return [rewrite(example, half, ids, rng, tokenizer) is not example for rng in rngs]

    assert drawn(0, 0) == drawn(0, 0)
    assert len({tuple(drawn(seed, epoch)) for seed, epoch in ((0, 0), (1, 0), (0, 1))}) == 3
    assert 40 < sum(drawn(0, 0)) < 80
    never = LatentStage(steps=1, slots=1, probability=0.0)
    assert rewrite(example, never, ids, curriculum_rng(0, 5, 0), tokenizer) is example


def test_stages_follow_one_another_by_optimizer_step():
    first = LatentStage(until_step=10, steps=1, slots=1, probability=0.5)
    second = LatentStage(until_step=20, steps=2, slots=1, probability=0.5)
    last = LatentStage(steps=3, slots=1, probability=1.0)
    stages = (first, second, last)
    assert [stage_at(stages, step) for step in (0, 9, 10, 19, 20, 10**6)] == [first, first, second, second, last, last]
    assert stage_at((first, second), 20) is None
    assert stage_at((), 0) is None
    with pytest.raises(ValueError, match=r"latent.stages end at steps \[None, 10\]; expected rising until_step"):
        LatentConfig(stages=(last, first))


def test_sentinels_that_the_vocabulary_lacks_are_named(tokenizer, demo_tokenizer):
    with pytest.raises(ValueError, match=r"latent.begin is '<bot>', which the tokenizer .* add it to student.new_tokens"):
        latent_ids(demo_tokenizer, LatentConfig())
    with pytest.raises(ValueError, match="expected three different ones"):
        latent_ids(tokenizer, LatentConfig(slot="<bot>"))


def test_a_curriculum_whose_sentinels_nothing_teaches_is_refused():
    run: dict[str, Any] = {
        "teacher": {"kind": "hf", "model": "t"},
        "student": {"model": "s"},
        "data": {"prompts": "p.jsonl"},
    }
    run |= {"latent": {"stages": [{"steps": 1, "slots": 2, "probability": 0.5}]}}
    with pytest.raises(ValueError, match=r"latent.stages without a cross-entropy: .* set loss.ce_teacher"):
        Config.model_validate(run)
    with pytest.raises(ValueError, match=r"latent.stages without a cross-entropy"):
        Config.model_validate(run | {"loss": {"ce_teacher": 1.0, "ce_teacher_target": "argmax"}})
    assert Config.model_validate(run | {"loss": {"ce_teacher": 0.1}}).latent.stages[0].slots == 2
