"""Who a teacher is and what it can deliver, read from its files before any weight is loaded.

In:  a teacher's config, or a tokenizer's folder. (Of a model that runs elsewhere there is the tokenizer's folder alone.)
Out: a TeacherInfo; fingerprints are hex digests.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from teacher_serving.config import (
    HttpTeacherConfig,
    ServedTeacherConfig,
    SeveralTeachersConfig,
    SimulatedTeacherConfig,
    VllmTeacherConfig,
)
from teacher_serving.types import TeacherInfo

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from teacher_serving.config import LocalTeacherConfig, RemoteTeacherConfig

WHOLE_FILE_BYTES = 64 * 2**20
"""Weight files up to this size are hashed whole, larger ones by a sample of every tensor."""
TENSOR_SAMPLE_BYTES = 64 * 2**10
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
MAX_CPU_KV_BYTES = 2 * 2**30
KV_BLOCK_TOKENS = 128
"""Of vLLM on the CPU; a sequence wastes up to one block."""
VOLATILE_CONFIG_KEYS = ("transformers_version", "_name_or_path")
WITH_STATES_IN_VLLM = frozenset(
    {
        "AfmoeForCausalLM",
        "ApertusForCausalLM",
        "Cohere2MoeForCausalLM",
        "DeepseekForCausalLM",
        "Ernie4_5ForCausalLM",
        "Gemma4ForCausalLM",
        "GptOssForCausalLM",
        "GraniteForCausalLM",
        "GraniteSWAForCausalLM",
        "IQuestCoderForCausalLM",
        "InternLM3ForCausalLM",
        "K2HorizonForCausalLM",
        "LLaMAForCausalLM",
        "LagunaForCausalLM",
        "Llama4ForCausalLM",
        "LlamaForCausalLM",
        "MiMoForCausalLM",
        "MiMoV2FlashForCausalLM",
        "MiMoV2ForCausalLM",
        "MiniCPMForCausalLM",
        "MiniMaxM2ForCausalLM",
        "Ministral3ForCausalLM",
        "MistralForCausalLM",
        "NemotronHForCausalLM",
        "NemotronHPuzzleForCausalLM",
        "Phi3ForCausalLM",
        "Plamo3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Step1ForCausalLM",
        "TeleChat2ForCausalLM",
        "TeleChat3ForCausalLM",
        "TeleFLMForCausalLM",
    }
)
"""Architectures whose hidden states vLLM 0.32 can hand out: with its EAGLE-3 interface, without latent attention."""


class FileFingerprints(NamedTuple):
    """Of a model's folder: what its files say, whatever the settings. Seconds for a large model."""

    model: str
    tokenizer: str
    vocabulary: str


def read_fingerprints(config: LocalTeacherConfig) -> FileFingerprints:
    """Those of the folder of this config. Raises ValueError where a file is missing."""
    folder = Path(config.model)
    # Of a simulated teacher no weights are read, and none need be there.
    model = "simulated" if isinstance(config, SimulatedTeacherConfig) else model_fingerprint(folder)
    return FileFingerprints(model, tokenizer_fingerprint(folder), vocabulary_fingerprint(folder))


