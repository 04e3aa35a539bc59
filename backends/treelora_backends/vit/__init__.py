"""Vision transformers of timm."""

from treelora_backends.without_compiler import import_timm

import_timm()
