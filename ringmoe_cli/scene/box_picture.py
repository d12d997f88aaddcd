"""Boxes over an image: what was labelled, what was found."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.boxes import Boxes
from ringmoe_cli.scene.picture import INK, new_figure, quicklook, save, thinned

LABELLED, FOUND = "#38c172", "#ff5533"
"""Colours of the outlines."""


def save_boxes(path: Path, values: NDArray[np.float32], found: Boxes, truth: Boxes) -> None:
    """One picture: labelled outlines in green, found ones in red with their score.

    Args:
        path: a PNG file.
        values: (C, H, W) bands of the image.
        found: predicted boxes in its pixels.
        truth: labelled boxes.
    """
    height, width = values.shape[1:]
    figure = new_figure(7, 7 * height / width + 0.4)
    axes = figure.subplots()
    axes.imshow(quicklook(thinned(values)), extent=(0, width, height, 0))
    for boxes, colour, scored in ((truth, LABELLED, False), (found, FOUND, True)):
        for outline, score in zip(boxes.polygons().tolist(), boxes.scores.tolist(), strict=True):
            x, y = zip(*outline, outline[0], strict=True)
            axes.plot(x, y, color=colour, linewidth=1)
            if scored:
                axes.text(x[0], y[0], f"{score:.2f}", color=colour, fontsize=5, va="bottom")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    title = f"{len(truth)} labelled (green), {len(found)} found (red)"
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    save(figure, path)