def describe(
    config: LocalTeacherConfig | HttpTeacherConfig | ServedTeacherConfig | SeveralTeachersConfig,
    files: FileFingerprints | None = None,
) -> TeacherInfo:
    """What the teacher of this config can deliver. `files`: where they have been read already.

    Raises ValueError where the folder or a file of it is missing, where K is larger than the vocabulary, where a
    stop token is outside it, where there is no such hidden layer or the engine cannot ship it, and where the context
    asked for is longer than the model's.
    """
    if isinstance(config, HttpTeacherConfig):
        return _describe_endpoint(config)
    if isinstance(config, ServedTeacherConfig):
        from teacher_serving.served_client import describe_served  # its module needs this one

        return describe_served(config)
    if isinstance(config, SeveralTeachersConfig):
        from teacher_serving.several import describe_several  # likewise

        return describe_several(config)
    folder = Path(config.model)
    text_config = read_text_config(folder)
    vocab_size = int(text_config["vocab_size"])
    if config.top_k > vocab_size:
        raise ValueError(
            f"top_k={config.top_k} is larger than the vocabulary of {folder}: {vocab_size} tokens; "
            f"expected at most {vocab_size}"
        )
    outside = [token for token in config.sampling.stop_token_ids or () if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"sampling.stop_token_ids {outside} are outside the vocabulary of {folder}: {vocab_size} tokens; "
            f"expected 0 to {vocab_size - 1}"
        )
    _check_hidden_layers(config, text_config["num_hidden_layers"])
    model_limit = context_limit(folder)
    if not model_limit and config.max_model_len is None:
        raise ValueError(f"{folder}/config.json has no max_position_embeddings; set max_model_len")
    if model_limit and config.max_model_len is not None and config.max_model_len > model_limit:
        raise ValueError(
            f"max_model_len={config.max_model_len} is longer than the model's {model_limit} ({folder}/config.json); "
            f"expected at most {model_limit}"
        )
    max_model_len = config.max_model_len or model_limit
    settings = {
        "sampling": config.sampling.model_dump(),
        "top_k": config.top_k,
        "dtype": config.dtype,
        "max_model_len": max_model_len,
        "hidden_layers": config.hidden_layers,
        "weight_version": config.weight_version,
    }
    if isinstance(config, SimulatedTeacherConfig):
        settings["response_tokens"] = config.response_tokens
    files = files or read_fingerprints(config)
    return TeacherInfo(
        teacher_id=config.teacher_id or folder.resolve().name,
        fingerprint=_digest(files.model, files.tokenizer, _canonical(settings)),
        vocabulary_fingerprint=files.vocabulary,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=_eos_token_ids(folder, text_config),
    )


def _describe_endpoint(config: HttpTeacherConfig) -> TeacherInfo:
    """What a teacher without files of its own can deliver, by those of its tokenizer. Asks the endpoint for its context
    where the config does not say it.

    The address is no part of the fingerprint: the same model elsewhere is the same teacher.
    """
    folder = Path(config.tokenizer)
    tokenizer = read_tokenizer(folder)
    text_config = read_text_config(folder) if (folder / "config.json").is_file() else {}
    vocab_size = int(text_config.get("vocab_size") or max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1)
    outside = [token for token in config.sampling.stop_token_ids or () if not 0 <= token < vocab_size]
    if outside or config.top_k > vocab_size:
        raise ValueError(
            f"sampling.stop_token_ids {outside} are outside the vocabulary in {folder}, or top_k={config.top_k} is larger: "
            f"it has {vocab_size} tokens"
        )
    max_model_len = config.max_model_len
    if max_model_len is None:
        from teacher_serving.http_client import served_context

        max_model_len = served_context(config)
    settings = {
        "sampling": config.sampling.model_dump(),
        "top_k": config.top_k,
        "max_model_len": max_model_len,
        "weight_version": config.weight_version,
    }
    return TeacherInfo(
        teacher_id=config.teacher_id or config.model.rstrip("/").rpartition("/")[2],
        fingerprint=_digest("http", config.model, tokenizer_fingerprint(folder), _canonical(settings)),
        vocabulary_fingerprint=vocabulary_fingerprint(tokenizer),
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=_eos_token_ids(folder, text_config) or _eos_of_tokenizer(folder, tokenizer),
    )


