"""What a scene, a tile store, a checkpoint or a preset is: one report for people and scripts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ringmoe_cli import console

Report = dict[str, Any]


def of_path(target: str, allow_remote: bool = False) -> Report:
    """Report on whatever lies at a path.

    Raises:
        RingmoeError: if it is none of the three kinds.
    """
    path = Path(target)
    if (path / "config.json").is_file():
        return of_checkpoint(path)
    from ringmoe_cli.scene.tiles import is_store

    if is_store(path):
        return of_store(path)
    return of_scene(target, allow_remote)


def of_preset(name: str) -> Report:
    """Sizes of a preset, counted without allocating them."""
    from model.config import ModelConfig

    return {"kind": "preset", "name": name, **sizes(ModelConfig.preset(name))}


def sizes(config: Any) -> Report:
    """Shape, parameters per component and cost of a model."""
    from model.counts import count_parameters, multiply_adds

    counts = count_parameters(config)
    side = config.image_size
    return {
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "heads": list(config.num_heads),
        "modalities": dict(config.channels),
        "attention": config.attention,
        "gate": config.gate,
        "experts": f"{config.specialised}+{config.collaborative}+{config.shared}",
        "image_size": side,
        "parameters": sum(counts.values()),
        "components": counts,
        "giga_multiply_adds": round(multiply_adds(config, side, side) / 1e9, 3),
    }


def of_checkpoint(path: Path) -> Report:
    """What a checkpoint says of itself, and how large it is on disk."""
    from model.checkpoint import read_config

    config = read_config(path)
    task = config.task
    return {
        "kind": f"checkpoint ({config.kind})",
        "path": str(path),
        "bytes": sum(f.stat().st_size for f in path.glob("*.safetensors")),
        "task": task.name if task else None,
        "classes": list(task.classes) if task else [],
        "bands": {m: list(n.bands) for m, n in config.normalisation.items()},
        "gsd": dict(config.gsd),
        "provenance": dict(config.provenance),
        **sizes(config.model),
    }


def of_recipes() -> Report:
    """Names and first lines of the recipes that come with the program."""
    from ringmoe_cli.recipe import find_recipe, recipe_names

    first = {n: find_recipe(n).read_text().splitlines()[0].lstrip("# ") for n in recipe_names()}
    return {"kind": "recipes", **first}


def of_scene(target: str, allow_remote: bool) -> Report:
    """What a scene is, from its headers alone."""
    from ringmoe_cli.scene.sensors import open_scene

    scene = open_scene(target, allow_remote=allow_remote)
    grid = scene.grid
    return {
        "kind": "scene",
        "name": scene.name,
        "modality": scene.modality,
        "sensor": scene.sensor,
        "bands": [band.name for band in scene.bands],
        "dtype": str(scene.dtype),
        "quantity": scene.quantity,
        "height": grid.height,
        "width": grid.width,
        "crs": short_crs(grid.crs),
        "gsd": scene.gsd,
        "transform": list(grid.transform) if grid.transform else None,
        "nodata": [band.nodata for band in scene.bands],
    }


def of_store(path: Path) -> Report:
    """The scenes of a tile store."""
    from ringmoe_cli.scene.tiles import open_store

    store = open_store(path)
    return {"kind": "tile store", "path": str(path), "scenes": [of_stored(s) for s in store.scenes]}


def of_stored(scene: Any) -> Report:
    """One scene of a store: grid, bands, statistics, labels."""
    grid = scene.grid
    return {
        "name": scene.name,
        "modality": scene.modality,
        "bands": list(scene.scene.band_names),
        "height": grid.height,
        "width": grid.width,
        "crs": short_crs(grid.crs),
        "gsd": scene.scene.gsd,
        "labels": list(scene.labels),
        "statistics": dict(scene.statistics),
    }


def short_crs(crs: str | None) -> str | None:
    """EPSG code of a CRS where it has one, else its name."""
    if crs is None:
        return None
    from pyproj import CRS

    known = CRS.from_user_input(crs)
    code = known.to_epsg(min_confidence=70)
    return f"EPSG:{code}" if code else str(known.name)


def show(report: Report) -> None:
    """Print a report for people: a table of its plain entries, then one table per nested one."""
    flat = [(k, text_of(v)) for k, v in report.items() if not nested(v)]
    console.table("", ("what", "value"), flat)
    for key, value in report.items():
        if nested(value):
            rows = value if isinstance(value, list) else [value]
            columns = [c for c in rows[0] if not nested(rows[0][c])]
            if isinstance(value, Mapping):
                console.table(f"\n{key}", (key, ""), [(k, text_of(v)) for k, v in value.items()])
            else:
                table = [[text_of(row[c]) for c in columns] for row in rows]
                console.table(f"\n{key}", columns, table)


def nested(value: object) -> bool:
    """Whether a value deserves a table of its own."""
    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def text_of(value: object) -> str:
    """A value as a person reads it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value) or "-"
    return str(value)


def draw(
    target: str, quicklook: Path | None, routing: Path | None, curves: Path | None
) -> Iterator[Path]:
    """Draw the pictures that were asked for and yield their paths."""
    from ringmoe_cli.jobs import quicklook as pictures

    wanted = (
        (quicklook, pictures.draw_quicklook),
        (routing, pictures.draw_routing),
        (curves, pictures.draw_curves),
    )
    for path, drawing in wanted:
        if path:
            drawing(target, path)
            yield path
