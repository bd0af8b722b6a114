"""Whether a model is served as it was trained: log-probabilities out of vLLM beside those of the reference in plain torch.

In:  a model's folder (an INT8 export or a float one), how to serve it, token sequences.
Out: `ServingReport`, and what in it is beyond the gates.

Engine and reference live in processes of their own, two Ray tasks: vLLM changes torch for its whole process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayTaskError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from raykd.evaluation.serving_report import Floor, Referred, Served, ServingReport, compare
from raykd.student.int8_files import int8_names, int8_section, is_int8, load_int8_reference
from raykd.student.quantization import StoredInt8Linear
from teacher_serving.config import SamplingConfig, VllmTeacherConfig
from teacher_serving.connect import connect, cpu_environment, resolve_device
from teacher_serving.identity import context_limit

GREEDY_TOKENS = 32
"""Tokens that the engine writes to each sequence's first half."""
BLACKWELL = 10
"""Compute capability from which vLLM has no INT8 kernels (W8A8)."""


class ServingError(ValueError):
    """The model cannot be checked or served so."""


def check_serving(
    engine: VllmTeacherConfig, sequences: Sequence[np.ndarray], *, float_folder: Path | None = None
) -> ServingReport:
    """Serve the folder `engine.model` with vLLM and compare it with its reference; needs a Ray cluster.

    Args:
        engine: how to serve; its `dtype` is that of both sides.
        sequences: int arrays [T] of token ids; log-probabilities of all but their first token are compared.
        float_folder: the same model in float, to go with an INT8 one in bfloat16: what two engines differ by there.

    Errors: ServingError when the folder cannot be served so, or not compared.
    """
    folder = Path(engine.model)
    check_engine(engine, sequences)
    if is_int8(folder) and engine.dtype == "bfloat16" and float_folder is None:
        raise ServingError(f"{folder} in bfloat16: found no float twin to compare with, name its float_folder")
    report = compare(*_both(engine, sequences), int8_names(folder), engine.dtype)
    if float_folder is None or engine.dtype == "float32" or not is_int8(folder):
        return report
    twin = engine.model_copy(update={"model": str(float_folder)})
    floor = compare(*_both(twin, sequences), [], engine.dtype)
    return replace(report, floor=Floor(floor.mean, floor.p99))


def check_engine(engine: VllmTeacherConfig, sequences: Sequence[np.ndarray]) -> None:
    """Refuse before anything loads what could not be compared."""
    folder, longest = Path(engine.model), max(map(len, sequences), default=0)
    if min(map(len, sequences), default=0) < 2:
        raise ServingError(f"found {len(sequences)} sequences, expected some, each of 2 tokens or more")
    if 0 < (limit := engine.max_model_len or context_limit(folder)) <= longest:  # 0: not said
        raise ServingError(f"a sequence has {longest} tokens, expected fewer than the {limit} that the engine holds")
    if engine.dtype not in ("float32", "bfloat16"):
        raise ServingError(f"found dtype={engine.dtype}, expected float32 or bfloat16, the type of both sides")
    if not is_int8(folder):
        return
    if engine.dtype != (trained := int8_section(folder)["forward_dtype"]):
        raise ServingError(f"found dtype={engine.dtype} for an INT8 model that was trained in {trained}: serve it in that")
    shards = int8_section(folder)["activation_shards"]
    if engine.tensor_parallel_size != shards:
        raise ServingError(
            f"tensor_parallel_size={engine.tensor_parallel_size} for an INT8 model with activation_shards={shards}: every "
            "shard of a layer's input has a scale of its own, so that it is served as trained only where the two are equal; "
            "train with quantization.activation_shards of the server"
        )


def require_int8_device(capability: tuple[int, int]) -> None:
    """Refuse GPUs without INT8 kernels. `capability`: as torch.cuda.get_device_capability says it."""
    if capability[0] >= BLACKWELL:
        raise ServingError(
            f"found a GPU of compute capability {capability[0]}.{capability[1]}: vLLM has INT8 kernels (W8A8) from Turing "
            f"to Hopper, below {BLACKWELL}.0; serve a bfloat16 export there, or the INT8 one elsewhere"
        )


# --- engine and reference, each in a process of its own -------------------------------------------------------------------


def _both(engine: VllmTeacherConfig, sequences: Sequence[np.ndarray]) -> tuple[Served, Referred]:
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    engine = resolve_device(with_greedy_writing(engine), has_gpu=has_gpu)
    if engine.device == "cuda" and engine.dtype == "float32" and is_int8(Path(engine.model)):
        raise ServingError(
            "found a GPU for an INT8 model trained in float32: vLLM's INT8 kernels on GPUs put out bfloat16 only; train "
            "with train.precision=bfloat16, or check on the CPU (device: cpu)"
        )
    environment = {"PYTHONWARNINGS": "ignore", **(cpu_environment(engine) if engine.device == "cpu" else {})}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the kernels are asked for in this process
    resources: dict[str, Any] = {"num_cpus": engine.num_cpus, "num_gpus": engine.gpus_per_actor}
    task = ray.remote(serve).options(**resources, max_retries=0, runtime_env={"env_vars": environment})
    served = get_result(task.remote(engine, list(sequences)))
    reference = ray.remote(refer).options(num_cpus=engine.num_cpus, max_retries=0)
    own = reference.remote(engine.model, engine.dtype, list(sequences), served.written, engine.num_threads)
    return served, get_result(own)


