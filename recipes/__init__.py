"""One YAML per experiment. Imported as ``treelora_recipes`` so that the files travel with the package."""
