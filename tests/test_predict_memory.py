"""Memory of the pipeline, without a model's own: bounded at full width, flat in height."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mapping import write_scene

SCRIPT = """
import sys
from pathlib import Path
from ringmoe_cli.machine import use_memory_steadily
use_memory_steadily()
from dataclasses import replace
from mapping import TASK, mapped, normalised
import torch
from model.batch import Prediction
from ringmoe_cli.jobs.answers import Settings
from ringmoe_cli.scene.maps.product import ClassMap

class Eight:
    def predict(self, batch):
        x = batch.images["ms"][:, 0]
        return Prediction(dense=torch.cat([x, x], 1).softmax(1))

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

source = normalised(sys.argv[1])
before = peak()
product = ClassMap(replace(TASK, classes=tuple("abcdefgh"), colours=()), True)
folder = Path(sys.argv[2])
outputs = {"classes": folder / "c.tif", "probabilities": folder / "p.tif"}
mapped(Eight(), source, product, outputs, Settings.of(192))
print(before, peak())
"""


@pytest.mark.slow
def test_memory_is_bounded_at_full_width_and_flat_in_height(tmp_path):
    """8 classes with probabilities, 10980 columns; the rest of 600 MB is for the model at work."""
    peaks = []
    for height in (1000, 3500):
        folder = tmp_path / str(height)
        folder.mkdir()
        path = write_scene(folder / "s.tif", height, 10980)
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path), str(folder)],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        before, peak = map(int, done.stdout.split()[-2:])
        peaks.append(peak - before)
    assert peaks[1] < 480
    assert peaks[1] - peaks[0] < 60  # GDAL's cache of 64 MB fills first
