"""VllmEngine against HfEngine, and what an engine does with rows that cannot be answered. One vLLM engine for all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from teacher_serving.arrow import Answer, split_columns
from teacher_serving.config import HfTeacherConfig, RequestConfig, SamplingConfig, VllmTeacherConfig
from teacher_serving.connect import connect
from teacher_serving.faults import Fault
from teacher_serving.hf_engine import HfEngine
from teacher_serving.types import TEACHER_OUTPUT_SCHEMA, TeacherDeadError
from teacher_serving.vllm_engine import VllmEngine

pytestmark = pytest.mark.vllm

CONTEXT = 512
SOMETIMES_STOP = tuple(range(0, 1000, 9))  # a random model never writes its real end token


def options(model: Path, **changes) -> dict:
    sampling = SamplingConfig(max_tokens=24, stop_token_ids=SOMETIMES_STOP)
    common = {"model": str(model), "dtype": "float32", "device": "cpu", "max_model_len": CONTEXT, "max_num_seqs": 16}
    return {**common, "top_k": 64, "sampling": sampling, **changes}


@pytest.fixture(scope="module")
def engine(tiny_model_path: Path) -> Iterator[VllmEngine]:
    """The one vLLM engine of this file, in this process."""
    engine = connect(VllmTeacherConfig(**options(tiny_model_path)))
    assert isinstance(engine, VllmEngine)
    yield engine
    engine.close()
    engine.close()  # idempotent
    with pytest.raises(TeacherDeadError, match="closed"):
        engine.generate(prompts(engine, 1))


@pytest.fixture
def adapt(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., VllmEngine]:
    """The engine with some of its options changed for one test (all but those that vLLM was started with)."""

    def change(**changes) -> VllmEngine:
        monkeypatch.setattr(engine, "_config", engine._config.model_copy(update=changes))
        return engine

    return change


def reference(engine: VllmEngine) -> HfEngine:
    """Plain transformers with the options the vLLM engine has now."""
    shared = HfTeacherConfig.model_fields.keys() - {"kind"}
    hf = connect(HfTeacherConfig(**{name: getattr(engine._config, name) for name in shared}))
    assert isinstance(hf, HfEngine)
    return hf


def prompts(engine: VllmEngine, num_rows: int, *, seed: int = 0, shortest: int = 1, longest: int = 40) -> pa.Table:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(shortest, longest, num_rows, endpoint=True)
    ids = [generator.integers(0, engine.info.vocab_size, length, dtype=np.int32) for length in lengths]
    return pa.table({"uid": np.arange(num_rows), "prompt_ids": pa.array(ids, pa.list_(pa.int32()))})


def arrays(answers: list[Answer], top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Top-k ids, log-probabilities and sampled log-probability of all tokens, in full precision."""
    pieces = [piece for answer in answers for piece in answer.pieces]
    output_ids = np.concatenate([answer.output_ids for answer in answers])
    ids, logprobs = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return split_columns(ids, logprobs, output_ids, top_k)


