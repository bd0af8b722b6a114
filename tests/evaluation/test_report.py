import base64
import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raykd.config import Config
from raykd.evaluation.highlight import highlight
from raykd.evaluation.metrics import Estimate
from raykd.evaluation.report import choose_examples, write_report
from raykd.evaluation.results import load_results
from tests.evaluation.synthetic import ANSWERED, TOOLS, completion, write_metrics, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "made-up <run>"
    folder.mkdir()
    settings = {"teacher": {"kind": "vllm", "model": "t"}, "student": {"model": "s"}, "data": {"prompts": "p"}}
    write_run(folder, Config.model_validate(settings))
    write_report(folder, 10)
    return folder


class Page(HTMLParser):
    """Tags, image sources and text of a page; fails on tags that do not close in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in ("img", "br", "meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(run):
    page = Page((run / "report" / "report.html").read_text(encoding="utf-8"))
    assert len(page.sources) == 8
    for source in page.sources:
        assert source.startswith("data:image/svg+xml;base64,")
        assert b"<svg" in base64.b64decode(source.partition(",")[2])
    assert not {"script", "link", "iframe"} & set(page.tags)
    for words in ("50.0 %", "exact calls", "one_call: exact calls", "student-fingerprint", "29,000", "calls wrong"):
        assert words in page.text
    for words in ("12.5 / ∞", "1 of 2 cores, <made> up", "0.7500", "tier 3: loops of recorded drafts", "cdcdcdcd"):
        assert words in page.text


def test_what_comes_from_data_is_escaped_on_the_page(run):
    html = (run / "report" / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    for text in (
        "<script>alert(1)</script>",
        "<b>Köln</b>",
        "<i>made up</i>",
        "made-up <run>",
        "malformed JSON <1>",
        "<made> up",
    ):
        assert text not in html
        assert text in page.text


def test_the_markdown_links_figures_that_exist_and_shows_the_same_numbers(run):
    text = (run / "report" / "report.md").read_text(encoding="utf-8")
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(figures) == 8
    assert all((run / "report" / figure).is_file() for figure in figures)
    assert "| exact calls | 100.0 % (100.0–100.0) | 50.0 %" in text
    assert "malformed JSON \\<1\\> | 1 |" in text
    assert "| time to the first valid call, ms: median / 95th percentile | 12.5 / ∞ |" in text
    assert "1 of 2 cores, \\<made\\> up" in text
    assert "| tier 2: halting: AUC | – | 0.7500 (0.5000–1.000) | – |" in text


def test_what_was_infinite_is_so_again_when_results_are_read(run):
    assert "Infinity" not in (run / "report" / "results.json").read_text(encoding="utf-8")
    student = load_results(run / "report").models["student"]
    assert student.metrics["first_call_tokens"] == Estimate(math.inf, math.inf, math.inf, 12)
    assert "first_call_tokens" not in student.ratios
    assert student.facts["first_call_s_p95"] == math.inf
    assert student.by_tier["tier 3"]["halt_loops"] == Estimate(2.5, 2.0, 3.0, 4)


def test_results_of_before_there_were_facts_are_read_all_the_same(run, tmp_path):
    content = json.loads((run / "report" / "results.json").read_text(encoding="utf-8"))
    for model in content["models"].values():
        del model["facts"], model["by_tier"], model["machine"]
    del content["data"]["refinements"]
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "results.json").write_text(json.dumps(content), encoding="utf-8")
    assert "exact calls" in write_report(tmp_path, 10).read_text(encoding="utf-8")


def test_a_run_that_was_not_evaluated_is_reported_as_such(tmp_path):
    write_metrics(tmp_path, num_steps=6)
    html = write_report(tmp_path, 10).read_text(encoding="utf-8")
    assert "Not evaluated yet" in html
    assert "Losses" in html


def test_examples_are_taken_from_every_kind_in_turn():
    rows = [{"kind": kind, "key": index} for index, kind in enumerate("aaabbc")]
    assert [row["key"] for row in choose_examples(rows, 5)] == [0, 3, 5, 1, 4]


def test_spans_are_coloured_by_what_they_are():
    html = highlight(completion({"name": "weather", "arguments": {"city": "Köln"}}), [], TOOLS)
    assert '<span class="name">weather</span>' in html
    assert '<span class="key">city</span>' in html
    assert '<span class="value">Köln</span>' in html
    assert '<span class="structure">{&quot;</span>' in html
    assert '<span class="integration">21.5</span>' in highlight("It is 21.5 degrees.", ANSWERED, TOOLS)


@given(st.text() | st.text().map(lambda text: json.dumps({"name": "weather", "arguments": {text: text}})))
def test_highlighting_changes_no_character_of_any_text(text):
    page = Page(highlight(text, ANSWERED, TOOLS))
    assert page.text.replace("\r", "\n") == text.replace("\r", "\n")
    assert set(page.tags) <= {"span"}
