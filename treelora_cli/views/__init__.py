"""What the terminal shows: results, tables, trees, progress."""
