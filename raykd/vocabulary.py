"""The student's tokenizer with its new tokens, what it has to do with the teacher's, ids carried over from one to the other.

In:  folders of tokenizers and the tokens that a student's lacks; tables of token ids. No model.
Out: a tokenizer; a `VocabularyMatch`; the tables in the student's ids.

Prompts, teacher output and its cache are in the teacher's ids, and examples are built in them. They are carried over last,
before anything looks at them that knows the student.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from teacher_serving.identity import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOOL_CALL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Envelopes of tool calls and results (Hermes, Qwen): part of the text, so decoding without special tokens keeps them."""
ID_COLUMNS = ("prompt_ids", "output_ids", "recorded_ids", "input_ids", "topk_ids", "set_ids")


def student_tokenizer(folder: str | Path, new_tokens: Collection[str]) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, given the tokens of `new_tokens` that it lacks.

    Raises ValueError where the folder has no fast tokenizer, and for a token that does not come out as one id of its own.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; expected the folder of a fast tokenizer")
    from transformers import AutoTokenizer  # two seconds that processes of Ray's without a tokenizer need not take

    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_tokens(tokenizer, new_tokens)
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Collection[str]) -> dict[str, int]:
    """Give `tokenizer` those of `tokens` that it lacks, in place; returns the id of each.

    They are special, left out where text is decoded without special tokens, but for TOOL_CALL_TOKENS. Their ids do not
    depend on the order in which they are named. Raises ValueError where a token does not come out as one id of its own.
    """
    before = tokenizer.get_vocab()
    for token in sorted(tokens):
        if token not in before:
            tokenizer.add_tokens([token], special_tokens=token not in TOOL_CALL_TOKENS)
    ids: dict[str, int] = {}
    for token in tokens:
        found = tokenizer(token, add_special_tokens=False)["input_ids"]
        if not isinstance(found, list) or len(found) != 1 or found[0] in ids.values() or found[0] == tokenizer.unk_token_id:
            raise ValueError(f"token {token!r} is tokenised as {found}, expected one id of its own; choose another text")
        ids[token] = found[0]
    return ids


def token_id(tokenizer: Any, token: str | None, option: str) -> int:
    """Id of a token that a loss or a curriculum needs and `option` names. Raises ValueError where there is none."""
    found = tokenizer.get_vocab().get(token) if token else None
    if found is None:
        raise ValueError(
            f"{option} is {token!r}, which the tokenizer {tokenizer.name_or_path!r} does not have: add it to "
            "student.new_tokens, or name one of the tokenizer's tokens"
        )
    return found


