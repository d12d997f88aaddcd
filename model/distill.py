"""Distillation: a pruned encoder learns its parent's features on unlabelled chips."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from model.batch import Features
from model.encoder import RingMoE
from model.optim import adamw, learning_rate

WARMUP = 20
CLIP = 5.0


def feature_loss(student: Mapping[str, Features], parent: Mapping[str, Features]) -> Tensor:
    """Mean over modalities and stages of the squared error over the parent's variance."""
    losses = [
        (found - wanted).square().mean() / wanted.var().clamp(min=1e-6)
        for name, stages in parent.items()
        for found, wanted in zip(student[name], stages, strict=True)
    ]
    return torch.stack(losses).mean()


def distill(
    student: RingMoE,
    parent: RingMoE,
    batches: Iterable[Mapping[str, Tensor]],
    steps: int,
    rate: float = 2e-4,
    on_step: Callable[[float], None] = lambda _: None,
) -> None:
    """Train a student on its parent's four stage maps.

    Args:
        student: changed in place; the modalities it has are learnt.
        parent: has at least those.
        batches: modality -> (B, C, H, W) normalised, at least `steps` of them.
        steps: updates; linear warm-up, then cosine to 1 % of the rate.
        rate: largest learning rate of AdamW.
        on_step: called with the loss of every step.
    """
    optimiser = adamw(student, rate, weight_decay=0.0)
    student.train()
    for step, images in zip(range(steps), batches, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, rate, rate / 100, min(WARMUP, steps // 5))
        with torch.no_grad():
            wanted = parent(images)
        loss = feature_loss(student(images), wanted)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimiser.step()
        on_step(loss.item())
    student.eval()
