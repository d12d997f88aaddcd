"""Opening one raster file safely: the driver is chosen by content, sizes are checked first.

A VRT may name any file or URL, and a small file may declare a terabyte. Nothing is decoded, and
nothing outside the file's own folder is touched, before the checks here have passed.
"""

import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene.grid import ControlPoint, Grid

SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"II*\x00", "GTiff"),
    (b"MM\x00*", "GTiff"),
    (b"II+\x00", "GTiff"),
    (b"MM\x00+", "GTiff"),
    (b"\x00\x00\x00\x0cjP  ", "JP2OpenJPEG"),
    (b"\xff\x4f\xff\x51", "JP2OpenJPEG"),
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"EHFA_HEADER_TAG", "HFA"),
    (b"NITF", "NITF"),
    (b"NSIF", "NITF"),
    (b"BM", "BMP"),
)
"""First bytes of the formats read here, and GDAL's driver for each."""

SUFFIXES = (".tif", ".tiff", ".jp2", ".img", ".bin", ".dat", ".png", ".ntf", ".vrt")
"""Endings of files that a folder is searched for."""

MAX_BLOCK_BYTES = 512 * 2**20
"""A block larger than this is not read: one pixel of it would cost as much."""

MAX_RATIO = 1200
"""Declared bytes per byte on disk: beyond what deflate can reach, nothing was measured there."""

SMALL = 2**30
"""Declared bytes below which the ratio does not matter."""

REMOTE = ("/vsicurl", "/vsis3", "/vsigs", "/vsiaz", "/vsiadls", "/vsioss", "/vsiswift", "/vsihdfs")

SAFE_OPTIONS = {"GDAL_CACHEMAX": 64 * 2**20, "GDAL_VRT_ENABLE_PYTHON": "NO"}
"""GDAL settings of every read (the cache in bytes: rasterio passes integers so)."""


def is_remote(path: str) -> bool:
    """Whether GDAL would use the network for this path."""
    return "://" in path or path.startswith(REMOTE)


