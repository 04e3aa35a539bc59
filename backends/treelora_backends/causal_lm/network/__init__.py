"""How a causal language model is run in parts."""
