"""The encoder with a task head on it."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapt import insert_convpass
from model.batch import Batch, Features, Prediction
from model.checkpoint import CheckpointConfig, load_module, read_config
from model.config import ModelConfig, TaskConfig
from model.decoders import Detail
from model.encoder import Encoding, RingMoE
from model.modality import MODALITIES
from model.router import LayerRouting, balance_loss
from model.stream import load_in_integers, stream_blocks
from model.tasks import TASKS
from model.tasks.classification import pooled


@dataclass
class TaskOutput:
    """One training step's losses."""

    loss: Tensor
    """What is minimised: task + balance_weight·balance."""
    task: Tensor
    """The head's own loss."""
    balance: Tensor
    """Balance loss summed over blocks, before its weight (RingMoE Eq. 4-6)."""
    routing: list[LayerRouting]
    """One per block."""

    @property
    def parts(self) -> dict[str, Tensor]:
        """What to log besides the loss; `balance` is 1 per routed branch when balanced."""
        branches = sum(bool(layer.branches) for layer in self.routing)
        return {"task": self.task, "balance": self.balance / max(branches, 1)}


class TaskNetwork(nn.Module):
    """Encoder, fusion of the modalities present, head.

    Co-registered modalities go through their own experts of the shared encoder and are averaged,
    stage by stage, over those that see the place: a modality may be missing as a whole, in some
    samples, or under a cloud mask.
    """

    def __init__(
        self,
        encoder: RingMoE,
        task: TaskConfig,
        *,
        balance_weight: float = 0.004,
        modality_dropout: float = 0.0,
    ) -> None:
        """Put a head with random weights on an encoder.

        Args:
            encoder: its modalities must contain the task's.
            task: the head and what it says.
            balance_weight: weight of the routers' balance loss while the encoder trains.
            modality_dropout: chance, per training sample, to hide all modalities but one.

        Raises:
            ValueError: for an unknown task or a modality the encoder lacks.
        """
        super().__init__()
        if task.name not in TASKS:
            raise ValueError(f"unknown task {task.name!r}; choose from {', '.join(TASKS)}")
        reads = encoder.config.modalities
        missing = [m for m in task.modalities if m not in reads]
        if missing:
            raise ValueError(f"the model reads {', '.join(reads)}, not {missing[0]}")
        self.task = task
        self.balance_weight = balance_weight
        self.modality_dropout = modality_dropout
        self.encoder = encoder
        self.head = TASKS[task.name](task, encoder.config.widths)
        self.details = nn.ModuleDict()
        if task.detail and self.head.detailed:
            for m in task.modalities:
                polarimetric = MODALITIES[m].polarimetric
                self.details[m] = Detail(encoder.config.channels[m], task.detail, polarimetric)

    @property
    def config(self) -> ModelConfig:
        """Sizes of the encoder."""
        return self.encoder.config

    def present(self, batch: Batch) -> tuple[str, ...]:
        """The task's modalities that are in the batch, in the task's order.

        Raises:
            ValueError: if there is none.
        """
        names = tuple(m for m in self.task.modalities if m in batch.images)
        if not names:
            raise ValueError(
                f"this model reads {', '.join(self.task.modalities)}; "
                f"the input has {', '.join(batch.images) or 'nothing'}"
            )
        return names

    def encode(self, batch: Batch) -> Encoding:
        """Features (B·T, ...) of every present modality; row b·T + t is date t of sample b."""
        names = self.present(batch)
        learns = any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return self.encoder.encode(
                {m: batch.images[m].flatten(0, 1) for m in names},
                valid={m: batch.valid[m].flatten(0, 1) for m in names if m in batch.valid} or None,
                channels={
                    m: batch.channels[m].repeat_interleave(batch.images[m].shape[1], 0)
                    for m in names
                    if m in batch.channels
                }
                or None,
            )

    def answer(self, features: dict[str, Features], batch: Batch) -> object:
        """The head's raw output from the modalities' features."""
        first = batch.images[next(iter(features))]
        fused = self.fused(features, batch)
        return self.head(fused, (first.shape[-2], first.shape[-1]))

    def fused(self, features: dict[str, Features], batch: Batch) -> Features:
        """The maps the head reads: each stage's mean over the modalities that see the place."""
        weights = {m: self.weight(m, batch) for m in features}
        if self.training and self.modality_dropout and len(weights) > 1:
            weights = hide_modalities(weights, self.modality_dropout)
        if self.details:
            features = {m: [*f, self.pixels(m, batch)] for m, f in features.items()}
        kind = next(self.head.parameters()).dtype
        return [stage.to(kind) for stage in fuse(features, weights)]

    @torch.no_grad()
    def embed(self, batch: Batch) -> Tensor:
        """Means and deviations over space of what the head reads, (B·T, 2·ΣC)."""
        return pooled(self.fused(self.encode(batch).features, batch))

    def pixels(self, modality: str, batch: Batch) -> Tensor:
        """What a modality's pixels say past the encoder, (B·T, detail, H, W)."""
        image = batch.images[modality]
        if modality in batch.channels:
            image = image * batch.channels[modality][:, None, :, None, None].to(image.dtype)
        detail: Tensor = self.details[modality](image.flatten(0, 1))
        return detail

    def weight(self, modality: str, batch: Batch) -> Tensor:
        """1 where the modality has a valid pixel, (B·T, 1, H, W) float."""
        if modality in batch.valid:
            return batch.valid[modality].flatten(0, 1).float()
        return torch.ones_like(batch.images[modality].flatten(0, 1)[:, :1])

    def forward(self, batch: Batch) -> object:
        """The head's raw output, as its `loss` and `predict` want it."""
        return self.answer(self.encode(batch).features, batch)

    def loss(self, batch: Batch) -> TaskOutput:
        """Losses of a labelled batch."""
        encoding = self.encode(batch)
        task = self.head.loss(self.answer(encoding.features, batch), batch)
        balance = balance_loss(encoding.routing)
        loss = task + self.balance_weight * balance if balance.requires_grad else task
        return TaskOutput(loss, task, balance, encoding.routing)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """What the task says about the batch (call `eval()` first)."""
        return self.head.predict(self(batch))


