"""All targets of a turn: what is there, why something is not, and that a trained model agrees with the schemas."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from raykd.data.collate import collate_kd_batch
from raykd.data.detokenize import decode_tokens
from raykd.data.examples import examples_to_table
from raykd.data.grammar import ToolGrammars, offered_schemas
from raykd.data.id_sets import CopyIndex, Turn
from raykd.data.integration import ResultIndex
from raykd.data.process_targets import (
    PROCESS_LOSSES,
    REASONS,
    SeenResult,
    describe_missing,
    join_turns,
    mark_turn,
    process_targets,
)
from raykd.demo.registry import openai_tools
from raykd.losses.grammar import json_grammar_loss, json_grammar_weight
from raykd.types import Example, Mark, SetKind, Source
from tests.conftest import DEMO_TEACHER

SCHEMAS = offered_schemas(json.dumps(openai_tools(["get_weather", "get_stock_price", "set_thermostat"])))
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}\n</tool_call><|im_end|>'
RESULT = '{"temperature": 21.5, "low": 12, "station": "Montsouris"}'
ANSWER = "It is 21.5 degrees at Montsouris.<|im_end|>"


@pytest.fixture(scope="module")
def grammars(demo_tokenizer):
    return ToolGrammars(demo_tokenizer)


def make_turn(text, tokenizer):
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    return Turn(*decode_tokens(tokenizer, ids), ids, tokenizer)


@pytest.fixture
def targets_of(demo_tokenizer, grammars):
    def build(text, results=(), schemas=SCHEMAS, losses=PROCESS_LOSSES):
        seen = [SeenResult(ResultIndex([result]), CopyIndex(result, demo_tokenizer)) for result in results]
        return process_targets(make_turn(text, demo_tokenizer), seen, schemas, losses, grammars)

    return build


def test_a_turn_has_every_target_of_its_kind(targets_of, demo_tokenizer):
    call, answer = targets_of(CALL), targets_of(ANSWER, [RESULT])
    assert set(call.sets.kind.tolist()) == {SetKind.TOOL_CHOICE}
    assert len(call.grammar.position) > 5
    assert set(call.missing) == {"integration_copy", "copy_mass", "number_contradiction"}
    assert set(call.missing.values()) == {"no_tool_result"}
    assert {SetKind.COPY, SetKind.CONTRADICTION} == set(answer.sets.kind.tolist())
    assert set(answer.missing.values()) == {"no_call"}
    turn = make_turn(ANSWER, demo_tokenizer)
    results = [ResultIndex([RESULT])]
    assert (answer.marks == mark_turn(turn.text, turn.offsets, results, SCHEMAS.keys()).marks).all()


@pytest.mark.parametrize(
    ("text", "results", "schemas", "reasons"),
    [
        ("Hello.", [], SCHEMAS, {"tool_choice": "no_call", "json_grammar": "no_call", "copy_mass": "no_tool_result"}),
        ("Hello.", [RESULT], SCHEMAS, {"copy_mass": "nothing_reused", "number_contradiction": "nothing_reused"}),
        (CALL, [], {}, {"tool_choice": "few_tools", "json_grammar": "unknown_tool"}),
        (CALL, [], {"get_weather": ""}, {"tool_choice": "few_tools", "json_grammar": "no_schema"}),
        (CALL, [], {"a": "", "b": ""}, {"tool_choice": "unknown_tool", "json_grammar": "unknown_tool"}),
        (CALL, [], {"get_weather": '{"type": "nonsense"}'}, {"json_grammar": "schema_not_supported"}),
        ('<tool_call>{"name": "get_weather"}', [], SCHEMAS, {"json_grammar": "no_arguments"}),
        ("On Montsouris", ["Montsouris"], SCHEMAS, {"number_contradiction": "no_other_number"}),
        ("It is 1,234.50 now", ['{"n": 1234.5}'], SCHEMAS, {"copy_mass": "not_verbatim"}),
        (
            json.dumps({"tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "x"}'}}]}),
            [], SCHEMAS, {"json_grammar": "arguments_as_text"},
        ),
    ],
)  # fmt: skip
def test_what_is_missing_has_a_reason(targets_of, text, results, schemas, reasons):
    found = targets_of(text, results, schemas)
    assert reasons.items() <= found.missing.items()
    assert set(found.missing.values()) <= REASONS.keys()


def test_only_what_active_losses_ask_for_is_computed(targets_of):
    found = targets_of(CALL, [RESULT], losses={"kd", "tool_name"})
    assert (len(found.sets.position), len(found.grammar.position), found.missing) == (0, 0, {})
    assert (found.marks & Mark.TOOL_NAME).any()


def test_a_call_that_leaves_its_schema_is_counted_and_keeps_what_came_before(targets_of):
    found = targets_of(CALL.replace("celsius", "kelvin"))
    assert found.num_illegal_calls == 1
    assert 0 < len(found.grammar.position) < len(targets_of(CALL).grammar.position)
    assert "json_grammar" not in found.missing


def test_joined_turns_fit_the_example_and_the_batch(targets_of, demo_tokenizer):
    turns = [targets_of(CALL), targets_of(CALL, [RESULT]), targets_of(ANSWER, [RESULT])]
    lengths = [len(turn.marks) for turn in turns]
    starts = [3, 3 + lengths[0], 3 + lengths[0] + lengths[1] + 4]
    joined = join_turns(starts, turns, starts[2] + lengths[2])
    assert joined.missing == {}
    assert joined.num_calls == 2
    assert len(joined.grammar.masks) == len(turns[0].grammar.masks)  # the same call twice: the same masks
    assert join_turns(starts[:1], turns[:1], starts[1]).missing == turns[0].missing
    ids = np.zeros(len(joined.marks), dtype=np.int32)
    for start, text in zip(starts, (CALL, CALL, ANSWER), strict=True):
        written = make_turn(text, demo_tokenizer).ids
        ids[start : start + len(written)] = written
    response = int(((joined.marks & Mark.RESPONSE) != 0).sum())
    scores = np.empty((response, 0))
    example = Example(
        uid=1,
        source=Source.GOLD,
        input_ids=ids,
        marks=joined.marks,
        topk_ids=scores.astype(np.int32),
        topk_logprobs=scores.astype(np.float16),
        log_tail=np.empty(0, np.float32),
        set_position=joined.sets.position,
        set_kind=joined.sets.kind,
        set_sizes=joined.sets.sizes,
        set_ids=joined.sets.ids,
        grammar_position=joined.grammar.position,
        grammar_row=joined.grammar.row,
        grammar_masks=joined.grammar.masks,
    )
    batch = collate_kd_batch(examples_to_table([example]), pad_id=0)
    written = batch.response_ids[batch.set_row]
    in_set = (batch.set_ids == written[:, None]).any(dim=1)
    assert torch.equal(in_set, batch.set_kind != SetKind.CONTRADICTION)
    label = batch.response_ids[batch.grammar_row]
    words = batch.grammar_masks[batch.grammar_mask].gather(1, (label // 32)[:, None])[:, 0]
    assert ((words >> (label % 32).int()) & 1).all()


def test_reasons_are_counted_over_samples_and_told_in_words(targets_of):
    samples = [targets_of("Hello."), targets_of(CALL), targets_of("Bye.")]
    missing = Counter(" ".join(f"{loss}:{reason}" for loss, reason in sample.missing.items()) for sample in samples)
    told = describe_missing(missing)
    assert told["json_grammar"] == ["the assistant calls no tool (2)"]
    assert told["copy_mass"] == ["no tool result stands before the turn (3)"]
    assert describe_missing({"": 3}) == {}


def test_a_trained_model_puts_its_mass_on_what_the_schema_allows(demo_tokenizer, grammars):
    """The demo teacher has never seen the grammar; its own calls obey it, and so do the alternatives that it considers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO_TEACHER, dtype=torch.float32).eval()
    tools = openai_tools(["get_weather", "set_thermostat", "search_flights"])
    losses, counts, illegal = [], [], 0
    writer: Any = model  # the type stubs hide `generate`
    for request in ("What is the weather in Oslo?", "Set the kitchen to 21 degrees.", "Find a flight from Rome to Paris."):
        prompt = demo_tokenizer.apply_chat_template(
            [{"role": "user", "content": request}], tools=tools, add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        with torch.no_grad():
            whole = writer.generate(prompt, max_new_tokens=60, do_sample=False)
            hidden = model.model(whole).last_hidden_state[0]
        ids = whole[0, prompt.shape[1] :].numpy().astype(np.int32)
        turn = Turn(*decode_tokens(demo_tokenizer, ids), ids, demo_tokenizer)
        found = process_targets(turn, [], offered_schemas(json.dumps(tools)), {"json_grammar"}, grammars)
        position, row, masks = found.grammar
        assert len(position) > 0, turn.text
        before = hidden[torch.from_numpy(position).long() + prompt.shape[1] - 1]
        weight = json_grammar_weight(torch.full((len(position),), int(Source.TEACHER)))
        head = model.lm_head.weight
        loss = json_grammar_loss(before, head, torch.from_numpy(row).long(), torch.from_numpy(masks), weight)
        losses.append(loss.sum.item())
        counts.append(loss.count.item())
        illegal += found.num_illegal_calls
    assert illegal == 0
    assert np.exp(-sum(losses) / sum(counts)) > 0.99, (losses, counts)
