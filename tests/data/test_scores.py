import pytest

from treelora_cli.data import sari
from treelora_cli.data import text_scores as scores


def test_exact_match_ignores_white_space_only():
    assert scores.exact_match(" 4  apples\n", "4 apples") == 1.0
    assert scores.exact_match("4 Apples", "4 apples") == 0.0


def test_choice_compares_the_first_letter():
    assert scores.first_letter_match("(B) because", "B") == 1.0
    assert scores.first_letter_match("A", "B\nIt is so.") == 0.0
    assert scores.first_letter_match("", "B") == 0.0


def test_rouge_l_by_hand():
    # common subsequence "the cat on mat": 4 of 5 and 4 of 6 words
    assert scores.rouge_l("The cat on a mat.", "the cat sat on the mat") == pytest.approx(2 * 4 / 11)
    assert scores.rouge_l("dog", "cat") == 0.0
    assert scores.rouge_l("", "cat") == 0.0


def test_rouge_l_splits_scripts_without_spaces():
    assert scores.words("Äpfel 今天好") == ["äpfel", "今", "天", "好"]
    assert scores.rouge_l("今天好", "今天坏") == pytest.approx(2 / 3)


def test_edit_similarity_by_hand():
    # "return x" and "return y": 7 of 8 characters in common
    assert scores.edit_similarity("return x", "return y") == pytest.approx(14 / 16)
    assert scores.edit_similarity(" same \n", "same") == 1.0


def test_sari_is_one_when_the_answer_is_hit_and_low_when_nothing_is_done():
    source, answer = "about ninety five species are currently accepted", "about 95 species are now accepted"
    assert scores.sari(source, answer, answer) == pytest.approx(1.0)
    assert scores.sari(source, source, answer) < 0.5


def test_sari_unigrams_by_hand():
    # source a b c, answer a d, prediction a c: a is kept rightly, c wrongly; b deleted rightly; d not added
    keep, add, delete = sari.sari_of_order(*(sari.ngrams(t.split(), 1) for t in ("a b c", "a c", "a d")))
    assert keep == pytest.approx(2 * 0.5 * 1.0 / 1.5)
    assert delete == pytest.approx(1.0)
    assert add == pytest.approx(0.0)


@pytest.mark.parametrize("metric", [m for m in scores.METRICS if m != "token_accuracy"])
def test_every_metric_gives_one_for_the_answer_itself(metric):
    assert scores.score_text(metric, "a source sentence", "an answer", "an answer") == pytest.approx(1.0)


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="unknown metric 'bleu'"):
        scores.score_text("bleu", "", "", "")
