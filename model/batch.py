"""The two values where files meet tensors: a `Batch` goes in, a `Prediction` comes out.

Shape legend of the project:

    B  images in a batch          T  dates of one sample (1; 2 for change; n for tracking)
    C  channels, or width         H, W  pixels, or tokens of a stage
    K  classes                    N  tokens of an attention window
    T (as suffix, x_TD) tokens    D  width of a token   F  hidden width of an expert
    E  experts of a branch        M  modalities
"""

from dataclasses import dataclass, field, fields
from typing import Any, Self

from torch import Tensor

Features = list[Tensor]
"""The four stages of one modality, (B, C·2^s, ceil(H/4·2^s), ceil(W/4·2^s)), s = 0..3."""


@dataclass
class Batch:
    """Normalised images of one or several modalities, and what is known about them."""

    images: dict[str, Tensor]
    """modality -> (B, T, C, H, W) float32; B may differ between modalities when unpaired."""
    valid: dict[str, Tensor] = field(default_factory=dict)
    """modality -> (B, T, 1, H, W) bool; absent means every pixel is valid."""
    channels: dict[str, Tensor] = field(default_factory=dict)
    """modality -> (B, C) bool, channels really measured (dual-pol SAR); absent means all."""
    targets: dict[str, Any] = field(default_factory=dict)
    """Labels: "classes" (B,) or (B, H, W) int64; "values" (B, 1, H, W) float32;
    "boxes" list of `model.boxes.Boxes`, one per image (T·B of them for clips)."""
    keys: list[str] = field(default_factory=list)
    """One name per sample: "scene:row:col", for messages."""

    def to(self, device: Any) -> Self:
        """The same batch on a device."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: move(v) for k, v in value.items()}
            if isinstance(value, list):
                return [move(v) for v in value]
            return value.to(device, non_blocking=True) if hasattr(value, "to") else value

        return type(self)(**{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass
class Prediction:
    """What a task says about a batch of windows, in those windows' pixels; one field is set."""

    dense: Tensor | None = None
    """(B, K, H, W): class probabilities, or values (K = 1). Blended across windows."""
    scores: Tensor | None = None
    """(B, K): class probabilities of each whole window."""
    boxes: list[Any] | None = None
    """One `model.boxes.Boxes` per image. Merged across windows."""