def with_greedy_writing(engine: VllmTeacherConfig) -> VllmTeacherConfig:
    """The engine's settings for a check: it writes greedily and never ends early, and records no top-k."""
    changes = {"sampling": SamplingConfig(max_tokens=GREEDY_TOKENS, stop_token_ids=()), "top_k": 1, "hidden_layers": ()}
    return VllmTeacherConfig.model_validate(engine.model_dump() | changes)


def serve(engine: VllmTeacherConfig, sequences: list[np.ndarray]) -> Served:
    """Task: what vLLM says. Raises ServingError for a row that comes back without an answer."""
    from teacher_serving.vllm_kernels import layer_kernels  # imports vllm, which belongs in this process alone

    if engine.device == "cuda" and is_int8(Path(engine.model)):
        require_int8_device(torch.cuda.get_device_capability())
    teacher: Any = connect(engine)
    uids = pa.array(range(len(sequences)), pa.int64())
    given = {"prompt_ids": [row[:1] for row in sequences], "output_ids": [row[1:] for row in sequences]}
    scored = teacher.score(pa.table({"uid": uids, **{name: _ids(rows) for name, rows in given.items()}}))
    written = teacher.generate(pa.table({"uid": uids, "prompt_ids": _ids([row[: half(row)] for row in sequences])}))
    for reason in [*scored["finish_reason"].to_pylist(), *written["finish_reason"].to_pylist()]:
        if reason.startswith("error"):
            raise ServingError(f"a sequence came back without an answer: {reason}")
    kernels = layer_kernels(teacher)
    teacher.close()
    logprobs = [row.values.to_numpy() for row in scored["sampled_logprob"]]
    return Served(logprobs, [row.values.to_numpy() for row in written["output_ids"]], kernels)


def _ids(rows: list[np.ndarray]) -> pa.Array:
    return pa.array(rows, pa.list_(pa.int32()))


def half(sequence: np.ndarray) -> int:
    """How much of a sequence is the prompt of what the engine writes."""
    return max(1, len(sequence) // 2)


def refer(folder: str, dtype: str, sequences: list[np.ndarray], written: list[np.ndarray], num_threads: int) -> Referred:
    """Task: what the reference says. Sets the number of torch threads of its process."""
    torch.set_num_threads(num_threads)
    disable_progress_bar()
    if not is_int8(Path(folder)):
        return scores_of(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), sequences, written)
    model = load_int8_reference(Path(folder))
    referred = scores_of(model, sequences, written)
    if model.dtype != torch.float32:
        return referred
    with _noise_in_the_last_bit(model):
        shaken = scores_of(model, sequences, written)
    difference = np.abs(np.concatenate(shaken.logprobs) - np.concatenate(referred.logprobs))
    return replace(referred, floor=Floor(float(difference.mean()), float(np.quantile(difference, 0.99))))


@contextlib.contextmanager
def _noise_in_the_last_bit(model: PreTrainedModel) -> Iterator[None]:
    """Within: what the INT8 layers of a reference read differs by about one rounding of a float, as in another engine."""
    generator = torch.Generator().manual_seed(0)

    def shake(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (x,) = inputs
        return (x * (1 + torch.finfo(x.dtype).eps / 2 * torch.randn(x.shape, generator=generator)),)

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, StoredInt8Linear):
                stack.callback(module.register_forward_pre_hook(shake).remove)
        yield


@torch.inference_mode()
def scores_of(model: PreTrainedModel, sequences: Sequence[np.ndarray], written: Sequence[np.ndarray]) -> Referred:
    """A model's own view of the sequences and of what the engine wrote to their first halves, one at a time."""
    logprobs, agrees = [], []
    for sequence, continuation in zip(sequences, written, strict=True):
        ids = torch.from_numpy(np.asarray(sequence, np.int64))
        own = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)
        logprobs.append(own.gather(1, ids[1:, None])[:, 0].numpy())
        whole = torch.from_numpy(np.concatenate([sequence[: half(sequence)], continuation]).astype(np.int64))
        likely = model(input_ids=whole[None], use_cache=False).logits[0, half(sequence) - 1 : -1].argmax(dim=-1)
        agrees.append((likely == whole[half(sequence) :]).numpy())
    return Referred(logprobs, agrees)


def get_result(reference: Any) -> Any:
    """ray.get, with a user's mistake as the ValueError that it is."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ValueError) else error) from None
