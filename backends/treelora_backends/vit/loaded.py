"""A loaded timm transformer with one LoRA slot: what sessions, predictors, exports and contenders need of a base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from treelora_backends.vit.loading import create_vit

if TYPE_CHECKING:
    from treelora_backends.vit.augment import Augment
    from treelora_backends.vit.images import Preprocessing
    from treelora_backends.vit.trunk import Trunk
    from treelora_cli.backend.runtime import Runtime
    from treelora_cli.config import Config


@dataclass(frozen=True, eq=False)
class LoadedVit:
    """The frozen network, and how images get into it.

    Attributes:
        network: The base with its adapter slot.
        layers: Names of the adapted modules in network order, shape (D,).
        fingerprint: SHA-256 over the frozen weights, hex.
        trunk: The network in two parts, before and after the first adapted block.
        preprocessing: From image to tensor.
        config: Settings it was loaded with.
        runtime: Device, arithmetic and reporter.
    """

    network: nn.Module
    layers: tuple[str, ...]
    fingerprint: str
    trunk: Trunk
    preprocessing: Preprocessing
    config: Config
    runtime: Runtime

    @property
    def scale(self) -> float:
        """LoRA scale alpha / rank."""
        return self.config.adapter.scale

    @property
    def facts(self) -> dict[str, Any]:
        """Architecture, size and preprocessing."""
        vit = cast("Any", self.trunk.vit)
        return {
            "architecture": vit.pretrained_cfg.get("architecture") or type(vit).__name__,
            "blocks": len(self.trunk.blocks),
            "width": self.trunk.width,
            "parameters": sum(p.numel() for n, p in self.network.named_parameters() if "lora_" not in n),
            "input_size": list(self.preprocessing.size),
            "mean": list(self.preprocessing.mean),
            "std": list(self.preprocessing.std),
        }

    def augmenting(self, config: Config, otherwise: str | None = None) -> Augment | None:
        """Return what changes training images at random: the setting's policy, or ``otherwise``; ``None`` for none.

        Raises:
            UsageError: ``train.augment`` is no policy of timm.
        """
        from treelora_backends.vit.augment import Augment

        policy = config.train.augment or otherwise
        return None if not policy else Augment(policy, self.preprocessing.size, self.preprocessing.mean)

    def fresh_vit(self, classes: int) -> nn.Module:
        """Return the frozen model anew, without adapters, with a linear classifier for ``classes``."""
        vit = create_vit(self.config.base, offline=self.runtime.offline)
        cast("Any", vit).reset_classifier(classes)
        return vit.to(self.runtime.device)
