"""Cloud and quality masks: pixels that a scene has, but that should not be mapped."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.maps.strips import Readable
from ringmoe_cli.scene.raster import grid_of, numpy_type, open_raster
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.scene import Band, Scene


class Masked:
    """A scene without the pixels that a mask marks; reads like the reader it wraps."""

    def __init__(self, reader: Readable, mask: SceneReader, values: tuple[int, ...]) -> None:
        """Wrap a reader; `values` of the mask are left out, or all but 0 where none are given."""
        self.reader, self.mask, self.values = reader, mask, values
        told = f"mask {mask.scene.bands[0].path}:{mask.scene.bands[0].index}={values}"
        self.scene: Scene = replace(reader.scene, notes=(*reader.scene.notes, told))

    def physical(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Physical channels and validity of a window."""
        values, valid = self.reader.physical(window)
        marks = self.mask.read(window)[0][0]
        hit = np.isin(marks, self.values) if self.values else marks != 0
        return values, valid & ~hit

    def close(self) -> None:
        """Close the files."""
        self.mask.close()
        self.reader.close()  # type: ignore[attr-defined]


def masked(reader: Readable, scene: Scene, text: str, allow_remote: bool = False) -> Masked:
    """A scene with `--mask` applied.

    Args:
        reader: reads the bands that the model wants.
        scene: all bands of the file.
        text: a file or a band's name, and after `=` the values to leave out (else: not 0).
        allow_remote: let GDAL use the network.

    Raises:
        SceneError: if there is no such file or band, or it does not lie on the scene's pixels.
    """
    name, _, listed = text.partition("=")
    try:
        values = tuple(int(v) for v in listed.split(",") if v)
    except ValueError as error:
        raise SceneError(f"--mask {text}: write FILE or BAND, or FILE=3,8,9") from error
    band = next((b for b in scene.bands if b.name == name), None)
    if band is None and not Path(name).exists():
        have = ", ".join(scene.band_names)
        raise SceneError(f"--mask {name} is neither a file nor a band of {scene.name} ({have})")
    mask = (
        replace(scene, bands=(band,), mask=None, notes=())
        if band
        else mask_scene(name, scene.grid, allow_remote)
    )
    return Masked(reader, SceneReader(mask, allow_remote=allow_remote), values)


def mask_scene(path: str, grid: Grid, allow_remote: bool) -> Scene:
    """The first band of a file, on the pixels of a scene or on whole multiples of them."""
    with open_raster(path, allow_remote=allow_remote) as dataset:
        own, dtype = grid_of(dataset), numpy_type(dataset.dtypes[0])
    zoom = max(1, round(grid.height / own.height))
    if (own.height * zoom, own.width * zoom) != (grid.height, grid.width):
        raise SceneError(
            f"--mask {path} has {own.height} x {own.width} pixels, the scene {grid.height} x "
            f"{grid.width}; warp it to the scene's grid"
        )
    return Scene("mask", "ms", (Band("mask", path, 1, zoom=zoom),), grid, dtype, "dn")
