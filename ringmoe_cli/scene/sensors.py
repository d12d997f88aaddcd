"""What a file, folder or archive is: each kind of product has a reader, everything else is plain.

Metadata decides, never a date or a guess; no pixel is decoded here.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene.products import landsat, planet, sentinel1, sentinel2, stack
from ringmoe_cli.scene.products.plain import Said as Said
from ringmoe_cli.scene.products.plain import Unnamed, open_plain
from ringmoe_cli.scene.products.product_files import ProductFiles, find_product
from ringmoe_cli.scene.scene import Scene

Reader = Callable[[ProductFiles, Said], list[Scene]]

PRODUCTS: tuple[tuple[Callable[[ProductFiles], bool], Reader], ...] = (
    (sentinel2.is_product, sentinel2.open_product),
    (sentinel1.is_product, sentinel1.open_product),
    (landsat.is_product, landsat.open_product),
    (planet.is_product, planet.open_product),
    (stack.is_product, stack.open_product),
)
"""Asked in this order whether a folder or archive is theirs."""


def open_scenes(
    path: str | Path, said: Said | None = None, *, allow_remote: bool = False
) -> list[Scene]:
    """Describe every scene in a file, folder or archive, from its metadata.

    Args:
        path: a raster that GDAL reads, a product folder or its archive; `product:part` chooses a
            part of one that holds several, such as `S1A_IW_SLC.SAFE:IW1`.
        said: what the user says about it.
        allow_remote: let GDAL use the network and files outside a VRT's folder.

    Raises:
        SceneError: if it cannot be opened, or its bands or modality are not certain.
    """
    said = said or Said()
    found = find_product(str(path))
    if found is None:
        return [open_plain(str(path), said, allow_remote)]
    files, part = found
    for is_mine, reader in PRODUCTS:
        if is_mine(files):
            return chosen(reader(files, said), part, str(path))
    raise SceneError(f"{path} is a folder or archive that holds no known product")


def chosen(scenes: list[Scene], part: str, path: str) -> list[Scene]:
    """The scenes whose name has this part.

    Raises:
        SceneError: if none has.
    """
    kept = [s for s in scenes if part.lower() in s.name.lower()]
    if not kept:
        raise SceneError(f"{path}: no part {part}; it has {', '.join(s.name for s in scenes)}")
    return kept


def open_scene(
    path: str | Path,
    *,
    modality: str | None = None,
    bands: Sequence[str] | None = None,
    scale: str | None = None,
    allow_remote: bool = False,
    unnamed: Unnamed = "refuse",
) -> Scene:
    """Describe the one scene in a file, folder or archive, from its metadata.

    Args:
        path: a raster that GDAL reads, a product folder or archive, or `product:part`.
        modality: opt, ms, sar-l1 or sar-l2; otherwise it follows from the bands' names.
        bands: names of a plain file's bands, in order (`-` skips one); or, of a product whose
            bands have names, those to use.
        scale: a factor, `factor,offset`, or what the numbers are (see `plain.QUANTITIES`).
        allow_remote: let GDAL use the network and files outside a VRT's folder.
        unnamed: number bands that nothing names instead of refusing them (for predict).

    Raises:
        SceneError: if it cannot be opened, its bands or modality are not certain, or it holds
            several scenes.
    """
    said = Said(modality, tuple(bands) if bands else None, scale, unnamed)
    scenes = open_scenes(path, said, allow_remote=allow_remote)
    if len(scenes) > 1:
        names = ", ".join(s.name for s in scenes[:3])
        raise SceneError(f"{path} holds {len(scenes)} scenes ({names} ...); name one: {path}:PART")
    return scenes[0]
