"""The merged model as a GGUF file: the base's own file with the adapted weights in place of its own.

Everything else, the tokenizer and the packed weights of other layers included, is copied bit for bit; the token that
ends a turn is named where the file does not. How a weight lies in the file is found by comparing it with the one that
transformers reads, not by the name of the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from treelora_backends.causal_lm.card import write_card
from treelora_backends.causal_lm.export import compare_networks, merged_contents
from treelora_backends.causal_lm.loading import drop_quantizer, load_model, source_of
from treelora_backends.causal_lm.memory import merged_adapter
from treelora_backends.causal_lm.modelfile import write_modelfile
from treelora_backends.own_code import refuse_own_code
from treelora_cli.backend.values import ExportCheck, ExportOptions, Memory
from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    from treelora_backends.causal_lm.loaded import LoadedLm
    from treelora_backends.causal_lm.task import LmTask
    from treelora_cli.backend.adapters import AdapterWeights
    from treelora_cli.backend.contract import TaskData

_FILE = "model.gguf"
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LLAMA_CPP = "python convert_hf_to_gguf.py {out} --outfile {out}/model.gguf --outtype f16"
"""The command of llama.cpp that converts a merged export."""
_INSTEAD = "Export --format merged, then, in llama.cpp: " + LLAMA_CPP
_USE = """
`llama-cli -m model.gguf`, or `ollama create NAME -f Modelfile`; in Python
`AutoModelForCausalLM.from_pretrained("PATH", gguf_file="model.gguf")`.
"""


class GgufExport:
    """Meets ``FurtherExport``.

    Args:
        base: The loaded model.

    Raises:
        UsageError: The base is no GGUF file.
    """

    def __init__(self, base: LoadedLm) -> None:
        source = source_of(str(base.config.base.model))
        if not source.gguf:
            raise UsageError(
                f"--format gguf changes the weights of a base that is a GGUF file. {_INSTEAD.format(out='OUT')}"
            )
        self.base = base
        self.origin = Path(source.name) / source.gguf

    def write(self, memory: Memory, out: Path, options: ExportOptions) -> None:
        """Write the file, card and Modelfile.

        Raises:
            UsageError: A weight lies in the file in a way that is not known; llama.cpp's command is named.
        """
        base = self.base
        model: Any = load_model(base.config.base, torch.device("cpu"), offline=base.runtime.offline, dtype="float32")
        changed = _changed(self.origin, model, merged_adapter(memory))
        _copy_with(self.origin, out / _FILE, changed, options.dtype, base.encoder.stop_ids)
        write_modelfile(base, memory.tasks, out, adapter=False, model=f"./{_FILE}")
        write_card(base, merged_contents(memory), _USE, memory.tasks, out, lora=False)

    def load_line(self, out: Path) -> str:
        """Return the line that loads it."""
        return f'AutoModelForCausalLM.from_pretrained("{out}", gguf_file="{_FILE}")'

    def check(self, memory: Memory, out: Path, held_out: Sequence[tuple[str, TaskData]]) -> ExportCheck:
        """Read it back with transformers and compare with the merged model in memory."""
        from transformers import AutoModelForCausalLM

        from treelora_backends.causal_lm.loading import dequantized

        refuse_own_code(str(out), offline=True)
        stock: Any = AutoModelForCausalLM.from_pretrained(
            out, gguf_file=_FILE, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **dequantized()
        )
        drop_quantizer(stock)
        data = [(name, cast("LmTask", task)) for name, task in held_out]
        weights = merged_adapter(memory)
        written = _type_of(out / _FILE, weights.layers[0], len(self.base.lm.blocks))
        return compare_networks(self.base, memory, weights, stock.eval(), written, data)


def _changed(origin: Path, model: Any, updates: AdapterWeights) -> dict[str, np.ndarray[Any, Any]]:
    """Return the weights that change, by their names in the file, as they lie there, float32."""
    import gguf

    reader = gguf.GGUFReader(str(origin))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = _names(reader, int(model.config.get_text_config().num_hidden_layers))
    changed: dict[str, np.ndarray[Any, Any]] = {}
    for index, layer in enumerate(updates.layers):
        module = model.get_submodule(layer)
        name = f"{names.get_name(layer)}.weight"
        if name not in tensors:
            raise UsageError(f"Layer '{layer}' is not in {origin.name} by itself. {_INSTEAD.format(out='OUT')}")
        stored = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        own = module.weight.detach().float()
        lies = _layout(own, torch.from_numpy(stored.copy()), model.config.get_text_config())
        if lies is None:
            raise UsageError(f"How '{name}' lies in {origin.name} is not known. {_INSTEAD.format(out='OUT')}")
        update = updates.update(index)
        turned = type(module).__name__ == "Conv1D"
        changed[name] = lies(own + (update.T if turned else update)).numpy().astype(np.float32)
    return changed


def _type_of(path: Path, layer: str, blocks: int) -> str:
    """Return the type in which a layer's weight lies in a file."""
    import gguf

    reader = gguf.GGUFReader(str(path))
    name = f"{_names(reader, blocks).get_name(layer)}.weight"
    kind = next(tensor.tensor_type for tensor in reader.tensors if tensor.name == name)
    return {short: dtype for dtype, short in _TYPES.items()}.get(kind.name, "float32")


