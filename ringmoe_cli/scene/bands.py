"""Bands by name: what names mean, and which modality a set of names makes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WAVELENGTHS: Mapping[str, float] = {
    "coastal": 443.0,
    "blue": 490.0,
    "green_i": 531.0,
    "green": 560.0,
    "yellow": 605.0,
    "red": 665.0,
    "rededge1": 705.0,
    "rededge2": 740.0,
    "rededge3": 783.0,
    "nir": 835.0,
    "nir08": 865.0,
    "nir09": 945.0,
    "pan": 590.0,
    "cirrus": 1375.0,
    "swir16": 1610.0,
    "swir22": 2190.0,
    "thermal": 10900.0,
    "thermal2": 12000.0,
}
"""Centre wavelengths in nm of the names used here (close to STAC's common names)."""

POLARISATIONS = ("hh", "hv", "vh", "vv")
"""Channel order of complex SAR."""

COHERENCY = ("11", "12_re", "12_im", "13_re", "13_im", "22", "23_re", "23_im", "33")
"""Elements of a Hermitian 3×3 matrix in channel order; names are t11, t12_re … or c11, c12_re …"""

ALIASES: Mapping[str, str] = {
    "r": "red", "g": "green", "b": "blue", "n": "nir", "nir1": "nir", "infrared": "nir",
    "nearinfrared": "nir", "nir2": "nir09", "coastalblue": "coastal", "coastalaerosol": "coastal",
    "ultrablue": "coastal", "greeni": "green_i", "greenii": "green", "rededge": "rededge1",
    "re1": "rededge1", "re2": "rededge2", "re3": "rededge3", "narrownir": "nir08",
    "nirnarrow": "nir08", "watervapour": "nir09", "watervapor": "nir09", "panchromatic": "pan",
    "swir1": "swir16", "swir2": "swir22", "lwir11": "thermal", "lwir12": "thermal2",
}  # fmt: skip
"""Other spellings, without spaces, dashes and underscores."""

SENTINEL2: Mapping[str, str] = {
    "b1": "coastal", "b2": "blue", "b3": "green", "b4": "red", "b5": "rededge1", "b6": "rededge2",
    "b7": "rededge3", "b8": "nir", "b8a": "nir08", "b9": "nir09", "b10": "cirrus", "b11": "swir16",
    "b12": "swir22",
}  # fmt: skip
"""Sentinel-2's band numbers."""

LANDSAT_TM: Mapping[str, str] = {
    "b1": "blue", "b2": "green", "b3": "red", "b4": "nir", "b5": "swir16", "b6": "thermal",
    "b7": "swir22", "b8": "pan",
}  # fmt: skip
"""Band numbers of Landsat 4, 5 and 7."""

LANDSAT_OLI: Mapping[str, str] = {
    "b1": "coastal", "b2": "blue", "b3": "green", "b4": "red", "b5": "nir", "b6": "swir16",
    "b7": "swir22", "b8": "pan", "b9": "cirrus", "b10": "thermal", "b11": "thermal2",
}  # fmt: skip
"""Band numbers of Landsat 8 and 9."""


@dataclass(frozen=True)
class Kind:
    """What a set of bands makes."""

    modality: str
    """Name of the modality."""
    bands: tuple[str, ...]
    """Canonical band names, in the order given."""


def canonical(name: str, numbers: Mapping[str, str] | None = None) -> str:
    """One spelling for a band: `Red`, `r` and `RED band` are `red`; others become lower case.

    Args:
        name: as written in a file or by a user.
        numbers: meaning of `b1`, `b2` …, where the sensor is known.
    """
    text = re.sub(r"\s+", " ", stripped(name).lower())
    text = re.sub(r" ?band$|\.(bin|tif|tiff)$", "", text)
    bare = re.sub(r"[\s_-]", "", text)
    numbered = re.sub(r"^(b|band)0*(\d+a?)$", r"b\2", bare)
    if numbers and numbered in numbers:
        return numbers[numbered]
    if bare in ALIASES:
        return ALIASES[bare]
    if bare in WAVELENGTHS:
        return bare
    if matrix := re.fullmatch(r"([tc])([123])([123])(re|im|real|imag)?", bare):
        letter, row, col, part = matrix.groups()
        return f"{letter}{row}{col}" + (f"_{part[:2]}" if part else "")
    if bare in POLARISATIONS:
        return bare
    return numbered if numbered != bare else re.sub(r"[\s-]+", "_", text)


def stripped(name: str) -> str:
    """A description without the wavelength that GDAL adds to ENVI's: `red (0.66 Micrometers)`."""
    return re.sub(r"\s*\([\d.]+ [a-zA-Z]+\)$", "", name.strip())


def is_meaningful(name: str | None) -> bool:
    """Whether a description names a band at all (GDAL and ERDAS write `Band 1` for nothing)."""
    text = stripped(name or "").lower()
    return bool(text) and not re.fullmatch(r"(band|layer|channel)[ _]?\d*", text)


def sentinel2_numbers(names: Sequence[str]) -> bool:
    """Whether names like B1 … B12 can only be Sentinel-2's: B8A is among them."""
    return any(re.fullmatch(r"(?i)b(and)?_?0?8a", n.strip()) for n in names)


def modality_of(names: Sequence[str], is_complex: bool) -> str | None:
    """The modality that canonical names say, or None if they say none.

    Polarisations make SAR (complex: sar-l1, real: sar-l2), nine matrix elements sar-l1, red,
    green and blue alone opt, and any other set of optical bands ms.
    """
    if all(n in POLARISATIONS for n in names):
        return "sar-l1" if is_complex else "sar-l2"
    if is_complex:
        return None
    if len(names) == len(COHERENCY) and all(n[1:] in COHERENCY for n in names):
        return "sar-l1"
    if sorted(names) == ["blue", "green", "red"]:
        return "opt"
    if all(n in WAVELENGTHS for n in names):
        return "ms"
    return None


def nearest_band(wavelength: float, tolerance: float = 20.0) -> str | None:
    """The named band at this wavelength in nm, or None if none lies within the tolerance."""
    name = min(WAVELENGTHS, key=lambda n: abs(WAVELENGTHS[n] - wavelength))
    return name if abs(WAVELENGTHS[name] - wavelength) <= tolerance else None
