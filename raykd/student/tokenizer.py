"""New tokens for a student, and what its vocabulary has to do with the teacher's.

In:  a model with its tokenizer and the tokens that it lacks; the folders of two tokenizers; tables of token ids.
Out: the model with rows for them; a `VocabularyMatch`, whose id map carries stored ids over.

A model is migrated before it is wrapped for several devices and before an optimizer holds its parameters.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from teacher_serving.identity import vocabulary_fingerprint, vocabulary_size

logger = logging.getLogger(__name__)

TOOL_CALL_TOKENS = {
    "<tool_call>": "start of a tool call",
    "</tool_call>": "end of the tool call",
    "<tool_response>": "start of a tool result",
    "</tool_response>": "end of the tool result",
}
"""Envelopes of tool calls and results (Hermes, Qwen), with the descriptions that their rows start from."""
RECORD = "migrated_token_ids"
"""Key of the model's config.json: token -> id of the rows that a migration has initialised."""
ID_COLUMNS = ("prompt_ids", "output_ids", "recorded_ids", "input_ids", "topk_ids", "set_ids")


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
    special: bool = True,
    multiple: int = 64,
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
        special: whether they are left out where text is decoded without special tokens: slots, yes; envelopes of calls, no.
        multiple: where rows are added, their number is made a multiple of this.
        noise: standard deviation of the noise, in units of the standard deviation of the rows' entries.
        seed: of the noise.

    Raises ValueError where a token does not come out as one id of its own.
    """
    known = vocabulary_size(tokenizer)
    before = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in tokens if token not in before], special_tokens=special)
    token_ids = _check_tokens(tokenizer, tokens)
    num_rows, num_ids = _embedding(model).weight.shape[0], vocabulary_size(tokenizer)
    valid = min(known, num_rows)  # rows that mean something; those beyond are padding
    if num_ids > num_rows:
        model.resize_token_embeddings(-(-num_ids // multiple) * multiple, mean_resizing=False)
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


def _check_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, str]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for token in tokens:
        found = tokenizer(token, add_special_tokens=False)["input_ids"]
        if not isinstance(found, list) or len(found) != 1 or found[0] in ids.values() or found[0] == tokenizer.unk_token_id:
            raise ValueError(f"token {token!r} is tokenised as {found}, expected one id of its own; choose another text")
        ids[token] = found[0]
    return ids


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


@dataclass(frozen=True)
class VocabularyMatch:
    """What a student's vocabulary has to do with a teacher's.

    identical: every id means the same. superset: the student has all of the teacher's tokens, perhaps under other ids, and
    splits text alike; `id_map` carries ids over. different: neither.
    """

    kind: Literal["identical", "superset", "different"]
    num_teacher: int  # tokens
    num_student: int
    num_shared: int  # tokens of the teacher that the student has
    num_same_id: int  # of those, under the same id
    reasons: tuple[str, ...]  # why not identical
    id_map: np.ndarray | None  # int32 [teacher's ids] -> student's id, -1 where the teacher has no such id; superset only

    def require(self) -> np.ndarray | None:
        """The id map, None where ids stay; raises ValueError with the numbers where the vocabularies are different."""
        if self.kind == "different":
            raise ValueError(
                f"teacher and student have different vocabularies: {self.num_teacher} and {self.num_student} tokens, "
                f"{self.num_shared} of the teacher's are known to the student, {self.num_same_id} under the same id; "
                f"{'; '.join(self.reasons)}. Expected the same vocabulary or one with more special tokens: use a student of "
                "the teacher's family, or the teacher's tokenizer for a student with random weights"
            )
        return self.id_map


def compare_vocabularies(teacher_folder: str | Path, student_folder: str | Path) -> VocabularyMatch:
    """Compare the tokenizers of two folders by what their ids mean. Raises ValueError where one has no tokenizer.json."""
    fingerprints = [vocabulary_fingerprint(folder) for folder in (teacher_folder, student_folder)]
    teacher, student = (
        Tokenizer.from_file(str(Path(folder) / "tokenizer.json")) for folder in (teacher_folder, student_folder)
    )
    teacher_ids, student_ids = (t.get_vocab(with_added_tokens=True) for t in (teacher, student))
    shared = {token for token in teacher_ids if token in student_ids}
    same = [token for token in shared if teacher_ids[token] == student_ids[token]]
    reasons = []
    missing = sorted(teacher_ids.keys() - shared)
    if missing:
        reasons.append(f"the student lacks {len(missing)} tokens, such as {missing[:3]}")
    special = [_special_tokens(t) for t in (teacher, student)]
    changed = sorted(token for token in shared if (token in special[0]) != (token in special[1]))
    if changed:
        reasons.append(f"{len(changed)} tokens are special for one of them only, such as {changed[:3]}")
    parts = [name for name, one, other in _text_rules(teacher, student) if one != other]
    if parts:
        reasons.append(f"they split or spell text differently ({', '.join(parts)})")
    kind = "different" if reasons else "superset"
    if fingerprints[0] == fingerprints[1]:
        kind = "identical"  # every id means the same, however each of them splits text
    elif not reasons:
        reasons.append(f"the student has {len(student_ids) - len(shared)} more tokens, {len(shared) - len(same)} moved")
    id_map = None
    if kind == "superset":
        id_map = np.full(max(teacher_ids.values()) + 1, -1, np.int32)
        id_map[list(teacher_ids.values())] = [student_ids[token] for token in teacher_ids]
    return VocabularyMatch(kind, len(teacher_ids), len(student_ids), len(shared), len(same), tuple(reasons), id_map)


def _special_tokens(tokenizer: Tokenizer) -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}


def _text_rules(teacher: Tokenizer, student: Tokenizer) -> list[tuple[str, Any, Any]]:
    """What decides, beside the vocabulary, how text becomes tokens and tokens text."""
    one, other = (json.loads(t.to_str()) for t in (teacher, student))
    names = ("normalizer", "pre_tokenizer", "decoder")
    rules = [(name, one.get(name), other.get(name)) for name in names]
    kept = ("type", "merges", "unk_token", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    return rules + [(f"model.{name}", one["model"].get(name), other["model"].get(name)) for name in kept]


def remap_ids(table: pa.Table, id_map: np.ndarray) -> pa.Table:
    """The table with all its token ids (ID_COLUMNS that it has) put through `id_map` [old ids]; everything else stays.

    Works on TEACHER_OUTPUT_SCHEMA, PROMPT_ROW_SCHEMA and EXAMPLE_SCHEMA. Raises ValueError for ids that have no new one,
    and for rows with grammar masks, which hold a bit per old id: build those examples anew.
    """
    masks = table["grammar_masks"].combine_chunks() if "grammar_masks" in table.column_names else None
    if masks is not None and len(masks.flatten()):
        raise ValueError("grammar_masks hold a bit for every old id and cannot be mapped: map teacher output, not examples")
    for name in ID_COLUMNS:
        if name not in table.column_names:
            continue
        place = table.schema.get_field_index(name)
        column = table[name].combine_chunks()
        values = column.flatten().to_numpy()
        unknown = (values < 0) | (values >= len(id_map))
        unknown[~unknown] = id_map[values[~unknown]] < 0
        if unknown.any():
            raise ValueError(
                f"{name} holds {int(unknown.sum())} ids without a new one, such as {values[unknown][0]}; the map knows "
                f"{int((id_map >= 0).sum())} ids up to {len(id_map) - 1}"
            )
        lengths = np.diff(column.offsets.to_numpy())
        lengths[column.is_null().to_numpy(zero_copy_only=False)] = 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        mapped = pa.ListArray.from_arrays(
            offsets, pa.array(id_map[values], column.type.value_type), type=column.type, mask=column.is_null()
        )
        table = table.set_column(place, table.schema.field(name), mapped)
    return table
