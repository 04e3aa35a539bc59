"""How one task is protected from the next: each method is one small strategy, unknown to the trainer."""
