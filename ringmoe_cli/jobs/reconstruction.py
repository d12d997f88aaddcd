"""What a pre-trained model makes of images it sees in part: input, masked, reconstructed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import Batch
from model.checkpoint import CheckpointConfig, read_config
from model.config import PretrainConfig
from model.pretrain import MaskedImageModel, with_masks
from ringmoe_cli.errors import CheckpointError
from ringmoe_cli.scene.loader import pretraining_batches
from ringmoe_cli.scene.picture import Image, quicklook
from ringmoe_cli.scene.tiles import open_store

CHIPS = 2
"""Of each modality."""
SEED = 20_11
"""Of chips and masks: the same ones at every look at a run."""
GAP = 3
"""Columns between two chips."""

Rows = dict[str, dict[str, Image]]


def reconstructions(run: Path) -> Rows:
    """Chips of the stores a run was trained on, with what the model fills in.

    Args:
        run: folder of a pre-training run.

    Returns:
        modality -> caption ("input", "masked", "reconstructed") -> (H, W, 3). Complex SAR is shown
        as what it reconstructs, the span in decibels.

    Raises:
        CheckpointError: if the checkpoint is not one of pre-training, or its stores are gone.
    """
    config = read_config(run)
    if config.pretraining is None:
        raise CheckpointError(f"{run} is a {config.kind} checkpoint; it reconstructs nothing")
    network = MaskedImageModel.from_pretrained(run)
    batch = sample(run, config, config.pretraining)
    masks: Mapping[str, torch.Tensor] = batch.targets["masks"]
    with torch.inference_mode():
        output = network(batch, masks)
        targets = {m: network.target(batch, m, masks[m]) for m in batch.images}
    return {
        m: panels(target, counts > 0, output.reconstructions[m], config.normalisation[m].bands)
        for m, (target, counts) in targets.items()
    }


def sample(run: Path, config: CheckpointConfig, objective: PretrainConfig) -> Batch:
    """A few masked chips of every modality.

    Raises:
        CheckpointError: if a store of the run is not where it was.
    """
    named = [Path(s) for s in config.provenance.get("stores", ())]
    paths = [run / s / "tiles.zarr" if s == Path("simulated") else s for s in named]
    gone = next((p for p in paths if not p.exists()), None)
    if gone or not paths:
        raise CheckpointError(f"{run} was trained on {gone or 'unknown stores'}, which is not here")
    batches = pretraining_batches(
        [open_store(p) for p in paths],
        config.normalisation,
        size=config.model.image_size,
        batch_size=CHIPS * len(config.normalisation),
        weights=dict.fromkeys(config.normalisation, 1.0),
        seed=SEED,
    )
    return next(with_masks(batches, config.model, objective.mask_ratio, SEED, 0))


def panels(
    target: torch.Tensor, hidden: torch.Tensor, guess: torch.Tensor, bands: Sequence[str]
) -> dict[str, Image]:
    """Three pictures of the same chips, stretched alike.

    Args:
        target: (B, c, H, W) what was to be predicted.
        hidden: (B, 1 or c, H, W) bool, where it counted.
        guess: (B, c, H, W) what was predicted.
        bands: names of the modality's channels.
    """
    mask = hidden[:, :1]
    filled = torch.where(mask, guess, target)
    shown = [bands.index(b) for b in ("red", "green", "blue") if b in bands]
    chosen = shown if len(shown) == 3 and target.shape[1] >= 3 else list(range(target.shape[1]))
    strips = [side_by_side(x[:, chosen]) for x in (target, target, filled)]
    seen = side_by_side(torch.ones_like(mask))[0] > 0
    dark = seen & ~(side_by_side(mask)[0] > 0)
    together = quicklook(np.concatenate(strips, axis=2), np.concatenate([seen, dark, seen], axis=1))
    pictures = np.split(together, 3, axis=1)
    return dict(zip(("input", "masked", "reconstructed"), pictures, strict=True))


def side_by_side(chips: torch.Tensor) -> NDArray[np.float32]:
    """(B, c, H, W) as (c, H, B·W + gaps), the gaps zero."""
    padded = torch.nn.functional.pad(chips.float(), (0, GAP))
    joined: NDArray[np.float32] = torch.cat(list(padded), dim=2)[..., :-GAP].numpy()
    return joined
