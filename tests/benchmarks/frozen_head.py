"""A learned project of images, opened for benchmarks that look into the head on its frozen features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from treelora_backends.vit.shared_head import SharedHead, class_names, class_of_column, columns_of

from treelora_cli import Project
from treelora_cli.backend import adapters
from treelora_cli.learning.evaluation import read_held_out


class FrozenHead:
    """The shared head of a project, and its held-out images.

    Args:
        path: A project of the vit backend.
        limit: Most held-out images of a class.

    Attributes:
        names: Of the classes.
        class_of: The class of each column, (K,).
        tasks: Held-out data of each task.
    """

    def __init__(self, path: str, limit: int | None) -> None:
        project = Project.open(path, device="cpu")
        stored, config = project._stored, project._config()
        self.base: Any = project._loaded(config, exact=True)
        self.memory = stored.memory()
        self.head = SharedHead.restore(self.memory.shared(), self.base.trunk, config, self.base.runtime)
        assert self.head.features is not None
        self.features = self.head.features
        columns = columns_of(self.memory)
        self.names, self.class_of = class_names(columns), class_of_column(columns)
        records = {name: stored.task_record(name) for name in project.tasks}
        self.tasks: list[Any] = [one.data for one in read_held_out(self.base, records, limit)]

    def truth(self, task: Any) -> Tensor:
        """Return the class of each held-out image of a task, (n,)."""
        return torch.tensor([self.names.index(label) for label in task.labels])[task.test.labels]

    def views(self, images: Tensor) -> list[Tensor]:
        """Return the head's features (B, W) of normalised images and of their mirror images."""
        trunk = self.base.trunk
        with adapters.base_only(self.base.network):
            return [self.features(trunk.after(trunk.before(view))) for view in (images, images.flip(-1))]
