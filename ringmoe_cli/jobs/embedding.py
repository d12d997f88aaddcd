"""Features of a scene without any head: one vector per tile, or a dense map."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.batch import Batch, Prediction
from model.checkpoint import CheckpointConfig, read_config
from model.encoder import RingMoE
from ringmoe_cli import console
from ringmoe_cli.errors import CheckpointError, RingmoeError
from ringmoe_cli.jobs.answers import Settings, lattice_of
from ringmoe_cli.jobs.compute import computed
from ringmoe_cli.jobs.maps import check_free, output_path
from ringmoe_cli.jobs.opening import Opener, Wish, about_scenes
from ringmoe_cli.jobs.prediction import Job, Report, predict_scene
from ringmoe_cli.jobs.summary import described, model_identity
from ringmoe_cli.machine import chosen_device, return_unused_memory, use_memory_steadily
from ringmoe_cli.scene.maps.product import FeatureMap, Vectors
from ringmoe_cli.scene.maps.strips import Normalised, SkipBad, window_batches
from ringmoe_cli.scene.maps.vectortiles import write_tiles

SAMPLED_BATCHES = 8
"""Batches, evenly spread over a scene, from which principal components are taken."""


class Features(nn.Module):
    """An encoder that answers with the features of one stage."""

    def __init__(self, encoder: RingMoE, modality: str, stage: int, pooled: bool) -> None:
        """Wrap an encoder.

        Args:
            encoder: in eval mode.
            modality: the one it reads.
            stage: 0 to 3, at 4, 8, 16, 32 pixels per feature.
            pooled: answer with the mean over each window, (B, C, 1, 1).
        """
        super().__init__()
        self.encoder, self.modality, self.stage, self.pooled = encoder, modality, stage, pooled

    @property
    def width(self) -> int:
        """Channels of the answer."""
        return self.encoder.config.widths[self.stage]

    @property
    def stride(self) -> int:
        """Pixels per feature."""
        return self.encoder.config.patch_size << self.stage

    def predict(self, batch: Batch) -> Prediction:
        """Features (B, C, h, w), those of places without a valid pixel being zero."""
        images = {self.modality: batch.images[self.modality][:, 0]}
        valid = {m: v[:, 0] for m, v in batch.valid.items()} or None
        measured = batch.channels or None
        encoding = self.encoder.encode(images, valid=valid, channels=measured)
        dense = encoding.features[self.modality][self.stage]
        if not self.pooled:
            return Prediction(dense=dense)
        seen = self.weights(batch, dense)
        mean = (dense * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True)
        return Prediction(dense=mean)

    def weights(self, batch: Batch, dense: Tensor) -> Tensor:
        """1 where a feature has a valid pixel under it, (B, 1, h, w)."""
        if self.modality not in batch.valid:
            return torch.ones_like(dense[:, :1])
        valid = batch.valid[self.modality][:, 0].float()
        stride = self.stride
        seen = nn.functional.max_pool2d(valid, stride, ceil_mode=True)
        return seen.to(dense.dtype)


@dataclass(frozen=True)
class Components:
    """Principal components: what K numbers keep of a feature."""

    mean: Tensor
    """(C,)."""
    axes: Tensor
    """(K, C), orthonormal, by falling variance."""


class Projected(nn.Module):
    """Features in their principal components; being linear, it may come before the blend."""

    def __init__(self, features: Features, components: Components) -> None:
        super().__init__()
        self.features = features
        self.components = components

    def predict(self, batch: Batch) -> Prediction:
        """(B, K, h, w)."""
        dense = self.features.predict(batch).dense
        assert dense is not None
        centred = dense - self.components.mean.to(dense).view(1, -1, 1, 1)
        return Prediction(
            dense=torch.einsum("bchw,kc->bkhw", centred, self.components.axes.to(dense))
        )


def principal_components(samples: Tensor, count: int) -> Components:
    """Components of samples (N, C).

    Raises:
        RingmoeError: if more are wanted than there are channels or samples.
    """
    if count > min(samples.shape):
        raise RingmoeError(
            f"--pca {count}: only {min(samples.shape)} components can be had from "
            f"{samples.shape[0]} samples of {samples.shape[1]} features"
        )
    mean = samples.mean(0)
    centred = (samples - mean).double()
    _, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes.flip(1)[:, :count].T
    heaviest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return Components(mean, (axes * heaviest.sign()).float())  # signs do not depend on LAPACK


@dataclass(frozen=True)
class Embedder:
    """An encoder at work on scenes."""

    features: Features
    """On its device."""
    config: CheckpointConfig
    """What its checkpoint says."""
    identity: dict[str, Any]
    """What tells this model from others."""
    settings: Settings
    """Windows of dense maps."""
    wish: Wish
    """What the user said about scenes and outputs."""

    def vectors(self, path: str) -> dict[str, Any]:
        """Write one vector per tile as GeoParquet."""
        fitted = self.open(path)
        outputs = {"vectors": self.output(path, fitted, ".parquet")}
        check_free(outputs, self.wish.overwrite)
        settings = replace(self.settings, overlap=0, cell=self.settings.window)

        def finish(report: Report) -> None:
            write_tiles(outputs["vectors"], fitted.grid, settings.window, rows_of(report))

        network, product = replaced(self.features, pooled=True), Vectors(self.features.width)
        job = Job(network, fitted, product, settings, skip_bad=self.wish.skip_bad)
        report = predict_scene(job, outputs, about=self.about(fitted), finish=finish)
        tiles = sum(int(sums["valid"].sum()) for _, _, sums in report.sums)
        return self.said(path, fitted, report, tiles=tiles)

    def dense(
        self, path: str, components: int | None, dtype: str, suffix: str = ".tif"
    ) -> dict[str, Any]:
        """Write a feature map, one pixel per feature, as COG or (by its suffix) Zarr."""
        fitted = self.open(path)
        outputs = {"features": self.output(path, fitted, suffix)}
        check_free(outputs, self.wish.overwrite)
        network, channels = replaced(self.features, pooled=False), self.features.width
        samples = self.samples(network, fitted)
        answering: Any = network
        if components:
            found = principal_components(samples, components)
            samples = (samples - found.mean) @ found.axes.T
            answering, channels = Projected(network, found), components
        product = FeatureMap(channels, dtype, largest(samples))
        about = {**self.about(fitted), "product": [channels, dtype, product.scales]}
        job = Job(answering, fitted, product, self.settings, skip_bad=self.wish.skip_bad)
        report = predict_scene(job, outputs, about=about, options=self.wish.options)
        return self.said(path, fitted, report, stage=self.features.stage + 1, bands=channels)

    def samples(self, network: Features, source: Normalised) -> Tensor:
        """Features (N, C) of some batches spread over the scene.

        Raises:
            RingmoeError: if the scene has no valid pixel.
        """
        lattice = lattice_of(source, self.settings)
        rows = sorted({int(r) for r in np.linspace(0, lattice.rows - 1, SAMPLED_BATCHES)})
        found = []
        for row in rows:
            some = window_batches(
                source, lattice, self.settings.batch, row, row + 1, SkipBad(self.wish.skip_bad)
            )
            batch = next((w.batch for w in some if w.batch is not None), None)
            if batch is not None:
                there = batch.to(self.settings.device)
                found.append(computed(partial(tokens, network, there)))
        if not found:
            raise RingmoeError("the scene has no valid pixel; it has no features either")
        return torch.cat(found)

    def open(self, path: str) -> Normalised:
        """The scene at the model's ground sampling distance."""
        opener = Opener(self.config, (self.features.modality,), self.wish)
        return opener.at_model_resolution(opener.open(path), path)

    def output(self, path: str, source: Normalised, suffix: str) -> Path:
        """`<scene>_embedding.<suffix>` beside the scene, unless said otherwise."""
        name = source.dates[0][self.features.modality].scene.name
        return output_path(path, name, "embedding", self.wish.output, suffix)

    def about(self, source: Normalised) -> dict[str, Any]:
        """What identifies scene, model and stage."""
        return {
            "model": self.identity, "scenes": about_scenes(source), "stage": self.features.stage,
        }  # fmt: skip

    def said(self, path: str, source: Normalised, report: Report, **more: Any) -> dict[str, Any]:
        """What happened, for `--json`."""
        for place in report.skipped:
            console.warn(f"left out: {place}")
        output = str(next(iter(report.outputs.values())))
        if self.wish.stac:
            more["stac"] = described(report.outputs, path, source, "embedding")
        return {"scene": path, "output": output, **more, "seconds": round(report.seconds, 3)}


