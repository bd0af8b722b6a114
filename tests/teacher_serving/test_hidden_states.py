"""Hidden states that the transformers teacher ships: the right layers, every token, kept on the way to an Example."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raykd.data.cache import TeacherCache
from raykd.data.collate import collate_kd_batch
from raykd.data.examples import build_examples, example_from_row
from raykd.losses.full import full_kd_loss, full_kd_states, full_kd_weight
from raykd.student.teacher_head import load_teacher_head
from teacher_serving.config import HfTeacherConfig, SamplingConfig
from teacher_serving.connect import connect
from teacher_serving.hf_engine import HfEngine
from teacher_serving.identity import describe, state_bytes_per_token

LAYERS = (0, 1)
HIDDEN = 64


def options(model: Path, **changes) -> HfTeacherConfig:
    sampling = SamplingConfig(max_tokens=6, stop_token_ids=tuple(range(0, 1000, 9)))
    common = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "top_k": 5, "hidden_layers": LAYERS}
    return HfTeacherConfig(**{"model": str(model), "sampling": sampling, **common, **changes})


@pytest.fixture(scope="module")
def engine(tiny_model_path: Path) -> HfEngine:
    engine = connect(options(tiny_model_path))
    assert isinstance(engine, HfEngine)
    return engine


@pytest.fixture(scope="module")
def prompts() -> pa.Table:
    ids = [[5, 6, 7, 8], [9], [], [10, 11]]  # the third cannot be answered
    return pa.table({"uid": [3, 1, 2, 4], "prompt_ids": pa.array(ids, pa.list_(pa.int32()))})


@pytest.fixture(scope="module")
def written(engine: HfEngine, prompts: pa.Table) -> pa.Table:
    return engine.generate(prompts)


def flat_states(table: pa.Table) -> np.ndarray:
    return table["hidden_states"].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def reference(model: Path, ids: list[int]) -> tuple[np.ndarray, torch.Tensor]:
    """States [L, T, H] by transformers' own output of hidden states, whose last entry is normed; and the logits."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        out = whole(input_ids=torch.tensor([ids]), output_hidden_states=True)
    normed = out.hidden_states[-1]
    return torch.stack([out.hidden_states[1][0], normed[0]]).numpy(), out.logits[0]


def test_every_token_but_the_last_has_the_output_of_the_named_layers(written: pa.Table, tiny_model_path: Path):
    norm = load_teacher_head(tiny_model_path).norm
    for row in written.to_pylist():
        if row["finish_reason"].startswith("error"):
            assert (row["num_hidden_layers_shipped"], row["hidden_states"]) == (0, [])
            continue
        ids = row["prompt_ids"] + row["output_ids"]
        states = np.array(row["hidden_states"], np.float32).reshape(len(LAYERS), len(ids), HIDDEN)
        assert row["num_hidden_layers_shipped"] == len(LAYERS)
        expected, _ = reference(tiny_model_path, ids)
        assert np.isnan(states[:, -1]).all()
        np.testing.assert_allclose(states[0, :-1], expected[0, :-1], rtol=1e-3, atol=1e-3)
        with torch.no_grad():  # the last layer's is the one before the final norm
            np.testing.assert_allclose(norm(torch.from_numpy(states[1, :-1])), expected[1, :-1], rtol=5e-3, atol=5e-3)


def test_states_of_given_text_are_those_of_written_text(engine: HfEngine, written: pa.Table):
    answered = written.filter(pa.array([len(ids) > 0 for ids in written["output_ids"].to_pylist()]))
    scored = engine.score(answered.select(["uid", "prompt_ids", "output_ids"]))
    assert scored["num_hidden_layers_shipped"].equals(answered["num_hidden_layers_shipped"])
    np.testing.assert_array_equal(flat_states(scored), flat_states(answered))


