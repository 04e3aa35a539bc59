"""One table of split rules: a new line there is a rule everywhere, and what is not there is an error everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from treelora_cli.algorithm import split
from treelora_cli.algorithm.split import RULES, SplitRule, halve
from treelora_cli.algorithm.tree import Tree, build_tree, extend_tree
from treelora_cli.config import DEFAULTS, from_flags, parse_config
from treelora_cli.errors import ConfigError

LAYER = np.array([[0.0], [0.1], [1.0], [7.0]], dtype=np.float32)  # two tasks a side by number, three by the widest gap
UNKNOWN = r"unknown rule 'halves', expected one of principal-gap, median-l1"


def test_the_default_is_a_rule() -> None:
    assert DEFAULTS.tree.split in RULES


def test_a_line_in_the_table_is_a_rule_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {**RULES, "halves": SplitRule(lambda layer, _: halve(layer))}
    monkeypatch.setattr(split, "RULES", rules)
    assert parse_config("tree: {split: halves}", "r.yaml").tree.split == "halves"
    signatures = LAYER[:, None, :]
    tree = build_tree(signatures, 1, split="halves")
    assert [node.members for node in tree.nodes[1:]] == [(0, 1), (2, 3)]
    assert [node.members for node in build_tree(signatures, 1).nodes[1:]] == [(0, 1, 2), (3,)]
    assert Tree.from_state(tree.to_dict(), tree.to_arrays()) == tree
    assert extend_tree(build_tree(signatures, 1), LAYER[:1], 1, split="halves").split == "halves"


def test_a_rules_labels_are_kept_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES["principal-gap"]
    monkeypatch.setattr(split, "RULES", {"joined": SplitRule(rule.cut, lambda rows: np.array([0, 1, 2, 0]))})
    tree = build_tree(LAYER[:, None, :], 1, split="joined")
    assert next(node.members for node in tree.nodes[1:] if 0 in node.members) in [(0, 3), (0, 1, 3), (0, 2, 3)]


def test_a_name_that_is_not_in_the_table_is_an_error_everywhere() -> None:
    line = r"'split' is one of principal-gap, median-l1; got 'halves'\."
    with pytest.raises(ConfigError, match=r"^r\.yaml:1: " + line):
        parse_config("tree: {split: halves}", "r.yaml")
    with pytest.raises(ConfigError, match=r"^--split: " + line):
        from_flags(tree__split="halves")
    for build in (
        lambda: build_tree(LAYER[:, None, :], 1, split="halves"),
        lambda: extend_tree(None, LAYER[:1], 1, split="halves"),
        lambda: extend_tree(build_tree(LAYER[:, None, :], 1), LAYER[:1], 1, split="halves"),
    ):
        with pytest.raises(ValueError, match=UNKNOWN):
            build()


def test_a_rule_without_a_cut_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="cut"):
        SplitRule()  # type: ignore[call-arg]
