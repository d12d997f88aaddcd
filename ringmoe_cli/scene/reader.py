"""Windows of a scene: raw values and validity, from however many files it has."""

import threading
from collections.abc import Mapping
from itertools import groupby
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.errors import BadBlockError
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.radiometry import calibrate, to_physical, valid_pixels
from ringmoe_cli.scene.raster import SAFE_OPTIONS, open_raster
from ringmoe_cli.scene.scene import Band, Scene


class SceneReader:
    """Reads windows of a scene from any thread; each thread has its own file handles.

    Can be pickled (the handles stay behind). Close it, or use it as a context manager.
    """

    def __init__(self, scene: Scene, *, allow_remote: bool = False) -> None:
        self.scene = scene
        self.allow_remote = allow_remote
        self._start()

    def _start(self) -> None:
        self._local = threading.local()
        self._opened: list[Any] = []
        self._lock = threading.Lock()

    def read(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Raw values (bands, h, w) and validity (h, w) of a window.

        Pixels outside the scene are zero and invalid. Calibrated products come calibrated.

        Raises:
            BadBlockError: if a block cannot be decoded; it names file, band and window.
        """
        inside = self.scene.grid.clip(window)
        shape = (window.height, window.width)
        if inside == window:
            return self._read_inside(window)
        values = np.zeros((len(self.scene.bands), *shape), self.scene.dtype)
        valid = np.zeros(shape, np.bool_)
        if inside.height and inside.width:
            rows = slice(inside.row - window.row, inside.row - window.row + inside.height)
            cols = slice(inside.col - window.col, inside.col - window.col + inside.width)
            values[:, rows, cols], valid[rows, cols] = self._read_inside(inside)
        return values, valid

    def physical(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Physical channels (channels, h, w) and validity (h, w) of a window."""
        raw, valid = self.read(window)
        return to_physical(raw, self.scene), valid

    def close(self) -> None:
        """Close the file handles of all threads."""
        with self._lock:
            for dataset in self._opened:
                dataset.close()
            self._opened.clear()
            self._local = threading.local()

    def _read_inside(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        scene = self.scene
        row, col = scene.corner
        place = window._replace(row=window.row + row, col=window.col + col)
        counts = self._counts(place)
        valid = valid_pixels(counts, scene)
        if scene.mask:
            valid &= self._mask(place)
        if any(b.calibration for b in scene.bands):
            counts = self._calibrated(counts, place)
        return counts.astype(scene.dtype, copy=False), valid

    def _counts(self, window: Window) -> NDArray[Any]:
        """What the files hold: bands of one file are read together, unmeasured ones are zero."""
        parts: list[tuple[int, NDArray[Any]]] = []
        at = 0
        for (path, zoom), group in groupby(self.scene.bands, key=lambda b: (b.path, b.zoom)):
            bands = list(group)
            if path:
                read = self._read_file(path, zoom, [b.index for b in bands], window)
                parts.append((at, read))
            at += len(bands)
        if len(parts) == 1 and len(parts[0][1]) == at:
            return parts[0][1]
        shape = (at, window.height, window.width)
        whole = np.zeros(shape, np.result_type(*(p for _, p in parts)))  # zeros take no memory
        for start, read in parts:
            whole[start : start + len(read)] = read
        return whole

    def _read_file(self, path: str, zoom: int, indexes: list[int], window: Window) -> NDArray[Any]:
        """Some bands of one file on the scene's grid; coarser pixels are repeated, not blended."""
        if zoom == 1:
            return self._decode(path, indexes, window)
        top, left = window.row // zoom, window.col // zoom
        bottom = -(-(window.row + window.height) // zoom)
        right = -(-(window.col + window.width) // zoom)
        coarse = self._decode(path, indexes, Window(top, left, bottom - top, right - left))
        fine = coarse.repeat(zoom, axis=1).repeat(zoom, axis=2)
        row, col = window.row - top * zoom, window.col - left * zoom
        return fine[:, row : row + window.height, col : col + window.width]

    def _decode(self, path: str, indexes: list[int], window: Window) -> NDArray[Any]:
        import rasterio
        from rasterio.errors import RasterioError
        from rasterio.windows import Window as RasterWindow

        dataset = self._dataset(path)
        part = RasterWindow(window.col, window.row, window.width, window.height)
        try:
            with rasterio.Env(**SAFE_OPTIONS):  # outside, GDAL's cache grows to 5 % of the memory
                if indexes == [0]:
                    return np.asarray(dataset.dataset_mask(window=part))[None]
                return np.asarray(dataset.read(indexes, window=part))
        except (RasterioError, ValueError) as error:
            raise BadBlockError(
                f"{path}: band {', '.join(map(str, indexes))}, rows {window.row}-"
                f"{window.row + window.height}, columns {window.col}-{window.col + window.width} "
                f"cannot be decoded; pass --skip-bad to mark such blocks invalid"
            ) from error

    def _mask(self, window: Window) -> NDArray[np.bool_]:
        mask: Band | None = self.scene.mask
        assert mask is not None
        found = self._read_file(mask.path, mask.zoom, [mask.index], window)[0]
        if self.scene.mask_out:
            return ~np.isin(found, self.scene.mask_out)
        return np.asarray(found > 0, np.bool_)

    def _calibrated(self, counts: NDArray[Any], window: Window) -> NDArray[Any]:
        rows = np.arange(window.row, window.row + window.height)
        cols = np.arange(window.col, window.col + window.width)
        done = np.zeros(counts.shape, self.scene.dtype)
        for i, band in enumerate(self.scene.bands):
            if band.measured:
                table = band.calibration
                done[i] = calibrate(counts[i], table, rows, cols) if table else counts[i]
        return done

    def _dataset(self, path: str) -> Any:
        """This thread's handle of a file."""
        handles = self._local.__dict__
        if path not in handles:
            handles[path] = open_raster(path, allow_remote=self.allow_remote)
            with self._lock:
                self._opened.append(handles[path])
        return handles[path]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> Mapping[str, Any]:
        return {"scene": self.scene, "allow_remote": self.allow_remote}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()