def _eos_of_tokenizer(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token that tokenizer_config.json says ends a text."""
    path = folder / "tokenizer_config.json"
    token = json.loads(path.read_text()).get("eos_token") if path.is_file() else None
    found = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
    return () if found is None else (found,)


def _check_hidden_layers(config: LocalTeacherConfig, num_layers: int) -> None:
    layers = list(config.hidden_layers)
    if layers and layers[-1] >= num_layers:
        raise ValueError(
            f"hidden_layers={layers}, but {config.model} has {num_layers} layers; expected 0 to {num_layers - 1}"
        )
    architectures = read_model_config(Path(config.model)).get("architectures") or []
    if layers and isinstance(config, VllmTeacherConfig) and not WITH_STATES_IN_VLLM & set(architectures):
        raise ValueError(
            f"hidden_layers={layers} with kind: vllm, which cannot hand out the states of {architectures} ({config.model}), "
            f"only those of {', '.join(sorted(WITH_STATES_IN_VLLM))}; use kind: hf"
        )


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder. Raises ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"no model folder at {folder}; expected a Hugging Face folder with config.json")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; expected a Hugging Face model folder")
    return json.loads(path.read_text())


def read_text_config(folder: Path) -> dict[str, Any]:
    """The language model's part of config.json."""
    model_config = read_model_config(folder)
    return model_config.get("text_config", model_config)


def context_limit(folder: Path) -> int:
    """Positions the model was made for; 0 where its config does not say."""
    return int(read_text_config(folder).get("max_position_embeddings") or 0)


def cpu_kv_cache_bytes(config: LocalTeacherConfig, info: TeacherInfo) -> int:
    """KV cache for max_num_seqs full contexts, within MAX_CPU_KV_BYTES but for two contexts at least.

    On the CPU vLLM would otherwise claim most of the machine's memory.
    """
    element_bytes = 2 if config.dtype in ("float16", "bfloat16") else 4
    token_bytes = kv_bytes_per_token(Path(config.model), element_bytes)
    token_bytes += state_bytes_per_token(config) // 2 * element_bytes  # states are kept next to keys and values
    context_bytes = (info.max_model_len + 2 * KV_BLOCK_TOKENS) * token_bytes
    return max(2 * context_bytes, min(config.max_num_seqs * context_bytes, MAX_CPU_KV_BYTES))


def state_bytes_per_token(config: LocalTeacherConfig | RemoteTeacherConfig) -> int:
    """Bytes of hidden states that are shipped with one token."""
    if not config.hidden_layers:
        return 0
    return 2 * len(config.hidden_layers) * read_text_config(Path(config.tokenizer_folder))["hidden_size"]


def kv_bytes_per_token(folder: Path, element_bytes: int) -> int:
    """Bytes of keys and values that one token takes over all layers."""
    text_config = read_text_config(folder)
    num_heads = text_config["num_attention_heads"]
    head_dim = text_config.get("head_dim") or text_config["hidden_size"] // num_heads
    num_kv_heads = text_config.get("num_key_value_heads") or num_heads
    return 2 * text_config["num_hidden_layers"] * num_kv_heads * head_dim * element_bytes


def vocabulary_fingerprint(source: str | Path | Tokenizer) -> str:
    """Hash of the id-to-token map, special tokens marked: equal for two tokenizers that mean the same by every id.

    `source`: a folder, or a fast tokenizer at hand. Raises ValueError where the folder has no tokenizer.json.
    """
    tokenizer = read_tokenizer(Path(source)) if isinstance(source, str | Path) else source
    tokens = sorted((index, token) for token, index in tokenizer.get_vocab(with_added_tokens=True).items())
    special = sorted(index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    return _digest(_canonical(tokens), _canonical(special))


def read_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer in a folder. Raises ValueError where there is none."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json; expected the folder of a fast tokenizer")
    return Tokenizer.from_file(str(path))


def vocabulary_size(tokenizer: Any) -> int:
    """Ids that a Hugging Face tokenizer knows: one more than its largest. A model's head may have more rows: padding."""
    return _largest_id(tokenizer, len(tokenizer)) + 1


@lru_cache(maxsize=8)
def _largest_id(tokenizer: Any, num_tokens: int) -> int:
    """Of a tokenizer with so many tokens: it may be given more."""
    return max(tokenizer.get_vocab().values())


def tokenizer_fingerprint(folder: Path) -> str:
    """Hash of every file that decides how a conversation becomes token ids, the chat template included."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return _digest(*(part for file in files for part in (file.name.encode(), file.read_bytes())))


def model_fingerprint(folder: Path) -> str:
    """Hash of architecture and weights, in seconds for any size: large files by 64 KiB of every tensor."""
    architecture = {k: v for k, v in read_model_config(folder).items() if k not in VOLATILE_CONFIG_KEYS}
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} has no *.safetensors; expected the weights of a model")
    return _digest(_canonical(architecture), *(_weight_file_digest(file) for file in weights))


def _weight_file_digest(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name}:{size}".encode())
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            digest.update(file.read())
            return digest.digest()
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest.update(header)
        tensors_start = file.tell()
        for name, tensor in json.loads(header).items():
            if name == "__metadata__":
                continue
            begin, end = tensor["data_offsets"]
            # From the middle: a tensor's edges are the likeliest to be untouched (padding, rare tokens).
            middle = begin + max(0, end - begin - TENSOR_SAMPLE_BYTES) // 2
            file.seek(tensors_start + middle)
            digest.update(file.read(min(TENSOR_SAMPLE_BYTES, end - begin)))
    return digest.digest()


def _eos_token_ids(folder: Path, text_config: dict[str, Any]) -> tuple[int, ...]:
    """The generation config's word on where a text ends, else the model config's."""
    generation = folder / "generation_config.json"
    found = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    if found is None:
        found = text_config.get("eos_token_id")
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _digest(*parts: str | bytes) -> str:
    """Hash of the parts, each with its length, so that no two lists of parts run together."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]
