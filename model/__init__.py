"""The network: pixels and tensors, no files but checkpoints.

    from model import ModelConfig, RingMoE

    net = RingMoE(ModelConfig.preset("nano"))
    features = net({"opt": x, "ms": y})   # per modality, four (B, C, H, W) maps
"""

from model.config import ModelConfig
from model.encoder import RingMoE

__all__ = ["ModelConfig", "RingMoE"]
