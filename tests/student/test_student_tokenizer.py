"""New tokens: rows of their own for every id, old rows as they were, done once; vocabularies compared; stored ids mapped."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from raykd.student.tokenizer import TOOL_CALL_TOKENS, compare_vocabularies, migrate, remap_ids
from raykd.types import EXAMPLE_SCHEMA
from teacher_serving.identity import vocabulary_size

LATENT = {"<bot>": "start of thought", "<eot>": "", "<slot>": ""}
CORPUS = ["the start of a thought", "a tool call and its result", "the end"] * 3


def make_tokenizer(corpus=CORPUS, vocab_size=300, extra=()):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens(["<|end|>", *extra], special_tokens=True)
    return tokenizer


def make_model(num_rows, *, tie=True, dtype=torch.float32) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=num_rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tie,
        initializer_range=0.3,
    )
    model: Any = Qwen3ForCausalLM(config)
    return model.to(dtype)


def rows(model: Any):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def test_added_tokens_get_rows_though_the_tokenizers_own_size_leaves_them_out():
    tokenizer = make_tokenizer()
    base = tokenizer.vocab_size  # without added tokens: what the resize must not go by
    model = make_model(base)
    migration = migrate(model, tokenizer, LATENT, multiple=64)
    embedding, _ = rows(model)
    assert migration.num_valid_ids == base + 4 == len(tokenizer)
    assert migration.num_rows == len(embedding) == model.config.vocab_size == -(-(base + 4) // 64) * 64
    assert migration.token_ids == {"<bot>": base + 1, "<eot>": base + 2, "<slot>": base + 3}
    ids = tokenizer("the<bot><slot><slot><eot>end", add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i > base] == [base + 1, base + 3, base + 3, base + 2]
    model(input_ids=torch.tensor([ids]))
    sentinels = embedding[base + 1 : base + 4]
    assert torch.pdist(sentinels).min() > 0  # rows of their own, none shared by clamping


def test_an_id_beyond_the_rows_fails_loudly_instead_of_being_clamped():
    model = make_model(300)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[5, 300]]))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_rows_ties_and_types_stay_and_new_rows_are_means_of_old_ones(tie, dtype):
    tokenizer = make_tokenizer()
    num_old = vocabulary_size(tokenizer)
    model = make_model(num_old, tie=tie, dtype=dtype)
    before = [matrix.detach().clone() for matrix in rows(model)]
    ids = torch.tensor([[1, 2, 3]])
    logits = model(input_ids=ids).logits
    migration = migrate(model, tokenizer, LATENT, noise=0.01)
    after = rows(model)
    assert (after[0] is after[1]) == tie
    assert all(matrix.dtype == dtype and matrix.requires_grad for matrix in after)
    torch.testing.assert_close(model(input_ids=ids).logits[..., :num_old], logits)
    start = tokenizer("start of thought", add_special_tokens=False)["input_ids"]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:num_old], old)
        spread = 0.06 * float(old.float().std())
        expected = {"<bot>": old[start].float().mean(0), "<eot>": old.float().mean(0)}
        for token, row in expected.items():
            difference = (new[migration.token_ids[token]].float() - row).abs().max()
            assert 0 < difference < spread + (0.005 if dtype == torch.bfloat16 else 0)


def test_doing_it_again_changes_nothing_and_never_what_training_made_of_the_rows(tmp_path):
    model, tokenizer = make_model(vocabulary_size(make_tokenizer())), make_tokenizer()
    first = migrate(model, tokenizer, LATENT)
    assert set(first.token_ids.values()) <= set(first.initialised)
    with torch.no_grad():
        rows(model)[0][list(first.token_ids.values())] = 7.0  # training
    trained = rows(model)[0].detach().clone()
    assert migrate(model, tokenizer, LATENT).initialised == ()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for saved_tokenizer in (tokenizer, make_tokenizer()):  # the latter as it was before the tokens were added
        assert migrate(again, saved_tokenizer, LATENT).initialised == ()
        assert torch.equal(rows(again)[0], trained)
    more = migrate(again, tokenizer, LATENT | TOOL_CALL_TOKENS, special=False)
    assert set(more.initialised) == {more.token_ids[token] for token in TOOL_CALL_TOKENS}
    assert torch.equal(
        rows(again)[0][: vocabulary_size(make_tokenizer()) + 3], trained[: vocabulary_size(make_tokenizer()) + 3]
    )
    assert tokenizer.decode(list(more.token_ids.values()), skip_special_tokens=True) == "".join(TOOL_CALL_TOKENS)


def test_tokens_that_were_there_keep_their_rows():
    tokenizer = make_tokenizer(extra=["<bot>"])
    model = make_model(512)  # with padding: rows that exist and mean nothing yet
    before = rows(model)[0].detach().clone()
    migration = migrate(model, tokenizer, LATENT)
    new = [migration.token_ids["<eot>"], migration.token_ids["<slot>"]]
    assert migration.initialised == tuple(new)
    untouched = torch.ones(512, dtype=torch.bool)
    untouched[new] = False
    assert torch.equal(rows(model)[0][untouched], before[untouched])
    assert len(rows(model)[0]) == 512


def test_a_tokenizer_that_has_tokens_beyond_the_models_rows_is_caught_up_with():
    tokenizer = make_tokenizer(extra=["<bot>"])
    model = make_model(tokenizer.vocab_size)
    migration = migrate(model, tokenizer, {"<bot>": ""})
    assert migration.token_ids["<bot>"] in migration.initialised
    assert migration.num_rows >= vocabulary_size(tokenizer)


def test_a_token_that_does_not_come_out_as_one_id_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<b"], special_tokens=True)
    with pytest.raises(ValueError, match="expected one id of its own"):
        migrate(make_model(512), tokenizer, {"": ""})


def save(tmp_path, name, tokenizer):
    tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / name


def moved(tokenizer, shift=5):
    """The same tokenizer with its ids rotated among the byte tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: (i + shift) % 256 if i < 256 else i for token, i in state["model"]["vocab"].items()}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def test_vocabularies_are_identical_a_superset_or_refused_with_the_numbers(tmp_path):
    plain = save(tmp_path, "plain", make_tokenizer())
    match = compare_vocabularies(plain, save(tmp_path, "again", make_tokenizer()))
    assert (match.kind, match.require()) == ("identical", None)

    more = compare_vocabularies(plain, save(tmp_path, "more", make_tokenizer(extra=["<bot>"])))
    assert (more.kind, more.num_student - more.num_teacher, more.num_same_id) == ("superset", 1, more.num_teacher)
    np.testing.assert_array_equal(more.require(), np.arange(more.num_teacher))

    other = moved(make_tokenizer(extra=["<bot>"]))
    match = compare_vocabularies(plain, save(tmp_path, "moved", other))
    assert match.kind == "superset"
    id_map = match.require()
    assert id_map is not None
    teacher_ids = make_tokenizer()("the tool call", add_special_tokens=False)["input_ids"]
    assert other.decode(id_map[teacher_ids].tolist()) == "the tool call"

    less = compare_vocabularies(tmp_path / "more", plain)
    with pytest.raises(
        ValueError, match=rf"{less.num_teacher} and {less.num_student} tokens.*lacks 1 tokens, such as .*<bot>"
    ):
        less.require()
    foreign = save(tmp_path, "foreign", make_tokenizer(corpus=["xyz abc " * 9, "qqq zzz"]))
    with pytest.raises(ValueError, match="different vocabularies"):
        compare_vocabularies(plain, foreign).require()
    wordy = make_tokenizer(extra=["<bot>"])
    wordy.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match="split or spell text differently"):
        compare_vocabularies(plain, save(tmp_path, "wordy", wordy)).require()
    ordinary = make_tokenizer()
    ordinary.add_tokens(["<bot>"])
    with pytest.raises(ValueError, match="special for one of them only"):
        compare_vocabularies(tmp_path / "more", save(tmp_path, "ordinary", ordinary)).require()


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
    mapped = remap_ids(pa.concat_tables([table.slice(1), table.slice(0, 1)]), np.array([10, 11, 12]))
    assert mapped.column_names == table.column_names
    assert mapped["prompt_ids"].to_pylist() == [[], [12, 12], [10]]
    assert mapped["recorded_ids"].to_pylist() == [None, [11], [12, 10]]
    assert mapped["topk_ids"].to_pylist() == [[10], [], [11, 12]]
    assert mapped["uid"].to_pylist() == [0, 1, 2]
    assert mapped["marks"].to_pylist() == [[2], [0], [1]]
    assert mapped.schema.equals(table.schema)
    for id_map in (np.array([10, -1, 12]), np.array([10, 11])):
        with pytest.raises(ValueError, match="without a new one"):
            remap_ids(table, id_map)
    masks = pa.table({"grammar_masks": pa.array([[1]], EXAMPLE_SCHEMA.field("grammar_masks").type)})
    with pytest.raises(ValueError, match="cannot be mapped"):
        remap_ids(masks, np.arange(3))
