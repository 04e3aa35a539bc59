"""Vision transformers of timm."""

from treelora_backends.vit.without_compiler import import_timm

import_timm()
