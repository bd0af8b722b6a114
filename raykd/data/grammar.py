"""Which tokens a tool's JSON Schema allows next, at every argument token of a call.

In:  a call in the text and tokens of its turn, the JSON Schema of the tool's parameters, the tokenizer.
Out: one packed mask of ids [ceil(V/32)] for each token that lies wholly inside the arguments.

The grammar (xgrammar, Dong et al., 2024) is compiled once per schema and walked along the written tokens. It is the schema
read as tools mean it: properties in any order, none that the schema does not declare (unless it says so), any white space.
In any order xgrammar does not check that a key is new or that all required ones are there, only their number; llguidance,
the alternative, insists on the declared order, which is not the authors'. Any text may follow the arguments, so that a
token which ends them and goes on with the envelope is legal wherever the arguments may end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raykd.data.detokenize import token_bytes
from raykd.data.extractors import ToolCall

if TYPE_CHECKING:
    import xgrammar  # elsewhere where it is used: with transformers, which it needs, two seconds of every process

_ANYTHING = r"[\s\S]*"


class GrammarMasks(NamedTuple):
    """Legal ids at G tokens."""

    position: np.ndarray  # int32 [G] the token
    row: np.ndarray  # int32 [G] its row of masks
    masks: np.ndarray  # int32 [U, ceil(V/32)] distinct masks: bit i%32 of word i//32 says that id i is legal


class CallGrammar(NamedTuple):
    """Legal ids along one call."""

    legal: GrammarMasks
    breaks: bool  # a written token is not legal; the tokens from there on are left out


NO_MASKS = GrammarMasks(np.empty(0, np.int32), np.empty(0, np.int32), np.empty((0, 0), np.int32))


class ToolGrammars:
    """The compiled grammars of one tokenizer: build it once per process. Not for several threads at a time.

    Raises ValueError where the bytes of the tokenizer's tokens are unknown.
    """

    def __init__(self, tokenizer: Any, *, max_schemas: int = 1024):
        """`max_schemas` bounds how many compiled grammars are kept (some 10 kB to 1 MB each, by vocabulary)."""
        pieces = token_bytes(tokenizer)
        if pieces is None:
            raise ValueError(
                "loss.json_grammar needs the bytes of every token, and this tokenizer's decoder is of an unknown kind; "
                "use a byte-level tokenizer or a converted SentencePiece one, or set loss.json_grammar=0"
            )
        for index, token in tokenizer.added_tokens_decoder.items():
            if token.special:
                pieces[index] = b""  # never legal, whatever it would spell
        import xgrammar

        info = xgrammar.TokenizerInfo(pieces, xgrammar.VocabType.RAW, stop_token_ids=[tokenizer.eos_token_id])
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.num_words = -(-len(pieces) // 32)
        self.compiled = lru_cache(max_schemas)(self._compile)

    def _compile(self, schema_json: str) -> xgrammar.CompiledGrammar | None:
        """Grammar of a JSON Schema; None where it cannot be expressed."""
        import xgrammar

        try:
            arguments = xgrammar.Grammar.from_json_schema(schema_json, any_order=True)
            return self._compiler.compile_grammar(xgrammar.Grammar.concat(arguments, xgrammar.Grammar.from_regex(_ANYTHING)))
        except (RuntimeError, ValueError):
            return None

    def walk(self, grammar: xgrammar.CompiledGrammar, beginning: str, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Masks [n, W] at the first n of `ids`, written after the text `beginning`; all of them unless one is illegal."""
        import xgrammar

        masks = np.zeros((len(ids), self.num_words), dtype=np.int32)
        matcher = xgrammar.GrammarMatcher(grammar)
        if beginning and not matcher.accept_string(beginning):
            return masks, 0
        for index, token in enumerate(ids.tolist()):
            if not matcher.fill_next_token_bitmask(masks, index):
                masks[index] = -1
            if not matcher.accept_token(token):
                return masks, index
        return masks, len(ids)


def call_grammar(
    text: str,
    offsets: np.ndarray,
    ids: np.ndarray,
    call: ToolCall,
    grammar: xgrammar.CompiledGrammar,
    grammars: ToolGrammars,
) -> CallGrammar:
    """Legal ids at the tokens [T] that lie wholly inside the arguments of `call`, up to the first illegal one.

    A boundary token, which also holds characters around the arguments, is none of them.
    """
    start, end = call.arguments_span
    first = int(np.searchsorted(offsets[:, 0], start, side="left"))
    last = int(np.searchsorted(offsets[:, 1], end, side="right"))
    begun = int(offsets[first - 1, 1]) if first else start  # a token before may hold the beginning of the arguments
    if first >= last or (begun > start and begun != offsets[first, 0]):
        return CallGrammar(NO_MASKS, breaks=False)
    masks, num_legal = grammars.walk(grammar, text[start : max(begun, start)], ids[first:last])
    rows = np.arange(num_legal, dtype=np.int32)
    return CallGrammar(GrammarMasks(first + rows, rows, masks[:num_legal]), breaks=num_legal < last - first)


def join_masks(parts: Sequence[GrammarMasks]) -> GrammarMasks:
    """Several as one, each distinct mask kept once."""
    parts = [part for part in parts if len(part.position)]
    if not parts:
        return NO_MASKS
    row_of: dict[bytes, int] = {}  # in the order of the rows
    rows = []
    for part in parts:
        new_rows = [row_of.setdefault(mask.tobytes(), len(row_of)) for mask in part.masks]
        rows.append(np.array(new_rows, dtype=np.int32)[part.row])
    masks = np.frombuffer(bytearray().join(row_of), dtype=np.int32).reshape(len(row_of), -1)
    return GrammarMasks(np.concatenate([part.position for part in parts]), np.concatenate(rows), masks)


@lru_cache(maxsize=256)
def offered_schemas(tools_json: str) -> dict[str, str]:
    """Name -> JSON Schema of the parameters, as JSON text, of each offered tool (OpenAI form); "" without one."""
    functions = [tool.get("function", tool) for tool in json.loads(tools_json)]
    return {
        function["name"]: json.dumps(function["parameters"], ensure_ascii=False) if function.get("parameters") else ""
        for function in functions
    }