def open_raster(path: str, *, allow_remote: bool = False) -> Any:
    """A rasterio dataset of this thread's own.

    Raises:
        SceneError: if the file is missing, no raster, or declares what cannot be read.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    driver = None if is_remote(path) else driver_of(Path(path), allow_remote=allow_remote)
    if is_remote(path) and not allow_remote:
        raise SceneError(f"{path} is remote; pass --allow-remote to read it")
    with rasterio.Env(**SAFE_OPTIONS), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            dataset = rasterio.open(path, driver=driver, sharing=False)
        except RasterioError as error:
            raise SceneError(f"{path} cannot be opened: {one_line(error)}") from error
    try:
        if not allow_remote:
            check_side_files(dataset, path)
        check_sizes(dataset, path)
    except SceneError:
        dataset.close()
        raise
    return dataset


def driver_of(path: Path, *, allow_remote: bool = False) -> str:
    """GDAL's driver for a local file, by its first bytes.

    Raises:
        SceneError: if the file is missing, empty, or of no format read here.
    """
    head = first_bytes(path)
    for signature, driver in SIGNATURES:
        if head.startswith(signature):
            return driver
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<VRTDataset"):
        check_vrt(path, allow_remote=allow_remote)
        return "VRT"
    if envi_header(path):
        return "ENVI"
    what = "is empty" if not head else "is not a raster that can be read"
    raise SceneError(f"{path} {what}; give a GeoTIFF, JP2, VRT, ENVI, NITF, ERDAS, PNG or JPEG")


def first_bytes(path: Path, count: int = 1024) -> bytes:
    """The beginning of a file, or of a member of a zip archive (`/vsizip/{archive}/member`).

    Raises:
        SceneError: if there is none.
    """
    if member := re.fullmatch(r"/vsizip/\{(.+)\}/(.+)", str(path)):
        try:
            with zipfile.ZipFile(member[1]) as archive, archive.open(member[2]) as file:
                return file.read(count)
        except (OSError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
            raise SceneError(f"{path} cannot be read: {one_line(error)}") from error
    if path.is_dir():
        raise SceneError(f"{path} is a folder that holds no known product")
    if not path.is_file():
        raise SceneError(f"{path} does not exist")
    with path.open("rb") as file:
        return file.read(count)


def envi_header(path: Path) -> Path | None:
    """The ENVI header that belongs to a flat binary file."""
    for header in (path.with_suffix(".hdr"), path.with_name(path.name + ".hdr")):
        if header.is_file() and header != path:
            with header.open("rb") as file:
                if file.read(4) == b"ENVI":
                    return header
    return None


def check_vrt(path: Path, *, allow_remote: bool, seen: frozenset[Path] = frozenset()) -> None:
    """Refuse a VRT that reads outside its own folder or from the network.

    Every file it names is checked in turn, other VRTs included.

    Raises:
        SceneError: naming the first source that is not allowed.
    """
    if allow_remote:
        return
    folder = path.resolve().parent
    for source in vrt_sources(path):
        target = (folder / source).resolve()
        if is_remote(source) or "/vsi" in source or not target.is_relative_to(folder):
            raise SceneError(
                f"{path} reads {source}, outside its own folder; pass --allow-remote to allow it"
            )
        if not target.is_file():
            raise SceneError(f"{path} reads {source}, which does not exist")
        if target in seen or target == path.resolve():
            raise SceneError(f"{path} reads itself through {source}")
        inner = first_bytes(target).lstrip(b"\xef\xbb\xbf \t\r\n")
        if inner.startswith(b"<VRTDataset"):
            check_vrt(target, allow_remote=False, seen=seen | {path.resolve()})
        else:
            open_raster(str(target)).close()


def vrt_sources(path: Path) -> list[str]:
    """The files that a VRT names.

    Raises:
        SceneError: if it is not plain XML, or of a kind whose sources cannot be listed.
    """
    try:
        text = path.read_text("utf-8")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise SceneError(f"{path} is a VRT that declares entities; it is not read")
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise SceneError(f"{path} is not a valid VRT: {one_line(error)}") from error
    found = []
    for element in root.iter():
        tag = element.tag.lower()
        value = element.text or ""
        if tag in ("sourcefilename", "sourcedataset", "filename", "cutlineds"):
            found.append(value)
        elif tag in ("pixelfunctioncode", "processingsteps", "group"):
            raise SceneError(f"{path} is a VRT with <{element.tag}>, which is not read")
    return found


def check_side_files(dataset: Any, path: str) -> None:
    """Refuse metadata that name overviews or masks in other files: GDAL would open any of them.

    Raises:
        SceneError: naming the file.
    """
    for band in (0, *dataset.indexes):
        for key, value in dataset.tags(band, ns="OVERVIEWS").items():
            if key in ("OVERVIEW_FILE", "MASK_FILE"):
                raise SceneError(f"{path} names {value} as its {key}; pass --allow-remote to allow")


def check_sizes(dataset: Any, path: str) -> None:
    """Refuse declared sizes that cannot be true or cannot be read in bounded memory.

    Raises:
        SceneError: with the declared and the real size.
    """
    if dataset.count == 0:
        raise SceneError(f"{path} has no raster bands of its own; name one of its parts")
    item = max(bytes_per_pixel(t) for t in dataset.dtypes)
    rows, cols = dataset.block_shapes[0]
    bands = dataset.count if dataset.interleaving and dataset.interleaving.value == "PIXEL" else 1
    block = min(rows, 2**31) * cols * item * bands
    if block > MAX_BLOCK_BYTES:
        raise SceneError(
            f"{path} has blocks of {rows} x {cols} pixels ({block / 2**20:.0f} MB each); "
            "rewrite it with gdal_translate -of COG"
        )
    declared = dataset.width * dataset.height * dataset.count * item
    on_disk = sum(bytes_on_disk(f) for f in dataset.files)
    if on_disk and declared > SMALL and declared > MAX_RATIO * on_disk:
        raise SceneError(
            f"{path} declares {dataset.count} x {dataset.height} x {dataset.width} pixels "
            f"({declared / 2**30:.1f} GB) in {on_disk / 2**20:.2f} MB: it is empty or broken"
        )


def file_stamp(path: str) -> list[int]:
    """Size and time of change of a local file; tells whether it is still the same."""
    file = Path(path)
    return [file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else []


def bytes_on_disk(path: str) -> int:
    """Size of a local file, or of the archive that it is in."""
    member = re.fullmatch(r"/vsizip/\{(.+)\}/.+", path)
    file = Path(member[1] if member else path)
    return file.stat().st_size if file.is_file() else 0


def bytes_per_pixel(gdal_type: str) -> int:
    """Bytes of one value of a GDAL type as stored."""
    import numpy as np

    packed = {"complex_int16": 4, "complex_int32": 8}
    return packed.get(gdal_type) or np.dtype(numpy_type(gdal_type)).itemsize


def numpy_type(gdal_type: str) -> str:
    """The numpy name of the type that rasterio reads this GDAL type as."""
    return {"complex_int16": "complex64", "complex_int32": "complex64"}.get(gdal_type, gdal_type)


def grid_of(dataset: Any) -> Grid:
    """The grid of a dataset: transform, control points or RPCs, and their system."""
    points, points_crs = dataset.gcps
    crs = dataset.crs or points_crs
    rpcs = dataset.rpcs.to_gdal() if dataset.rpcs else None
    return Grid(
        height=dataset.height,
        width=dataset.width,
        crs=crs.to_wkt() if crs else None,
        transform=tuple(dataset.transform)[:6],
        gcps=tuple(ControlPoint(p.row, p.col, p.x, p.y, p.z or 0.0) for p in points),
        rpcs=rpcs,
        pixel_is_point=dataset.tags().get("AREA_OR_POINT") == "Point",
    )


def one_line(error: BaseException) -> str:
    """The message of an exception and its cause, on one line."""
    text = str(error.__cause__ or error) or type(error).__name__
    return " ".join(text.split())


def scene_name(path: str) -> str:
    """A short name for a scene, from its file's."""
    name = Path(os.fspath(path)).name
    return name.split(".")[0] if not name.startswith(".") else name
