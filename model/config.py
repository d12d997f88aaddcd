"""Sizes: the only place that knows how large a model is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from model.modality import MODALITIES

Attention = Literal["swin_v2", "swin_v1"]
Gate = Literal["softmax", "normalized"]
Gelu = Literal["tanh", "erf"]
SarTarget = Literal["power", "power_paper", "pixels"]


def default_channels() -> dict[str, int]:
    """Channels per modality of the released model: 3/4/8/3."""
    return {name: modality.channels for name, modality in MODALITIES.items()}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the encoder's shape and arithmetic (RINGMOE §2-3)."""

    embed_dim: int = 448
    """C: width of the first stage; stage s has C·2^s."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks per stage."""
    num_heads: tuple[int, ...] = (14, 28, 56, 112)
    """Attention heads per stage."""
    image_size: int = 192
    """Side of a training chip in pixels; fixes the window of each stage."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    window: int = 12
    """Attention window in tokens; a stage whose grid is smaller uses its grid."""
    mlp_ratio: int = 4
    """Hidden width of an expert over its width."""
    channels: Mapping[str, int] = field(default_factory=default_channels)
    """Channels of each modality; its keys are the model's modalities, in order."""
    specialised: int = 4
    """Modal-specialised experts per modality and layer (0: no such branch)."""
    collaborative: int = 4
    """Collaborative experts per layer, shared by all modalities (0: no such branch)."""
    shared: int = 1
    """Shared experts per layer, seen by every token (0 or 1)."""
    top_k: int = 1
    """Experts per token in each routed branch."""
    gate: Gate = "softmax"
    """`softmax`: weight = probability (Eq. 3); `normalized`: kept gates sum to 1 (the release)."""
    capacity_factor: float | None = None
    """None: dropless. Else an expert takes at most ceil(k·tokens·factor/experts) tokens."""
    attention: Attention = "swin_v2"
    """Scaled cosine attention (Liu et al. 2022), or the release's Swin V1 form."""
    gelu: Gelu = "tanh"
    """The release uses the tanh form; imported Swin weights want `erf`."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm but the merging one."""
    merge_eps: float = 1e-4
    """Epsilon of the LayerNorm after patch merging."""
    mask_cell: int = 32
    """Side of a masked cell in pixels (pre-training)."""
    kept: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    """Pruned layers: "stage.block" -> branch ("collaborative" or "specialised.<modality>") -> the
    router rows whose experts remain, in order. The router keeps all its rows, so that a softmax
    gate keeps its parent's denominator. An empty tuple removes the branch and its router.
    A layer or branch that is not named keeps everything."""

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A named size (`nano`, `tiny`, `base`, `large`, `14b`), with some fields changed.

        Raises:
            ValueError: for an unknown preset.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in order."""
        return tuple(self.channels)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the stages: C, 2C, 4C, 8C."""
        return tuple(self.embed_dim * 2**s for s in range(len(self.depths)))

    def stage_window(self, stage: int) -> int:
        """Attention window of a stage in tokens: min(window, grid of a training chip)."""
        stride: int = self.patch_size * 2**stage
        return min(self.window, max(1, self.image_size // stride))

    def experts_of(self, stage: int, block: int, branch: str) -> tuple[int, ...]:
        """Router rows of the experts present in a branch of one layer."""
        full = self.collaborative if branch == "collaborative" else self.specialised
        return tuple(self.kept.get(f"{stage}.{block}", {}).get(branch, range(full)))

    def with_modalities(self, names: tuple[str, ...]) -> Self:
        """The same model with some of its modalities only."""
        return replace(self, channels={name: self.channels[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; lists become tuples.

        Raises:
            ValueError: for unknown or impossible fields.
        """
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown model field(s): {', '.join(sorted(unknown))}")
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        kept = {
            layer: {branch: tuple(rows) for branch, rows in branches.items()}
            for layer, branches in values.get("kept", {}).items()
        }
        plain["kept"] = kept
        return cls(**plain)


def check(config: ModelConfig) -> None:
    """Refuse a config that no model can have.

    Raises:
        ValueError: naming the field, its value and what would fit.
    """
    if len(config.depths) != len(config.num_heads):
        raise ValueError("depths and num_heads must have one entry per stage")
    for width, heads in zip(config.widths, config.num_heads, strict=True):
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
    if not config.channels:
        raise ValueError("channels is empty: a model needs at least one modality")
    if config.shared not in (0, 1):
        raise ValueError(f"shared is {config.shared}; a layer has 0 or 1 shared expert")
    if not (config.specialised or config.collaborative or config.shared):
        raise ValueError("a layer needs at least one expert")
    for branch in ("specialised", "collaborative"):
        count = getattr(config, branch)
        if count and config.top_k > count:
            raise ValueError(f"top_k is {config.top_k}, but there are {count} {branch} experts")


PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8),
        "image_size": 64, "window": 8, "mask_cell": 16,
    },
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
    "14b": {"embed_dim": 448, "depths": (2, 2, 18, 2), "num_heads": (14, 28, 56, 112)},
}  # fmt: skip


@dataclass(frozen=True)
class PretrainConfig:
    """The objective of pre-training (RINGMOE §4)."""

    mask_ratio: float = 0.6
    """Share of cells masked; ceil(ratio·cells) of them."""
    sar_l1_target: SarTarget = "power"
    """What SAR-L1 reconstructs: standardised dB span, the paper's clipped span, or the pixels."""
    balance_weight: float = 0.004
    """Weight of E·Σ f·P (balanced = 1) per block; 0.004 equals the release's 0.001·64."""


@dataclass(frozen=True)
class TaskConfig:
    """What a fine-tuned model says about a window."""

    name: str
    """segmentation, classification, detection, tracking, change or depth."""
    classes: tuple[str, ...] = ()
    """Class names in index order; empty for depth."""
    colours: tuple[tuple[int, int, int], ...] = ()
    """RGB per class, for colour tables and pictures."""
    modalities: tuple[str, ...] = ()
    """Modalities the head was trained on; several are fused."""
    window: int = 192
    """Side of the training window in pixels; predict uses the same by default."""
    rotated: bool = False
    """Detection: boxes carry an angle."""
    value_range: tuple[float, float] = (0.0, 1.0)
    """Depth: lowest and highest value in the training labels, in `unit`."""
    unit: str = ""
    """Depth: unit of the values, metres for heights."""
    channels: int = 256
    """Width of the decoder; 64 is enough for `nano`."""
    adapter: int = 0
    """Width of the Convpass bypasses beside the encoder's blocks; 0: none."""
    detail: int = 0
    """Width of the path from the pixels past the encoder (`model.decoders.Detail`); 0: none."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`; lists become tuples."""
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        plain["colours"] = tuple(tuple(c) for c in values.get("colours", ()))
        return cls(**plain)
