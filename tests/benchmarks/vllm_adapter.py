"""Read an exported adapter by vLLM's own loader, and compare what it holds with the file; no GPU is needed for that.

treelora export OUT --format adapter --task TASK
python -m venv vllm && vllm/bin/pip install vllm        # some gigabytes; apart, since it brings its own torch
vllm/bin/python tests/benchmarks/vllm_adapter.py OUT
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

_PREFIX = "base_model.model."
_PARTS = (("lora_A", "lora_a"), ("lora_B", "lora_b"))


def main(folder: Path) -> int:
    """Print what vLLM makes of the adapter; 1 where a weight differs from the file's."""
    import torch
    from safetensors.torch import load_file

    os.environ["VLLM_TARGET_DEVICE"] = "cpu"  # else it pins memory for a GPU
    vllm: Any = importlib.import_module("vllm")
    helper = importlib.import_module("vllm.lora.peft_helper").PEFTHelper.from_local_dir(str(folder), 2048)
    helper.validate_legal(importlib.import_module("vllm.config.lora").LoRAConfig(max_lora_rank=max(8, helper.r)))
    names = {str(name).rpartition(".")[2] for name in helper.target_modules}
    loader = importlib.import_module("vllm.lora.lora_model").LoRAModel.from_local_checkpoint
    loaded = loader(str(folder), names, helper, lora_model_id=1, device="cpu", dtype=torch.float32)
    largest = 0.0
    for name, weight in load_file(folder / "adapter_model.safetensors").items():
        module, part = next((name.split(f".{ours}.")[0], theirs) for ours, theirs in _PARTS if f".{ours}." in name)
        theirs = getattr(loaded.loras[module.removeprefix(_PREFIX)], part)
        largest = max(largest, float((theirs - weight).abs().max()))
    scale = helper.vllm_lora_scaling_factor
    print(f"vLLM {vllm.__version__}: {len(loaded.loras)} modules of rank {helper.r}, scale {scale}")
    print(f"largest difference from the file {largest}")
    return int(largest > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
