"""Causal language models of transformers."""

from treelora_backends.without_compiler import import_torchvision

import_torchvision()