@dataclass(frozen=True)
class VocabularyMatch:
    """What a student's vocabulary has to do with a teacher's.

    identical: every id means the same. superset: the student has all of the teacher's tokens, perhaps under other ids, and
    splits text alike; `id_map` carries ids over. different: neither.
    """

    kind: Literal["identical", "superset", "different"]
    names: tuple[str, str]  # folders of teacher and student
    num_teacher: int  # tokens
    num_student: int
    num_shared: int  # tokens of the teacher that the student has
    num_same_id: int  # of those, under the same id
    num_ids: int  # ids of the student: one more than its largest
    reasons: tuple[str, ...]  # why not identical
    id_map: np.ndarray  # int32 [teacher's ids] -> student's id; -1 where one of the two has no such token

    def require(self) -> VocabularyMatch:
        """Itself; raises ValueError with the numbers where the vocabularies are different."""
        if self.kind == "different":
            raise ValueError(
                f"teacher {self.names[0]!r} and student {self.names[1]!r} have different vocabularies: {self.num_teacher} "
                f"and {self.num_student} tokens, {self.num_shared} of the teacher's are known to the student, "
                f"{self.num_same_id} under the same id; {'; '.join(self.reasons)}. Expected the same vocabulary or one with "
                "more special tokens: use a student of the teacher's family, or set student.tokenizer to the teacher's "
                "folder for a student with random weights"
            )
        return self

    def student_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The teacher's ids [...] as the student's, int32. Raises ValueError for an id that is none of its tokens."""
        ids = np.asarray(ids, np.int32)
        if self.kind == "identical":
            return ids
        unknown = (ids < 0) | (ids >= len(self.id_map))
        unknown[~unknown] = self.id_map[ids[~unknown]] < 0
        if unknown.any():
            raise ValueError(
                f"{int(unknown.sum())} ids are no tokens of teacher {self.names[0]!r}, such as {ids[unknown][0]}; expected "
                f"ids of its {self.num_teacher} tokens, the largest {len(self.id_map) - 1}"
            )
        return self.id_map[ids]


def compare_vocabularies(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> VocabularyMatch:
    """Compare two fast tokenizers by what their ids mean."""
    backends = backend_of(teacher), backend_of(student)
    teacher_ids, student_ids = (backend.get_vocab(with_added_tokens=True) for backend in backends)
    shared = {token for token in teacher_ids if token in student_ids}
    num_same_id = sum(teacher_ids[token] == student_ids[token] for token in shared)
    reasons = []
    missing = sorted(teacher_ids.keys() - shared)
    if missing:
        reasons.append(f"the student lacks {len(missing)} tokens, such as {missing[:3]}")
    special = [_special_tokens(backend) for backend in backends]
    changed = sorted(token for token in shared if (token in special[0]) != (token in special[1]))
    if changed:
        reasons.append(f"{len(changed)} tokens are special for one of them only, such as {changed[:3]}")
    identical = teacher_ids == student_ids and not changed  # every id means the same, however each of them splits text
    parts = [] if identical else [name for name, one, other in _text_rules(*backends) if one != other]
    if parts:
        reasons.append(f"they split or spell text differently ({', '.join(parts)})")
    kind = "identical" if identical else "different" if reasons else "superset"
    if kind == "superset":
        reasons.append(f"the student has {len(student_ids) - len(shared)} more tokens, {len(shared) - num_same_id} moved")
    id_map = np.full(max(teacher_ids.values()) + 1, -1, np.int32)
    id_map[[teacher_ids[token] for token in shared]] = [student_ids[token] for token in shared]
    return VocabularyMatch(
        kind=kind,
        names=(teacher.name_or_path, student.name_or_path),
        num_teacher=len(teacher_ids),
        num_student=len(student_ids),
        num_shared=len(shared),
        num_same_id=num_same_id,
        num_ids=vocabulary_size(student),
        reasons=tuple(reasons),
        id_map=id_map,
    )


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The fast tokenizer itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    assert isinstance(backend, Tokenizer), f"{type(tokenizer).__name__} is no fast tokenizer"
    return backend


def _special_tokens(tokenizer: Tokenizer) -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}


def _text_rules(teacher: Tokenizer, student: Tokenizer) -> list[tuple[str, Any, Any]]:
    """What decides, beside the vocabulary, how text becomes tokens and tokens text."""
    one, other = (json.loads(t.to_str()) for t in (teacher, student))
    names = ("normalizer", "pre_tokenizer", "decoder")
    rules = [(name, one.get(name), other.get(name)) for name in names]
    kept = ("type", "merges", "unk_token", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    return rules + [(f"model.{name}", one["model"].get(name), other["model"].get(name)) for name in kept]


def remap_ids(table: pa.Table, match: VocabularyMatch) -> pa.Table:
    """The table in the student's ids: ID_COLUMNS and grammar masks, as far as it has them; everything else stays.

    Works on TEACHER_OUTPUT_SCHEMA, PROMPT_ROW_SCHEMA and EXAMPLE_SCHEMA. Raises ValueError for ids that are none of the
    teacher's tokens, such as padding rows of its head.
    """
    if match.kind == "identical":
        return table
    columns: Mapping[str, pa.ListArray] = {
        name: _remapped(table[name].combine_chunks(), name, match) for name in ID_COLUMNS if name in table.column_names
    }
    if "grammar_masks" in table.column_names:
        columns |= {"grammar_masks": _remapped_masks(table, match)}
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    return table


def _remapped(column: pa.ListArray, name: str, match: VocabularyMatch) -> pa.ListArray:
    try:
        ids = match.student_ids(column.flatten().to_numpy())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    lengths = np.diff(column.offsets.to_numpy())
    lengths[column.is_null().to_numpy(zero_copy_only=False)] = 0
    return _lists(ids, lengths, column)


def _remapped_masks(table: pa.Table, match: VocabularyMatch) -> pa.ListArray:
    """Masks with a bit for every id of the student; its new tokens are not legal."""
    column, rows = table["grammar_masks"].combine_chunks(), table["grammar_row"].combine_chunks()
    parts = np.split(rows.flatten().to_numpy(), np.cumsum(rows.value_lengths().fill_null(0).to_numpy())[:-1])
    num_masks = np.array([part.max(initial=-1) + 1 for part in parts], np.int64)  # of each example
    if not num_masks.any():
        return column
    words = column.flatten().to_numpy().reshape(int(num_masks.sum()), -1)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    known = np.flatnonzero(match.id_map >= 0)
    moved = np.zeros((len(words), -(-match.num_ids // 32) * 32), np.uint8)
    moved[:, match.id_map[known]] = bits[:, known]
    words = np.packbits(moved, axis=1, bitorder="little").view(np.int32)
    return _lists(words.reshape(-1), num_masks * words.shape[1], column)


def _lists(values: np.ndarray, lengths: np.ndarray, like: pa.ListArray) -> pa.ListArray:
    """Lists of these lengths, end to end, null where `like` is, of its type."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values, like.type.value_type), type=like.type, mask=like.is_null())
