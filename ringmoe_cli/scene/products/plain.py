"""A plain raster as a scene: its bands by name, its modality, its units.

Ambiguity is an error, not a guess: where neither the file nor the user says what a band is, the
message says what to pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rasterio.enums import ColorInterp

from model.modality import MODALITIES
from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene import bands as naming
from ringmoe_cli.scene.raster import grid_of, numpy_type, open_raster, scene_name
from ringmoe_cli.scene.scene import Band, Quantity, Scene

ALPHA = ColorInterp.alpha

Unnamed = Literal["refuse", "number"]
"""What to do with bands that nothing names: an error, or band_1, band_2 …"""

QUANTITIES: tuple[Quantity, ...] = ("reflectance", "dn", "amplitude", "sigma0", "db")
"""Words that `--scale` understands besides numbers."""


@dataclass(frozen=True)
class Said:
    """What the user says about a scene; it overrides what the file says."""

    modality: str | None = None
    """Name of a modality."""
    bands: tuple[str, ...] | None = None
    """Names of the file's bands, in order."""
    scale: str | None = None
    """`0.0001`, `0.0001,-0.1` (scale, offset), or one of `QUANTITIES`."""
    unnamed: Unnamed = "refuse"
    """What to do with bands that nothing names."""
    scl: tuple[int, ...] = ()
    """Scene classes of a Sentinel-2 Level-2A product to mark invalid."""


def open_plain(path: str, said: Said, allow_remote: bool = False) -> Scene:
    """A scene in one raster file."""
    with open_raster(path, allow_remote=allow_remote) as dataset:
        kept = bands_of(dataset, path, said)
        dtype = common_dtype(dataset, kept, path)
        modality = decide_modality(path, [b.name for b in kept], dtype, said)
        scene = Scene(
            name=scene_name(path),
            modality=modality,
            bands=tuple(kept),
            grid=grid_of(dataset),
            dtype=dtype,
            quantity=decide_quantity(dataset, kept, modality, dtype),
            mask=mask_of(dataset, path),
            named=not any(b.name.startswith("band_") for b in kept),
        )
    return finished(scene, said)


def select_said(scene: Scene, said: Said) -> Scene:
    """The bands of a product that `--bands` names, in that order; all of them by default."""
    return scene.select([naming.canonical(n) for n in said.bands]) if said.bands else scene


def finished(scene: Scene, said: Said) -> Scene:
    """Apply `--scale`, fill missing polarisations, and set the ground sampling distance."""
    scene = with_scale(scene, said.scale) if said.scale else scene
    scene = with_missing_polarisations(scene) if scene.quantity == "complex" else scene
    return replace(scene, gsd=scene.gsd or scene.grid.gsd)


def bands_of(dataset: Any, path: str, said: Said) -> list[Band]:
    """The bands of a dataset, named by the user, the file's descriptions or its colours.

    Raises:
        SceneError: if their names are not certain.
    """
    indexes = [i for i, c in zip(dataset.indexes, dataset.colorinterp, strict=True) if c != ALPHA]
    names = said_names(said, indexes, dataset.count, path) or file_names(dataset, indexes, said)
    if names is None and said.unnamed == "refuse":
        raise SceneError(
            f"{path} has {len(indexes)} band(s) without names; pass --bands, "
            f"e.g. --bands {example_names(len(indexes))}"
        )
    if names is None:
        names = [f"band_{i}" for i in indexes]
    check_unique(names, path)
    return [
        band_at(dataset, path, i, name)
        for i, name in zip(indexes, names, strict=True)
        if name != "-"
    ]


def said_names(said: Said, indexes: list[int], count: int, path: str) -> list[str] | None:
    """What `--bands` says, checked against the number of bands."""
    if said.bands is None:
        return None
    if len(said.bands) == len(indexes):
        return [n if n == "-" else naming.canonical(n) for n in said.bands]
    if len(said.bands) == count and said.bands[-1] in ("-", "alpha"):
        return [naming.canonical(n) for n in said.bands[: len(indexes)]]
    raise SceneError(
        f"{path} has {len(indexes)} bands, but --bands names {len(said.bands)}: "
        f"{','.join(said.bands)} (use - to skip a band)"
    )


