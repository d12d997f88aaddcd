"""Calibration chips: what a model's layers really see, drawn from tile stores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ringmoe_cli.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

    from model.budget import Mass
    from model.checkpoint import CheckpointConfig
    from model.config import ModelConfig
    from ringmoe_cli.scene.tiles import Store

BATCH = 64
"""Chips drawn at once."""
ROUNDS = 20
"""Batches that may hold too little valid data before the rest is taken as it is."""
CHIPS = 32
"""Chips that go through a model at once."""
IN_MEMORY = 500_000_000
"""Parameters of a model that is loaded to measure its routing; a larger one is streamed."""
TOKENS = 1 << 28
"""Bytes of the tokens of all chips where they are most, after the patch embedding."""
STREAMED_CHIPS = 16
"""Chips that go through a streamed model."""


def chips_within_memory(config: "ModelConfig", count: int) -> int:
    """How many of so many chips of each modality can go through a model at once.

    The work holds their tokens several times over.
    """
    own = (config.image_size // config.patch_size) ** 2 * config.embed_dim * 4
    return max(2, min(count, TOKENS // (own * len(config.modalities))))


def calibration_chips(
    paths: Sequence[Path], about: "CheckpointConfig", modalities: Sequence[str], count: int
) -> "dict[str, Tensor]":
    """Normalised training chips of each modality, whole ones first.

    Args:
        paths: tile stores.
        about: the checkpoint, whose normalisation is used.
        modalities: those that are needed.
        count: chips of each.

    Returns:
        modality -> (B, C, H, W).

    Raises:
        StoreError: if the stores hold no scene of a modality.
    """
    from ringmoe_cli.scene.tiles import open_store

    stores = [open_store(path) for path in paths]
    held = sorted({scene.modality for store in stores for scene in store.scenes})
    for name in modalities:
        if name not in held:
            raise StoreError(
                f"{', '.join(map(str, paths))} holds {', '.join(held)}; "
                f"the model is calibrated on {', '.join(modalities)}"
            )
        if name not in about.normalisation:
            raise StoreError(
                f"the model does not say how {name} is normalised; "
                "convert it again with --statistics and a tile store of such scenes"
            )
    return {name: chips_of(stores, about, name, count) for name in modalities}


def chips_of(
    stores: "Sequence[Store]", about: "CheckpointConfig", name: str, count: int
) -> "Tensor":
    """Chips of one modality, (B, C, H, W): those without invalid pixels, then others."""
    import torch

    from ringmoe_cli.scene.loader import pretraining_batches

    batches = pretraining_batches(
        stores,
        {name: about.normalisation[name]},
        size=about.model.image_size,
        batch_size=min(BATCH, count),
        weights={name: 1.0},
    )
    whole: list[Tensor] = []
    parts: list[Tensor] = []
    for batch, _ in zip(batches, range(ROUNDS + count // BATCH), strict=False):
        images, valid = batch.images[name][:, 0], batch.valid.get(name)
        full = torch.ones(len(images), dtype=torch.bool)
        if valid is not None:
            full = valid.flatten(1).all(1)
        whole += images[full].unbind(0)
        parts += images[~full].unbind(0)
        if len(whole) >= count:
            break
    return torch.stack([*whole, *parts][:count])


def routing_mass(source: Path, part: "ModelConfig", chips: "Mapping[str, Tensor]") -> "Mass":
    """Routing mass of the sub-model on calibration chips; large models are streamed."""
    import torch

    from model.checkpoint import load_module
    from model.encoder import RingMoE
    from model.mass import mass_on_chips
    from model.prune import size_of
    from model.stream import streamed_encoder

    if size_of(part) > IN_MEMORY:
        few = {name: images[:STREAMED_CHIPS] for name, images in chips.items()}
        return mass_on_chips(streamed_encoder(source, part.modalities), [few])
    with torch.device("meta"):
        encoder = RingMoE(part)
    load_module(source, encoder, "encoder.")
    longest = max(len(images) for images in chips.values())
    steps = range(0, longest, CHIPS)
    batches = ({m: x[i : i + CHIPS] for m, x in chips.items() if i < len(x)} for i in steps)
    return mass_on_chips(encoder.eval(), batches)
