"""A ResNet-18 pyramid (He et al. 2016) that stands where our encoder stands, as a baseline."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from model.encoder import Encoding
from model.router import LayerRouting

WIDTHS = (64, 128, 256, 512)


class Basic(nn.Module):
    """Two 3 × 3 convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H / stride, W / stride)."""
        return nn.functional.relu(self.body(x) + self.shortcut(x))


class ResNetPyramid(nn.Module):
    """Stages of strides 4, 8, 16, 32; one stem per modality, the rest shared."""

    def __init__(self, channels: Mapping[str, int]) -> None:
        super().__init__()
        self.config = Sizes(tuple(channels))
        self.stems = nn.ModuleDict(
            {
                m: nn.Sequential(nn.Conv2d(c, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64),
                                 nn.ReLU(), nn.MaxPool2d(3, 2, 1))
                for m, c in channels.items()
            }
        )  # fmt: skip
        inputs = (64, *WIDTHS[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(Basic(i, o, 1 if s == 0 else 2), Basic(o, o, 1))
            for s, (i, o) in enumerate(zip(inputs, WIDTHS, strict=True))
        )

    def encode(self, images: Mapping[str, Tensor], **_: Any) -> Encoding:
        """As `RingMoE.encode`, without routing."""
        features = {}
        for name, image in images.items():
            x, maps = self.stems[name](image), []
            for stage in self.stages:
                x = stage(x)
                maps.append(x)
            features[name] = maps
        return Encoding(features, [LayerRouting({})])


class Sizes:
    """What a head asks of a config."""

    widths = WIDTHS

    def __init__(self, modalities: tuple[str, ...]) -> None:
        self.modalities = modalities
