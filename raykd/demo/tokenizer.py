"""The demo world's tokenizer: byte-level BPE learnt from the corpus, and a Hermes/Qwen-style chat template.

In: conversations. Out: a `PreTrainedTokenizerFast` that round-trips any text.

Capitalised words and single digits never carry their leading space, so that a name or a number has the same tokens in
a request, in a call's JSON and in an answer: copying is then one and the same operation everywhere.
"""

import re
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKER_TOKENS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# JSON Schema's set phrases, which would be half of every prompt | one digit | lower-case word with its space |
# any other word | punctuation and spaces, but not the space of a following lower-case word | that space otherwise.
_PIECES = (
    r'", "parameters": \{"type": "object", "properties": \{"|": \{"type": "\p{Ll}+"'
    r"|\p{N}| ?\p{Ll}[\p{L}_]*|\p{L}[\p{L}_]*|(?:[^\s\p{L}\p{N}]|\s(?! ?\p{Ll}))+|\s"
)

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{- '\\n' + ((tool.function or tool) | tojson) }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content or '' }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function or tool_call %}
            {%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": ' + (call.name | tojson) + ', "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>tool\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def train_tokenizer(conversations: Iterable[dict[str, Any]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn merges from rows with `messages` and `tools`, as the chat template renders them.

    vocab_size counts everything, the 256 bytes and the added tokens included. The same rows give the same tokenizer.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(MARKER_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    renderer = _wrap(Tokenizer(models.BPE()))
    added = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS + MARKER_TOKENS))
    pieces = (piece for row in conversations for piece in added.split(render(renderer, row, prompt=False)))
    bpe.train_from_iterator(pieces, trainer)
    tokenizer = _wrap(bpe)
    if len(tokenizer) != vocab_size:
        raise ValueError(f"the corpus gives {len(tokenizer)} tokens, expected {vocab_size}: use a smaller vocab_size")
    return tokenizer


def render(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], *, prompt: bool) -> str:
    """The row's `messages` and `tools` as text; a prompt ends where the assistant begins."""
    text = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], add_generation_prompt=prompt, tokenize=False)
    assert isinstance(text, str), f"expected rendered text, found {type(text)}"
    return text


def _wrap(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """With added tokens and chat template. Markers are not special: a decoded answer keeps its <tool_call>."""
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    bpe.add_tokens([AddedToken(token, normalized=False) for token in MARKER_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )
