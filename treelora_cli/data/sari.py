"""The arithmetic of SARI on texts that are split into words; pure."""

from __future__ import annotations

from collections import Counter

_SARI_ORDERS = 4


def sari_of_words(source: list[str], prediction: list[str], answer: list[str]) -> float:
    """Return SARI of texts that are split into words."""
    texts = [source, prediction, answer]
    parts = [sari_of_order(*(ngrams(text, order) for text in texts)) for order in range(1, _SARI_ORDERS + 1)]
    return sum(sum(part) / 3 for part in parts) / len(parts)


def ngrams(text: list[str], order: int) -> Counter[tuple[str, ...]]:
    """Count runs of ``order`` words."""
    return Counter(tuple(text[start : start + order]) for start in range(len(text) - order + 1))


def sari_of_order(
    source: Counter[tuple[str, ...]], prediction: Counter[tuple[str, ...]], answer: Counter[tuple[str, ...]]
) -> tuple[float, float, float]:
    """Return (F1 of kept, F1 of added, precision of deleted) n-grams of one order."""
    kept, should_keep = source & prediction, source & answer
    good = kept & answer
    keep = _f1(
        _share(sum(good[gram] / kept[gram] for gram in good), len(kept)),
        _share(good.total(), should_keep.total()),
    )
    deleted = source - prediction
    rightly = deleted - answer
    delete = _share(sum(rightly[gram] / deleted[gram] for gram in rightly), len(deleted))
    added, should_add = set(prediction) - set(source), set(answer) - set(source)
    well = len(added & should_add)
    return keep, _f1(_share(well, len(added)), _share(well, len(should_add))), delete


def _share(part: float, whole: int) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
