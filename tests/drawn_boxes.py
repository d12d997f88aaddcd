"""Bright rectangles on noise, still or moving: pictures a detector must be able to learn."""

import math

import torch

from model.batch import Batch
from model.boxes import Boxes
from model.config import ModelConfig, TaskConfig
from model.encoder import RingMoE
from model.tasks.network import TaskNetwork

SMALL = {
    "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "image_size": 64,
    "window": 8, "channels": {"opt": 3}, "specialised": 2, "collaborative": 2,
}  # fmt: skip


def network(name, rotated=False):
    torch.manual_seed(0)
    task = TaskConfig(
        name, ("car", "ship"), modalities=("opt",), window=64, rotated=rotated, channels=32
    )
    return TaskNetwork(RingMoE(ModelConfig(**SMALL)), task)


def paint(image, box, label):
    """Fill a rotated rectangle of a (3, H, W) image with the colour of its class."""
    height, width = image.shape[1:]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    cx, cy, w, h, a = box.tolist()
    u = math.cos(a) * (x - cx) + math.sin(a) * (y - cy)
    v = math.cos(a) * (y - cy) - math.sin(a) * (x - cx)
    inside = (u.abs() < w / 2) & (v.abs() < h / 2)
    image[label, inside], image[2, inside] = 2.0, -1.0


def picture(g, places, rotated):
    """One image and its boxes; longer than wide, so that the angle can be seen."""
    image, rows, labels = torch.randn(3, 64, 64, generator=g) * 0.2, [], []
    for x, y in places:
        length, wide = 14 + 6 * torch.rand(2, generator=g)
        angle = (torch.rand(1, generator=g) - 0.5) * math.pi * rotated
        rows.append(torch.tensor([x, y, length + 4, wide - 6, float(angle)]))
        labels.append(int(torch.randint(0, 2, (1,), generator=g)))
        paint(image, rows[-1], labels[-1])
    return image, Boxes(torch.stack(rows), labels=torch.tensor(labels))


def still(count=4, rotated=False, seed=0):
    """A batch of images with two rectangles each."""
    g = torch.Generator().manual_seed(seed)
    pictures = [picture(g, [(18, 20), (44, 43)], rotated) for _ in range(count)]
    images = torch.stack([image for image, _ in pictures])
    return Batch({"opt": images[:, None]}, targets={"boxes": [boxes for _, boxes in pictures]})


def clip(frames=6, seed=0):
    """Pairs of frames: two small objects move, two that look the same stand and have no label."""
    g = torch.Generator().manual_seed(seed)
    background = torch.randn(3, 64, 64, generator=g) * 0.2
    images, truth = [], []
    for t in range(frames):
        image = background.clone()
        for still_box in ([15.0, 50, 6, 4, 0], [50.0, 12, 6, 4, 0]):
            paint(image, torch.tensor(still_box), 0)
        moving = torch.tensor([[8.0 + 7 * t, 20, 6, 4, 0], [56.0 - 7 * t, 36, 6, 4, 0]])
        for box in moving:
            paint(image, box, 0)
        images.append(image)
        truth.append(Boxes(moving, tracks=torch.tensor([0, 1])))
    pairs = torch.stack(images).view(-1, 2, 3, 64, 64)
    keys = [f"clip:{t}:{t + 1}" for t in range(0, frames, 2)]
    return Batch({"opt": pairs}, targets={"boxes": truth}, keys=keys)


def fit(model, batch, steps, rate=4e-3):
    """Minimise the loss of one batch; the last loss."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        output = model.loss(batch)
        optimiser.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        schedule.step()
    return float(output.task.detach())


def score(model, batch):
    """The task's metric on a batch."""
    model.eval()
    metric = model.head.metric()
    metric.update(model.predict(batch), batch)
    return metric.compute()
