"""Scores as TRACE's own evaluation computes them, to be held beside published figures; pure.

They are kinder than those of ``text_scores``: words count once however often they occur, literals of code are taken
out, an answer may say more than it was asked. All scores lie in [0, 1].

Source: the evaluation code of TRACE (Wang et al., arXiv 2310.06762) with the packages ``rouge`` and ``fuzzywuzzy`` and
Hugging Face's ``evaluate`` that it calls; ``starts_right`` is the evaluation of TreeLoRA's public code.
"""

from __future__ import annotations

import re

from treelora_cli.data.sari import sari_of_words

_LITERAL = re.compile(r"<(STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)
_MARK = "Answer: "
_SPLITS = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
"""What mteval-v13a splits off words, as sacrebleu writes it."""
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def equal(prediction: str, answer: str) -> float:
    """Return 1 when both are the same text, else 0; nothing is never right."""
    return float(prediction.strip() == answer.strip() != "")


def starts_right(prediction: str, answer: str) -> float:
    """Return 1 when the prediction begins with the answer: 60 for 6."""
    return float(answer.strip() != "" and prediction.strip().startswith(answer.strip()))


def choice_after_mark(prediction: str, answer: str) -> float:
    """Return 1 when the letters chosen agree: those after ``Answer: ``, or the first where the answer has no mark."""
    marked = _MARK in answer
    given, wanted = (_letter(text, marked=marked) for text in (prediction, answer))
    return float(given == wanted != "")


def _letter(text: str, *, marked: bool) -> str:
    if not marked:
        return text.strip()[:1]
    place = text.find(_MARK)
    return "" if place < 0 else text[place + len(_MARK) :][:1]


def similarity_of_code(prediction: str, answer: str) -> float:
    """Return ``fuzz.ratio`` in whole percents, with literals in place of their marks."""
    from rapidfuzz import fuzz

    given, wanted = (plain_code(text.strip()) for text in (prediction, answer))
    if not (given and wanted):
        return 0.0
    return round(fuzz.ratio(given, wanted)) / 100


def plain_code(code: str) -> str:
    """Put literals in place of their marks: ``<NUM_LIT:4>`` becomes 4, ``<STR_LIT>`` nothing."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return _LITERAL.sub(lambda found: found.group(2), code)


def sari_13a(source: str, prediction: str, answer: str) -> float:
    """Return SARI with words as mteval-v13a splits them, in lower case."""
    return sari_of_words(*(words_13a(text.lower()) for text in (source, prediction, answer)))


def words_13a(text: str) -> list[str]:
    """Split as sacrebleu's tokeniser 13a does."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in _ENTITIES:
        text = text.replace(entity, sign)
    text = f" {text} "
    for pattern, written in _SPLITS:
        text = pattern.sub(written, text)
    return text.split()


def rouge_l_of_sets(prediction: str, answer: str) -> float:
    """Return ROUGE-L as the package ``rouge`` computes it: over sentences, every word counted once.

    The words of the longest common subsequences of all pairs of sentences, united, over the different words of each
    text. Sentences end at full stops.
    """
    given, wanted = _sentences(prediction), _sentences(answer)
    if not (given and wanted):
        return 0.0
    common: set[str] = set()
    for one in given:  # TRACE gives the answer for the package's hypothesis, which matters to ties alone
        for other in wanted:
            common |= set(_common_words(one, other))
    counts = [len({word for sentence in text for word in sentence}) for text in (wanted, given)]
    precision, recall = len(common) / counts[0], len(common) / counts[1]
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_words(one: list[str], other: list[str]) -> list[str]:
    """Return a longest common subsequence, the one that the package finds."""
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one, start=1):
        for j, its in enumerate(other, start=1):
            same = word == its
            lengths[i][j] = lengths[i - 1][j - 1] + 1 if same else max(lengths[i - 1][j], lengths[i][j - 1])
    found: list[str] = []
    i, j = len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            found.append(one[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]
