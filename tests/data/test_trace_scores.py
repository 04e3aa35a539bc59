"""Scores as TRACE computes them, worked out by hand."""

import pytest

from treelora_cli.data import sari, text_scores, trace_scores


def test_rouge_counts_every_word_once_and_unites_sentences():
    # common "the cat sat"; different words: the cat sat on mat (5) and the cat sat (3)
    given, wanted = "the cat sat the cat", "the cat sat on the mat"
    assert trace_scores.rouge_l_of_sets(given, wanted) == pytest.approx(2 * (3 / 5) * 1.0 / (3 / 5 + 1.0), abs=1e-7)
    assert text_scores.rouge_l(given, wanted) == pytest.approx(2 * 4 / 11)
    # two sentences in another order: every word is common to some pair
    assert trace_scores.rouge_l_of_sets("it rains. we go", "we go. it rains") == pytest.approx(1.0, abs=1e-7)
    assert text_scores.rouge_l("it rains. we go", "we go. it rains") == pytest.approx(0.5)
    assert trace_scores.rouge_l_of_sets("The cat", "the cat") == pytest.approx(0.5, abs=1e-7), "letters count"
    assert trace_scores.rouge_l_of_sets("", "cat") == trace_scores.rouge_l_of_sets(".", "cat") == 0.0


def test_literals_of_code_are_put_in_place_of_their_marks():
    code = "x = <STR_LIT:abc> + <NUM_LIT:4> + <STR_LIT> + <NUM_LIT> + <CHAR_LIT:c> + <CHAR_LIT>"
    assert trace_scores.plain_code(code) == "x = abc + 4 +  + 0 + c + "
    # "f(abc)" and "f(abd)": 5 of 6 characters in common, 2 * 5 / 12 = 0.8333 as whole percents
    assert trace_scores.similarity_of_code("f(<STR_LIT:abc>)", "f(<STR_LIT:abd>)") == 0.83
    assert text_scores.edit_similarity("f(<STR_LIT:abc>)", "f(<STR_LIT:abd>)") == pytest.approx(30 / 32)
    assert trace_scores.similarity_of_code("", "x") == trace_scores.similarity_of_code("<STR_LIT>", "<STR_LIT>") == 0.0


@pytest.mark.parametrize(
    ("prediction", "answer", "as_trace", "strict"),
    [
        ("B\nIt is so.", "B\nBecause.", 1.0, 1.0),
        ("Answer: B Because", "Answer: B", 1.0, 1.0),
        ("B", "Answer: B", 0.0, 1.0),
        ("Answer: (B)", "Answer: B", 0.0, 1.0),
        ("Answer: A", "Answer: B", 0.0, 0.0),
        ("The answer is: C", "C", 0.0, 1.0),
        ("(A) answers nothing", "A", 0.0, 1.0),
        ("", "A", 0.0, 0.0),
    ],
)
def test_the_choice_is_read_after_its_mark(prediction, answer, as_trace, strict):
    assert trace_scores.choice_after_mark(prediction, answer) == as_trace
    assert text_scores.first_letter_match(prediction, answer) == strict


def test_an_answer_that_says_more_starts_right():
    assert trace_scores.starts_right("60", "6") == 1.0
    assert text_scores.exact_match("60", "6") == trace_scores.equal("60", "6") == 0.0
    assert trace_scores.starts_right("x", "") == trace_scores.equal("", " ") == 0.0
    assert trace_scores.equal("a  b", "a b") == 0.0
    assert text_scores.exact_match("a  b", "a b") == 1.0


def test_words_as_13a_splits_them():
    assert trace_scores.words_13a("Don't pay $1,000.50, it's 5-fold &amp; &quot;new&quot;.") == [
        *("Don't", "pay", "$", "1,000.50", ",", "it's", "5", "-", "fold", "&", '"', "new", '"', "."),
    ]
    assert trace_scores.words_13a("line-\nbreak\nnext") == ["linebreak", "next"]


def test_sari_counts_signs_as_words():
    source, prediction, answer = "a b , c", "a b", "a b ,"
    assert trace_scores.sari_13a(source, prediction, answer) == pytest.approx(
        sari.sari_of_words(["a", "b", ",", "c"], ["a", "b"], ["a", "b", ","])
    )
    # words kept: a, b of a, b and the comma, F1 2 * 1 * (2/3) / (5/3) = 0.8; none added, none to add: 1; of two deleted
    # the comma wrongly: 0.5
    keep, add, delete = sari.sari_of_order(*(sari.ngrams(t.split(), 1) for t in (source, prediction, answer)))
    assert (keep, add, delete) == (pytest.approx(0.8), 1.0, 0.5)
    assert trace_scores.sari_13a(source, prediction, answer) != pytest.approx(
        text_scores.sari(source, prediction, answer)
    )


@pytest.mark.parametrize("metric", [one for one in text_scores.METRICS if one != "token_accuracy"])
def test_every_score_names_the_others_beside_it(metric):
    beside = text_scores.scores_beside(metric, "a source", "an answer", "an answer")
    assert beside
    assert all(value == pytest.approx(1.0) for value in beside.values())
    assert metric not in beside
