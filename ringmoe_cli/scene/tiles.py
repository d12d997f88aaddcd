"""The tile store: one Zarr group per scene, the raster whole on its own grid.

    tiles.zarr/                    attributes: schema, scene names
      manifest.jsonl               one line per region, with a checksum
      <scene>/                     attributes: the scene's description and statistics
        image    (band, y, x)      raw values, never stretched
        valid    (y, x)            1 where every band holds a measurement
        windows  (tile_y, tile_x)  share of valid pixels per tile
        labels_<task> (y, x)       classes (255: ignore) or values (NaN: ignore)
        band, y, x, spatial_ref    CF coordinates; x and y are pixel centres

GDAL, QGIS, xarray and rioxarray open it in place. With shards it is Zarr v3 (GDAL from 3.13).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.errors import StoreError
from ringmoe_cli.scene.grid import ControlPoint, Grid, Window
from ringmoe_cli.scene.radiometry import to_physical
from ringmoe_cli.scene.scene import Band, Scene
from ringmoe_cli.scene.store.chunks import ChunkedArray

SCHEMA = 1
"""Version of the layout above."""

IGNORE = 255
"""Class of pixels that no label covers."""


@dataclass(frozen=True)
class LabelLayer:
    """What a label array means."""

    task: str
    """segmentation, depth or change."""
    classes: tuple[str, ...] = ()
    """Class names in index order; empty for values."""
    colours: tuple[tuple[int, int, int], ...] = ()
    """RGB per class; empty if the source has none."""
    unit: str = ""
    """Unit of values."""
    counts: tuple[int, ...] = ()
    """Labelled pixels per class (one number for values)."""
    value_range: tuple[float, float] = (0.0, 0.0)
    """Lowest and highest value (values only)."""

    @property
    def dtype(self) -> str:
        """Type of the array."""
        return "uint8" if self.classes else "float32"

    @property
    def array(self) -> str:
        """Name of the array in the scene's group."""
        return f"labels_{self.task}"

    @property
    def ignore(self) -> float:
        """Value of pixels without a label."""
        return IGNORE if self.classes else float("nan")