def assert_agree(found: list[Answer], expected: list[Answer], top_k: int) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.finish_reason == b.finish_reason
        assert a.output_ids.tolist() == b.output_ids.tolist()
    found_ids, found_logprobs, found_sampled = arrays(found, top_k)
    expected_ids, expected_logprobs, expected_sampled = arrays(expected, top_k)
    np.testing.assert_allclose(found_logprobs, expected_logprobs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(found_sampled, expected_sampled, atol=1e-4, rtol=0)
    # Ids may differ only where two tokens are as good as tied.
    gaps = np.abs(np.diff(expected_logprobs, axis=1, append=-np.inf))
    tied = (gaps < 1e-4) | (np.roll(gaps, 1, axis=1) < 1e-4)
    tied[:, -1] |= found_ids[:, -1] != expected_ids[:, -1]  # with the token just outside
    assert (found_ids == expected_ids)[~tied].all()
    assert (found_ids == expected_ids).mean() > 0.99


@pytest.mark.parametrize("top_k", [1, 5, 64])
def test_both_engines_agree_on_what_they_write_and_on_what_they_are_given(adapt, top_k: int):
    engine = adapt(top_k=top_k)
    hf = reference(engine)
    asked = prompts(engine, 24)
    written = engine.generate_answers(asked)
    assert {answer.finish_reason for answer in written} == {"stop", "length"}
    assert_agree(written, hf.generate_answers(asked), top_k)
    given = asked.append_column("output_ids", prompts(engine, 24, seed=1, longest=60)["prompt_ids"])
    assert_agree(engine.score_answers(given), hf.score_answers(given), top_k)


def test_a_row_may_have_a_limit_of_its_own(engine: VllmEngine):
    asked = prompts(engine, 4)
    limited = asked.append_column("max_tokens", pa.array([1, 2, 3, 24], pa.int32()))
    whole, cut = engine.generate_answers(asked), engine.generate_answers(limited)
    for answer, part, limit in zip(whole, cut, (1, 2, 3, 24), strict=True):
        assert part.output_ids.tolist() == answer.output_ids[:limit].tolist()
    assert_agree(cut, reference(engine).generate_answers(limited), top_k=64)


def test_requests_with_settings_of_their_own_share_the_batch(engine: VllmEngine):
    """What a shared teacher does: each client's K, sampling and context, whatever runs beside it."""
    own = [
        RequestConfig(top_k=3, sampling=SamplingConfig(max_tokens=9, stop_token_ids=())),
        RequestConfig(top_k=64, sampling=SamplingConfig(max_tokens=40, stop_token_ids=())),
        RequestConfig(top_k=5, sampling=SamplingConfig(max_tokens=40, stop_token_ids=()), max_model_len=48),
    ]
    asked = prompts(engine, 12)
    hf = reference(engine)
    with ThreadPoolExecutor() as threads:
        written = list(threads.map(lambda request: engine.generate_answers(asked, request), own))
    for request, answers in zip(own, written, strict=True):
        assert_agree(answers, hf.generate_answers(asked, request), request.top_k)
    given = asked.append_column("output_ids", prompts(engine, 12, seed=1, longest=60)["prompt_ids"])
    found, expected = engine.score_answers(given, own[2]), hf.score_answers(given, own[2])
    assert [answer.finish_reason for answer in found] == [answer.finish_reason for answer in expected]
    assert len({answer.finish_reason for answer in found}) > 1  # some are longer than this request's context
    fitting = [row for row, answer in enumerate(found) if answer.finish_reason == "given"]
    assert_agree([found[row] for row in fitting], [expected[row] for row in fitting], 5)


def test_scoring_what_was_written_gives_the_same_numbers(engine: VllmEngine):
    written = engine.generate(prompts(engine, 8))
    scored = engine.score(written.select(["uid", "prompt_ids", "output_ids"]))
    assert written.schema.equals(TEACHER_OUTPUT_SCHEMA)
    assert scored.schema.equals(TEACHER_OUTPUT_SCHEMA)
    assert set(scored["finish_reason"].to_pylist()) == {"given"}
    for name in ("topk_logprobs", "log_tail", "sampled_logprob"):
        a, b = (table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for table in (written, scored))
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=1e-2 if "topk" in name else 1e-4)


def test_kept_arrays_and_vllms_flat_lists_are_the_same_table(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch):
    assert engine._keeps_arrays, "this vLLM version is not known to the array path"
    asked = prompts(engine, 8)
    kept = engine.generate(asked)
    given = kept.select(["uid", "prompt_ids", "output_ids"])
    kept_scores = engine.score(given)
    monkeypatch.setattr(engine, "_keeps_arrays", False)
    assert engine.generate(asked).equals(kept)
    assert engine.score(given).equals(kept_scores)


def test_what_is_sampled_depends_on_uid_and_seed_and_not_on_the_batch(adapt):
    engine = adapt(sampling=SamplingConfig(temperature=1.0, max_tokens=16, stop_token_ids=()))
    same_prompt = pa.table({"uid": np.arange(6), "prompt_ids": [[5, 6, 7]] * 6})
    together = engine.generate(same_prompt)["output_ids"].to_pylist()
    alone = [engine.generate(same_prompt.slice(row, 1))["output_ids"][0].as_py() for row in range(6)]
    assert together == alone
    assert len({tuple(ids) for ids in together}) == 6
    engine = adapt(sampling=SamplingConfig(temperature=1.0, max_tokens=16, stop_token_ids=(), seed=1))
    assert engine.generate(same_prompt)["output_ids"].to_pylist() != together


def test_a_long_sequence_does_not_hold_back_a_short_one(adapt):
    engine = adapt(sampling=SamplingConfig(max_tokens=120, stop_token_ids=()))
    long_prompt = prompts(engine, 1, longest=1)
    short_prompt = prompts(engine, 1, shortest=CONTEXT - 4, longest=CONTEXT - 4)  # full after a few tokens
    order: list[str] = []

    def write_long() -> None:
        table = engine.generate(long_prompt)
        order.append(f"long {len(table['output_ids'][0])}")

    thread = threading.Thread(target=write_long)
    thread.start()
    while not engine._running:
        time.sleep(0.001)
    short = engine.generate(short_prompt)
    order.append("short")
    thread.join()
    assert len(short["output_ids"][0]) == 4
    assert order == ["short", "long 120"]


