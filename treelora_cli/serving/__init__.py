"""A small HTTP server that answers with a project."""
