"""Heads that are solved, not trained. Pure tensor code."""