def test_rows_that_cannot_be_asked_are_error_rows_and_the_others_go_on(engine: VllmEngine):
    vocab_size = engine.info.vocab_size
    ids = [[1, 2, 3], [], [1] * CONTEXT, [vocab_size], [4, 5]]
    asked = pa.table({"uid": [10, 11, 12, 13, 14], "prompt_ids": pa.array(ids, pa.list_(pa.int32()))})
    table = engine.generate(asked)
    reasons = table["finish_reason"].to_pylist()
    assert table["uid"].to_pylist() == [10, 11, 12, 13, 14]
    assert [reason.startswith("error: ") for reason in reasons] == [False, True, True, True, False]
    assert [len(ids) > 0 for ids in table["output_ids"].to_pylist()] == [True, False, False, False, True]
    assert "empty" in reasons[1]
    assert "context" in reasons[2]
    assert "vocabulary" in reasons[3]
    nothing_given = asked.append_column("output_ids", pa.array([[], [1], [1], [1], [2]], pa.list_(pa.int32())))
    scored = engine.score(nothing_given)
    assert [reason[:5] for reason in scored["finish_reason"].to_pylist()] == ["given", "error", "error", "error", "given"]
    assert [len(ids) for ids in scored["output_ids"].to_pylist()] == [0, 0, 0, 0, 1]


def test_the_context_is_usable_to_its_last_token(engine: VllmEngine):
    ids = np.arange(CONTEXT, dtype=np.int32) % engine.info.vocab_size
    full = pa.table({"uid": [0], "prompt_ids": [ids[:5]], "output_ids": [ids[5:]]})
    assert_agree(engine.score_answers(full), reference(engine).score_answers(full), 64)
    engine.probe()


def test_a_late_request_is_given_up_and_the_engine_goes_on(adapt):
    endless = SamplingConfig(max_tokens=24, stop_token_ids=())
    engine = adapt(request_timeout_s=1e-9, sampling=endless)
    table = engine.generate(prompts(engine, 3))
    assert all("request_timeout_s" in reason for reason in table["finish_reason"].to_pylist())
    assert not engine._engine.has_unfinished_requests()
    engine = adapt(request_timeout_s=600.0)
    assert not any("error" in reason for reason in engine.generate(prompts(engine, 3))["finish_reason"].to_pylist())


def test_a_prompt_that_returns_nothing_is_asked_again_and_then_counted(engine: VllmEngine, monkeypatch, tmp_path: Path):
    asked = prompts(engine, 3)
    undisturbed = engine.generate(asked)
    monkeypatch.setattr(engine, "_empty_fault", Fault("teacher", "empty", "uid", 1, tmp_path / "struck"))
    assert engine.generate(asked).equals(undisturbed)
    assert (tmp_path / "struck").exists()
    monkeypatch.setattr(engine, "_empty_fault", Fault("teacher", "empty", "uid", 1))
    reasons = engine.generate(asked)["finish_reason"].to_pylist()
    assert reasons[1] == "error: the teacher returned nothing"
    assert not any("error" in reason for reason in (reasons[0], reasons[2]))


def test_calls_from_many_threads_get_their_own_rows(engine: VllmEngine):
    asked = prompts(engine, 24, seed=3)
    expected = engine.generate(asked)
    parts: dict[int, pa.Table] = {}
    threads = [
        threading.Thread(target=lambda at=at: parts.update({at: engine.generate(asked.slice(at, 3))}))
        for at in range(0, 24, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = pa.concat_tables([parts[at] for at in sorted(parts)])
    for name in ("uid", "output_ids", "finish_reason"):
        assert found[name].to_pylist() == expected[name].to_pylist()


@pytest.mark.parametrize("sampling", [{"sample_top_k": 1}, {"top_p": 1e-6}])
def test_sampling_from_the_best_token_alone_is_greedy_in_both_engines(adapt, sampling: dict):
    engine = adapt(sampling=SamplingConfig(max_tokens=8, stop_token_ids=()))
    asked = prompts(engine, 4)
    greedy = engine.generate(asked)["output_ids"].to_pylist()
    engine = adapt(sampling=SamplingConfig(max_tokens=8, stop_token_ids=(), temperature=1.0, **sampling))
    assert engine.generate(asked)["output_ids"].to_pylist() == greedy
    assert reference(engine).generate(asked)["output_ids"].to_pylist() == greedy
