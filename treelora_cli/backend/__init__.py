"""What the core and a model family share: the contract, adapters, device and arithmetic."""