def _names(reader: Any, blocks: int) -> Any:
    """Return gguf's table from names of transformers to those in files of this architecture."""
    import gguf

    architecture = reader.get_field("general.architecture").contents()
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise UsageError(f"gguf does not know the architecture '{architecture}'. {_INSTEAD.format(out='OUT')}")
    return gguf.get_tensor_name_map(known[architecture], blocks)


def _layout(own: Tensor, stored: Tensor, config: Any) -> Callable[[Tensor], Tensor] | None:
    """Return what turns a weight of transformers (out, in) into the file's; ``None`` where nothing known does."""
    heads = {int(config.num_attention_heads), int(getattr(config, "num_key_value_heads", 0) or 0)} - {0}
    ways: list[Callable[[Tensor], Tensor]] = [lambda weight: weight, lambda weight: weight.T.contiguous()]
    ways += [partial(_paired, heads=count) for count in sorted(heads)]
    for way in ways:
        try:
            if torch.equal(way(own), stored):
                return way
        except RuntimeError:  # as many rows do not divide so
            continue
    return None


def _paired(weight: Tensor, heads: int) -> Tensor:
    """Interleave the halves of each head's rows, as llama.cpp's rotary embedding reads them."""
    parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return parts.transpose(1, 2).reshape(weight.shape)


def _end_of_turn(reader: Any, stops: Sequence[int]) -> int | None:
    """Return the token at which answers stop that the file does not name; ``None`` where it names all or has one."""
    named = {name: reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    if named["eot"] is not None:
        return None
    known = {int(field.contents()) for field in named.values() if field is not None}
    return next((one for one in stops if one not in known), None)


def _copy_with(
    origin: Path, target: Path, changed: dict[str, np.ndarray[Any, Any]], dtype: str, stops: Sequence[int] = ()
) -> None:
    """Copy a GGUF file, some weights replaced, and name the token that ends a turn where it does not."""
    import gguf

    reader = gguf.GGUFReader(str(origin))
    writer = gguf.GGUFWriter(str(target), reader.get_field("general.architecture").contents())  # type: ignore[union-attr]
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    if (end := _end_of_turn(reader, stops)) is not None:
        writer.add_eot_token_id(end)
    kind = gguf.GGMLQuantizationType[_TYPES[dtype]]
    try:
        for tensor in reader.tensors:
            if tensor.name in changed:
                writer.add_tensor(tensor.name, gguf.quants.quantize(changed[tensor.name], kind), raw_dtype=kind)
            else:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
