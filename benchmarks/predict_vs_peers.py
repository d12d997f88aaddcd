"""The same network through this project's pipeline and through TerraTorch's tiled inference.

    python benchmarks/predict_vs_peers.py [--size 8192] [--terratorch VENV/bin/python]

A Swin V2 tiny encoder with random weights (timm's where timm is installed, else that of
transformers) and a 1 x 1 head predict a scene of 3 bands in windows of 256 pixels with a quarter of
overlap. Either side runs in a process of its own, from the scene on disk to a class map on disk;
its seconds and its own peak memory are printed, beside the forward time of the same windows alone.
Without `--terratorch` (or $TERRATORCH_PYTHON), the interpreter of an environment of its own that
has terratorch, that side is skipped.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WINDOW, OVERLAP, BATCH, CLASSES = 256, 64, 4, 3


def swin_segmenter() -> Any:
    """Swin V2 tiny and a linear head: (B, 3, 256, 256) -> (B, CLASSES, 256, 256) logits."""
    import torch
    from torch import nn

    torch.manual_seed(0)

    class Timm(nn.Module):
        def __init__(self, timm: Any) -> None:
            super().__init__()
            self.encoder = timm.create_model("swinv2_tiny_window8_256", features_only=True)

        def forward(self, x: Any) -> Any:
            return self.encoder(x)[-1].permute(0, 3, 1, 2)

    class Transformers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from transformers import Swinv2Config, Swinv2Model

            config = Swinv2Config(image_size=WINDOW, window_size=8, depths=[2, 2, 6, 2])
            self.encoder = Swinv2Model(config, add_pooling_layer=False)

        def forward(self, x: Any) -> Any:
            tokens = self.encoder(x).last_hidden_state  # (B, 64, 768)
            side = WINDOW // 32
            return tokens.transpose(1, 2).reshape(len(x), -1, side, side)

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            try:
                import timm

                self.features: nn.Module = Timm(timm)
            except ImportError:
                self.features = Transformers()
            self.head = nn.Conv2d(768, CLASSES, 1)

        def forward(self, x: Any) -> Any:
            logits = self.head(self.features(x))
            return nn.functional.interpolate(logits, scale_factor=32, mode="bilinear")

    return Segmenter().eval()


def ours(scene: Path, output: Path) -> None:
    """Map the scene with this project's pipeline."""
    from model.batch import Batch, Prediction
    from model.config import TaskConfig
    from model.normalisation import Normalisation
    from ringmoe_cli.jobs.answers import Settings
    from ringmoe_cli.jobs.prediction import Job, predict_scene
    from ringmoe_cli.machine import use_memory_steadily
    from ringmoe_cli.scene.maps.product import ClassMap
    from ringmoe_cli.scene.maps.strips import Normalised
    from ringmoe_cli.scene.reader import SceneReader
    from ringmoe_cli.scene.sensors import open_scene

    use_memory_steadily()
    network = swin_segmenter()
    mark("loaded")

    class Network:
        def predict(self, batch: Batch) -> Prediction:
            return Prediction(dense=network(batch.images["opt"][:, 0]).softmax(1))

    task = TaskConfig("segmentation", ("a", "b", "c"), (), ("opt",), window=WINDOW)
    norm = Normalisation(("red", "green", "blue"), (0.1,) * 3, (0.05,) * 3)
    source = Normalised([{"opt": SceneReader(open_scene(str(scene)))}], {"opt": norm})
    settings = Settings(WINDOW, OVERLAP, BATCH)
    predict_scene(Job(Network(), source, ClassMap(task), settings), {"classes": output})


def theirs(scene: Path, output: Path) -> None:
    """Map the scene with TerraTorch's `tiled_inference`, as its users call it."""
    import rasterio
    import torch
    from terratorch.tasks.tiled_inference import tiled_inference

    network = swin_segmenter()
    mark("loaded")
    with rasterio.open(scene) as src:
        values, profile = src.read().astype(np.float32), src.profile
    values = (values * np.float32(1e-4) - np.float32(0.1)) / np.float32(0.05)
    with torch.inference_mode():
        answer = tiled_inference(
            network, torch.from_numpy(values)[None], CLASSES, h_crop=WINDOW, w_crop=WINDOW,
            h_stride=WINDOW - OVERLAP, w_stride=WINDOW - OVERLAP, batch_size=BATCH,
        )  # fmt: skip
    classes = answer.argmax(1).numpy().astype(np.uint8)
    cog = {"driver": "COG", "count": 1, "dtype": "uint8", "nodata": 255, "compress": "deflate"}
    with rasterio.open(output, "w", **{**profile, **cog}) as dst:
        dst.write(classes)


def mark(name: str) -> None:
    """Say how much memory and time it has taken to here."""
    status = Path("/proc/self/status").read_text()
    found = {k: int(status.split(f"{k}:")[1].split()[0]) // 1024 for k in ("VmHWM", "VmRSS")}
    print(json.dumps({"at": name, "peak_mb": found["VmHWM"], "rss_mb": found["VmRSS"]}), flush=True)


def run(python: str, side: str, scene: Path, output: Path) -> None:
    """One side in a process of its own."""
    start = time.perf_counter()
    command = [python, __file__, "--side", side, "--scene", str(scene), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        print(f"{side}: failed: {' '.join(last)}")
        return
    marks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(json.dumps({
        "side": side, "seconds": round(seconds, 1), "peak_mb": marks[-1]["peak_mb"],
        "loaded_mb": marks[0]["rss_mb"], "load": round(os.getloadavg()[0], 1),
    }), flush=True)  # fmt: skip


def forward_seconds(size: int, most: float = 30) -> tuple[float, int]:
    """Seconds of the forward pass alone over all windows (from up to `most` timed), and windows."""
    import torch

    network = swin_segmenter()
    side = -(-(size - WINDOW) // (WINDOW - OVERLAP)) + 1
    x = torch.randn(BATCH, 3, WINDOW, WINDOW)
    with torch.inference_mode():
        network(x)
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < most and done * BATCH < side**2:
            network(x).softmax(1)
            done += 1
    return (time.perf_counter() - start) / done / BATCH * side**2, side**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--terratorch", default=os.environ.get("TERRATORCH_PYTHON"))
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--scene", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        {"ours": ours, "theirs": theirs}[given.side](given.scene, given.output)
        mark("done")
        return
    from predict_pipeline import make_cog

    with tempfile.TemporaryDirectory() as name:
        scene = Path(name, "scene.tif")
        make_cog(scene, given.size, 3)
        seconds, windows = forward_seconds(given.size)
        print(
            json.dumps({"side": "forward alone", "seconds": round(seconds, 1), "windows": windows})
        )
        run(sys.executable, "ours", scene, Path(name, "ours.tif"))
        if given.terratorch:
            run(given.terratorch, "theirs", scene, Path(name, "theirs.tif"))
        else:
            print("terratorch: skipped, no environment given (--terratorch VENV/bin/python)")


if __name__ == "__main__":
    main()
