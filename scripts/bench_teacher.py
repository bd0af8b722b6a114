"""Teacher stage against bare vLLM, side by side in one run on one engine: `python scripts/bench_teacher.py [--quick]`.

In:  a model folder (default: the demo teacher), or with --random a 2-layer model of V = 32000 made on the spot, whose
     tokenizer is the cheapest there is to decode; K = 64.
Out: a printed table and bench/teacher.json: microseconds a token from engine output to Arrow, and the rate of the
     teacher stage relative to bare `LLM.generate` with flat, with no and with default log-probabilities.

All cells of a round run one after the other on the same engine and the rounds repeat, so that other load on the
machine meets every cell alike; a ratio is the median over rounds. CPU time is the column to trust on a busy machine.
The bare cells stop at vLLM's own objects: making arrays of them is not charged to them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import pyarrow as pa
import torch
from vllm import LLM, EngineArgs, SamplingParams, TokensPrompt
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists

from teacher_serving import vllm_engine
from teacher_serving.actor import BusyClock, answer_block
from teacher_serving.arrow import Answer, answers_table
from teacher_serving.config import SamplingConfig, VllmTeacherConfig
from teacher_serving.connect import connect
from teacher_serving.types import Teacher, TeacherInfo
from teacher_serving.vllm_arrays import KeptArrays, pieces_of

K = 64
RANDOM_V = 32_000
DEMO_TEACHER = Path(__file__).parents[1] / "raykd" / "demo" / "teacher"
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 32
Cell = Callable[[], int]  # does its work and says how many tokens it was


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds of fewer sequences, about two minutes")
    parser.add_argument("--model", type=Path, default=DEMO_TEACHER)
    parser.add_argument("--random", type=int, metavar="HIDDEN_SIZE", help="a random model instead of --model")
    parser.add_argument("--out", type=Path, default=Path("bench/teacher.json"))
    args = parser.parse_args()
    num_sequences, num_rounds = (128, 3) if args.quick else (256, 7)

    report: dict[str, object] = {"K": K, "model": "random" if args.random else args.model.name}
    report["to_arrow_us_per_token"] = to_arrow()
    print("engine output to Arrow, microseconds of CPU a token:", report["to_arrow_us_per_token"])
    with tempfile.TemporaryDirectory() as folder:
        if args.random:
            save_random_model(Path(folder), args.random)
        teacher, llm, config = start(folder if args.random else str(args.model))
        vocab_size = report["V"] = teacher.info.vocab_size
        for title, cells in (
            ("generate", generate_cells(teacher, llm, config, num_sequences, vocab_size)),
            ("score", score_cells(teacher, llm, config, num_sequences, vocab_size)),
        ):
            report[title] = race(cells, num_rounds)
            print_race(title, report[title])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


# ---- the engine, shared by all cells


def save_random_model(folder: Path, hidden_size: int) -> None:
    """A random Qwen3 with a vocabulary of whole words, the cheapest there is to decode."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=RANDOM_V,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=max(2, hidden_size // 64),
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(RANDOM_V)}, unk_token="w0"))
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)


def start(model: str) -> tuple[vllm_engine.VllmEngine, LLM, VllmTeacherConfig]:
    """The teacher, and a bare LLM around the very same engine (idle while the other works)."""
    config = VllmTeacherConfig(
        model=model,
        top_k=K,
        dtype="float32",
        device="cpu",
        max_model_len=256,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        batch_size=32,
        concurrent_batches=4,
        sampling=SamplingConfig(max_tokens=OUTPUT_TOKENS, stop_token_ids=()),
    )
    engine_args = vllm_engine._engine_args

    def with_tokenizer(config: VllmTeacherConfig, info: TeacherInfo) -> EngineArgs:  # default log-probs are decoded
        return dataclasses.replace(engine_args(config, info), skip_tokenizer_init=False)

    with patch.object(vllm_engine, "_engine_args", with_tokenizer):
        teacher = connect(config)
    assert isinstance(teacher, vllm_engine.VllmEngine)
    with patch.object(LLMEngine, "from_engine_args", lambda *_, **__: teacher._engine):
        llm = LLM(model, max_logprobs=K, dtype="float32", enforce_eager=True)
    return teacher, llm, config