def fuse(features: dict[str, Features], weights: dict[str, Tensor]) -> Features:
    """Mean over modalities per stage and token, counting those with a valid pixel under the token.

    Args:
        features: modality -> four stages (B, C, h, w).
        weights: modality -> (B, 1, H, W), positive where it is valid.
    """
    if len(features) == 1:
        return next(iter(features.values()))
    stages = []
    for s in range(len(next(iter(features.values())))):
        maps = [f[s] for f in features.values()]
        size = maps[0].shape[-2:]
        seen = [(F.adaptive_max_pool2d(weights[m], size) > 0).to(maps[0].dtype) for m in features]
        total = sum(x * w for x, w in zip(maps, seen, strict=True))
        stages.append(total / sum(seen).clamp(min=1))  # type: ignore[union-attr]
    return stages


def hide_modalities(weights: dict[str, Tensor], chance: float) -> dict[str, Tensor]:
    """With some chance per sample, keep one modality at random and weigh the others 0."""
    names = list(weights)
    first = weights[names[0]]
    alone = torch.rand(len(first), device=first.device) < chance
    kept = torch.randint(len(names), (len(first),), device=first.device)
    return {
        m: w * (~alone | (kept == i)).float().view(-1, 1, 1, 1)
        for i, (m, w) in enumerate(weights.items())
    }


def load_task_network(
    path: Path | str, streamed: bool = False, int8: bool = False, bf16: bool = False
) -> tuple[TaskNetwork, CheckpointConfig]:
    """A fine-tuned network in eval mode, and what its checkpoint says about it.

    Only the task's modalities are read, straight into memory in the checkpoint's dtypes.

    Args:
        path: the checkpoint.
        streamed: leave the encoder's blocks on disk; each is fetched when it is called.
        int8: round the experts to 8-bit integers as they are read; for inference on a CPU.
        bf16: the encoder becomes bfloat16; the head takes features in its own precision.

    Raises:
        ValueError: if the checkpoint is none, damaged, or has no task head.
    """
    config = read_config(path)
    if config.task is None:
        raise ValueError(
            f"{path} has an encoder but no task head; run `ringmoe finetune --init {path}` first"
        )
    with torch.device("meta"):
        encoder = RingMoE(config.model.with_modalities(config.task.modalities))
        insert_convpass(encoder, config.task.adapter)
    network = TaskNetwork(encoder, config.task)
    if streamed:
        stream_blocks(network, path)
    elif int8:
        load_in_integers(network, path, bf16=bf16)
    else:
        load_module(path, network)
    if bf16:
        network.encoder.bfloat16()
    return network.eval(), config
