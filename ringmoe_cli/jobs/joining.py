"""The maps of many scenes as one: `--mosaic`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint import read_config
from model.config import TaskConfig
from ringmoe_cli import console
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.jobs.maps import Tally, check_free, layer_files
from ringmoe_cli.jobs.opening import Wish
from ringmoe_cli.scene.areas import areas_of_map
from ringmoe_cli.scene.maps.mosaic import write_mosaic
from ringmoe_cli.scene.maps.product import CELL, Product, product_of


@dataclass(frozen=True)
class Mosaic:
    """A mosaic in the making."""

    path: Path
    """Its file."""
    task: TaskConfig
    """What the model says about pixels."""
    wish: Wish
    """What the user said."""

    @classmethod
    def of(cls, path: Path, model: Path, wish: Wish) -> "Mosaic":
        """A mosaic that nothing is in the way of.

        Raises:
            ValueError: for a model that makes no maps.
            RingmoeError: if the file exists.
        """
        task = read_config(model).task
        if task is None:
            raise RingmoeError(f"{model} has no task head; run `ringmoe finetune` first")
        mosaic = cls(path, task, wish)
        check_free(mosaic.outputs, wish.overwrite)
        return mosaic

    @property
    def product(self) -> Product:
        """What its maps hold."""
        return product_of(self.task, self.wish.probabilities)

    @property
    def outputs(self) -> dict[str, Path]:
        """Layer -> file."""
        return layer_files(self.path, self.product)

    def join(self, tally: Tally, scenes: Sequence[str], as_json: bool) -> None:
        """Write the mosaic, unless a scene failed: then the same command finishes the job."""
        if tally.failed:
            console.warn(f"no mosaic, as scenes failed; {self.path} comes once all are there")
            return
        sheets = [layer_files(Path(tally.made[s]), self.product) for s in scenes]
        write_mosaic(self.outputs, self.product.layers, sheets, self.wish.options)
        said = self.summary(len(sheets))
        console.result(said if as_json else said["output"])

    def summary(self, count: int) -> dict[str, Any]:
        """What came out, for `--json`."""
        said: dict[str, Any] = {"output": str(self.path), "task": self.task.name, "mosaic": count}
        if self.task.classes:
            areas = areas_of_map(self.path, len(self.task.classes), CELL)
            assert areas is not None
            named = zip(self.task.classes, areas, strict=True)
            said["classes"] = {name: {"area_m2": round(float(area), 1)} for name, area in named}
        return said
