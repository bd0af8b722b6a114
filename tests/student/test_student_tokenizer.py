"""New tokens: rows of their own for every id, old rows as they were, done once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from raykd.student.tokenizer import migrate, rows_needed
from raykd.vocabulary import TOOL_CALL_TOKENS
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
    assert migration.num_rows == rows_needed(base + 4, base)
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
    more = migrate(again, tokenizer, LATENT | dict.fromkeys(TOOL_CALL_TOKENS, "a call"))
    assert set(more.initialised) == {more.token_ids[token] for token in TOOL_CALL_TOKENS}
    assert torch.equal(
        rows(again)[0][: vocabulary_size(make_tokenizer()) + 3], trained[: vocabulary_size(make_tokenizer()) + 3]
    )
    assert tokenizer.decode(list(more.token_ids.values()), skip_special_tokens=True) == "".join(TOOL_CALL_TOKENS)
    assert rows_needed(len(rows(again)[0]), len(rows(again)[0])) == len(rows(again)[0])


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
