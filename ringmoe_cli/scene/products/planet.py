"""PlanetScope scenes: a 4- or 8-band GeoTIFF with its XML metadata beside it (Planet's spec)."""

from dataclasses import replace
from pathlib import PurePosixPath
from xml.etree import ElementTree

from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene.products.plain import Said, finished, open_plain, select_said
from ringmoe_cli.scene.products.product_files import ProductFiles
from ringmoe_cli.scene.scene import Scene

IMAGE = r"[^/]*_AnalyticMS(_SR)?(_8b)?[^/]*\.tif"
METADATA = r"[^/]*_AnalyticMS[^/]*_metadata[^/]*\.xml"

BANDS = {
    4: ("blue", "green", "red", "nir"),
    8: ("coastal", "blue", "green_i", "green", "yellow", "red", "rededge1", "nir"),
}
"""Band order of the products, by number of bands."""


def is_product(files: ProductFiles) -> bool:
    """Whether these are the files of an analytic PlanetScope product."""
    return bool(files.matching(IMAGE)) and bool(files.matching(METADATA))


def open_product(files: ProductFiles, said: Said) -> list[Scene]:
    """The scenes of an order, one per image.

    Raises:
        SceneError: if an image has no metadata, or another number of bands.
    """
    return [open_image(files, path, said) for path in files.matching(IMAGE)]


def open_image(files: ProductFiles, path: str, said: Said) -> Scene:
    """One image: surface reflectance, or radiance turned into top-of-atmosphere reflectance."""
    root = files.xml(metadata_of(files, path))
    plain = open_plain(files.gdal_path(path), Said(modality="ms", unnamed="number"))
    names = BANDS.get(len(plain.bands))
    if names is None:
        raise SceneError(f"{path} has {len(plain.bands)} bands; PlanetScope has 4 or 8")
    surface = "_SR" in PurePosixPath(path).stem
    scales = [1e-4] * len(names) if surface else coefficients(root, len(names), path)
    bands = tuple(
        replace(b, name=n, scale=s, offset=0.0, nodata=0.0)
        for b, n, s in zip(plain.bands, names, scales, strict=True)
    )
    scene = replace(
        plain,
        bands=bands,
        named=True,
        quantity="reflectance",
        sensor=f"PlanetScope {root.findtext('.//serialIdentifier') or ''}".strip(),
        date=(root.findtext(".//acquisitionDateTime") or "")[:10],
    )
    return finished(select_said(scene, said), said)


def metadata_of(files: ProductFiles, path: str) -> str:
    """The metadata file of an image: the one that shares the beginning of its name."""
    scene = PurePosixPath(path).name.partition("_AnalyticMS")[0]
    found = [n for n in files.matching(METADATA) if PurePosixPath(n).name.startswith(scene)]
    if not found:
        raise SceneError(f"{path} has no metadata file; it states the radiometry")
    return found[0]


def coefficients(root: ElementTree.Element, count: int, path: str) -> list[float]:
    """Factors from stored radiance to reflectance, by band number.

    Raises:
        SceneError: if a band has none.
    """
    found = {
        int(e.findtext("bandNumber") or 0): e.findtext("reflectanceCoefficient")
        for e in root.iter("bandSpecificMetadata")
    }
    missing = [i for i in range(1, count + 1) if not found.get(i)]
    if missing:
        raise SceneError(f"{path}: no reflectance coefficient of band {missing[0]}")
    return [float(found[i] or 0) for i in range(1, count + 1)]
