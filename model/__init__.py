"""The network: pixels and tensors, no files but checkpoints.

`RingMoE(ModelConfig.preset("nano"))` is an encoder; called with `{"opt": x, "ms": y}`, images
(B, C, H, W) per modality, it gives four maps (B, C, H, W) per modality.
"""

from typing import TYPE_CHECKING, Any

from model.config import ModelConfig

if TYPE_CHECKING:
    from model.encoder import RingMoE

__all__ = ["ModelConfig", "RingMoE"]


def __getattr__(name: str) -> Any:
    """Import torch only for those who want the network: tiling needs none of it."""
    if name == "RingMoE":
        from model.encoder import RingMoE

        return RingMoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
