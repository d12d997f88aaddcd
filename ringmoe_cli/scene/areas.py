"""Areas on the ellipsoid: what a pixel count is in square metres."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.scene.grid import Grid

EDGE_POINTS = 9
"""Points along a cell's long edges: rows of pixels are curves on the ellipsoid."""


class Areas:
    """Geodesic areas of the cells of a grid."""

    def __init__(self, grid: Grid) -> None:
        """Prepare the way to longitude and latitude.

        Raises:
            ValueError: if no transform and coordinate system place the grid on the ground.
        """
        from pyproj import CRS, Transformer

        if not grid.has_transform or grid.crs is None:
            raise ValueError("areas need a scene with a transform and a coordinate system")
        system = CRS.from_user_input(grid.crs)
        if system.geodetic_crs is None:
            raise ValueError(f"{system.name} does not lie on the Earth")
        self.grid = grid
        self.to_degrees: Any = Transformer.from_crs(system, system.geodetic_crs, always_xy=True)
        self.geod: Any = system.get_geod()

    def of_pixels(self, row: int, height: int, cell: int) -> NDArray[np.float64]:
        """Mean area in m² of the pixels in cells `cell` wide of some rows, (cells,)."""
        starts = range(0, self.grid.width, cell)
        return np.array(
            [self.pixel(row, height, c, min(cell, self.grid.width - c)) for c in starts]
        )

    def pixel(self, row: int, height: int, col: int, width: int) -> float:
        """Mean pixel area of a rectangle of pixels."""
        along = np.linspace(col, col + width, EDGE_POINTS)
        cols = np.concatenate([along, along[::-1]])
        rows = np.repeat([row, row + height], EDGE_POINTS)
        lon, lat = self.to_degrees.transform(*self.grid.xy(rows, cols))
        area, _ = self.geod.polygon_area_perimeter(lon, lat)
        return float(abs(area)) / (height * width)


def areas_of_map(path: Path, classes: int, cell: int) -> NDArray[np.float64] | None:
    """Geodesic area in m² of each class of a class map on disk; None if it lies nowhere known."""
    import rasterio

    from ringmoe_cli.scene.maps.product import counts_in_cells
    from ringmoe_cli.scene.raster import grid_of

    total = np.zeros(classes)
    with rasterio.open(path) as source:
        try:
            areas = Areas(grid_of(source))
        except ValueError:
            return None
        for top in range(0, source.height, cell):
            height = min(cell, source.height - top)
            rows = source.read(1, window=((top, top + height), (0, source.width)))
            total += areas.of_pixels(top, height, cell) @ counts_in_cells(rows, classes, cell)
    return total
