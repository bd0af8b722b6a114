"""Vocabularies compared by what their ids mean, and tables carried over from one to the other."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raykd.types import EXAMPLE_SCHEMA
from raykd.vocabulary import (
    TOOL_CALL_TOKENS,
    VocabularyMatch,
    add_tokens,
    compare_vocabularies,
    remap_ids,
    student_tokenizer,
    token_id,
)
from tests.student.test_student_tokenizer import make_tokenizer


def moved(tokenizer, shift=5):
    """The same tokenizer with its ids rotated among the byte tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: (i + shift) % 256 if i < 256 else i for token, i in state["model"]["vocab"].items()}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def mapping(id_map, num_ids) -> VocabularyMatch:
    """A superset with a given map."""
    known = sum(i >= 0 for i in id_map)
    ids = np.array(id_map, np.int32)
    return VocabularyMatch("superset", ("t", "s"), known, num_ids, known, 0, num_ids, (), ids)


def test_the_students_tokenizer_is_that_of_its_folder_with_the_tokens_it_lacks(tmp_path):
    make_tokenizer(extra=["<bot>"]).save_pretrained(tmp_path)
    tokenizer = student_tokenizer(tmp_path, ["<bot>", "<slot>", "<tool_call>"])
    assert len(tokenizer) == len(make_tokenizer(extra=["<bot>"])) + 2
    assert token_id(tokenizer, "<bot>", "latent.begin") == len(make_tokenizer(extra=["<bot>"])) - 1
    ids = tokenizer("<bot><slot><tool_call>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>"  # text, and no mark like the others
    assert len(student_tokenizer(tmp_path, [])) == len(tokenizer) - 2, "the folder's own has not changed"
    assert student_tokenizer(tmp_path, ["<tool_call>", "<slot>"]).get_vocab() == tokenizer.get_vocab(), "in any order"
    with pytest.raises(ValueError, match="latent.end is '<eot>', which the tokenizer .* add it to student.new_tokens"):
        token_id(tokenizer, "<eot>", "latent.end")
    with pytest.raises(ValueError, match="no tokenizer.json"):
        student_tokenizer(tmp_path / "nowhere", [])


def test_a_token_that_does_not_come_out_as_one_id_is_refused():
    with pytest.raises(ValueError, match="expected one id of its own"):
        add_tokens(make_tokenizer(), [""])


def test_vocabularies_are_identical_a_superset_or_refused_with_the_numbers():
    plain, more_tokens = make_tokenizer(), make_tokenizer(extra=["<bot>"])
    match = compare_vocabularies(plain, make_tokenizer())
    assert match.require().kind == "identical"
    assert match.student_ids([7, 3]).tolist() == [7, 3]

    more = compare_vocabularies(plain, more_tokens)
    assert (more.kind, more.num_student - more.num_teacher, more.num_same_id) == ("superset", 1, more.num_teacher)
    np.testing.assert_array_equal(more.require().id_map, np.arange(more.num_teacher))

    other = moved(make_tokenizer(extra=["<bot>"]))
    match = compare_vocabularies(plain, other).require()
    assert match.kind == "superset"
    assert match.num_same_id == match.num_teacher - 256
    teacher_ids = plain("the tool call", add_special_tokens=False)["input_ids"]
    assert other.decode(match.student_ids(teacher_ids).tolist()) == "the tool call"
    with pytest.raises(ValueError, match=rf"1 ids are no tokens of teacher .*{len(plain)}"):
        match.student_ids([3, len(plain)])

    less = compare_vocabularies(more_tokens, plain)
    with pytest.raises(
        ValueError, match=rf"{less.num_teacher} and {less.num_student} tokens.*lacks 1 tokens, such as .*<bot>"
    ):
        less.require()
    foreign = make_tokenizer(corpus=["xyz abc " * 9, "qqq zzz"])
    with pytest.raises(ValueError, match="different vocabularies"):
        compare_vocabularies(plain, foreign).require()
    wordy = make_tokenizer(extra=["<bot>"])
    wordy.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match="split or spell text differently"):
        compare_vocabularies(plain, wordy).require()
    ordinary = make_tokenizer()
    ordinary.add_tokens(["<bot>"])
    with pytest.raises(ValueError, match="special for one of them only"):
        compare_vocabularies(more_tokens, ordinary).require()


