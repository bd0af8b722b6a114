"""Several teachers as one: who answers what, and what cannot be put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from raykd.cli import ConfigError, load_config
from teacher_serving.config import SeveralTeachersConfig
from teacher_serving.connect import connect, contact
from teacher_serving.identity import describe
from teacher_serving.several import teacher_for
from tests.completion_server import TOPS, completion, completion_server

MATH = {"kind": "http", "address": "http://h/v1", "model": "m"}
CODE = {"kind": "served", "app": "code"}
SWAPPED = {
    "token_ids": [222, 212],
    "logprobs": {
        "tokens": ["token_id:222", "token_id:212"],
        "token_logprobs": [TOPS[1]["token_id:222"], TOPS[0]["token_id:212"]],
        "top_logprobs": TOPS[::-1],
    },
}
"""The recorded completion with its two tokens in the other order."""


def several(tokenizer: str = "t", **options: Any) -> SeveralTeachersConfig:
    return SeveralTeachersConfig.model_validate({"tokenizer": tokenizer, "teachers": {"math": MATH, "code": CODE}} | options)


def test_prompts_that_name_nobody_are_dealt_out_by_the_weights_and_always_alike():
    weights = {"math": 2.0, "code": 1.0, "named alone": 0.0, "art": 1.0}
    dealt = [teacher_for(uid, weights, seed=0) for uid in range(20_000)]
    for name, weight in weights.items():  # within four standard deviations of the binomial
        share = weight / 4.0
        assert abs(dealt.count(name) / 20_000 - share) <= 4 * (share * (1 - share) / 20_000) ** 0.5, name
    assert dealt[:8] == ["math", "math", "math", "code", "math", "math", "art", "code"]  # on any machine
    assert dealt == [teacher_for(uid, dict(reversed(weights.items())), seed=0) for uid in range(20_000)]
    assert dealt != [teacher_for(uid, weights, seed=1) for uid in range(20_000)]
    heavier = [teacher_for(uid, weights | {"code": 2.0}, seed=0) for uid in range(20_000)]
    assert {new for old, new in zip(dealt, heavier, strict=True) if old != new} == {"code"}


def test_each_teacher_is_one_alone_with_what_all_have_in_common():
    config = several(top_k=5, sampling={"max_tokens": 7}, num_replicas=2, batch_size=3, max_model_len=99)
    math, code = config.config_of("math"), config.config_of("code")
    assert (math.kind, math.model, code.kind, code.app) == ("http", "m", "served", "code")  # type: ignore[union-attr]
    for name, own in (("math", math), ("code", code)):
        assert (own.teacher_id, own.tokenizer, own.top_k, own.sampling.max_tokens) == (name, "t", 5, 7)
        assert (own.num_replicas, own.batch_size, own.max_model_len, own.max_retries) == (2, 3, 99, 6)
    assert SeveralTeachersConfig.model_validate(config.model_dump()) == config
    keyed = several(teachers={"math": MATH | {"api_key_env": "KEY"}, "code": MATH | {"api_key_env": "KEY", "weight": 3}})
    assert (keyed.api_key_names, keyed.weights) == (("KEY",), {"math": 1.0, "code": 3.0})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teachers": {"math": MATH}}, "at least 2 items"),
        ({"teachers": {"math": MATH | {"weight": 0}, "code": CODE | {"weight": 0}}}, "expected one above 0"),
        ({"teachers": {"math": MATH, "code": CODE | {"address": "http://h"}}}, "expected one of the two"),
        ({"teachers": {"math": MATH, "code": {"kind": "vllm", "model": "m"}}}, "does not match any of the expected tags"),
        ({"teachers": {"math": MATH | {"top_k": 3}, "code": CODE}}, "Extra inputs are not permitted"),
        ({"top_k": 0}, "teachers.code: top_k: Input should be greater than or equal to 1"),
        ({"weight_version": "2"}, "teachers.code: Value error, weight_version=2 with kind: served has no effect"),
        ({"max_retries": 3}, "max_retries=3 with kind: several has no effect"),
    ],
)
def test_teachers_that_cannot_be_put_together_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        several(**options)


def test_a_wrong_option_is_named_by_its_path(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "teacher: {kind: several, tokenizer: t, teachers: {math: {kind: served, ap: a}, code: {kind: served, app: b}}}\n"
        "student: {model: s}\ndata: {prompts: p.jsonl}\n"
    )
    with pytest.raises(ConfigError, match=r"a.yaml: teacher.teachers.math.ap: no such option; did you mean 'app'\?"):
        load_config([file])


def test_rows_go_to_the_teacher_that_they_are_for_and_come_back_in_order(tiny_model_path: Path, tmp_path: Path):
    with completion_server() as math, completion_server() as code:
        code.answer = lambda body: completion(**SWAPPED)
        teachers = {
            name: MATH | {"address": server.address, "model": "tiny"} for name, server in (("math", math), ("code", code))
        }
        config = several(str(tiny_model_path), teachers=teachers, top_k=3, sampling={"max_tokens": 8})
        assert contact(config, describe(config), scoring=False) == "; ".join(
            f"{name}: tiny at {server.address} gives top-3" for name, server in (("math", math), ("code", code))
        )
        teacher = connect(config, ledger=tmp_path / "spent.txt")
        before = len(math.asked), len(code.asked)
        names = ["math", "code", "code", "math", "code"]
        rows = pa.table({"uid": range(5), "prompt_ids": [[9, uid] for uid in range(5)], "for_teacher": names})
        answers = teacher.generate(rows)
        alone = {name: connect(config.config_of(name)) for name in teachers}
        expected = [alone[name].generate(rows.slice(row, 1)) for row, name in enumerate(names)]
        assert answers["uid"].to_pylist() == [0, 1, 2, 3, 4]
        assert answers["teacher_id"].to_pylist() == names
        assert answers["output_ids"].to_pylist() == [[212, 222] if name == "math" else [222, 212] for name in names]
        assert answers.drop_columns("teacher_fingerprint").equals(
            pa.concat_tables(expected).drop_columns("teacher_fingerprint").combine_chunks()
        )
        assert set(answers["teacher_fingerprint"].to_pylist()) == {teacher.info.fingerprint}
        assert teacher.generate(rows.slice(0, 0)).num_rows == 0
        assert (len(math.asked) - before[0], len(code.asked) - before[1]) > (2, 3)
        assert [len((tmp_path / f"spent-{name}.txt").read_text().splitlines()) for name in teachers] == [2, 3]
        for one in (teacher, *alone.values()):
            one.close()


def test_the_fingerprint_is_that_of_all_and_of_no_weight(tiny_model_path: Path):
    def fingerprint(**changes: dict[str, Any]) -> str:
        teachers = {name: MATH | changes.get(name, {}) for name in ("math", "code")}
        return describe(several(str(tiny_model_path), teachers=teachers, max_model_len=64)).fingerprint

    assert fingerprint() == fingerprint(math={"weight": 5, "address": "http://other/v1"})
    assert fingerprint() != fingerprint(code={"model": "another"})
    assert fingerprint(math={"model": "a"}, code={"model": "b"}) != fingerprint(math={"model": "b"}, code={"model": "a"})
