"""The checkable claims of a text: statements with a number, a name or a reference that could be looked up.

In:  a text, as an assistant wrote it.
Out: `Claim`s with spans in code points; how a student's claims compare with the teacher's.

Code, JSON, tool calls, latent spans, questions and hedged sentences make no claim. A sentence is cut at semicolons and
before ", and", ", but" and the like, never at a bare comma. The rules are for English.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from raykd.data.code_mode import fenced_blocks
from raykd.data.json_tree import parse
from raykd.types import Span


class Claim(NamedTuple):
    """One claim, and what in it can be looked up (numbers, names in lower case, URLs, quotations)."""

    span: Span
    anchors: frozenset[str]


class LatentSpans(NamedTuple):
    """Latent spans of a text, sentinels included, and how many of them lack their other sentinel."""

    spans: list[Span]  # from the first <bot> outside a span through the next <eot>, or the end
    num_unmatched: int


class ClaimScore(NamedTuple):
    """A student's claims against its teacher's; all NaN where the teacher made none, so that means leave the pair out."""

    penalty: float  # [0, 1] for fewer claims, or a smaller share of claims among the statements, than the teacher
    support: float  # [0, 1] share of the student's claims whose anchors are all in the teacher's text

    @property
    def reward(self) -> float:
        return 0.5 * (1.0 - self.penalty) + 0.5 * self.support


_WORD = re.compile(r"[^\W\d_](?:[\w'’-]*\w)?")
_ANCHOR = re.compile(
    r"(?P<url>https?://[^\s<>\"')\]]++)"
    r"|(?P<quote>\"[^\"\n]{1,200}\"|“[^”\n]{1,200}”|`[^`\n]{1,200}`)"
    r"|(?P<number>\d++(?:[.,:/-]\d++)*+)"
)
# A sentence ends at its mark before white space or the end, or at a line break. A run of marks is tried once, at its first.
_END = re.compile(r"(?<![.!?])[.!?]++[\"'”’)\]]*+(?=\s|\Z)|[。！？]++|\n")
_ABBREVIATION = re.compile(r"(?:\b(?:[A-Z]|Dr|Mr|Mrs|Ms|Prof|St|No|vs|etc|approx|e\.g|i\.e|U\.S))\Z")
_CLAUSE = re.compile(r";\s++|,\s++(?:and|but|or|while|whereas|so)\s++")
_HEDGE = re.compile(
    r"(?i)\b(?:maybe|perhaps|possibly|probably|likely|might|(?-i:may)|could|would|should|seems?|appears?|presumably|apparently"
    r"|I (?:think|believe|guess|suppose|assume)|not sure|in my opinion|if)\b"
)
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|had|does|did|will|can|cannot|costs?|contains?|includes?|uses?|shows?|means?|takes?"
    r"|returns?|supports?|requires?|needs?|runs?|equals?|rises?|rose|falls?|fell|grew|grows?|stands?|lies?|goes|went|gives?"
    r"|gave|made|makes?|won|wins?|lost|began|begins?|starts?|ends?|arrives?|leaves?|left|lives?|became|becomes?|wrote"
    r"|writes?|built|holds?|held|sold|sells?|pays?|paid|meets?|met|says?|said|found|finds?|comes?|came|[a-z]{2,}ed)\b"
    r"|['’](?:s|re|ve)\b"
)
_SENTINEL = re.compile(r"<bot>|<eot>")
_SHORTEST = 3  # words
# Capitalised without being names.
_NO_NAMES = frozenset(["I", "I'm", "I’m", "I'll", "I’ll", "I've", "I’ve", "I'd", "I’d", "Ok", "OK", "Yes", "No"])


def latent_spans(text: str) -> LatentSpans:
    """`<bot> ... <eot>`; a <bot> inside a span is one of its slots, so that `<bot><bot><eot>` is one span, and balanced."""
    spans, opened, unmatched = [], -1, 0
    for sentinel in _SENTINEL.finditer(text):
        if sentinel[0] == "<bot>":
            opened = sentinel.start() if opened < 0 else opened
        elif opened < 0:
            unmatched += 1
        else:
            spans.append(Span(opened, sentinel.end()))
            opened = -1
    if opened >= 0:
        spans.append(Span(opened, len(text)))
        unmatched += 1
    return LatentSpans(spans, unmatched)


def extract_claims(text: str) -> list[Claim]:
    """All claims in order, in time linear in the text."""
    claims = []
    for statement in _statements(text):
        anchors = _claimed(text[statement.start : statement.end])
        if anchors:
            claims.append(Claim(statement, anchors))
    return claims


def claim_spans(text: str) -> list[Span]:
    """Spans of the claims: what the mark CLAIM covers."""
    return [claim.span for claim in extract_claims(text)]


def claim_score(student_text: str, teacher_text: str) -> ClaimScore:
    """The student's claims against the teacher's.

    penalty = 0.6 max(0, 1 - r_c / 0.5) + 0.4 max(0, 1 - r_s / 0.7), r_c the ratio of the numbers of claims, r_s that of the
    shares of statements that are claims.
    """
    teacher, student = extract_claims(teacher_text), extract_claims(student_text)
    if not teacher:
        return ClaimScore(math.nan, math.nan)
    count_ratio = len(student) / len(teacher)
    student_share = len(student) / max(1, len(_statements(student_text)))
    share_ratio = student_share / (len(teacher) / len(_statements(teacher_text)))
    penalty = 0.6 * max(0.0, 1.0 - count_ratio / 0.5) + 0.4 * max(0.0, 1.0 - share_ratio / 0.7)
    known = {word.casefold() for word in _WORD.findall(teacher_text)} | set(_looked_up(teacher_text))
    supported = sum(claim.anchors <= known for claim in student)
    return ClaimScore(penalty, supported / max(1, len(student)))


def _claimed(sentence: str) -> frozenset[str]:
    """The anchors of a sentence, or of a clause of one; empty where it claims nothing."""
    words = list(_WORD.finditer(sentence))
    if len(words) < _SHORTEST or sentence.endswith(("?", "？")) or _HEDGE.search(sentence) or not _VERB.search(sentence):
        return frozenset()
    return frozenset(_looked_up(sentence)) | _names(sentence, words)


def _looked_up(text: str) -> list[str]:
    return [match[0].strip('"“”`').casefold() for match in _ANCHOR.finditer(text)]


def _names(sentence: str, words: list[re.Match[str]]) -> frozenset[str]:
    """Proper nouns: capitalised words not at the beginning of a sentence, or there with another one behind them."""
    capital = [word[0][0].isupper() and word[0] not in _NO_NAMES for word in words]
    first = [index == 0 or sentence[words[index - 1].end() : word.start()].strip() not in ("", ",", "'", "’", "-")
             for index, word in enumerate(words)]  # fmt: skip
    found = set()
    for index, word in enumerate(words):
        begins_name = first[index] and index + 1 < len(words) and capital[index + 1] and not first[index + 1]
        if capital[index] and (not first[index] or (begins_name and sentence[word.end() : words[index + 1].start()] == " ")):
            found.add(word[0].casefold())
    return frozenset(found)


def _statements(text: str) -> list[Span]:
    """Sentences and their clauses (questions too) outside code, JSON and latent spans, without white space around them."""
    statements: list[Span] = []
    position = 0
    for start, end in [*_no_prose(text), (len(text), len(text))]:
        statements += _clauses(text, position, max(position, start))
        position = max(position, end)
    return [span for span in statements if _WORD.search(text, *span)]


def _clauses(text: str, start: int, end: int) -> list[Span]:
    """Clauses of text[start:end], each trimmed; a clause that ends its sentence keeps the mark at its end."""
    spans, begin = [], start
    for match in _END.finditer(text, start, end):
        stop = match.end() if match[0] != "\n" else match.start()
        before = text[max(begin, match.start() - 8) : match.start()]
        if match[0] == "." and _ABBREVIATION.search(before):
            continue
        spans.append((begin, stop))
        begin = match.end()
    spans.append((begin, end))
    clauses = []
    for sentence_start, sentence_end in spans:
        begin = sentence_start
        for cut in _CLAUSE.finditer(text, sentence_start, sentence_end):
            clauses.append((begin, cut.start()))
            begin = cut.end()
        clauses.append((begin, sentence_end))
    return [_trimmed(text, *clause) for clause in clauses]


def _trimmed(text: str, start: int, end: int) -> Span:
    clause = text[start:end]
    return Span(start + len(clause) - len(clause.lstrip()), max(start, end - len(clause) + len(clause.rstrip())))


def _no_prose(text: str) -> list[tuple[int, int]]:
    """Sorted ranges of fenced blocks, JSON objects and latent spans."""
    ranges: list[tuple[int, int]] = [whole for _, _, whole in fenced_blocks(text)]
    ranges += latent_spans(text).spans
    position = text.find("{")
    while position >= 0:
        node, read_to = parse(text, position)
        if node.closed or node.truncated:
            ranges.append((position, node.end))
        position = text.find("{", max(read_to, position + 1))
    return sorted(ranges)
