"""A project in a few calls of Python; the commands use the same.

::

    from treelora_cli import Project

    project = Project.create("birds", model="vit_base_patch16_224.augreg_in21k")
    project.train_task("~/data/gulls")
    print(project.evaluate().standing.overall())
    print(project.predict(["photo.jpg"])[0].output)

``treelora_cli/API.md`` shows every call; its examples are run as tests. Nothing heavy is imported before a call
needs the model. One object loads the model once; use it from one thread.
"""

from treelora_cli.api.project import Project
from treelora_cli.api.values import BASE, Evaluation

__all__ = ["BASE", "Evaluation", "Project"]
