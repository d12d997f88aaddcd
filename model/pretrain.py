"""Masked image modelling (RingMoE, after SimMIM): masks, decoders and losses.

Cells of each image are hidden, one learned token stands for every hidden patch, and one linear
decoder per modality predicts the hidden pixels from the last stage.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from model.batch import Batch
from model.config import ModelConfig, PretrainConfig
from model.encoder import RingMoE, initialise
from model.normalisation import Normalisation
from model.physics import paper_power_target, power_target
from model.router import LayerRouting, balance_loss

LOSS_EPS = 1e-5
"""Keeps the loss of a batch without a single masked valid pixel at 0."""


@dataclass
class PretrainOutput:
    """One forward pass of the objective."""

    loss: Tensor
    """Scalar: sum of `losses` plus the weighted balance loss."""
    losses: dict[str, Tensor]
    """modality -> mean absolute error over masked, valid pixels, in target units."""
    balance: Tensor
    """Balance loss summed over blocks, unweighted."""
    routing: list[LayerRouting]
    """One per block, in order."""
    reconstructions: dict[str, Tensor]
    """modality -> (B, c, H, W) prediction of the target, masked and visible pixels alike."""

    @property
    def parts(self) -> dict[str, Tensor]:
        """What to log besides the loss; `balance` is 1 when every router is balanced."""
        kinds = [{name.split(".")[0] for name in layer.branches} for layer in self.routing]
        return {**self.losses, "balance": self.balance / max(sum(map(len, kinds)), 1)}


class MaskedImageModel(nn.Module):
    """Encoder, mask token and one decoder per modality."""

    def __init__(
        self,
        config: ModelConfig,
        objective: PretrainConfig,
        normalisation: Mapping[str, Normalisation] | None = None,
    ) -> None:
        """Build the network.

        Args:
            config: sizes of the encoder.
            objective: mask ratio, SAR-L1 target and balance weight.
            normalisation: of SAR-L1, needed to train towards its power; not part of the weights.
        """
        super().__init__()
        self.config, self.objective = config, objective
        self.normalisation = dict(normalisation or {})
        self.encoder = RingMoE(config)
        self.mask_token = nn.Parameter(torch.zeros(config.embed_dim))
        self.stride = config.patch_size * 2 ** (len(config.depths) - 1)
        self.decoders = nn.ModuleDict(
            {
                name: nn.Conv2d(config.widths[-1], self.stride**2 * self.target_channels(name), 1)
                for name in config.modalities
            }
        )
        self.decoders.apply(initialise)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.total: Callable[[Tensor], Tensor] = lambda values: values
        self.whole_routing: Callable[[list[LayerRouting]], list[LayerRouting]] = list

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """The network of a pre-training run, or of released weights that have their decoders.

        Raises:
            ValueError: for a folder without one.
        """
        from model.checkpoint import load_module, read_config

        about = read_config(path)
        if about.pretraining is None:
            raise ValueError(f"{path} holds no mask token and decoders: its kind is {about.kind}")
        with torch.device("meta"):
            net = cls(about.model, about.pretraining, about.normalisation)
        load_module(path, net)
        return net.eval()

    def target_channels(self, modality: str) -> int:
        """Channels that the decoder of a modality predicts."""
        power = modality == "sar-l1" and self.objective.sar_l1_target != "pixels"
        return 1 if power else self.config.channels[modality]

    def forward(self, batch: Batch, masks: Mapping[str, Tensor]) -> PretrainOutput:
        """Hide, encode, predict and compare.

        Args:
            batch: images (B, 1, C, H, W) of one or several modalities.
            masks: modality -> (B, H/4, W/4) bool, true where a patch is hidden.
        """
        images = {m: x[:, 0] for m, x in batch.images.items()}
        valid = {m: v[:, 0] for m, v in batch.valid.items()}
        encoding = self.encoder.encode(
            images,
            valid=valid,
            channels=batch.channels,
            masks=dict(masks),
            mask_token=self.mask_token,
        )
        reconstructions = {
            m: self.decode(m, encoding.features[m][-1], (x.shape[-2], x.shape[-1]))
            for m, x in images.items()
        }
        targets = {m: self.target(batch, m, masks[m]) for m in images}
        values = self.counted_values(targets)
        losses = {m: masked_l1(reconstructions[m], *targets[m], values[m]) for m in images}
        routing = self.whole_routing(encoding.routing)
        balance = balance_loss(routing)
        loss = torch.stack([*losses.values()]).sum() + self.objective.balance_weight * balance
        return PretrainOutput(loss, losses, balance, routing, reconstructions)

    def loss(self, batch: Batch) -> PretrainOutput:
        """Forward pass on a batch that carries its masks (see `with_masks`)."""
        output: PretrainOutput = self(batch, batch.targets["masks"])
        return output

    def counted_values(self, targets: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Modality -> pixels times channels that count, in the whole batch over all ranks."""
        here = torch.zeros(len(self.config.modalities), device=self.mask_token.device)
        for i, name in enumerate(self.config.modalities):
            if name in targets:
                pixels, counts = targets[name]
                here[i] = counts.expand_as(pixels).sum()
        return dict(zip(self.config.modalities, self.total(here), strict=True))

    def decode(self, modality: str, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Last stage (B, D, h, w) -> (B, c, H, W), cropped to the image; no view, as FSDP wants."""
        pixels = depth_to_space(self.decoders[modality](features), self.stride)
        return pixels[..., : size[0], : size[1]].float().clone()

    def target(self, batch: Batch, modality: str, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What to predict, (B, c, H, W), and where it counts: M, (B, 1 or c, H, W) of 0 and 1.

        M is the mask times validity. A channel that was not measured does not count, and the span
        of an image counts only if all its channels were: a partial span is not a span.
        """
        images = batch.images[modality][:, 0]
        size = images.shape[-2:]
        hidden = upsample(mask, self.config.patch_size)[:, None, : size[0], : size[1]]
        valid = batch.valid.get(modality)
        seen = torch.ones_like(hidden) if valid is None else valid[:, 0]
        measured = torch.ones(images.shape[:2], dtype=torch.bool, device=images.device)
        measured = batch.channels.get(modality, measured)[:, :, None, None]
        kind = self.objective.sar_l1_target if modality == "sar-l1" else "pixels"
        if kind == "pixels":
            return images, (hidden & seen & measured).float()
        counts = (hidden & seen & measured.all(dim=1, keepdim=True)).float()
        if modality not in self.normalisation:
            raise ValueError("the SAR-L1 power target needs the store's statistics")
        if kind == "power":
            return power_target(images, self.normalisation[modality]), counts
        return paper_power_target(images, self.normalisation[modality], seen), counts


def masked_l1(
    prediction: Tensor, target: Tensor, counts: Tensor, values: Tensor | None = None
) -> Tensor:
    """Σ|x - x̂|·M / (ΣM + 1e-5) / c: mean absolute error over counted pixels and channels (SimMIM).

    Args:
        prediction: (B, c, H, W).
        target: (B, c, H, W).
        counts: M, (B, 1 or c, H, W) of 0 and 1.
        values: ΣM·c of the whole batch, where this is one rank's part of it.
    """
    weight = counts.expand_as(target)
    error = (target - prediction).abs() * weight
    values = weight.sum() if values is None else values
    return error.sum() / (values + LOSS_EPS * target.shape[1])


def depth_to_space(x: Tensor, block: int) -> Tensor:
    """(B, block²·c, h, w) -> (B, c, h·block, w·block), input channel = (row·block + col)·c + ch.

    This is the depth-column-row order; `nn.PixelShuffle` puts the channel first.
    """
    batch, depth, height, width = x.shape
    channels = depth // block**2
    blocks = x.reshape(batch, block, block, channels, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels, height * block, width * block)


def upsample(mask: Tensor, factor: int) -> Tensor:
    """Repeat each entry of (B, h, w) `factor` times along both sides."""
    return mask.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def random_mask(config: ModelConfig, ratio: float, size: tuple[int, int], *key: int) -> Tensor:
    """The hidden patches of one image, (H/4, W/4) bool; a pure function of its key.

    Of the ⌈H/cell⌉·⌈W/cell⌉ square cells, ⌈ratio·cells⌉ are hidden (22 of 36 in the paper).
    """
    rows, cols = (ceil(side / config.mask_cell) for side in size)
    hidden = np.zeros(rows * cols, dtype=bool)
    order = np.random.default_rng(key).permutation(rows * cols)
    hidden[order[: ceil(ratio * len(order))]] = True
    cells = torch.from_numpy(hidden.reshape(1, rows, cols))
    height, width = (ceil(side / config.patch_size) for side in size)
    return upsample(cells, config.mask_cell // config.patch_size)[0, :height, :width]


def batch_masks(
    config: ModelConfig,
    ratio: float,
    batch: Batch,
    seed: int,
    step: int,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Tensor]:
    """Masks of all images of a batch, independent per image and modality.

    Args:
        config: gives patch and cell size.
        ratio: share of cells hidden.
        batch: its images say how many masks of which size.
        seed: of the run.
        step: number of this batch in the run.
        rank: of this process; it holds every `world`-th image of the whole batch.
        world: number of processes.
    """
    masks, image = {}, rank
    for name, images in batch.images.items():
        size = (images.shape[-2], images.shape[-1])
        numbers = range(image, image + len(images) * world, world)
        masks[name] = torch.stack(
            [random_mask(config, ratio, size, seed, step, n) for n in numbers]
        )
        image += len(images) * world
    return masks


def with_masks(
    batches: Iterator[Batch],
    config: ModelConfig,
    ratio: float,
    seed: int,
    step: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """The same batches, each carrying its masks in `targets["masks"]`; `step` is the first's."""
    for number, batch in enumerate(batches, start=step):
        batch.targets["masks"] = batch_masks(config, ratio, batch, seed, number, rank, world)
        yield batch
