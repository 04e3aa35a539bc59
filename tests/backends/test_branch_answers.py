"""Which branches are asked for an image, and that those not asked could not have changed its answer."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from treelora_backends.vit.branch_answers import BRANCHES_ASKED, BranchAnswers, Seen

from treelora_cli.heads.two_views import fused

GROUPS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
"""Branch of each column; the third is no branch."""
NAMES = ["one", "other", None]


class Planted(BranchAnswers):
    """Branches whose heads say what is planted, and which note whom they were asked about."""

    def __init__(self, scores: Tensor) -> None:
        self.names = list(NAMES)
        self.group_of = GROUPS
        self.planted = scores
        self.asked: list[tuple[str, list[int]]] = []

    def _scores(self, name: str, rows: Tensor, seen: tuple[Seen, ...]) -> tuple[Tensor, float]:
        self.asked.append((name, rows.tolist()))
        return self.planted[rows][:, NAMES.index(name) == GROUPS], 10.0


def by_branch(log_columns: Tensor) -> Tensor:
    return torch.stack([log_columns[:, index == GROUPS].logsumexp(dim=1) for index in range(len(NAMES))], dim=1)


@given(st.integers(0, 10_000), st.sampled_from([0.5, 2.0, 8.0]))
def test_a_branch_that_is_not_asked_could_not_have_changed_the_answer(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = (spread * torch.randn(16, len(GROUPS), generator=generator)).log_softmax(dim=1)
    scores, branches = torch.rand(16, len(GROUPS), generator=generator), by_branch(before)
    after, answers = before.clone(), Planted(scores)
    answers.refine_(after, branches, ())
    whole = before.clone()
    for index in range(2):
        own = index == GROUPS
        opinion = fused(scores[:, own], 10.0, before[:, own] - branches[:, index, None])
        rows = (branches.topk(BRANCHES_ASKED, dim=1).indices == index).any(dim=1)
        whole[rows[:, None] & own] = (opinion + branches[:, index, None])[rows].flatten()
    assert torch.equal(after.argmax(dim=1), whole.argmax(dim=1))
    torch.testing.assert_close(by_branch(after), branches)


def test_a_sure_image_asks_one_branch_and_one_without_a_branch_none() -> None:
    columns = torch.full((3, len(GROUPS)), -20.0)
    columns[0, 1], columns[1, 2], columns[1, 3], columns[2, 7] = 0.0, 0.0, -0.1, 0.0
    columns = columns.log_softmax(dim=1)
    answers = Planted(torch.tensor([[1.0, 0.5, 0.0, 0.5, 0.4, 0.0, 0.0, 0.0, 0.0]]).expand(3, -1))
    answers.refine_(columns, by_branch(columns), ())
    assert answers.asked == [("one", [0, 1]), ("other", [1])]