def test_a_tool_call_token_added_to_a_student_leaves_the_teachers_ids_where_they_are():
    student = make_tokenizer()
    add_tokens(student, TOOL_CALL_TOKENS)
    match = compare_vocabularies(make_tokenizer(), student).require()
    assert (match.kind, match.num_student - match.num_teacher, match.num_same_id) == ("superset", 4, match.num_teacher)


def test_stored_ids_go_through_the_map_and_nothing_else_changes():
    ids, lists = pa.list_(pa.int32()), [[2, 0], None, [1]]
    table = pa.table(
        {
            "uid": [2, 0, 1],
            "prompt_ids": pa.array([[0], [], [2, 2]], ids),
            "recorded_ids": pa.array(lists, ids),
            "topk_ids": pa.array([[1, 2], [0], []], ids),
            "marks": pa.array([[1], [2], [0]], ids),
        }
    )
    mapped = remap_ids(pa.concat_tables([table.slice(1), table.slice(0, 1)]), mapping([10, 11, 12], 13))
    assert mapped.column_names == table.column_names
    assert mapped["prompt_ids"].to_pylist() == [[], [12, 12], [10]]
    assert mapped["recorded_ids"].to_pylist() == [None, [11], [12, 10]]
    assert mapped["topk_ids"].to_pylist() == [[10], [], [11, 12]]
    assert mapped["uid"].to_pylist() == [0, 1, 2]
    assert mapped["marks"].to_pylist() == [[2], [0], [1]]
    assert mapped.schema.equals(table.schema)
    for id_map in ([10, -1, 12], [10, 11]):
        with pytest.raises(ValueError, match=r"\w+_ids: \d ids are no tokens of teacher 't'"):
            remap_ids(table, mapping(id_map, 13))
    tokenizer = make_tokenizer()
    assert remap_ids(table, compare_vocabularies(tokenizer, tokenizer)) is table


@pytest.mark.parametrize("num_ids", [64, 97])
def test_every_bit_of_a_grammar_mask_goes_where_its_id_goes(num_ids):
    rng = np.random.default_rng(0)
    id_map = rng.permutation(num_ids)[:45]
    id_map[7] = -1  # an id that is no token
    legal = rng.random((3, 45)) < 0.5
    words = np.packbits(np.pad(legal, ((0, 0), (0, 64 - 45))), axis=1, bitorder="little").view(np.int32)
    masks = [words[:2].ravel().tolist(), [], words[2:].ravel().tolist()]
    columns = {"grammar_row": [[0, 1, 1, 0], [], [0]], "grammar_masks": masks}
    table = pa.table({name: pa.array(values, EXAMPLE_SCHEMA.field(name).type) for name, values in columns.items()})
    mapped = remap_ids(table, mapping(id_map, num_ids))
    assert mapped.schema == table.schema
    width = -(-num_ids // 32)
    assert [len(row) for row in mapped["grammar_masks"].to_pylist()] == [2 * width, 0, width]
    flat = mapped["grammar_masks"].combine_chunks().flatten().to_numpy().reshape(3, width)
    bits = np.unpackbits(flat.view(np.uint8), axis=1, bitorder="little")
    expected = np.zeros((3, 32 * width), bool)
    for i, new in enumerate(id_map):
        if new >= 0:
            expected[:, new] = legal[:, i]
    assert np.array_equal(bits.astype(bool), expected)
    none = table.slice(1, 1)
    assert remap_ids(none, mapping(id_map, num_ids)).equals(none)