# ---- cells


def run_stage(teacher: Teacher, table: pa.Table, config: VllmTeacherConfig) -> int:
    """What the teacher's actor does as Ray Data calls it: blocks of batch_size, concurrent_batches of them at once."""
    busy = BusyClock()
    blocks = [table.slice(at, config.batch_size) for at in range(0, table.num_rows, config.batch_size)]
    with ThreadPoolExecutor(config.concurrent_batches) as threads:
        answers = list(threads.map(lambda block: answer_block(teacher, block, busy), blocks))
    return sum(len(answer["output_ids"].combine_chunks().flatten()) for answer in answers)


def random_ids(num_sequences: int, length: int, vocab_size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, vocab_size, (num_sequences, length), dtype=np.int32)


def bare_cells(
    llm: LLM, make_rows: Callable[[], np.ndarray], tokens_per_row: int, option: str, settings: dict[str, Any]
) -> dict[str, Cell]:
    """vLLM alone with flat, with no and with default log-probabilities; `option` of SamplingParams asks for them."""

    def bare(more: dict[str, Any]) -> Cell:
        params = SamplingParams(temperature=0.0, **settings, **more)

        def cell() -> int:
            prompts = [TokensPrompt(prompt_token_ids=row.tolist()) for row in make_rows()]
            return len(llm.generate(prompts, params, use_tqdm=False)) * tokens_per_row

        return cell

    flat = {"flat_logprobs": True, "detokenize": False}
    kinds = {"flat": {option: K, **flat}, "logprobs=0": {option: 0, **flat}, "default": {option: K}}
    return {name: bare(more) for name, more in kinds.items()}


def generate_cells(
    teacher: Teacher, llm: LLM, config: VllmTeacherConfig, num_sequences: int, vocab_size: int
) -> dict[str, Cell]:
    """Writing OUTPUT_TOKENS for each prompt; every round has new prompts, so that no cache helps anybody."""
    seeds = iter(range(10**6))

    def prompts() -> np.ndarray:
        return random_ids(num_sequences, PROMPT_TOKENS, vocab_size, next(seeds))

    def ours() -> int:
        table = pa.table({"uid": np.arange(num_sequences), "prompt_ids": list(prompts())})
        return run_stage(teacher, table, config)

    writing = {"max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    return {"actor": ours} | bare_cells(llm, prompts, OUTPUT_TOKENS, "logprobs", writing)


def score_cells(
    teacher: Teacher, llm: LLM, config: VllmTeacherConfig, num_sequences: int, vocab_size: int
) -> dict[str, Cell]:
    """Scoring sequences that are all output but for one token."""
    length = PROMPT_TOKENS + OUTPUT_TOKENS
    seeds = iter(range(10**6, 2 * 10**6))

    def sequences() -> np.ndarray:
        return random_ids(num_sequences, length, vocab_size, next(seeds))

    def ours() -> int:
        rows = sequences()
        columns = {
            "uid": np.arange(num_sequences),
            "prompt_ids": list(rows[:, :1]),
            "recorded_ids": pa.array(list(rows[:, 1:]), pa.list_(pa.int32())),
        }
        return run_stage(teacher, pa.table(columns), config)

    return {"actor": ours} | bare_cells(llm, sequences, length - 1, "prompt_logprobs", {"max_tokens": 1})


# ---- the race


def race(cells: dict[str, Cell], num_rounds: int) -> dict[str, dict[str, float]]:
    """Tokens a second of every cell, and the actor's rate relative to it (medians over rounds), by wall and CPU time."""
    for cell in cells.values():
        cell()  # first touches
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in cells}
    names = list(cells)
    for round_ in range(num_rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = cells[name]()
            rates[name].append((tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)))
    result = {}
    for name in names:
        result[name] = {
            "tokens_per_s": statistics.median(wall for wall, _ in rates[name]),
            "tokens_per_cpu_s": statistics.median(cpu for _, cpu in rates[name]),
            "actor_ratio": statistics.median(a / b for (a, _), (b, _) in zip(rates["actor"], rates[name], strict=True)),
            "actor_ratio_cpu": statistics.median(a / b for (_, a), (_, b) in zip(rates["actor"], rates[name], strict=True)),
        }
    return result