def test_without_hidden_layers_nothing_is_shipped(tiny_model_path: Path, prompts: pa.Table, written: pa.Table):
    plain = connect(options(tiny_model_path, hidden_layers=())).generate(prompts)
    assert plain["num_hidden_layers_shipped"].to_pylist() == [0] * 4
    assert plain["hidden_states"].to_pylist() == [[]] * 4
    others = [name for name in plain.column_names if "hidden" not in name and name != "teacher_fingerprint"]
    assert plain.select(others).equals(written.select(others))


def test_states_out_of_half_precisions_range_stay_finite(engine: HfEngine):
    engine._keep_output(torch.nn.Identity(), (), torch.tensor([[[1e6, -1e6, 1.0], [0.0, 0.0, 0.0]]]))
    np.testing.assert_array_equal(engine._take_states(), [[[65504.0, -65504.0, 1.0], [np.nan] * 3]])


def test_states_belong_to_who_the_teacher_is(tiny_model_path: Path):
    fingerprints = {describe(options(tiny_model_path, hidden_layers=layers)).fingerprint for layers in ((), (0,), (1,))}
    assert len(fingerprints) == 3
    with pytest.raises(ValueError, match=r"hidden_layers=\[0, 2\].*has 2 layers; expected 0 to 1"):
        describe(options(tiny_model_path, hidden_layers=(0, 2)))
    assert state_bytes_per_token(options(tiny_model_path)) == 2 * 2 * HIDDEN
    assert state_bytes_per_token(options(tiny_model_path, hidden_layers=())) == 0


def test_states_survive_the_cache_and_arrive_in_the_batch(written: pa.Table, tmp_path: Path, tiny_model_path: Path):
    answered = written.filter(pa.array([len(ids) > 0 for ids in written["output_ids"].to_pylist()]))
    cache = TeacherCache(str(tmp_path), answered["teacher_fingerprint"][0].as_py())
    cache.write(answered)
    index = cache.index()
    file, row = index.lookup(answered["uid"].to_numpy())
    back = cache.read([index.files[i] for i in file], row)
    others = [name for name in back.column_names if name != "hidden_states"]
    assert back.select(others).equals(answered.select(others).combine_chunks())
    np.testing.assert_array_equal(flat_states(back), flat_states(answered))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    whole = [(name, pa.array(["[]"] * back.num_rows)) for name in ("messages_json", "tools_json")]
    for name, column in whole:
        back = back.append_column(name, column)
    examples = build_examples(back, tokenizer).examples
    for index, row in enumerate(answered.to_pylist()):
        example = example_from_row(examples, index)
        assert example.teacher_hidden.shape == (len(LAYERS), len(example.input_ids), HIDDEN)
        np.testing.assert_array_equal(example.teacher_hidden.reshape(-1), row["hidden_states"])
    batch = collate_kd_batch(examples, pad_id=0)
    num_states = int(batch.attention_mask.sum()) - examples.num_rows  # the last token of a row has none
    assert batch.teacher_hidden.shape == (len(LAYERS), num_states, HIDDEN)
    # From there norm and head give the teacher's own distribution: its top-k log-probabilities, and no divergence from it.
    norm, weight, _ = load_teacher_head(tiny_model_path)
    with torch.no_grad():
        normed = norm(full_kd_states(batch).float())
        logprobs = (normed @ weight.T).log_softmax(dim=1).gather(1, batch.topk_ids)
        torch.testing.assert_close(logprobs, batch.topk_logprobs, atol=2e-2, rtol=2e-3)
        loss = full_kd_loss(normed, weight, full_kd_states(batch), norm, weight, full_kd_weight(batch))
    assert loss.count == len(batch.response_index)
    assert abs(loss.mean()) < 1e-5


def test_states_of_another_length_are_refused(written: pa.Table, tiny_model_path: Path):
    row = written.slice(0, 1)
    for states in ([1.0] * (HIDDEN * 3 + 1), []):
        place = row.schema.get_field_index("hidden_states")
        broken = row.set_column(place, row.schema.field(place), pa.array([states], pa.list_(pa.float16())))
        (reason,) = build_examples(broken, AutoTokenizer.from_pretrained(tiny_model_path)).rejected["reason"].to_pylist()
        assert "hidden_states has" in reason