def file_names(dataset: Any, indexes: list[int], said: Said) -> list[str] | None:
    """Names by descriptions, wavelengths, colour interpretation, or a count that says it all."""
    written = [dataset.descriptions[i - 1] for i in indexes]
    if all(naming.is_meaningful(n) for n in written):
        numbers = naming.SENTINEL2 if naming.sentinel2_numbers(written) else None
        return [naming.canonical(n, numbers) for n in written]
    waves = [wavelength_of(dataset.tags(i)) for i in indexes]
    by_wave = [naming.nearest_band(w) if w else None for w in waves]
    if None not in by_wave and len(set(by_wave)) == len(by_wave):
        return [str(n) for n in by_wave]
    colours = [dataset.colorinterp[i - 1].name for i in indexes]
    if all(c in naming.WAVELENGTHS for c in colours) and len(set(colours)) == len(colours):
        return colours
    if len(indexes) == 3 and said.modality == "opt":
        return ["red", "green", "blue"]
    if len(indexes) == 1 and said.modality == "sar-l2":
        return ["amplitude"]
    return None


def wavelength_of(tags: dict[str, str]) -> float | None:
    """A band's centre in nm from its metadata (GDAL, ENVI and Sentinel-2 spellings)."""
    lower = {k.lower(): v for k, v in tags.items()}
    for key in ("wavelength", "central_wavelength", "center_wavelength", "central_wavelength_um"):
        try:
            value = float(lower[key].split()[0])
        except (KeyError, ValueError, IndexError):
            continue
        unit = lower.get("wavelength_unit", lower.get("wavelength_units", "")).lower()
        micro = key.endswith("_um") or unit.startswith(("micro", "um"))
        return value * 1000 if micro else value
    return None


def band_at(dataset: Any, path: str, index: int, name: str) -> Band:
    """One band as the file describes it."""
    return Band(
        name=name,
        path=path,
        index=index,
        wavelength=wavelength_of(dataset.tags(index)) or naming.WAVELENGTHS.get(name),
        scale=dataset.scales[index - 1],
        offset=dataset.offsets[index - 1],
        nodata=dataset.nodatavals[index - 1],
    )


def check_unique(names: Sequence[str], path: str) -> None:
    """Refuse two bands of one name.

    Raises:
        SceneError: naming the repeated ones.
    """
    twice = sorted({n for n in names if n != "-" and list(names).count(n) > 1})
    if twice:
        raise SceneError(f"{path} has several bands called {', '.join(twice)}; pass --bands")
    if all(n == "-" for n in names):
        raise SceneError(f"--bands skips every band of {path}")


def example_names(count: int) -> str:
    """A `--bands` value of the right length, for messages."""
    known = {1: ("vv",), 2: ("vv", "vh"), 3: ("red", "green", "blue")}
    order = ("blue", "green", "red", "nir", "swir16", "swir22")
    return ",".join(known.get(count, order[:count])) + (",..." if count > len(order) else "")


def common_dtype(dataset: Any, kept: list[Band], path: str) -> str:
    """The one type of the kept bands.

    Raises:
        SceneError: if they differ.
    """
    types = {numpy_type(dataset.dtypes[b.index - 1]) for b in kept}
    if len(types) > 1:
        raise SceneError(f"{path} mixes {', '.join(sorted(types))}; choose bands with --bands")
    return types.pop()


def decide_modality(path: str, names: Sequence[str], dtype: str, said: Said) -> str:
    """The modality that the user or the bands say.

    Raises:
        SceneError: if neither does, or they contradict the type of the numbers.
    """
    is_complex = dtype.startswith("complex")
    modality = said.modality or naming.modality_of(names, is_complex)
    if modality is None:
        raise SceneError(
            f"{path}: bands {', '.join(names)} ({dtype}) do not tell the modality; "
            f"pass --modality ({', '.join(MODALITIES)}) and --bands"
        )
    if modality not in MODALITIES:
        raise SceneError(f"--modality {modality} is unknown; choose from {', '.join(MODALITIES)}")
    coherency = naming.modality_of(names, False) == "sar-l1"
    if (is_complex or coherency) != (modality == "sar-l1") and "band_" not in names[0]:
        raise SceneError(
            f"{path}: {dtype} bands {', '.join(names)} cannot be {modality}; "
            "sar-l1 is complex hh, hv, vh, vv or a T3/C3 matrix"
        )
    return modality


