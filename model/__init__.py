"""The network: pixels and tensors, no files but checkpoints.

    from model import ModelConfig, RingMoE

    net = RingMoE(ModelConfig.preset("nano"))
    features = net({"opt": x, "ms": y})   # per modality, four (B, C, H, W) maps
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
