"""Landsat Collection 2, Level 1 and 2: one file per band, factors from the MTL file (USGS LSDS)."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene.bands import LANDSAT_OLI, LANDSAT_TM, WAVELENGTHS, canonical
from ringmoe_cli.scene.products.plain import Said, finished, select_said
from ringmoe_cli.scene.products.product_files import ProductFiles
from ringmoe_cli.scene.raster import grid_of, open_raster
from ringmoe_cli.scene.scene import Band, Scene

METADATA = r"[^/]*_MTL\.txt"
IMAGE = r"[^/]*(?<!_ST)_(?:SR_)?B(\d+)\.TIF"
OTHER = ("pan", "thermal", "thermal2")
"""Bands with other pixels or other units than reflectance; they are left out."""


def is_product(files: ProductFiles) -> bool:
    """Whether these are the files of a Landsat product with its MTL file."""
    return bool(files.matching(METADATA)) and bool(files.matching(IMAGE))


def open_product(files: ProductFiles, said: Said) -> list[Scene]:
    """The scene of a product: reflective bands with the scale and offset of their level.

    Raises:
        SceneError: if the metadata lack a factor, or the product is not of Collection 2.
    """
    about = parse_mtl(files.text(files.matching(METADATA)[0]))
    if about.get("COLLECTION_NUMBER", "") not in ("02", "2"):
        raise SceneError(f"{files.root} is not a Collection 2 product")
    craft = about.get("SPACECRAFT_ID", "")
    numbers = LANDSAT_OLI if craft in ("LANDSAT_8", "LANDSAT_9") else LANDSAT_TM
    bands = []
    for path in sorted(files.matching(IMAGE), key=lambda p: int(band_number(p))):
        number = band_number(path)
        name = canonical(f"b{number}", numbers)
        if name not in OTHER:
            bands.append(band(files, about, path, number, name))
    with open_raster(bands[0].path) as dataset:
        grid, dtype = grid_of(dataset), dataset.dtypes[0]
    level = about.get("PROCESSING_LEVEL", "")
    scene = Scene(
        name=files.name,
        modality="ms",
        bands=tuple(bands),
        grid=grid,
        dtype=dtype,
        quantity="reflectance",
        sensor=f"{craft.replace('_', ' ').title()} {level}",
        date=about.get("DATE_ACQUIRED", ""),
        notes=() if level.startswith("L2") else ("top of atmosphere, not corrected for the sun",),
    )
    return [finished(select_said(scene, said), said)]


def band_number(path: str) -> str:
    """The number in a band's file name."""
    match = re.fullmatch(IMAGE, PurePosixPath(path).name, re.IGNORECASE)
    assert match
    return match[1]


def band(files: ProductFiles, about: Mapping[str, str], path: str, number: str, name: str) -> Band:
    """One band with the factors that the metadata state; 0 is fill.

    Raises:
        SceneError: if there are none.
    """
    try:
        scale = float(about[f"REFLECTANCE_MULT_BAND_{number}"])
        offset = float(about[f"REFLECTANCE_ADD_BAND_{number}"])
    except (KeyError, ValueError) as error:
        raise SceneError(
            f"{files.root}: the metadata state no reflectance factors of band {number}"
        ) from error
    wavelength = WAVELENGTHS.get(name)
    gdal_path = files.gdal_path(path)
    return Band(name, gdal_path, 1, wavelength, scale, offset, nodata=0.0)


def parse_mtl(text: str) -> dict[str, str]:
    """`KEY = value` lines; of repeated keys the surface reflectance group's value counts.

    Level 2 files state both the surface reflectance factors and, in a later group, those of the
    Level 1 product that it was made from.
    """
    found: dict[str, str] = {}
    group = ""
    for line in text.splitlines():
        key, mark, value = (part.strip() for part in line.partition("="))
        if key == "GROUP":
            group = value
        elif mark and key != "END_GROUP" and not (group.startswith("LEVEL1_") and key in found):
            found[key] = value.strip('"')
    return found
