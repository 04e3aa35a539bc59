"""One self-contained page of a project's scores, tree, search, time and space; no script, no network."""
