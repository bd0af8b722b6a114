"""Ids that open a call, in vocabularies with and without markers of their own."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raykd.data.call_openings import call_formats, call_openings


def bpe_with(*extra: str, markers: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE with all bytes and the given pieces, which are merged from their characters."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for piece in extra:
        for end in range(2, len(piece) + 1):
            if piece[:end] not in vocabulary:
                vocabulary[piece[:end]] = len(vocabulary)
                merges.append((piece[: end - 1], piece[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in markers])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def openings(tokenizer, *formats: str) -> set[str]:
    return set(tokenizer.convert_ids_to_tokens(call_openings(tokenizer, formats or None).tolist()))


def test_a_marker_with_a_token_of_its_own_is_opened_by_that_token_alone():
    assert openings(bpe_with("<t", markers=("<tool_call>",)), "hermes") == {"<tool_call>"}


def test_a_split_marker_is_opened_by_the_piece_it_begins_with_or_a_longer_one():
    found = openings(bpe_with("<to", "Ċ<to"), "hermes")  # Ċ is a line break
    assert found == {"<to", "Ċ<to"}, "neither < nor <t: the tokenizer never begins a call with them"


def test_json_is_opened_by_every_brace_that_a_call_may_begin_with():
    found = openings(bpe_with('{"', 'Ġ{"', '[{"', "{}", "[1", "{a", "[]", '{"name"'), "json")
    assert found >= {"{", "[", '{"', 'Ġ{"', '[{"', '{"name"', "Ġ{", "[{"}
    assert not found & {"{}", "[1", "{a", "[]", '"', "Ġ"}


def test_sentencepiece_with_a_joined_space_and_brace():
    vocabulary = {"<unk>": 0, "▁": 1, "{": 2, '"': 3, "▁{": 4, '▁{"': 5, "▁a": 6, "a": 7}
    merges = [("▁", "{"), ("▁{", '"'), ("▁", "a")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    assert openings(PreTrainedTokenizerFast(tokenizer_object=tokenizer), "json") == {"{", "▁{", '▁{"'}


def test_the_chat_template_tells_the_format(demo_tokenizer):
    assert call_formats(demo_tokenizer) == ("hermes",)
    assert call_formats(bpe_with()) == ("json",)
    assert openings(demo_tokenizer) == {"<tool_call>"}


def test_an_unknown_format_is_refused(demo_tokenizer):
    with pytest.raises(ValueError, match="expected one or more of hermes"):
        call_openings(demo_tokenizer, ["xml"])
