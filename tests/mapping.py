"""A small segmentation model, scenes and networks with known answers, for tests of prediction."""

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine

from model.batch import Prediction
from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.config import ModelConfig, TaskConfig
from model.encoder import RingMoE
from model.normalisation import Normalisation
from model.tasks.network import TaskNetwork
from ringmoe_cli.jobs.answers import Settings, predict_rows
from ringmoe_cli.jobs.prediction import Job, predict_scene
from ringmoe_cli.scene.maps.strips import Normalised
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.sensors import open_scene

BANDS = ("blue", "green", "red", "nir")
NORM = Normalisation(BANDS, (0.1, 0.1, 0.1, 0.3), (0.05, 0.05, 0.05, 0.1))
CLASSES = ("water", "trees", "bare")
COLOURS = ((0, 0, 255), (0, 128, 0), (200, 180, 120))
TASK = TaskConfig("segmentation", CLASSES, COLOURS, ("ms",), window=32, channels=16)
CONFIG = ModelConfig(
    embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), image_size=32, window=4,
    channels={"ms": 4}, mask_cell=16,
)  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A segmentation checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    net = TaskNetwork(RingMoE(CONFIG), TASK)
    config = CheckpointConfig(CONFIG, "task", {"ms": NORM}, {"ms": 10.0}, TASK)
    save_checkpoint(folder, config, disk_tensors(net))
    return folder


def write_scene(path, height=70, width=100, names=BANDS, crs="EPSG:32630", hole=True, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 4000, (len(names), height, width)).astype(np.uint16)
    if hole:
        values[:, :20, :30] = 0
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=len(names), dtype="uint16",
        nodata=0, crs=crs, transform=Affine(10, 0, 500000, 0, -10, 5000000),
    ) as dst:  # fmt: skip
        dst.write(values)
        if all(names):
            dst.descriptions = names
        dst.scales = (1e-4,) * len(names)
    return path


@pytest.fixture
def scene(tmp_path):
    return write_scene(tmp_path / "scene.tif")


class Brightness:
    """A network whose answer is known: the first band's value as probability of class 1."""

    calls = 0

    def predict(self, batch):
        self.calls += 1
        x = torch.sigmoid(batch.images["ms"][:, 0, :1])
        return Prediction(dense=torch.cat([1 - x, x, x * 0], 1))


class Constant:
    def predict(self, batch):
        b, _, _, h, w = batch.images["ms"].shape
        return Prediction(dense=torch.tensor([0.2, 0.7, 0.1]).view(1, 3, 1, 1).expand(b, 3, h, w))


def normalised(path):
    return Normalised([{"ms": SceneReader(open_scene(path))}], {"ms": NORM})


def whole(network, source, **changes):
    settings = Settings(**{"window": 32, "overlap": 8, "batch": 3, **changes})
    rows = [(r.dense.copy(), r.valid) for r in predict_rows(network, source, settings, 3)]
    return np.concatenate([d for d, _ in rows], 1), np.concatenate([v for _, v in rows])


def outputs(tmp_path):
    return {"classes": tmp_path / "m.tif"}


class Stops(Brightness):
    """Fails after some batches, as a machine does."""

    def __init__(self, after):
        self.after = after

    def predict(self, batch):
        if self.calls >= self.after:
            raise KeyboardInterrupt
        return super().predict(batch)


def mapped(network, source, product, outputs, settings, original=None, **more):
    return predict_scene(Job(network, source, product, settings, original), outputs, **more)
