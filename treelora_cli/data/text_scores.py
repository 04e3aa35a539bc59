"""Scores of one generated answer against the right one; pure.

All scores lie in [0, 1], higher is better.
"""

from __future__ import annotations

import re

from treelora_cli.data import trace_scores as trace
from treelora_cli.data.sari import sari_of_words

METRICS = (
    "accuracy",
    "exact_match",
    "choice",
    "rouge_l",
    "sari",
    "edit_similarity",
    "token_accuracy",
    "trace_choice",
    "trace_rouge_l",
    "trace_sari",
    "trace_similarity",
)
"""Names of the scores of a language task.

``accuracy``: the right one of a closed set of answers; ``token_accuracy``: next-token accuracy on free text;
the others compare generated text through ``score_text``, those of ``trace_`` as TRACE computes them.
"""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]|\w+")
"""A word, or one character of a script that is written without spaces."""
_ANSWER = re.compile(r"^.*?\banswer\s*(?:is)?\s*:", re.IGNORECASE | re.DOTALL)
"""What stands before a choice that is announced."""


def score_text(metric: str, source: str, prediction: str, answer: str) -> float:
    """Score a prediction.

    Args:
        metric: One of ``METRICS`` but ``token_accuracy``.
        source: The prompt, which SARI compares with.
        prediction: Generated text.
        answer: The right text.
    """
    if metric in ("accuracy", "exact_match"):
        return exact_match(prediction, answer)
    if metric == "choice":
        return first_letter_match(prediction, answer)
    if metric == "rouge_l":
        return rouge_l(prediction, answer)
    if metric == "sari":
        return sari(source, prediction, answer)
    if metric == "edit_similarity":
        return edit_similarity(prediction, answer)
    if metric.startswith("trace_"):
        return _as_trace(metric, source, prediction, answer)
    raise ValueError(f"unknown metric '{metric}'")


def _as_trace(metric: str, source: str, prediction: str, answer: str) -> float:
    if metric == "trace_sari":
        return trace.sari_13a(source, prediction, answer)
    compare = {
        "trace_choice": trace.choice_after_mark,
        "trace_rouge_l": trace.rouge_l_of_sets,
        "trace_similarity": trace.similarity_of_code,
        "trace_equal": trace.equal,
        "starts_right": trace.starts_right,
    }
    if metric not in compare:
        raise ValueError(f"unknown metric '{metric}'")
    return compare[metric](prediction, answer)


BESIDE = {
    "accuracy": ("trace_equal", "starts_right"),
    "exact_match": ("trace_equal", "starts_right"),
    "choice": ("trace_choice", "starts_right"),
    "rouge_l": ("trace_rouge_l",),
    "sari": ("trace_sari",),
    "edit_similarity": ("trace_similarity",),
    "trace_choice": ("choice", "starts_right"),
    "trace_rouge_l": ("rouge_l",),
    "trace_sari": ("sari",),
    "trace_similarity": ("edit_similarity",),
}
"""Other definitions of each score, computed beside it."""


def scores_beside(metric: str, source: str, prediction: str, answer: str) -> dict[str, float]:
    """Return the score of the same prediction under other definitions, by their names."""
    named = BESIDE.get(metric, ())
    return {
        name: _as_trace(name, source, prediction, answer)
        if name.startswith(("trace_", "starts_"))
        else score_text(name, source, prediction, answer)
        for name in named
    }


def words(text: str) -> list[str]:
    """Split into lower-case words."""
    return _WORD.findall(text.lower())


def exact_match(prediction: str, answer: str) -> float:
    """Return 1 when both are the same but for white space, else 0."""
    return float(prediction.split() == answer.split())


def first_letter_match(prediction: str, answer: str) -> float:
    """Return 1 when both choose the same letter or digit: the first, or the first after ``Answer:``."""
    given, wanted = (re.search(r"\w", _ANSWER.sub("", text, count=1)) for text in (prediction, answer))
    return float(given is not None and wanted is not None and given.group() == wanted.group())


def edit_similarity(prediction: str, answer: str) -> float:
    """Return 2 M / T: M characters in common, in order, of T in both together; as TRACE scores code."""
    from rapidfuzz import fuzz

    return float(fuzz.ratio(prediction.strip(), answer.strip())) / 100


def rouge_l(prediction: str, answer: str) -> float:
    """Return the F1 of the longest common subsequence of words.

    Source: Lin, "ROUGE: A package for automatic evaluation of summaries", 2004, with beta 1.
    """
    from rapidfuzz.distance import LCSseq

    ours, theirs = words(prediction), words(answer)
    common = LCSseq.similarity(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def sari(source: str, prediction: str, answer: str) -> float:
    """Return SARI against one reference: the mean of how well n-grams were kept, added and deleted.

    Source: Xu et al., "Optimizing statistical machine translation for text simplification", TACL 2016;
    with 0 / 0 counted as 1 and the recall of kept n-grams by occurrence, as in Hugging Face's ``evaluate``.
    """
    return sari_of_words(words(source), words(prediction), words(answer))
