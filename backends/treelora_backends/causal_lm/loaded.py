"""A loaded language model with one LoRA slot: what sessions, predictors, exports and contenders need of a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from treelora_backends.causal_lm.loading import source_of

if TYPE_CHECKING:
    from treelora_backends.causal_lm.answers import Known
    from treelora_backends.causal_lm.network.network import LmNetwork
    from treelora_backends.causal_lm.render import Encoder
    from treelora_backends.causal_lm.router import FeatureReader
    from treelora_cli.backend.runtime import Runtime
    from treelora_cli.config import Config
    from treelora_cli.data.examples import TextExample


@dataclass(frozen=True, eq=False)
class LoadedLm:
    """The frozen network, and how text gets into it and out.

    Attributes:
        network: The PEFT model.
        layers: Names of the adapted modules in network order, shape (D,).
        fingerprint: SHA-256 over the frozen weights, hex.
        tokenizer: As transformers loads it.
        config: Settings it was loaded with.
        runtime: Device, arithmetic and reporter.
        lm: The network in two parts, before and after the first adapted block.
        context: The most tokens it takes.
        encoder: From text to tokens.
        known_answers: Answers computed before, by prompt and adapter; filled by whoever answers.
        features: Reads frozen features of inputs, once for each input.
    """

    network: nn.Module
    layers: tuple[str, ...]
    fingerprint: str
    tokenizer: Any
    config: Config
    runtime: Runtime
    lm: LmNetwork
    context: int
    encoder: Encoder
    known_answers: Known
    features: FeatureReader

    @property
    def scale(self) -> float:
        """LoRA scale alpha / rank."""
        return self.config.adapter.scale

    @property
    def facts(self) -> dict[str, Any]:
        """Architecture, size, context and where the weights came from."""
        model = self.lm.model
        return {
            "architecture": type(model).__name__,
            "blocks": len(self.lm.blocks),
            "width": int(model.config.get_text_config().hidden_size),
            "parameters": sum(p.numel() for n, p in self.network.named_parameters() if "lora_" not in n),
            "context": self.context,
            "dtype": self.config.base.dtype or "float32",
            "chat_template": self.encoder.has_template,
            "dequantized_from_gguf": source_of(str(self.config.base.model)).gguf is not None,
        }

    def read_features(self, examples: Sequence[TextExample], description: str) -> Tensor:
        """Return frozen features of inputs, (n, F)."""
        return self.features(examples, description)
