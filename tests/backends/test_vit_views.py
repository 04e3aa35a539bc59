"""Views of an image that are learned from: itself, mirrored, changed at random."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vit_prompts import load, task
from treelora_backends.vit.augment import Augment

from treelora_cli import seeds
from treelora_cli.backend import adapters
from treelora_cli.backend.values import Memory


def prepared(weights: Path, views: int, branch: str = "never", augment: str | None = None) -> Any:
    base, config = load(weights, **({} if augment is None else {"augment": augment}))
    config = replace(config, head=replace(config.head, views=views), tree=replace(config.tree, branch=branch))
    session = base.session(task(5, count=26), Memory((), dict), config)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 2.0, 0))
    session.prepare()
    return session


def images_of(session: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(session._views_of(torch.arange(4)))


@pytest.mark.parametrize("views", [1, 2, 5])
def test_every_view_counts_once_in_the_solved_head(weights: Path, views: int) -> None:
    session = prepared(weights, views)
    counts = session.shared_head.task_tensors()["anchor.counts"]
    assert counts.tolist() == (views * torch.bincount(session.labels).float()).tolist()


@pytest.mark.parametrize(("augment", "policy"), [(None, "rand-m5-mstd0.5"), ("rand-m9-mstd0.5", "rand-m9-mstd0.5")])
def test_a_view_is_the_image_mirrored_or_changed_by_the_setting(
    weights: Path, augment: str | None, policy: str
) -> None:
    session = prepared(weights, 4, augment=augment)
    plain, mirrored, third, fourth = images_of(session)
    torch.testing.assert_close(mirrored, plain.flip(-1))
    change = Augment(policy, session.base.preprocessing.size, session.base.preprocessing.mean)
    pixels = session.task.train.pixels[:4]
    for view, found in ((2, third), (3, fourth.flip(-1))):
        torch.manual_seed(seeds.of_view(session.seed, view, 0))
        assert torch.equal(found, session.base.preprocessing.normalise(change(pixels)))
    assert not torch.equal(third, plain)
    assert not torch.equal(third, fourth.flip(-1))


def test_views_are_the_same_again_and_leave_other_draws_alone(weights: Path) -> None:
    session = prepared(weights, 6)
    torch.manual_seed(7)
    first = images_of(session)
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(3))
    assert all(torch.equal(one, again) for one, again in zip(first, images_of(session), strict=True))
    other = prepared(weights, 6)
    assert torch.equal(
        session.shared_head.to_tensors()["anchor.half_gram"], other.shared_head.to_tensors()["anchor.half_gram"]
    )


def test_changed_views_say_nothing_of_the_kind_of_data(weights: Path) -> None:
    kinds = [prepared(weights, views, branch="first").token_moments() for views in (2, 5)]
    for name in ("sums", "squares", "counts"):
        torch.testing.assert_close(*(torch.from_numpy(getattr(one, name)) for one in kinds))


def test_training_draws_from_all_views(weights: Path) -> None:
    session = prepared(weights, 4)
    drawn = torch.cat([views for epoch in range(4) for _, views in session.batches(epoch)])
    assert sorted(set(drawn.tolist())) == [0, 1, 2, 3]
    order = torch.randperm(len(session.own), generator=torch.Generator().manual_seed(session.seed))
    rows = order[: session.at_once]  # the first chunk
    with torch.no_grad():
        wanted = session.base.trunk.before(list(session._views_of(rows))[3]).tokens
    kept = session.entering(rows, torch.full_like(rows, 3))
    torch.testing.assert_close(kept, wanted, rtol=1e-2, atol=1e-2)  # kept in half the bits
