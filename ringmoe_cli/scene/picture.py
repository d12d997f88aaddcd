"""Pictures for people: quicklooks, maps beside their truth, curves, heat maps. Always PNG files.

Matplotlib is imported inside the functions (it costs half a second) and drawn without a display.
The same data gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Colour = tuple[int, int, int]
Image = NDArray[np.uint8]

INK = "#20262c"
FAINT = "#c9d0d6"
LINES = ("#2f6f9f", "#c0563b", "#5a8f4a", "#8a5fa0", "#b8923a", "#4f5b66")
"""Line colours, told apart also in grey."""
NODATA: Colour = (235, 235, 235)
MOST_PIXELS = 900
"""Longest side of an image in a picture; larger ones are thinned."""


def thinned(array: NDArray[Any], most: int = MOST_PIXELS) -> NDArray[Any]:
    """Every n-th row and column of (..., H, W), so that no side is longer than `most`."""
    step = max(1, -(-max(array.shape[-2:]) // most))
    return array[..., ::step, ::step]


def quicklook(
    values: NDArray[Any],
    valid: NDArray[np.bool_] | None = None,
    tails: tuple[float, float] = (2.0, 98.0),
) -> Image:
    """(C, H, W) values as an (H, W, 3) picture: three bands as RGB, one or two as grey.

    Each band is stretched between two percentiles of its valid, finite pixels; complex values are
    shown as decibels of their power. Invalid pixels are light grey.
    """
    if np.iscomplexobj(values):
        values = 10 * np.log10(np.abs(values) ** 2 + 1e-12)
    bands = values[:3] if len(values) >= 3 else np.repeat(values[:1], 3, axis=0)
    seen = np.isfinite(bands).all(axis=0)
    seen = seen & valid if valid is not None else seen
    picture = np.full((*bands.shape[1:], 3), NODATA, np.uint8)
    if seen.any():
        for channel, band in enumerate(bands.astype(np.float32)):
            low, high = np.percentile(band[seen], tails)
            scaled = (band[seen] - low) / max(float(high - low), 1e-12)
            picture[seen, channel] = (np.clip(scaled, 0, 1) * 255).astype(np.uint8)
    return picture


def paint(classes: NDArray[Any], colours: Sequence[Colour]) -> Image:
    """(H, W) class indices as (H, W, 3) RGB; indices without a colour are light grey."""
    palette = np.full((256, 3), NODATA, np.uint8)
    palette[: len(colours)] = np.array(colours, np.uint8).reshape(-1, 3)
    picture: Image = palette[np.clip(classes, 0, 255).astype(np.uint8)]
    return picture


def palette_of(count: int) -> list[Colour]:
    """Colours for classes that have none of their own, evenly around the colour wheel."""
    from matplotlib.colors import hsv_to_rgb

    turns = (np.arange(count) * 0.618034) % 1
    wheel = hsv_to_rgb(np.stack([turns, np.full(count, 0.55), np.full(count, 0.8)], axis=1))
    return [(int(r), int(g), int(b)) for r, g, b in np.rint(wheel * 255)]


def save_triptych(
    path: Path,
    images: Mapping[str, Image],
    classes: Sequence[str],
    colours: Sequence[Colour],
    footer: str = "",
) -> None:
    """Images of equal size with one legend: input, truth, prediction; wide ones under each other.

    Args:
        path: PNG file.
        images: caption -> (H, W, 3), in order; `quicklook` and `paint` make them.
        classes: names in the legend.
        colours: RGB of each class.
        footer: one line below, e.g. the score.
    """
    from matplotlib.patches import Patch

    height, width = next(iter(images.values())).shape[:2]
    lines, columns = (len(images), 1) if width > 2 * height else (1, len(images))
    each = 9.0 / columns
    figure = new_figure(9.2, lines * (each * height / width + 0.25) + 0.8)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (caption, image) in zip(grid, images.items(), strict=True):
        axes.imshow(thinned(image.transpose(2, 0, 1)).transpose(1, 2, 0), interpolation="nearest")
        axes.set_title(caption, fontsize=10, color=INK, loc="left")
        axes.set_axis_off()
    patches = [
        Patch(color=hex_of(colour), label=name)
        for name, colour in zip(classes, colours, strict=True)
    ]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=min(len(classes), 8), frameon=False,
        fontsize=9, labelcolor=INK, title=footer, title_fontsize=9, handlelength=1.0,
    )  # fmt: skip
    save(figure, path)


def save_panels(path: Path, images: Mapping[str, Image]) -> None:
    """Pictures side by side, four in a row, each under its name."""
    columns = min(4, len(images))
    lines = -(-len(images) // columns)
    figure = new_figure(3.6 * columns, 3.8 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (name, image) in zip(grid, images.items(), strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(name, fontsize=9, color=INK, loc="left")
    save(figure, path)


def save_curves(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    reconstructions: Mapping[str, Mapping[str, Image]] | None = None,
) -> None:
    """Every number that a run logs against its steps, and below what pre-training fills in.

    Args:
        path: PNG file.
        rows: lines of `metrics.jsonl`: `step`, `loss`, and any number of others.
        reconstructions: modality -> caption ("input", "masked", "reconstructed") -> (H, W, 3).
    """
    timing = {"step", "seconds", "data_wait", "images_per_s", "mfu", "skipped"}
    names = [n for n in dict.fromkeys(k for r in rows for k in r) if n not in timing]
    names = [n for n in names if any(isinstance(r.get(n), int | float) for r in rows)]
    columns = min(4, len(names))
    heights = [2.3 * -(-len(names) // columns), 1.7 * len(reconstructions or ())]
    figure = new_figure(3.1 * columns, sum(heights))
    upper: Figure | SubFigure = figure
    if reconstructions:
        parts: Any = figure.subfigures(2, 1, height_ratios=heights)
        upper, lower = parts
        draw_rows(lower, reconstructions)
    grid = upper.subplots(-(-len(names) // columns), columns, squeeze=False).ravel()
    for number, (axes, name) in enumerate(zip(grid, names, strict=False)):
        points = [(r["step"], r[name]) for r in rows if isinstance(r.get(name), int | float)]
        draw_curve(axes, name, points, LINES[number % len(LINES)])
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    save(figure, path)


def draw_curve(axes: "Axes", name: str, points: Sequence[tuple[float, float]], colour: str) -> None:
    """One number against the steps: faint as logged, strong as running mean."""
    steps, values = (np.array(axis, float) for axis in zip(*points, strict=True))
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, running_mean(values), color=colour, linewidth=1.6)
    tidy(axes, name)


def draw_rows(figure: "SubFigure", rows: Mapping[str, Mapping[str, Image]]) -> None:
    """Pictures in rows, one row per name."""
    columns = max(len(images) for images in rows.values())
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, (caption, image) in zip(line, images.items(), strict=False):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(f"{name}: {caption}", fontsize=9, color=INK, loc="left")


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over a window of a twentieth of the curve, shorter at its ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    mean: NDArray[np.float64] = (sums[high] - sums[low]) / (high - low)
    return mean


def save_routing(path: Path, shares: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
    """Which experts a modality uses: a heat map of layers × experts for each, per branch.

    Args:
        path: PNG file.
        shares: branch ("collaborative", "specialised") -> modality -> (layers, experts), the share
            of that modality's tokens that go to each expert.
    """
    names = list(dict.fromkeys(m for by_modality in shares.values() for m in by_modality))
    layers = max(len(a) for by_modality in shares.values() for a in by_modality.values())
    figure = new_figure(1.9 * len(names) + 1.1, (0.22 * layers + 1.0) * len(shares))
    grid = figure.subplots(len(shares), len(names), squeeze=False)
    drawn = None
    for line, (branch, by_modality) in zip(grid, shares.items(), strict=True):
        for axes, name in zip(line, names, strict=True):
            if name not in by_modality:
                axes.set_axis_off()
                continue
            heat = by_modality[name]
            drawn = axes.imshow(heat, cmap="magma_r", vmin=0, vmax=1, aspect="auto")
            axes.set_title(f"{name}\n{branch}", fontsize=9, color=INK, loc="left")
            axes.set_xticks(range(heat.shape[1]), [str(e) for e in range(heat.shape[1])])
            axes.tick_params(labelsize=7, length=0, colors=INK)
            axes.set_xlabel("expert", fontsize=8, color=INK)
            if name == names[0]:
                axes.set_ylabel("layer", fontsize=8, color=INK)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=grid, fraction=0.03, pad=0.02)
        bar.set_label("share of the modality's tokens", fontsize=8, color=INK)
        bar.ax.tick_params(labelsize=7)
    save(figure, path)


def save_confusion(path: Path, counts: NDArray[Any], classes: Sequence[str]) -> None:
    """A confusion matrix, rows (truth) scaled to 100 %.

    Args:
        path: PNG file.
        counts: (K, K) numbers of pixels or samples, truth × prediction.
        classes: names.
    """
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 1.6 + 0.55 * len(classes)
    figure = new_figure(side, side)
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(share):
        colour = "white" if value > 0.6 else INK
        axes.text(
            column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour
        )
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.tick_params(labelsize=8, length=0, colors=INK)
    axes.set_xlabel("predicted", fontsize=9, color=INK)
    axes.set_ylabel("truth, % of its row", fontsize=9, color=INK)
    save(figure, path)


def hex_of(colour: Colour) -> str:
    """A colour as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def new_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches that needs no display and leaves no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=115, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: "Axes", title: str) -> None:
    """A plot with as little ink as will do."""
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.tick_params(labelsize=7, colors=INK, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.set_xlabel("step", fontsize=8, color=INK)


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG under a temporary name, then rename it; no dates inside."""
    part = path.with_name(f"{path.name}.part")
    figure.savefig(part, format="png", metadata={"Software": None})
    part.replace(path)