def print_race(title: str, result: object) -> None:
    assert isinstance(result, dict)
    goals = {"flat": 1.0, "logprobs=0": 0.85, "default": 5.0}
    print(f"\n{title:12}{'tokens/s':>10}{'tokens/CPU-s':>14}{'actor/this':>12}{'by CPU time':>13}{'goal':>7}")
    for name, row in result.items():
        goal = f">={goals[name]:g}" if name in goals else ""
        print(
            f"{name:12}{row['tokens_per_s']:10.0f}{row['tokens_per_cpu_s']:14.0f}"
            f"{row['actor_ratio']:12.2f}{row['actor_ratio_cpu']:13.2f}{goal:>7}"
        )


# ---- engine output to Arrow, without an engine


def to_arrow(num_tokens: int = 4096, num_repeats: int = 5) -> dict[str, float]:
    """Microseconds of CPU a token from the engine's step outputs to an Arrow table (ours) or to vLLM's lists."""
    generator = np.random.default_rng(0)
    ids = np.argsort(generator.random((num_tokens, 512)), axis=1)[:, : K + 1].astype(np.int32)
    ids[:, 0] = ids[:, 1]
    logprobs = -np.sort(generator.exponential(3.0, (num_tokens, K + 1)), axis=1).astype(np.float32)
    ranks = np.ones(num_tokens, np.int64)
    steps = [
        SimpleNamespace(
            new_logprobs=LogprobsLists(ids[t : t + 1], logprobs[t : t + 1], ranks[t : t + 1]),
            new_prompt_logprobs_tensors=None,
            prompt_token_id_logprobs=None,
        )
        for t in range(num_tokens)
    ]
    info = TeacherInfo("bench", "", "", RANDOM_V, num_tokens + 8, ())
    rows = pa.table({"uid": [0], "prompt_ids": pa.array([[1]], pa.list_(pa.int32()))})

    def ours() -> None:
        kept = KeptArrays()
        for step in steps:
            kept.update_from_output(step)  # type: ignore[arg-type]  (all of it that is read)
        answers_table(rows, [Answer(ids[:, 0], pieces_of(kept.logprobs, num_tokens, K), "length")], info, K, "0")

    def lists(*, flat: bool) -> Callable[[], None]:
        def cell() -> None:
            params = SamplingParams(logprobs=K, flat_logprobs=flat, detokenize=False)
            request: Any = SimpleNamespace(sampling_params=params)  # all of it that is read
            processor = LogprobsProcessor.from_new_request(None, request)
            for step in steps:
                processor.update_from_output(step)  # type: ignore[arg-type]  (likewise)
            if flat:
                pieces = pieces_of(processor.logprobs, num_tokens, K)
                answers_table(rows, [Answer(ids[:, 0], pieces, "length")], info, K, "0")

        return cell

    cells = {"ours": ours, "flat lists to Arrow": lists(flat=True), "nested, lists alone": lists(flat=False)}
    times: dict[str, list[float]] = {name: [] for name in cells}
    for _ in range(num_repeats):
        for name, cell in cells.items():
            began = time.process_time()
            cell()
            times[name].append((time.process_time() - began) / num_tokens * 1e6)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


if __name__ == "__main__":
    main()
