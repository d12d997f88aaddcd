"""Sentinel-2 Level-1C and Level-2A products (Sentinel-2 Products Specification Document).

Every band at its finest resolution, on the 10 m grid. Offsets, the quantification value and the
special values are those that the product's metadata state.
"""

import re
from dataclasses import replace
from xml.etree import ElementTree

from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene.bands import SENTINEL2, canonical
from ringmoe_cli.scene.products.plain import Said, finished, select_said
from ringmoe_cli.scene.products.product_files import ProductFiles, required
from ringmoe_cli.scene.raster import grid_of, open_raster
from ringmoe_cli.scene.scene import Band, Scene

METADATA = r"MTD_MSIL(1C|2A)\.xml"

IDS = ("b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8", "b8a", "b9", "b10", "b11", "b12")
"""Bands by their id in the metadata."""

COARSE = 60
"""Bands of this resolution in metres are left out unless they are asked for by name."""


def is_product(files: ProductFiles) -> bool:
    """Whether these are the files of a Level-1C or Level-2A product."""
    return bool(files.matching(METADATA))


def open_product(files: ProductFiles, said: Said) -> list[Scene]:
    """The one scene of a product.

    Raises:
        SceneError: if metadata or images are missing, or it holds several tiles.
    """
    root = files.xml(files.matching(METADATA)[0])
    images = finest(image_files(files, root))
    if said.bands is None:
        images = {b: x for b, x in images.items() if x[0] < COARSE}
    fine = min(resolution for resolution, _ in images.values())
    bands = tuple(
        band(files, root, name, path, resolution // fine)
        for name, (resolution, path) in sorted(images.items(), key=lambda x: IDS.index(x[0]))
    )
    with open_raster(next(b.path for b in bands if b.zoom == 1)) as dataset:
        grid, dtype = grid_of(dataset), dataset.dtypes[0]
    craft = root.findtext(".//SPACECRAFT_NAME") or "Sentinel-2"
    level = root.findtext(".//PROCESSING_LEVEL") or root.tag.partition("_User")[0]
    left_out = () if said.bands else ("60 m bands are left out; name them with --bands",)
    scene = Scene(
        name=files.name,
        modality="ms",
        bands=bands,
        grid=grid,
        dtype=dtype,
        quantity="reflectance",
        sensor=f"{craft} {level}",
        date=(root.findtext(".//PRODUCT_START_TIME") or "")[:10],
        notes=left_out,
    )
    if said.scl:
        scene = replace(scene, mask=scene_classes(files, fine), mask_out=said.scl)
    return [finished(select_said(scene, said), said)]


def image_files(files: ProductFiles, root: ElementTree.Element) -> list[tuple[str, int, str]]:
    """(band id, resolution, path) of every image that the metadata name.

    Raises:
        SceneError: if the product has several tiles (the format of before 2016).
    """
    granules = root.findall(".//Granule") + root.findall(".//Granules")
    if len(granules) != 1:
        raise SceneError(f"{files.root} holds {len(granules)} tiles; name one tile's product")
    found = []
    for element in granules[0]:
        path = f"{(element.text or '').strip()}.jp2"
        match = re.search(r"_(B\d\d|B8A)(?:_(\d\d)m)?\.jp2$", path)
        if match:
            name = re.sub("^b0", "b", match[1].lower())
            found.append((name, int(match[2] or native(root, name)), path))
    if not found:
        raise SceneError(f"{files.root}: the metadata name no images")
    return found


def native(root: ElementTree.Element, name: str) -> int:
    """A band's own resolution in metres."""
    for element in root.iter("Spectral_Information"):
        if element.get("physicalBand", "").lower() == name:
            return int(required(element, "RESOLUTION", name))
    return NATIVE[name]


NATIVE = {
    b: 10 if b in ("b2", "b3", "b4", "b8") else COARSE if b in ("b1", "b9", "b10") else 20
    for b in IDS
}


def finest(images: list[tuple[str, int, str]]) -> dict[str, tuple[int, str]]:
    """Each band at its finest resolution."""
    found: dict[str, tuple[int, str]] = {}
    for name, resolution, path in images:
        if name not in found or resolution < found[name][0]:
            found[name] = (resolution, path)
    return found


def band(files: ProductFiles, root: ElementTree.Element, name: str, path: str, zoom: int) -> Band:
    """One band with the radiometry that the metadata state."""
    quantum = root.findtext(".//BOA_QUANTIFICATION_VALUE") or root.findtext(
        ".//QUANTIFICATION_VALUE"
    )
    if quantum is None:
        raise SceneError(f"{files.root}: the metadata state no quantification value")
    number = str(IDS.index(name))
    offsets = [
        float(e.text or 0)
        for tag in ("BOA_ADD_OFFSET", "RADIO_ADD_OFFSET")
        for e in root.iter(tag)
        if e.get("band_id") == number
    ]
    special = {
        e.findtext("SPECIAL_VALUE_TEXT"): float(required(e, "SPECIAL_VALUE_INDEX", files.root))
        for e in root.iter("Special_Values")
    }
    centre = root.findtext(f".//Spectral_Information[@bandId='{number}']/Wavelength/CENTRAL")
    return Band(
        name=canonical(name, SENTINEL2),
        path=files.gdal_path(path),
        wavelength=float(centre) if centre else None,
        scale=1 / float(quantum),
        offset=(offsets[0] if offsets else 0.0) / float(quantum),
        nodata=special.get("NODATA"),
        saturated=special.get("SATURATED"),
        zoom=zoom,
    )


def scene_classes(files: ProductFiles, fine: int) -> Band:
    """The scene classification of a Level-2A product.

    Raises:
        SceneError: if the product has none.
    """
    found = sorted(files.matching(r".*_SCL_\d\dm\.jp2"))
    if not found:
        raise SceneError(f"{files.root} has no scene classification; --scl needs Level-2A")
    resolution = int(found[0][-7:-5])
    return Band("scl", files.gdal_path(found[0]), zoom=resolution // fine)
