"""Tasks: one file per head, one line per head here.

A head (`model.tasks.head.Head`) is an `nn.Module` built as `SomeHead(task, widths)` with

    forward(features, size) -> output      features: 4 × (B·T, C·2^s, h, w), row b·T + t
    loss(output, batch) -> Tensor          batch.targets: "classes", "values" or "boxes"
    predict(output) -> Prediction          dense, scores or boxes
    metric() -> Metric                     update(prediction, batch); compute() -> dict

and class attributes `dates` (T: 1, 2 for change, 0 for any) and `score` (the metric's main key).
`model.tasks.network.TaskNetwork` puts it on the encoder. A new task is one file, one line in
`TASKS`, one recipe and one test case.
"""

from model.tasks.change import Change
from model.tasks.classification import Classification
from model.tasks.depth import Depth
from model.tasks.detection import Detection
from model.tasks.head import Head
from model.tasks.segmentation import Segmentation
from model.tasks.tracking import Tracking

TASKS: dict[str, type[Head]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "change": Change,
    "depth": Depth,
    "detection": Detection,
    "tracking": Tracking,
}
"""Task name -> head."""
