"""The project directory: the only package that reads or writes it."""

from treelora_cli.project.project import Commit, Project, check_task_name
from treelora_cli.project.state import State, TaskEntry

__all__ = ["Commit", "Project", "State", "TaskEntry", "check_task_name"]
