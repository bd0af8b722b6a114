"""A run folder as training and evaluation leave it, made up: for tests of the report."""

import json
import math
from pathlib import Path

from raykd.evaluation.metrics import Estimate, Gold, score_completion
from raykd.evaluation.prompts import JudgedPrompt, JudgedPrompts
from raykd.evaluation.results import Judged, save_results, summarise
from raykd.tracing import Tracer

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"name": "weather", "arguments": {"city": "<b>Köln</b>", "days": 3}}
ASKED = [{"role": "user", "content": "Weather in <b>Köln</b> & <script>alert(1)</script>?"}]
ANSWERED = [
    *ASKED,
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": json.dumps({"temperature": 21.5, "sky": "clear sky"})},
]


def completion(call: dict) -> str:
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def write_metrics(run: Path, num_steps: int = 60) -> None:
    with Tracer(run) as tracer:
        for step in range(1, num_steps + 1, 3):
            decay = math.exp(-step / 20)
            tracer.log(
                step,
                {
                    "loss/total": 2 * decay + 0.1,
                    "loss/kd": 1.5 * decay + 0.05,
                    "loss/tool_name": 0.5 * decay + 0.01,
                    "loss/json_argument": 0.8 * decay + 0.02,
                    "teacher_kl": 1.5 * decay + 0.05,
                    "accuracy/tool_name": 1 - decay,
                    "accuracy/response": 1 - 1.1 * decay if step > 3 else float("nan"),
                    "learning_rate": 1e-3 * decay,
                    "grad_norm": 1 + decay,
                    "speed/student_tokens_per_s": 4000 + 10 * step,
                    "speed/teacher_tokens_per_s": 4100 - 10 * step,
                    "wait/teacher_s": 0.3 * decay,
                    "wait/trainer_s": 0.1,
                    "seconds": 1.2,
                    "response_tokens": 500 * step,
                },
            )
            if step % 15 == 1:
                tracer.log(step, {"validation/loss/kd": 1.6 * decay + 0.06, "validation/teacher_kl": 1.6 * decay + 0.06})
                tracer.log(step, {"validation/halt_auc": 1 - 0.5 * decay, "validation/self_evaluation_ece": 0.2 * decay})


def write_run(run: Path, config) -> None:
    """Metrics, rejected rows, results and completions of a teacher that is right and a student that is half right."""
    write_metrics(run)
    (run / "config.yaml").write_text("run: {name: '<i>made up</i>'}\n", encoding="utf-8")
    rows = [{"file": "f", "line": line, "reason": f"malformed JSON <{line % 2}>"} for line in range(3)]
    (run / "rejected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prompts, teacher_texts, student_texts = [], [], []
    for uid in range(12):
        asked = uid % 2 == 0
        gold = Gold(calls=[CALL], values=[]) if asked else Gold(calls=[], values=[21.5, "clear sky"])
        messages, kind = (ASKED, "one_call") if asked else (ANSWERED, "tool_result")
        prompts.append(JudgedPrompt(uid, f"row-{uid}", kind, messages, TOOLS, [1, 2], gold))  # type: ignore[arg-type]  (ids as a list)
        right = completion(CALL) if asked else "It is 21.5 degrees with a clear sky."
        wrong = completion({"name": "weather", "arguments": {"city": "Bonn"}}) if asked else ""
        teacher_texts.append(right)
        student_texts.append(right if uid < 6 else wrong)
    judged = {}
    for name, texts in {"teacher": teacher_texts, "student": student_texts, "untrained": [""] * 12}.items():
        judged[name] = Judged(f"/models/{name}", f"{name}-fingerprint", 1000 if name == "teacher" else 400)
        judged[name].texts = texts
        judged[name].scores = [
            score_completion(text, p.messages, p.tools, p.gold) for text, p in zip(texts, prompts, strict=True)
        ]
        for score in judged[name].scores:
            score["perplexity"] = (2.0, 4.0)
            score["first_call_tokens"] = (21.0 if name == "teacher" else math.inf, 1.0)
        judged[name].facts = {"weight_bytes": 2.5e6, "first_call_s": 0.0125, "first_call_s_p95": math.inf}
        judged[name].machine = "1 of 2 cores, <made> up"
    halting = {"halt_auc": Estimate(0.75, 0.5, 1.0, 9), "halt_loops": Estimate(1.5, 1.25, 1.75, 9)}
    judged["student"].of_heads = halting
    judged["student"].by_tier = {"tier 2": halting, "tier 3": {"halt_loops": Estimate(2.5, 2.0, 3.0, 4)}}
    held_out = JudgedPrompts(prompts, "held_out.jsonl", "ab" * 32, 12, [])
    drafts = {"path": "drafts.jsonl", "sha256": "cd" * 32, "num_rows": 9}
    save_results(summarise(judged, held_out, config, drafts), judged, held_out, run / "report")
