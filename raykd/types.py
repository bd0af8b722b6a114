"""The records that travel from prompt to optimizer step. No logic.

Prompt -> TeacherOutput (teacher_serving/types.py) -> Example -> Batch -> StudentOutput -> LossReport

Three invariants, each held by tests:

* One axis. Every per-token array describes the token at its own index of `input_ids`; spans become marks on that axis.
* One shift. Logits at t-1 predict token t; the shift happens once, in `losses/combine.py`.
* One division. A loss is (sum, count); the count it is divided by is the one of the whole optimizer step (all ranks, all
  micro-batches, each term its own tokens). Splitting, padding or adding workers changes nothing.

Shape letters: B sequences, T positions, V vocabulary, K teacher top-k entries, H hidden size, L layers,
N supervised (response) tokens of a batch, packed in row-major order of [B, T].
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch


class Mark(enum.IntFlag):
    """What a token is, as bits of `Example.marks` and `Batch.marks`. A token may carry several."""

    RESPONSE = 1  # written by the assistant (tool calls and the end-of-turn token included): supervised
    TOOL_NAME = 2  # overlaps a tool name inside a call (without its quotes)
    ARGUMENT_STRUCTURE = 4  # braces, brackets, colons, commas, quotes of a call's arguments
    ARGUMENT_KEY = 8
    ARGUMENT_VALUE = 16
    INTEGRATION = 32  # response token that reuses a value of a tool result
    CLAIM = 64  # overlaps a checkable claim
    CODE_MODE = 128  # code that calls tools through their programming interface
    DIRECT_TOOL = 256  # a direct tool call where code mode is preferred
    LATENT = 512  # slot between <bot> and <eot>: an input only, never supervised, so never RESPONSE
    DECISION = 1024  # the halt head is read at this token


class SetKind(enum.IntEnum):
    """What a set of ids at a token is for (`Example.set_ids`)."""

    TOOL_CHOICE = 0  # ids with which the name of some offered tool goes on here; the written token is one of them
    COPY = 1  # ids with which the copy of a tool result goes on here; the written token is one of them
    CONTRADICTION = 2  # ids that would write another number of the tool results; the written token is none of them


ARGUMENT_MARKS = Mark.ARGUMENT_STRUCTURE | Mark.ARGUMENT_KEY | Mark.ARGUMENT_VALUE


class Source(enum.IntEnum):
    """Who wrote the response of a sequence; decides which losses apply to it."""

    GOLD = 0  # the recorded conversation (human or any other author): ce_truth
    TEACHER = 1  # the teacher: ce_teacher
    STUDENT = 2  # the student, or somebody whom nobody should follow (the rejected half of a pair): never cross-entropy


class CawsTier(NamedTuple):
    """What a response of a tier may have at most."""

    max_spans: int  # latent spans
    max_loops: int  # of a refinement


CAWS_TIERS = {1: CawsTier(0, 1), 2: CawsTier(1, 2), 3: CawsTier(3, 3)}


class Span(NamedTuple):
    """Half-open range [start, end): characters of a text, or tokens of `input_ids`; the function says which."""

    start: int
    end: int


@dataclass(frozen=True)
class Prompt:
    """One validated row of the user's data, rendered and tokenised once.

    `recorded_ids` is None when the teacher is to write the completion; otherwise the rest of the recorded conversation,
    and `response_mask` [len(recorded_ids)] says which of those tokens the assistant wrote.
    """

    uid: int  # stable id: hash of source and key (see data/sources.py); epochs derive their own from it
    key: str  # the row's own id, or file:line
    messages_json: str  # JSON text of the conversation: up to the completion, or through the last recorded turn
    tools_json: str  # offered tools in the OpenAI form, as JSON text; "[]" without tools
    prompt_ids: np.ndarray  # int32 [P]
    recorded_ids: np.ndarray | None = None  # int32 [T]
    response_mask: np.ndarray | None = None  # bool [T]
    held_out: bool = False  # a validation prompt: never trained on
    caws_tier: int = 0  # that the row names; 0: none


EXAMPLE_SCHEMA = pa.schema(
    [
        ("uid", pa.int64()),
        ("held_out", pa.bool_()),
        ("source", pa.int8()),
        ("input_ids", pa.list_(pa.int32())),  # [T] prompt and completion
        ("marks", pa.list_(pa.uint16())),  # [T] bits of Mark
        ("topk_ids", pa.list_(pa.int32())),  # [R*K] R = tokens marked RESPONSE; empty without teacher scores
        ("topk_logprobs", pa.list_(pa.float16())),  # [R*K]
        ("log_tail", pa.list_(pa.float32())),  # [R]
        ("top_k", pa.int32()),  # K; 0 without teacher scores
        ("teacher_id", pa.string()),
        ("num_calls", pa.int32()),  # tool calls found in the response
        ("num_truncated_calls", pa.int32()),  # calls that the end of the text cut off
        ("cot_steps", pa.list_(pa.string())),  # reasoning steps of the response as the data names them; none: found in it
        ("missing", pa.string()),  # "loss:reason loss:reason": why losses that look for targets found none in the row
        ("tool_name_weight", pa.float32()),  # trust in the tool names of the row: 1, less where they were guessed
        ("quality", pa.float32()),  # score of the response in [0, 1]; NaN: none
        ("advantage", pa.float32()),  # of a response sampled from the student; NaN: none
        ("sampled_logprobs", pa.list_(pa.float32())),  # [R] nats, of that response under the weights that sampled it
        ("pair", pa.int64()),  # the same |pair| > 0 on two rows: > 0 is preferred to < 0; 0: none
        ("reference_logprob", pa.float32()),  # nats, sum over the response under the reference student; NaN: none
        ("caws_tier", pa.int8()),  # of CAWS_TIERS, where the row names one; 0: none
        ("target_length", pa.float32()),  # the teacher's response tokens, beside one sampled from the student; NaN: none
        ("halt_targets", pa.list_(pa.float32())),  # [D] probability of halting at each DECISION token; NaN: unknown
        ("set_position", pa.list_(pa.int32())),  # [S] the token, as an index of input_ids
        ("set_kind", pa.list_(pa.int8())),  # [S] SetKind
        ("set_sizes", pa.list_(pa.int32())),  # [S] number of ids in each set
        ("set_ids", pa.list_(pa.int32())),  # the sets end to end
        ("grammar_position", pa.list_(pa.int32())),  # [G] argument tokens whose legal alternatives are known
        ("grammar_row", pa.list_(pa.int32())),  # [G] row of grammar_masks
        ("grammar_masks", pa.list_(pa.int32())),  # [U*W] W = ceil(V/32): bit i%32 of word i//32 says that id i is legal
        ("num_teacher_layers", pa.int32()),  # 0 without teacher_hidden
        ("teacher_hidden", pa.list_(pa.float16())),  # [L*T*H] states of the shipped teacher layers; NaN: none at a token
        ("teacher_seconds", pa.float32()),  # engine time spent on the row; 0 when it came from the cache
        ("teacher_wait_seconds", pa.float32()),  # engine idle time before the row's block: the trainer was slower
    ]
)
"""Arrow form of `Example`: what the extractors emit and the collate step reads. One row per sequence, plain list columns."""


@dataclass(frozen=True)
class Example:
    """One training sequence: `EXAMPLE_SCHEMA` as NumPy arrays."""

    uid: int
    source: Source
    input_ids: np.ndarray  # int32 [T]
    marks: np.ndarray  # uint16 [T]
    topk_ids: np.ndarray  # int32 [R, K]
    topk_logprobs: np.ndarray  # float16 [R, K], nats; -inf marks a missing entry
    log_tail: np.ndarray  # float32 [R], nats
    teacher_id: str = ""
    held_out: bool = False
    num_calls: int = 0
    num_truncated_calls: int = 0
    cot_steps: np.ndarray = field(default_factory=lambda: np.empty(0, object))  # str [any number]
    missing: str = ""
    tool_name_weight: float = 1.0
    quality: float = math.nan
    advantage: float = math.nan
    sampled_logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # [R] or none
    pair: int = 0
    reference_logprob: float = math.nan
    caws_tier: int = 0
    target_length: float = math.nan
    halt_targets: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # [D]
    set_position: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # [S], each RESPONSE
    set_kind: np.ndarray = field(default_factory=lambda: np.empty(0, np.int8))  # [S]
    set_sizes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # [S]
    set_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # [sum of set_sizes]
    grammar_position: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # [G], each RESPONSE
    grammar_row: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # [G]
    grammar_masks: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int32))  # [U, W]
    teacher_hidden: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 0), np.float16))  # [L, T, H]; NaN: none

    @property
    def num_teacher_layers(self) -> int:
        return len(self.teacher_hidden)


_no_floats = partial(torch.empty, 0)
_no_bools = partial(torch.empty, 0, dtype=torch.bool)
_no_ints = partial(torch.empty, 0, dtype=torch.int64)


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch. The N response tokens are also listed once, packed, so that no loss sees padding."""

    uid: torch.Tensor  # int64 [B]
    input_ids: torch.Tensor  # int64 [B, T], right-padded
    attention_mask: torch.Tensor  # bool [B, T]
    marks: torch.Tensor  # int32 [B, T], bits of Mark; 0 on padding
    response_index: torch.Tensor  # int64 [N], position of each response token in the flattened [B*T]; never column 0
    response_source: torch.Tensor  # int8 [N], Source of the token's sequence
    topk_ids: torch.Tensor  # int64 [N, K]; K is the widest of the batch
    topk_logprobs: torch.Tensor  # float32 [N, K]; -inf marks a missing entry
    log_tail: torch.Tensor  # float32 [N]
    has_teacher: torch.Tensor  # bool [N], False where the token has no teacher scores
    # What only some losses look at; no rows where the data has none.
    end_index: torch.Tensor = field(
        default_factory=_no_ints
    )  # int64 [B], last response token of each sequence in the flattened [B*T]
    quality: torch.Tensor = field(default_factory=_no_floats)  # float32 [B]; NaN: none
    pair: torch.Tensor = field(default_factory=_no_ints)  # int64 [B]
    reference_logprob: torch.Tensor = field(default_factory=_no_floats)  # float32 [B]; NaN: none
    caws_tier: torch.Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.int8))  # int8 [B]; 0: not named
    target_length: torch.Tensor = field(default_factory=_no_floats)  # float32 [B]; NaN: none
    decision_index: torch.Tensor = field(default_factory=_no_ints)  # int64 [D], each DECISION token in the flattened [B*T]
    halt_targets: torch.Tensor = field(default_factory=_no_floats)  # float32 [D]; NaN: unknown
    response_advantage: torch.Tensor = field(
        default_factory=_no_floats
    )  # float32 [N] of the token's sequence; NaN: not sampled from the student
    response_old_logprob: torch.Tensor = field(
        default_factory=_no_floats
    )  # float32 [N] under the weights that sampled the token; NaN: not sampled
    tool_name_weight: torch.Tensor = field(default_factory=_no_floats)  # float32 [N] of the token's sequence
    rollout_row: torch.Tensor = field(default_factory=_no_ints)  # int64 [R], index into the N of tokens with a target length
    pair_row: torch.Tensor = field(default_factory=_no_ints)  # int64 [Q], index into the N of tokens of sequences in pairs
    turn_first: torch.Tensor = field(default_factory=_no_ints)  # int64 [F], index into the N of each turn's first token
    turn_has_call: torch.Tensor = field(default_factory=_no_bools)  # bool [N], the token's turn holds a tool call
    index_in_turn: torch.Tensor = field(default_factory=_no_ints)  # int64 [N], of the token; -1 at <bot> and <eot>
    set_row: torch.Tensor = field(default_factory=_no_ints)  # int64 [S], index into the N response tokens
    set_kind: torch.Tensor = field(default_factory=_no_ints)  # int64 [S]
    set_ids: torch.Tensor = field(
        default_factory=partial(torch.empty, 0, 0, dtype=torch.int64)
    )  # int64 [S, W], filled with -1
    grammar_row: torch.Tensor = field(default_factory=_no_ints)  # int64 [G], index into the N response tokens
    grammar_mask: torch.Tensor = field(default_factory=_no_ints)  # int64 [G], row of grammar_masks
    grammar_masks: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int32))  # [U, ceil(V/32)]
    state_index: torch.Tensor = field(
        default_factory=_no_ints
    )  # int64 [M], tokens with a teacher's state in the flattened [B*T], in rising order
    teacher_hidden: torch.Tensor = field(default_factory=partial(torch.empty, 0, 0, 0))  # float16 [L, M, H]

    @property
    def response_marks(self) -> torch.Tensor:
        """Marks of the N response tokens, int32 [N]."""
        return self.marks.flatten()[self.response_index]

    @property
    def response_ids(self) -> torch.Tensor:
        """Token ids of the N response tokens (the labels), int64 [N]."""
        return self.input_ids.flatten()[self.response_index]

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class StudentOutput:
    """What one forward pass of the student yields; nothing that no loss asked for."""

    hidden: torch.Tensor  # [B, T, H] after the final norm: the input of the LM head
    layers: tuple[torch.Tensor, ...] = ()  # [B, T, H] each, outputs of the decoder layers that were asked for
    halt_logits: torch.Tensor | None = None  # [D, 2] (continue, halt) at the decision points
    quality_logits: torch.Tensor | None = None  # [B] at the end of each response
    reference_hidden: torch.Tensor | None = None  # [B, T, H] of the student as the run began, frozen: for self_kd


@dataclass(frozen=True)
class TokenLoss:
    """A loss as (sum, count), in nats and tokens; `sum` carries the graph, `count` does not."""

    sum: torch.Tensor  # scalar
    count: torch.Tensor  # scalar, float32: sum of the token weights

    def mean(self) -> torch.Tensor:
        """sum / count, and exactly 0 (with its graph kept) when nothing was supervised."""
        return self.sum / torch.where(self.count > 0, self.count, torch.ones_like(self.count))


@dataclass(frozen=True)
class LossReport:
    """The loss of one micro-batch, ready for backward, and what it is made of. Detached tensors: no host sync here.

    `total` = sum over parts of weight * part.sum / (count of the whole optimizer step), so that summing `total` over
    micro-batches and ranks gives the loss of the step.
    """

    total: torch.Tensor  # scalar with graph
    parts: Mapping[str, TokenLoss]  # by loss name; sums detached, unweighted
    metrics: Mapping[str, TokenLoss]  # accuracies and the like as (sum, count), detached
