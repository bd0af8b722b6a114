"""Hidden states that vLLM ships are those of HfEngine, and change nothing else. One engine at a time in this process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pytest

from teacher_serving.config import HfTeacherConfig, SamplingConfig, VllmTeacherConfig
from teacher_serving.connect import connect
from teacher_serving.identity import WITH_STATES_IN_VLLM
from teacher_serving.vllm_engine import VllmEngine
from tests.conftest import DEMO_TEACHER

pytestmark = pytest.mark.vllm

LAYERS = (2, 6)  # of 7: one in the middle, and the last, whose output is the state before the final norm
HIDDEN = 128
CONTEXT = 320
BLOCK = 128  # tokens of a block of vLLM's cache on the CPU
NUM_BLOCKS = 14  # one of them is never used; fewer than the prompts below need at once
WITHOUT_STOP = SamplingConfig(max_tokens=40, stop_token_ids=())


def options(**changes) -> dict:
    sampling = SamplingConfig(max_tokens=40, stop_token_ids=tuple(range(0, 1140, 7)))
    common = {"model": str(DEMO_TEACHER), "dtype": "float32", "device": "cpu", "max_model_len": CONTEXT, "top_k": 16}
    # Prefill is cut into chunks of 256 tokens.
    return {**common, "max_num_seqs": 16, "sampling": sampling, **changes}


def small_cache(layers: tuple[int, ...]) -> dict:
    """Options of an engine whose cache runs full: sequences wait, and some are thrown out and computed again."""
    bytes_per_token = (2 * 7 * 4 * 32 + len(layers) * HIDDEN) * 4
    return {
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": NUM_BLOCKS * BLOCK * bytes_per_token,
        "hidden_layers": layers,
    }


@pytest.fixture(scope="module")
def prompts() -> pa.Table:
    """Prompts from one token to all but the context, around the edges of blocks, five of them with the same beginning."""
    generator = np.random.default_rng(0)
    beginning = generator.integers(0, 1140, 150, dtype=np.int32)
    lengths = [1, 2, 17, 100, 110, 120, 126, 127, 128, 129, CONTEXT - 6, CONTEXT - 1]
    ids = [generator.integers(0, 1140, length, dtype=np.int32) for length in lengths]
    ids += [np.concatenate((beginning, generator.integers(0, 1140, 3 + row, dtype=np.int32))) for row in range(5)]
    return pa.table({"uid": np.arange(len(ids)), "prompt_ids": pa.array(ids, pa.list_(pa.int32()))})


@pytest.fixture(scope="module")
def without(prompts: pa.Table) -> tuple[pa.Table, pa.Table]:
    """What an engine that ships no states writes, and its scores of that."""
    engine = connect(VllmTeacherConfig(**options(**small_cache(layers=()))))
    written = engine.generate(prompts)
    scored = engine.score(written.select(["uid", "prompt_ids", "output_ids"]))
    engine.close()
    return written, scored


@pytest.fixture(scope="module")
def engine(without: tuple[pa.Table, pa.Table]) -> Iterator[VllmEngine]:
    """The engine that ships states, started after the other is closed: vLLM has one connector a process."""
    engine = connect(VllmTeacherConfig(**options(**small_cache(LAYERS))))
    assert isinstance(engine, VllmEngine)
    yield engine
    engine.close()


@pytest.fixture
def adapt(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., VllmEngine]:
    """The engine with some of its options changed for one test."""

    def change(**changes) -> VllmEngine:
        monkeypatch.setattr(engine, "_config", engine._config.model_copy(update=changes))
        return engine

    return change


def states_of(table: pa.Table) -> list[np.ndarray]:
    """States [L, P + T, H] of every row."""
    assert table["num_hidden_layers_shipped"].to_pylist() == [len(LAYERS)] * table.num_rows
    rows = zip(*(table[name].to_pylist() for name in ("prompt_ids", "output_ids", "hidden_states")), strict=True)
    return [
        np.array(states, np.float32).reshape(len(LAYERS), len(prompt) + len(output), HIDDEN)
        for prompt, output, states in rows
    ]


def assert_same_states(found: pa.Table, expected: pa.Table) -> None:
    """One unit in the last place of a half apart at most (2^-10 of the value)."""
    for a, b in zip(states_of(found), states_of(expected), strict=True):
        assert np.isnan(a[:, -1]).all()
        assert not np.isnan(a[:, :-1]).any()
        np.testing.assert_allclose(a, b, rtol=2**-10, atol=2**-10)


def test_states_are_those_of_the_other_engine(engine: VllmEngine, prompts: pa.Table, monkeypatch: pytest.MonkeyPatch):
    scheduler = engine._engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
    thrown_out: list[str] = []
    preempt = scheduler._preempt_request

    def count(request, *args, **kwargs):
        thrown_out.append(request.request_id)
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", count)
    hf = connect(HfTeacherConfig(**options(hidden_layers=LAYERS)))
    written = engine.generate(prompts)
    assert thrown_out, "the cache was meant to be too small"
    assert set(written["finish_reason"].to_pylist()) == {"stop", "length"}
    expected = hf.generate(prompts)
    assert written["output_ids"].equals(expected["output_ids"])
    assert_same_states(written, expected)
    assert_same_states(engine.generate(prompts), expected)  # now their beginnings are in the prefix cache
    given = written.select(["uid", "prompt_ids", "output_ids"])
    assert_same_states(engine.score(given), hf.score(given))


def test_text_and_scores_are_those_without_states(engine: VllmEngine, prompts: pa.Table, without: tuple[pa.Table, pa.Table]):
    written = engine.generate(prompts)
    scored = engine.score(written.select(["uid", "prompt_ids", "output_ids"]))
    for found, expected in zip((written, scored), without, strict=True):
        for name in ("output_ids", "finish_reason"):
            assert found[name].equals(expected[name])
        for name in ("topk_logprobs", "log_tail", "sampled_logprob"):
            a, b = (table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for table in (found, expected))
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=1e-3, rtol=2**-10)
        a, b = (table["topk_ids"].combine_chunks().flatten().to_numpy() for table in (found, expected))
        assert (a == b).mean() > 0.999  # but for ties


def test_what_is_sampled_does_not_depend_on_the_batch(adapt: Callable[..., VllmEngine]):
    engine = adapt(sampling=SamplingConfig(temperature=1.0, max_tokens=16, stop_token_ids=tuple(range(0, 1140, 7))))
    same_prompt = pa.table({"uid": np.arange(20), "prompt_ids": [[5]] * 20})  # the last four join a running batch
    together = engine.generate(same_prompt)
    alone = [engine.generate(same_prompt.slice(row, 1)) for row in range(20)]
    assert together["output_ids"].to_pylist() == [table["output_ids"][0].as_py() for table in alone]
    assert len({tuple(ids) for ids in together["output_ids"].to_pylist()}) == 20
    assert_same_states(together, pa.concat_tables(alone))
    assert_same_states(together, engine.score(together.select(["uid", "prompt_ids", "output_ids"])))


def test_a_request_that_is_given_up_leaves_no_block_behind(adapt: Callable[..., VllmEngine], prompts: pa.Table):
    engine = adapt(request_timeout_s=1e-9, sampling=WITHOUT_STOP)
    reasons = engine.generate(prompts)["finish_reason"].to_pylist()
    assert all("request_timeout_s" in reason for reason in reasons)
    engine = adapt(request_timeout_s=600.0, sampling=WITHOUT_STOP)
    short = prompts.slice(0, 3)
    assert_same_states(engine.generate(short), engine.generate(short))
    assert engine._engine.engine_core.engine_core.scheduler.kv_cache_manager.usage == 0  # type: ignore[attr-defined]


def test_rows_that_are_not_answered_have_no_states(engine: VllmEngine):
    ids = [[1, 2], [], [3]]
    asked = pa.table({"uid": [0, 1, 2], "prompt_ids": pa.array(ids, pa.list_(pa.int32()))})
    written = engine.generate(asked)
    given = asked.append_column("output_ids", pa.array([[1], [1], []], pa.list_(pa.int32())))
    for table, shipped in ((written, [2, 0, 2]), (engine.score(given), [2, 0, 0])):
        assert table["num_hidden_layers_shipped"].to_pylist() == shipped
        assert [len(states) > 0 for states in table["hidden_states"].to_pylist()] == [num > 0 for num in shipped]


def test_an_engine_that_does_not_hold_its_model_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match=r"hidden_layers=\[6\].*set VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        connect(VllmTeacherConfig(**options(hidden_layers=(6,))))


def test_vllm_hands_out_the_states_of_the_known_architectures():
    interfaces = importlib.import_module("vllm.model_executor.models.interfaces")
    models = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry.models
    without = {name for name in WITH_STATES_IN_VLLM if not interfaces.supports_eagle3(models[name].load_model_cls())}
    assert not without
    assert not interfaces.supports_eagle3(models["GemmaForCausalLM"].load_model_cls())
