"""Sentinel-1 GRD and SLC products, calibrated with their own tables (S1 Product Specification).

GRD: one scene, amplitude counts read as linear σ⁰. SLC: one scene per burst of a swath (the whole
image for StripMap), complex amplitude divided by the table, so that |z|² is σ⁰.
"""

import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from xml.etree import ElementTree

import numpy as np

from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.products.plain import Said, finished, select_said
from ringmoe_cli.scene.products.product_files import ProductFiles, required
from ringmoe_cli.scene.raster import grid_of, open_raster
from ringmoe_cli.scene.scene import Band, Calibration, Scene

MEASUREMENT = r"measurement/s1\w-(\w+)-(grd|slc)-(hh|hv|vh|vv)-.*\.tiff?"


@dataclass(frozen=True)
class Image:
    """One measurement: a swath in one polarisation."""

    path: str
    """Inside the product."""
    swath: str
    """IW1, EW, S3 …"""
    kind: str
    """grd or slc."""
    polarisation: str
    """hh, hv, vh or vv."""

    def annotation(self) -> str:
        """Its annotation file."""
        return f"annotation/{PurePosixPath(self.path).stem}.xml"

    def calibration(self) -> str:
        """Its calibration file."""
        return f"annotation/calibration/calibration-{PurePosixPath(self.path).stem}.xml"


def is_product(files: ProductFiles) -> bool:
    """Whether these are the files of a GRD or SLC product."""
    return "manifest.safe" in files.names and bool(files.matching(MEASUREMENT))


def open_product(files: ProductFiles, said: Said) -> list[Scene]:
    """The scenes of a product: one per swath and burst, its polarisations as bands.

    Raises:
        SceneError: if annotation or calibration are missing.
    """
    images = []
    for path in files.matching(MEASUREMENT):
        swath, kind, polarisation = re.fullmatch(MEASUREMENT, path, re.IGNORECASE).groups()  # type: ignore[union-attr]
        images.append(Image(path, swath.upper(), kind.lower(), polarisation.lower()))
    found = []
    for swath in sorted({i.swath for i in images}):
        mine = sorted((i for i in images if i.swath == swath), key=order)
        found += swath_scenes(files, mine, said, several=len({i.swath for i in images}) > 1)
    return found


def order(image: Image) -> int:
    """Co-polarised first, as models expect VV before VH and HH before HV."""
    return ("vv", "vh", "hh", "hv").index(image.polarisation)


def swath_scenes(
    files: ProductFiles, images: list[Image], said: Said, several: bool
) -> list[Scene]:
    """The scenes of one swath."""
    first = images[0]
    about = files.xml(first.annotation())
    with open_raster(files.gdal_path(first.path)) as dataset:
        grid = grid_of(dataset)
    bands = tuple(
        Band(
            i.polarisation,
            files.gdal_path(i.path),
            nodata=0.0 if i.kind == "grd" else None,
            calibration=calibration(files, i),
        )
        for i in images
    )
    slc = first.kind == "slc"
    scene = Scene(
        name=f"{files.name}_{first.swath}" if several else files.name,
        modality="sar-l1" if slc else "sar-l2",
        bands=bands,
        grid=grid,
        dtype="complex64" if slc else "float32",
        quantity="complex" if slc else "sigma0",
        gsd=spacing(about, files),
        sensor=f"Sentinel-1 {first.swath} {first.kind.upper()}",
        date=(about.findtext("adsHeader/startTime") or "")[:10],
    )
    scene = select_said(scene, said)
    return [finished(s, said) for s in (burst_scenes(scene, about) if slc else [scene])]


def spacing(about: ElementTree.Element, files: ProductFiles) -> float:
    """Mean pixel spacing in metres; slant range is projected to the ground at mid-swath."""
    info = "imageAnnotation/imageInformation"
    across = float(required(about, f"{info}/rangePixelSpacing", files.root))
    along = float(required(about, f"{info}/azimuthPixelSpacing", files.root))
    projection = about.findtext("generalAnnotation/productInformation/projection") or ""
    angle = about.findtext(f"{info}/incidenceAngleMidSwath")
    if "slant" in projection.lower() and angle:
        across /= float(np.sin(np.radians(float(angle))))
    return (across + along) / 2


def burst_scenes(scene: Scene, about: ElementTree.Element) -> list[Scene]:
    """One scene per burst of a TOPS swath; the scene itself where there are none."""
    lines = int(about.findtext("swathTiming/linesPerBurst") or 0)
    count = len(about.findall("swathTiming/burstList/burst"))
    if not lines or not count:
        return [scene]
    if lines * count != scene.grid.height:
        raise SceneError(
            f"{scene.name}: {count} bursts of {lines} lines do not make {scene.grid.height} lines"
        )
    return [
        replace(
            scene,
            name=f"{scene.name}_burst{number + 1}",
            grid=burst_grid(scene.grid, number * lines, lines),
            corner=(number * lines, 0),
        )
        for number in range(count)
    ]


def burst_grid(grid: Grid, first: int, lines: int) -> Grid:
    """The grid of some lines, with the control points on and beside them."""
    part = grid.crop(Window(first, 0, lines, grid.width))
    margin = lines
    near = tuple(p for p in part.gcps if -margin <= p.row <= lines + margin)
    return replace(part, gcps=near if len(near) >= 4 else part.gcps)


def calibration(files: ProductFiles, image: Image) -> Calibration:
    """The σ⁰ table of a measurement; all lines on the pixels of the first.

    Raises:
        SceneError: if it is missing or empty.
    """
    root = files.xml(image.calibration())
    vectors = root.findall(".//calibrationVector")
    if not vectors:
        raise SceneError(f"{files.root}: {image.calibration()} holds no calibration vectors")
    pixels = numbers(vectors[0], "pixel")
    rows = [np.interp(pixels, numbers(v, "pixel"), numbers(v, "sigmaNought")) for v in vectors]
    return Calibration(
        tuple(float(v.findtext("line") or 0) for v in vectors),
        tuple(pixels),
        tuple(tuple(map(float, r)) for r in rows),
    )


def numbers(vector: ElementTree.Element, tag: str) -> list[float]:
    """Numbers separated by blanks."""
    return [float(v) for v in required(vector, tag, "calibration vector").split()]
