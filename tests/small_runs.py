"""Pre-training runs of seconds, for tests of the command around them."""

from pathlib import Path

import pytest
from training import TIMES

from model.journal import Journal
from ringmoe_cli.jobs.pretraining import PretrainRequest, simulated_stores
from ringmoe_cli.recipe import load_pretrain_recipe

SMALL = (
    "model.depths=[1,1,1,1]", "model.embed_dim=8", "model.image_size=32", "model.window=4",
    "model.mask_cell=8", "train.batch_size=8", "train.steps=4", "train.save_every=2",
    "train.log_every=2",
)  # fmt: skip


def simulated_store(folder: Path, size: int = 96) -> Path:
    """A small scene of all modalities in a tile store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringmoe_cli.jobs.pretraining.SIMULATED_SIZE", size)
        return simulated_stores(folder)[0]


def request(store: Path, output: Path, *changes: str) -> PretrainRequest:
    return PretrainRequest(
        (store,), output, load_pretrain_recipe("pretrain-nano", [*SMALL, *changes])
    )


def curve(folder: Path) -> list[dict[str, float]]:
    """What a run logged, but for times."""
    rows = Journal(folder / "metrics.jsonl").rows()
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