@dataclass(frozen=True)
class StoredScene:
    """One scene of a store; reads like a `SceneReader`, and can be pickled."""

    folder: Path
    """Folder of the scene's group."""
    scene: Scene
    """Its description; the bands' paths are gone, calibration has been applied."""
    tile_size: int
    """Side of a chunk in pixels."""
    statistics: Mapping[str, Mapping[str, float]]
    """Per channel (and `power_db` of sar-l1): count, mean, std, rms, min, max."""
    labels: Mapping[str, LabelLayer] = field(default_factory=dict)
    """Label arrays by task."""
    min_valid: float = 0.0
    """Windows with a smaller share of valid pixels are left out by the loader."""

    @property
    def name(self) -> str:
        """Name of the scene in its store."""
        return self.scene.name

    @property
    def modality(self) -> str:
        """Its modality."""
        return self.scene.modality

    @property
    def grid(self) -> Grid:
        """Where its pixels lie."""
        return self.scene.grid

    def read(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Raw values (bands, h, w) and validity (h, w); outside the scene zero and invalid."""
        raw = self._padded(self.image, window, 0)
        inside = self.grid.clip(window)
        if inside == window and self.tile_fractions(inside).min() == 1:
            return raw, np.ones((window.height, window.width), np.bool_)
        return raw, self._padded(self.valid, window, 0).astype(np.bool_)

    def tile_fractions(self, inside: Window) -> NDArray[np.float32]:
        """Shares of valid pixels of the tiles that a window inside the scene touches."""
        tile = self.tile_size
        rows = slice(inside.row // tile, -(-(inside.row + inside.height) // tile))
        cols = slice(inside.col // tile, -(-(inside.col + inside.width) // tile))
        return self.valid_fractions[rows, cols]

    def physical(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Physical channels (channels, h, w) and validity (h, w)."""
        raw, valid = self.read(window)
        return to_physical(raw, self.scene), valid

    def read_label(self, task: str, window: Window) -> NDArray[Any]:
        """Labels (h, w) of a window; outside the scene the ignore value."""
        layer = self.labels[task]
        return self._padded(self._label_arrays[task], window, layer.ignore)

    @cached_property
    def image(self) -> ChunkedArray:
        """The raw raster."""
        return ChunkedArray.of(self.folder, "image")

    @cached_property
    def valid(self) -> ChunkedArray:
        """The validity mask."""
        return ChunkedArray.of(self.folder, "valid")

    @cached_property
    def valid_fractions(self) -> NDArray[np.float32]:
        """Share of valid pixels per tile, (tiles down, tiles across)."""
        array = ChunkedArray.of(self.folder, "windows")
        return array.read(0, 0, *array.shape)

    @cached_property
    def _label_arrays(self) -> dict[str, ChunkedArray]:
        return {t: ChunkedArray.of(self.folder, x.array) for t, x in self.labels.items()}

    def _padded(self, array: ChunkedArray, window: Window, fill: float) -> NDArray[Any]:
        inside = self.grid.clip(window)
        if inside == window:
            return array.read(*window)
        out = np.full((*array.shape[:-2], window.height, window.width), fill, array.dtype)
        if inside.height and inside.width:
            row, col = inside.row - window.row, inside.col - window.col
            out[..., row : row + inside.height, col : col + inside.width] = array.read(*inside)
        return out


@dataclass(frozen=True)
class Store:
    """A finished tile store."""

    path: Path
    """Its folder."""
    scenes: tuple[StoredScene, ...]
    """In the order they were tiled."""

    def scenes_of(self, modality: str) -> tuple[StoredScene, ...]:
        """The scenes of one modality."""
        return tuple(s for s in self.scenes if s.modality == modality)


def open_store(path: str | Path) -> Store:
    """Open a finished store.

    Raises:
        StoreError: if it is missing, unfinished, or not a tile store.
    """
    path = Path(path)
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.part")
        hint = f"; {unfinished} is unfinished: run the same tile command again"
        raise StoreError(f"{path} does not exist{hint if unfinished.exists() else ''}")
    about = read_attributes(path)
    if "ringmoe_store" not in about:
        raise StoreError(f"{path} is not a tile store (make one with ringmoe tile)")
    if about["ringmoe_store"] != SCHEMA:
        raise StoreError(f"{path} has layout {about['ringmoe_store']}, not {SCHEMA}: tile it again")
    return Store(path, tuple(stored_scene(path / name) for name in about["scenes"]))


def stored_scene(folder: Path) -> StoredScene:
    """Open one scene's group.

    Raises:
        StoreError: if its attributes are not those of a scene.
    """
    about = read_attributes(folder)
    try:
        layers = {t: label_from_dict(v) for t, v in about["labels"].items()}
        return StoredScene(
            folder=folder,
            scene=scene_from_dict(about["scene"]),
            tile_size=about["tile_size"],
            statistics=about["statistics"],
            labels=layers,
            min_valid=about["min_valid"],
        )
    except (KeyError, TypeError) as error:
        raise StoreError(f"{folder} is not a scene of a tile store: {error}") from error


def is_store(folder: Path) -> bool:
    """Whether a folder is a Zarr group of either version."""
    return (folder / ".zgroup").is_file() or (folder / "zarr.json").is_file()


def read_attributes(folder: Path) -> dict[str, Any]:
    """Attributes of a Zarr group of either version.

    Raises:
        StoreError: if the folder is no such group.
    """
    if not is_store(folder):
        raise StoreError(f"{folder} is not a tile store (make one with ringmoe tile)")
    try:
        if (folder / "zarr.json").is_file():
            found = json.loads((folder / "zarr.json").read_text("utf-8"))["attributes"]
        else:
            found = json.loads((folder / ".zattrs").read_text("utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{folder}: attributes cannot be read ({error})") from error
    return dict(found)


def scene_to_dict(scene: Scene) -> dict[str, Any]:
    """Plain values of a scene, without paths, for a store's attributes."""
    about = asdict(scene)
    for band in about["bands"]:
        band["measured"] = bool(band.pop("path"))
        for key in ("index", "zoom", "calibration"):
            band.pop(key)
    for key in ("mask", "mask_out", "corner"):
        about.pop(key)
    return about


def scene_from_dict(about: Mapping[str, Any]) -> Scene:
    """Inverse of `scene_to_dict`; measured bands get the path `store`."""
    bands = tuple(
        Band(
            path="store" if b["measured"] else "", **{k: v for k, v in b.items() if k != "measured"}
        )
        for b in about["bands"]
    )
    grid = dict(about["grid"])
    grid["transform"] = tuple(grid["transform"])
    grid["gcps"] = tuple(ControlPoint(*p) for p in grid["gcps"])
    plain = {**about, "bands": bands, "grid": Grid(**grid), "notes": tuple(about["notes"])}
    return Scene(**plain)


def label_from_dict(about: Mapping[str, Any]) -> LabelLayer:
    """Inverse of `dataclasses.asdict` for label layers."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about.items()}
    plain["colours"] = tuple(tuple(c) for c in about["colours"])
    return LabelLayer(**plain)
