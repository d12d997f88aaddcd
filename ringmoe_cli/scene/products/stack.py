"""A folder of single-band rasters on one grid: a stack, a quad-pol set, a T3 or C3 matrix."""

import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene.bands import COHERENCY, POLARISATIONS, SENTINEL2, canonical
from ringmoe_cli.scene.products.plain import Said, decide_modality, decide_quantity, finished
from ringmoe_cli.scene.products.product_files import ProductFiles
from ringmoe_cli.scene.raster import SUFFIXES, grid_of, numpy_type, open_raster
from ringmoe_cli.scene.scene import Band, Scene

SAME = 1e-6
"""Relative difference at which transforms count as equal."""


def is_product(files: ProductFiles) -> bool:
    """Whether the folder holds rasters at its top."""
    return bool(rasters(files))


def rasters(files: ProductFiles) -> list[str]:
    """Raster files at the top of the folder."""
    return [n for n in files.names if "/" not in n and n.lower().endswith(SUFFIXES)]


def open_product(files: ProductFiles, said: Said) -> list[Scene]:
    """The scene that the files make together.

    With `--bands`, names are given to the files in alphabetical order (`-` leaves one out).

    Raises:
        SceneError: if the files differ in pixels or type, or their names name no bands.
    """
    paths = rasters(files)
    names = band_names(paths, files, said)
    chosen = ordered([(n, p) for n, p in zip(names, paths, strict=True) if n != "-"])
    scenes = [single(files, name, path) for name, path in chosen]
    first = scenes[0]
    for scene, (_, path) in zip(scenes, chosen, strict=True):
        check_same(first, scene, path, files)
    bands = tuple(s.bands[0] for s in scenes)
    modality = decide_modality(str(files.root), [b.name for b in bands], first.dtype, said)
    with open_raster(bands[0].path) as dataset:
        quantity = decide_quantity(dataset, list(bands), modality, first.dtype)
    stacked = replace(
        first, name=files.name, modality=modality, bands=bands, quantity=quantity, gsd=None
    )
    return [finished(stacked, said)]


def band_names(paths: list[str], files: ProductFiles, said: Said) -> list[str]:
    """Names by the user, or from what distinguishes the files' names.

    Raises:
        SceneError: if `--bands` has another number of names.
    """
    if said.bands:
        if len(said.bands) != len(paths):
            raise SceneError(
                f"{files.root} has {len(paths)} files, but --bands names {len(said.bands)}: "
                f"{', '.join(paths)} (use - to leave one out)"
            )
        return [n if n == "-" else canonical(n) for n in said.bands]
    stems = [PurePosixPath(p).stem for p in paths]
    hint = re.search(r"sentinel-?2|(^|_)s2[abc]_", " ".join(stems), re.IGNORECASE)
    return [canonical(n, SENTINEL2 if hint else None) for n in distinct_parts(stems)]


def distinct_parts(stems: list[str]) -> list[str]:
    """What is left of some names without the words that all begin and end with."""
    words = [re.findall(r"[A-Za-z0-9]+", s) for s in stems]
    if len(stems) == 1:
        return stems
    while all(len(w) > 1 for w in words) and len({w[0] for w in words}) == 1:
        words = [w[1:] for w in words]
    while all(len(w) > 1 for w in words) and len({w[-1] for w in words}) == 1:
        words = [w[:-1] for w in words]
    return ["_".join(w) for w in words]


def ordered(named: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Polarisations and matrix elements in channel order; other bands as they come."""
    names = [n for n, _ in named]
    if all(n in POLARISATIONS for n in names):
        return sorted(named, key=lambda x: ("vv", "vh", "hh", "hv").index(x[0]))
    if all(n[1:] in COHERENCY for n in names):
        return sorted(named, key=lambda x: COHERENCY.index(x[0][1:]))
    return named


def single(files: ProductFiles, name: str, path: str) -> Scene:
    """One file as a scene of one band.

    Raises:
        SceneError: if it has several bands.
    """
    gdal_path = files.gdal_path(path)
    with open_raster(gdal_path) as dataset:
        if dataset.count != 1:
            raise SceneError(
                f"{files.root} is read as a stack of single bands, but {path} has {dataset.count}; "
                "name the file itself"
            )
        band = Band(
            name,
            gdal_path,
            scale=dataset.scales[0],
            offset=dataset.offsets[0],
            nodata=dataset.nodatavals[0],
        )
        dtype = numpy_type(dataset.dtypes[0])
        return Scene(Path(path).stem, "ms", (band,), grid_of(dataset), dtype, "dn")


def check_same(first: Scene, other: Scene, path: str, files: ProductFiles) -> None:
    """Refuse files with other pixels or numbers.

    Raises:
        SceneError: naming the odd one.
    """
    ours, theirs = first.grid, other.grid
    shape = (ours.height, ours.width) == (theirs.height, theirs.width)
    near = all(
        abs(a - b) <= SAME * max(abs(a), abs(b), SAME)
        for a, b in zip(ours.transform, theirs.transform, strict=True)
    )
    if not (shape and near and ours.crs == theirs.crs):
        raise SceneError(f"{files.root}: {path} has other pixels than {first.name}")
    if first.dtype != other.dtype:
        raise SceneError(
            f"{files.root}: {path} is {other.dtype}, {first.name} {first.dtype}; "
            "leave one out with --bands and -"
        )
