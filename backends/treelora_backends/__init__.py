"""Model families. Imported as ``treelora_backends`` and found through entry points."""
