"""k-NN probe: what an encoder's features know, without training anything."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch
from model.checkpoint import read_config
from model.metrics import IGNORE, ConfusionMatrix
from model.tasks.classification import pooled
from ringmoe_cli.errors import CheckpointError, LabelError
from ringmoe_cli.jobs.finetuning import FinetuneRequest, starting_point
from ringmoe_cli.jobs.taskdata import DataRequest, Windows, open_task_data
from ringmoe_cli.recipe import FinetuneRecipe

TEMPERATURE = 0.07
"""Votes are weighted by exp(similarity / T) (Wu et al. 2018)."""


def knn_probe(
    data: DataRequest,
    model: Path,
    k: int,
    device: str = "cpu",
    across: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Classify held-out windows by their nearest training windows in feature space.

    A window of a dense label map stands for the class most of its pixels have.

    Args:
        data: labelled windows; the training part is the memory, the held-out part is asked.
        model: any checkpoint; its encoder is used as it is.
        k: neighbours that vote.
        device: where to compute.
        across: (modality of the memory, modality of the question) of co-registered data; the
            features are standardised per modality, so that only what varies counts.

    Raises:
        CheckpointError: if the checkpoint lacks a modality of the data.
    """
    config = read_config(model).model
    data = replace(data, size=data.size or config.image_size)
    found = open_task_data(data)
    if not found.classes:
        raise LabelError("a k-NN probe needs classes")
    request = FinetuneRequest(data, model, FinetuneRecipe(), init=model)
    encoder, normalisation = starting_point(request, found)
    encoder.eval().to(device)
    found.training.normalisation = found.held_out.normalisation = normalisation
    remembered, asked = across or (None, None)
    have = found.training.channels
    for name in across or ():
        if name not in have:
            raise CheckpointError(f"the data has no {name}; it has {', '.join(have)}")

    def embedded(windows: Windows, modality: str | None) -> tuple[Tensor, Tensor]:
        parts = [embed(encoder, b.to(device), modality) for b in windows.once(32)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    memory, classes = embedded(found.training, remembered)
    usual = memory if asked == remembered else embedded(found.training, asked)[0]
    question, truth = embedded(found.held_out, asked)
    likeness = standard(question, usual) @ standard(memory, memory).T
    votes = vote(likeness, classes, min(k, len(memory)), len(found.classes))
    confusion = ConfusionMatrix(len(found.classes))
    confusion.update(votes.argmax(1), truth)
    scores = confusion.compute()
    return {**scores, "task": "k-NN probe", "k": k, "class_names": found.classes}


@torch.no_grad()
def embed(encoder: Any, batch: Batch, modality: str | None) -> tuple[Tensor, Tensor]:
    """Features (B, 2·ΣC) of one modality or the mean of all, and a class per window."""
    images = {m: x[:, 0] for m, x in batch.images.items() if modality in (None, m)}
    valid = {m: v[:, 0] for m, v in batch.valid.items() if m in images}
    features = encoder.encode(images, valid=valid).features
    x = torch.stack([pooled(f) for f in features.values()]).mean(0)
    truth = batch.targets["classes"]
    return x, truth if truth.ndim == 1 else torch.stack([majority(t) for t in truth])


def standard(x: Tensor, usual: Tensor) -> Tensor:
    """Rows of length one of features (N, F) standardised as (M, F) training features are.

    Without it the few features that vary most decide alone which neighbour is near.
    """
    return F.normalize((x - usual.mean(0)) / (usual.std(0) + 1e-6))


def majority(labels: Tensor) -> Tensor:
    """The class most labelled pixels of a window have."""
    return labels[labels != IGNORE].mode().values


def vote(similarity: Tensor, classes: Tensor, k: int, count: int) -> Tensor:
    """(Q, K) votes of the k most similar of (Q, N), weighted by similarity."""
    nearest = similarity.topk(k, 1)
    weight = (nearest.values / TEMPERATURE).exp()
    votes = torch.zeros(len(similarity), count, device=similarity.device)
    return votes.scatter_add_(1, classes[nearest.indices], weight)
