"""Real data of four modalities for pre-training, and two labelled sets for reading it out.

EuroSAT (opt) is divided 80/20 by the md5 of the file name, MSTAR (sar-l2) as published: 17 degrees
for training, 15 for testing. Sentinel-2 (ms) is used west of column 576 and AIRSAR coherency
matrices (sar-l1) in strip 0 alone. What lies outside takes no part in pre-training.
"""

import hashlib
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from PIL import Image
from rasterio.windows import Window

from model.batch import Batch
from model.normalisation import Normalisation
from ringmoe_cli.scene.loader import mix, pretraining_batches, store_normalisation
from ringmoe_cli.scene.tiles import Store, open_store

SIDE = 64
"""Chips the encoder sees; MSTAR's 128-pixel chips are cropped, the target is in the middle."""
JITTER = 16
"""Pixels by which a training crop of MSTAR may be off the middle."""
WEST = 576
"""Columns of the Sentinel-2 scene that are used; the others are for testing maps."""
S2_BANDS = "blue,green,red,rededge1,rededge2,rededge3,nir,nir08,swir16,swir22"


@dataclass(frozen=True)
class Chips:
    """A classification set in memory."""

    modality: str
    train: torch.Tensor
    """(N, C, H, W) normalised."""
    train_labels: NDArray[np.int64]
    test: torch.Tensor
    test_labels: NDArray[np.int64]
    norm: Normalisation


@dataclass(frozen=True)
class Sources:
    """Everything that pre-training may see."""

    sets: Mapping[str, Chips]
    """By name: eurosat, mstar."""
    stores: list[Store]
    """Of the scenes."""

    @property
    def norms(self) -> dict[str, Normalisation]:
        """By modality, in the order of the paper."""
        found = {c.modality: c.norm for c in self.sets.values()} | store_normalisation(self.stores)
        return {m: found[m] for m in ("opt", "ms", "sar-l1", "sar-l2")}

    def batches(
        self, size: int, weights: Mapping[str, float], seed: int, first: int
    ) -> Iterator[Batch]:
        """Unpaired chips in the stated shares from batch `first` on; a function of the step."""
        shares = mix(size, weights)
        scenes = {m: n for m, n in shares.items() if m in ("ms", "sar-l1")}
        drawn = pretraining_batches(
            self.stores, {m: self.norms[m] for m in scenes}, size=SIDE,
            batch_size=sum(scenes.values()), weights=scenes, seed=seed, start_step=first,
        )  # fmt: skip
        for step, batch in enumerate(drawn, start=first):
            rng = np.random.default_rng((seed, 7, step))
            for chips in self.sets.values():
                picked = rng.integers(0, len(chips.train), shares[chips.modality])
                turned = [augmented(chips.train[i], rng) for i in picked]
                batch.images[chips.modality] = torch.stack(turned)[:, None]
            yield Batch({m: batch.images[m] for m in shares}, batch.valid, batch.channels)


def augmented(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A crop of `SIDE` about the middle, mirrored; optical chips also turned by 90 degrees."""
    margins = [(n - SIDE) // 2 for n in image.shape[-2:]]
    row, col = (m + int(rng.integers(-min(JITTER, m), min(JITTER, m) + 1)) for m in margins)
    image = image[:, row : row + SIDE, col : col + SIDE]
    image = image.flip(-1) if rng.random() < 0.5 else image
    if len(image) > 1:  # radar shadows fall away from the sensor: turning would be a lie
        image = image.rot90(int(rng.integers(4)), (-2, -1))
    return image


def centre(images: torch.Tensor) -> torch.Tensor:
    """The middle `SIDE` pixels."""
    row, col = ((n - SIDE) // 2 for n in images.shape[-2:])
    return images[..., row : row + SIDE, col : col + SIDE]


def sources(data: Path, folder: Path) -> Sources:
    """Read the labelled sets and tile the scenes into a folder, unless they are there."""
    return Sources({"eurosat": eurosat(data), "mstar": mstar(data)}, scenes(data, folder))


def eurosat(data: Path) -> Chips:
    """EuroSAT RGB, a fifth of it by md5 of the file name for testing."""
    root = data / "05_scene_classification" / "eurosat_rgb"
    files = sorted(root.rglob("*.jpg"))
    names = sorted({f.parent.name for f in files})
    labels = np.array([names.index(f.parent.name) for f in files])
    test = np.array([int(hashlib.md5(f.name.encode()).hexdigest(), 16) % 5 == 0 for f in files])
    images = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    return chips_of("opt", ("red", "green", "blue"), images.transpose(0, 3, 1, 2), labels, test)


def mstar(data: Path) -> Chips:
    """MSTAR magnitudes as their 8-bit files have them, split as published."""
    root = data / "05_scene_classification" / "mstar_soc"
    files = sorted(root.rglob("*.jp*g"))
    labels = np.array([int(f.parent.name) for f in files])
    test = np.array([f.parent.parent.name == "test" for f in files])
    grey = np.stack([np.asarray(Image.open(f).convert("L")) for f in files])
    return chips_of("sar-l2", ("amplitude",), grey[:, None], labels, test)


def chips_of(
    modality: str,
    bands: tuple[str, ...],
    images: NDArray[np.generic],
    labels: NDArray[np.int64],
    test: NDArray[np.bool_],
) -> Chips:
    """Standardise by the training images."""
    values = torch.from_numpy(images.astype(np.float32))
    seen = values[torch.from_numpy(~test)]
    mean, std = seen.mean((0, 2, 3)), seen.std((0, 2, 3))
    values = (values - mean[:, None, None]) / std[:, None, None]
    norm = Normalisation(bands, tuple(mean.tolist()), tuple(std.tolist()))
    return Chips(modality, values[~test], labels[~test], values[test], labels[test], norm)


def scenes(data: Path, folder: Path) -> list[Store]:
    """Stores of the multi-spectral and the complex scene."""
    folder.mkdir(parents=True, exist_ok=True)
    west, t3 = folder / "s2.zarr", folder / "t3.zarr"
    if not west.exists():
        file = western(data / "02_multispectral/s2_aberystwyth_10band/mosaic_10band.tif", folder)
        tile(file, west, "--modality", "ms", "--bands", S2_BANDS, "--scale", "0.001,0")
    if not t3.exists():
        tile(stacked(data / "04_sar_complex" / "airsar_sf_T3" / "strip0", folder), t3)
    return [open_store(west), open_store(t3)]


def tile(file: Path, store: Path, *words: str) -> None:
    """Run `ringmoe tile`."""
    command = ["ringmoe", "tile", "--min-valid", "0.5", str(file), "-o", str(store), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def western(scene: Path, folder: Path) -> Path:
    """The first columns of a raster as a file of their own."""
    target = folder / "west.tif"
    with rasterio.open(scene) as file:
        window = Window(0, 0, WEST, file.height)
        profile = file.profile | {"driver": "GTiff", "width": WEST}
        with rasterio.open(target, "w", **profile) as out:
            out.write(file.read(window=window))
    return target


def stacked(strip: Path, folder: Path) -> Path:
    """The nine elements of a PolSARpro T3 folder as the bands of one file."""
    target, files = folder / "t3.tif", sorted(strip.glob("*.bin"))
    with rasterio.open(files[0]) as first:
        profile = first.profile | {"driver": "GTiff", "count": len(files)}
        with rasterio.open(target, "w", **profile) as out:
            for number, file in enumerate(files, start=1):
                with rasterio.open(file) as element:
                    out.write(element.read(1), number)
                out.set_band_description(number, file.stem)
    return target
