"""Maps in a coordinate system of the user's choice: of scenes that points or RPCs place, or any."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rasterio
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.errors import CRSError, RasterioError
from rasterio.rpc import RPC
from rasterio.transform import Affine
from rasterio.warp import calculate_default_transform, reproject

from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.scene.grid import ControlPoint, Grid
from ringmoe_cli.scene.raster import one_line, open_raster
from ringmoe_cli.scene.writer import Layer, MapWriter, describe, ground_point, open_rows

WARP_MB = 64
"""Memory of GDAL's warper."""


@dataclass(frozen=True)
class Warp:
    """Where maps shall lie."""

    crs: str
    """What the user calls the coordinate system: EPSG:32630, WKT, a PROJ string."""
    dem: Path | None = None
    """Heights in metres, for scenes placed by RPCs."""

    def __post_init__(self) -> None:
        try:
            CRS.from_user_input(self.crs)
        except CRSError as error:
            raise RingmoeError(f"--warp {self.crs}: {one_line(error)}; say EPSG:32630") from error
        if self.dem is not None:
            open_raster(str(self.dem)).close()

    def place(self, grid: Grid) -> dict[str, Any]:
        """How GDAL gets from the scene's pixels to the ground.

        A transform counts before control points, these before RPCs, unless a DEM is given: with
        it the RPCs are better. Without one, RPCs are taken at the mean height they were made for.

        Raises:
            RingmoeError: if nothing places the scene.
        """
        if grid.has_transform and grid.crs:
            return {"src_crs": grid.crs, "src_transform": Affine(*grid.transform)}
        if grid.gcps and not (grid.rpcs and self.dem):
            return {"src_crs": grid.crs, "gcps": [ground_point(p) for p in grid.gcps]}
        if not grid.rpcs:
            raise RingmoeError("--warp needs a scene that lies somewhere: it has no CRS or points")
        rpcs = RPC.from_gdal(dict(grid.rpcs))
        height: dict[str, Any] = {"RPC_HEIGHT": str(rpcs.height_off)}
        if self.dem is not None:
            height = {"RPC_DEM": str(self.dem), "RPC_DEM_MISSING_VALUE": "0"}
        return {"src_crs": "EPSG:4326", "rpcs": rpcs, **height}

    def target(self, grid: Grid) -> Grid:
        """The grid of the map: about as many pixels as the scene has, north up.

        Raises:
            RingmoeError: if the scene cannot be seen in this system.
        """
        place = self.place(grid)
        if place.pop("src_transform", None):  # as points: GDAL's bounds know no rotation
            place["gcps"] = [ground_point(p) for p in corner_points(grid)]
        source = place.pop("src_crs")
        try:
            moved, width, height = calculate_default_transform(
                source, self.crs, grid.width, grid.height, **place
            )
        except (RasterioError, ValueError) as error:
            raise RingmoeError(f"--warp {self.crs}: {one_line(error)}") from error
        wkt = CRS.from_user_input(self.crs).to_wkt()
        return Grid(height, width, wkt, tuple(moved)[:6])


def corner_points(grid: Grid) -> list[ControlPoint]:
    """The corners of a grid with a transform, as control points."""
    places = [(r, c) for r in (0, grid.height) for c in (0, grid.width)]
    return [ControlPoint(r, c, *grid.xy(r, c)) for r, c in places]


class WarpedWriter(MapWriter):
    """A `MapWriter` whose COG lies in another coordinate system than the rows it takes."""

    def __init__(
        self,
        path: Path,
        layer: Layer,
        grid: Grid,
        work: Path,
        options: Mapping[str, str] | None,
        warp: Warp,
    ) -> None:
        """Prepare a map; fails at once if the scene cannot be warped."""
        super().__init__(path, layer, grid, work, options)
        self.warp, self.target = warp, warp.target(grid)
        self.warped_file = work / f"{layer.name}.warped.tif"
        self.temporary = (*self.temporary, self.warped_file)

    def ready(self) -> Path:
        """The rows, warped: class numbers by the nearest pixel, everything else bilinear."""
        kind = Resampling.nearest if self.layer.classes else Resampling.bilinear
        bands = list(range(1, self.layer.bands + 1))
        with ExitStack() as stack:
            stack.enter_context(rasterio.Env(GDAL_CACHEMAX=WARP_MB << 20))
            rows = stack.enter_context(rasterio.open(self.rows_file))
            out = stack.enter_context(open_rows(self.warped_file, self.layer, self.target))
            describe(out, self.layer, self.target)
            reproject(
                rasterio.band(rows, bands), rasterio.band(out, bands), **self.warp.place(self.grid),
                src_nodata=self.layer.nodata, dst_nodata=self.layer.nodata, dst_crs=self.warp.crs,
                dst_transform=out.transform, resampling=kind, warp_mem_limit=WARP_MB,
            )  # fmt: skip
        return self.warped_file