def replaced(features: Features, pooled: bool) -> Features:
    """The same encoder and stage, pooled or not."""
    return Features(features.encoder, features.modality, features.stage, pooled).eval()


@torch.inference_mode()
def tokens(network: Features, batch: Batch) -> Tensor:
    """Features of a batch at places with a valid pixel, (N, C)."""
    dense = network.predict(batch).dense
    assert dense is not None
    seen = network.weights(batch, dense)[:, 0] > 0
    return dense.permute(0, 2, 3, 1)[seen].float().cpu()


def largest(samples: Tensor) -> tuple[float, ...]:
    """Per channel, the size that int8 must hold: beyond all but a few of the samples."""
    high = torch.quantile(samples[:: max(1, len(samples) // 50_000)].abs(), 0.9999, dim=0)
    return tuple(float(v) for v in high.clamp(min=1e-6))


def rows_of(report: Report) -> Iterable[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Vectors (C, 1, columns) and validity (1, columns) of each row of tiles."""
    for _, _, sums in report.sums:
        yield sums["vectors"], sums["valid"].astype(bool)


def load_embedder(
    directory: Path,
    wish: Wish,
    *,
    stage: int = 4,
    device: str = "auto",
    window: int | None = None,
    overlap: float | None = None,
    batch: int | None = None,
) -> Embedder:
    """Load the encoder of any checkpoint.

    Raises:
        ValueError: if there is no checkpoint, or it is damaged.
        CheckpointError: if it does not say how its input was normalised.
        RingmoeError: for a stage, window or modality that it cannot have.
    """
    use_memory_steadily()
    from model.packing import pack

    config = read_config(directory)
    modality = the_modality(config, wish.modality, directory)
    encoder = load_encoder(directory, config, modality)
    if not 1 <= stage <= len(config.model.depths):
        raise RingmoeError(f"--stage {stage}: choose 1 to {len(config.model.depths)}")
    features = Features(encoder, modality, stage - 1, pooled=False).eval()
    where = chosen_device(device)
    side = window or (config.task.window if config.task else config.model.image_size)
    unit = features.stride
    if side % unit:
        raise RingmoeError(f"--window {side} must be a multiple of {unit}, the pixels per feature")
    settings = Settings.of(side, overlap, batch, where)
    fitting = round(settings.overlap / unit) * unit
    settings = replace(settings, overlap=min(fitting, side - unit), cell=unit)
    pack(features.to(where))
    return_unused_memory()
    return Embedder(features, config, model_identity(directory), settings, wish)


def load_encoder(directory: Path, config: CheckpointConfig, modality: str) -> RingMoE:
    """The encoder, with the adapters that a fine-tuned one may have."""
    if config.task is None:
        return RingMoE.from_pretrained(directory, modality)
    from model.tasks.network import load_task_network

    return load_task_network(directory)[0].encoder


def the_modality(config: CheckpointConfig, said: str | None, directory: Path) -> str:
    """Which of the model's modalities is meant.

    Raises:
        CheckpointError: if it has no normalisation for it.
        RingmoeError: if it has several and the user did not say.
    """
    known = tuple(config.normalisation)
    if not known:
        raise CheckpointError(
            f"{directory} does not say how its input is normalised; "
            "convert it again with --statistics and a tile store of such scenes"
        )
    if said is None and len(known) > 1:
        raise RingmoeError(f"{directory} reads {', '.join(known)}; choose one with --modality")
    modality = said or known[0]
    if modality not in known:
        raise CheckpointError(f"{directory} reads {', '.join(known)}, not {modality}")
    return modality