def decide_quantity(dataset: Any, kept: list[Band], modality: str, dtype: str) -> Quantity:
    """What the numbers are; for real radar bands their sign decides (decibels go below zero)."""
    if dtype.startswith("complex"):
        return "complex"
    if modality == "sar-l1":
        return "coherency"
    if modality == "sar-l2":
        if not dtype.startswith("float"):
            return "amplitude"
        return "db" if has_negative(dataset, kept) else "sigma0"
    scaled = any(b.scale != 1 or b.offset != 0 for b in kept)
    return "reflectance" if scaled or dtype.startswith("float") else "dn"


def has_negative(dataset: Any, kept: list[Band]) -> bool:
    """Whether a look at a few windows of the first band finds a negative value."""
    import numpy as np
    from rasterio.errors import RasterioError
    from rasterio.windows import Window

    side = 128
    for share in (0.5, 0.25, 0.75):
        row, col = int(dataset.height * share), int(dataset.width * share)
        part = Window(col, row, min(side, dataset.width - col), min(side, dataset.height - row))
        try:
            values = dataset.read(kept[0].index, window=part)
        except RasterioError:
            continue
        measured = values[np.isfinite(values)]
        if kept[0].nodata is not None:
            measured = measured[measured != np.asarray(kept[0].nodata, values.dtype)]
        if (measured < 0).any():
            return True
    return False


def mask_of(dataset: Any, path: str) -> Band | None:
    """An alpha band, or the file's own mask (a .msk file or an internal one)."""
    from rasterio.enums import MaskFlags

    for index, colour in zip(dataset.indexes, dataset.colorinterp, strict=True):
        if colour == ALPHA:
            return Band("alpha", path, index)
    per_dataset = any(MaskFlags.per_dataset in flags for flags in dataset.mask_flag_enums)
    return Band("mask", path, 0) if per_dataset else None


def with_scale(scene: Scene, scale: str) -> Scene:
    """The scene as `--scale` describes it.

    Raises:
        SceneError: if the text is neither numbers nor a quantity.
    """
    for quantity in QUANTITIES:
        if scale == quantity:
            return with_quantity(scene, quantity)
    try:
        factor, offset = [float(v) for v in [*scale.split(","), "0"][:2]]
    except ValueError as error:
        raise SceneError(
            f"--scale {scale} is neither factor[,offset] nor one of {', '.join(QUANTITIES)}"
        ) from error
    bands = tuple(replace(b, scale=factor, offset=offset) for b in scene.bands)
    optical = scene.modality in ("opt", "ms")
    return replace(scene, bands=bands, quantity="reflectance" if optical else scene.quantity)


def with_quantity(scene: Scene, quantity: Quantity) -> Scene:
    """The scene with numbers of this kind.

    Raises:
        SceneError: if the modality has no such numbers.
    """
    radar = ("amplitude", "sigma0", "db")
    fits = {"opt": ("reflectance", "dn"), "ms": ("reflectance", "dn"), "sar-l2": radar}
    if quantity not in fits.get(scene.modality, ()):
        raise SceneError(f"--scale {quantity} does not fit {scene.name}, which is {scene.modality}")
    return replace(scene, quantity=quantity)


def with_missing_polarisations(scene: Scene) -> Scene:
    """Complex SAR in the order HH, HV, VH, VV; polarisations not measured are zero, and noted."""
    held = {b.name: b for b in scene.bands}
    strange = [n for n in held if n not in naming.POLARISATIONS]
    if strange:
        if not scene.named:
            return scene
        raise SceneError(
            f"{scene.name}: complex band {strange[0]} is no polarisation; "
            f"pass --bands with {', '.join(naming.POLARISATIONS)}"
        )
    missing = [n for n in naming.POLARISATIONS if n not in held]
    bands = tuple(held.get(n, Band(n, path="")) for n in naming.POLARISATIONS)
    note = f"{', '.join(missing)} not measured: zeros" if missing else ""
    return replace(scene, bands=bands, notes=scene.notes + ((note,) if note else ()))
