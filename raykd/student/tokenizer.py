"""New tokens for a student: rows of their own in the embedding and the LM head, set once and then trained.

In:  a model with its tokenizer, and the tokens that they lack. Out: both with them, in place.

A model is migrated before it is wrapped for several devices and before an optimizer holds its parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raykd.vocabulary import add_tokens
from teacher_serving.identity import vocabulary_size

logger = logging.getLogger(__name__)

RECORD = "migrated_token_ids"
"""Key of the model's config.json: token -> id of the rows that a migration has initialised."""
ROW_MULTIPLE = 64
"""Where rows are added, their number is made a multiple of this."""


@dataclass(frozen=True)
class Migration:
    """What `migrate` did."""

    token_ids: dict[str, int]  # of the tokens asked for
    initialised: tuple[int, ...]  # ids whose rows were set now; empty when there was nothing to do
    num_rows: int  # of embedding and LM head, padding included
    num_valid_ids: int  # ids that the tokenizer knows: logits from here on are to be masked


@torch.no_grad()
def migrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, str],
    *,
    multiple: int = ROW_MULTIPLE,
    noise: float = 0.01,
    seed: int = 0,
) -> Migration:
    """Give `tokenizer` the tokens and `model` rows for every id of it, in place. Doing it again changes nothing.

    A new row is the mean of all rows that mean something, or of the rows of the token's description where it has one, plus
    noise; in the LM head likewise. Rows that were there stay as they are, and so do dtype, device, and the tie of the two.
    A token that the tokenizer and the model know already keeps its row, and a row once initialised is never set again: the
    model's config keeps record of them. After Hewitt (2021, "Initializing new word embeddings for pretrained language
    models"), whose mean leaves the model's predictions almost as they were.

    Args:
        tokens: token -> description, "" for none.
        multiple: where rows are added, their number is made a multiple of this.
        noise: standard deviation of the noise, in units of the standard deviation of the rows' entries.
        seed: of the noise.

    Raises ValueError where a token does not come out as one id of its own.
    """
    known = vocabulary_size(tokenizer)
    token_ids = add_tokens(tokenizer, tokens)
    num_rows, num_ids = _embedding(model).weight.shape[0], vocabulary_size(tokenizer)
    valid = min(known, num_rows)  # rows that mean something; those beyond are padding
    if num_ids > num_rows:
        with torch.random.fork_rng(devices=[]):  # what it draws for the new rows is not used
            model.resize_token_embeddings(rows_needed(num_ids, num_rows, multiple), mean_resizing=False)
    recorded: dict[str, int] = dict(getattr(model.config, RECORD, None) or {})
    new = {token: i for token, i in token_ids.items() if i >= valid and recorded.get(token) != i}
    unnamed = [i for i in range(num_rows, _embedding(model).weight.shape[0]) if i not in token_ids.values()]
    sources = {i: _ids_of(tokenizer, tokens[token], valid) for token, i in new.items()} | {i: [] for i in unnamed}
    for matrix in _matrices(model):
        _initialise(matrix, sources, valid, noise, seed)
    if new:
        setattr(model.config, RECORD, recorded | new)
        logger.info("new tokens %s; %d rows, %d ids", new, _embedding(model).weight.shape[0], num_ids)
    return Migration(token_ids, tuple(sorted(sources)), _embedding(model).weight.shape[0], num_ids)


def rows_needed(num_ids: int, num_rows: int, multiple: int = ROW_MULTIPLE) -> int:
    """Rows of embedding and LM head after a migration: those that are there where they are enough for all ids."""
    return num_rows if num_ids <= num_rows else -(-num_ids // multiple) * multiple


def _ids_of(tokenizer: PreTrainedTokenizerBase, description: str, valid: int) -> list[int]:
    ids = tokenizer(description, add_special_tokens=False)["input_ids"] if description else []
    assert isinstance(ids, list)
    return [i for i in ids if i < valid]


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding), f"the embedding of {type(model).__name__} is a {type(embedding).__name__}"
    return embedding


def _matrices(model: PreTrainedModel) -> list[Tensor]:
    """Everything with a row per token id, each once: embedding, LM head where it is not the same, the head's bias."""
    head = model.get_output_embeddings()
    matrices: list[Tensor] = [_embedding(model).weight]
    if isinstance(head, nn.Linear):
        if head.weight is not matrices[0]:
            matrices.append(head.weight)
        if head.bias is not None:
            matrices.append(head.bias)
    return matrices


def _initialise(matrix: Tensor, sources: Mapping[int, list[int]], valid: int, noise: float, seed: int) -> None:
    """Set rows [.., H] (or entries of a bias) to the mean of their sources, or of all `valid` rows where they have none."""
    if not sources:
        return
    old = matrix[:valid].float()
    mean, scale = old.mean(dim=0), noise * float(old.std())
    for row, ids in sorted(sources.items()):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + row)  # a row's noise does not depend on the others
        jitter = scale * torch.randn(mean.shape, generator=generator)
        matrix[row] = ((old[ids].mean(dim=0) if ids else mean) + jitter.to(mean.device)).to(matrix.dtype)
