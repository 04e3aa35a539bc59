"""The project directory: the only package that reads or writes it."""

from treelora_cli.project.commit import Commit
from treelora_cli.project.health import damage_of_the_past, disk_bytes, history_bytes, trash, whole_tasks, works
from treelora_cli.project.project import Project
from treelora_cli.project.repair import Repair, find_lost_state, repair, restore_state
from treelora_cli.project.state import State, TaskEntry, check_task_name

__all__ = [
    "Commit",
    "Project",
    "Repair",
    "State",
    "TaskEntry",
    "check_task_name",
    "damage_of_the_past",
    "disk_bytes",
    "find_lost_state",
    "history_bytes",
    "repair",
    "restore_state",
    "trash",
    "whole_tasks",
    "works",
]
