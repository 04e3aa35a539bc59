"""One task from data to commit, streams of tasks, scoring and export."""
