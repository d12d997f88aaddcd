"""Damaged text files of users: one line that names the file, whatever is in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import read_config, weight_map
from model.journal import Journal
from model.weights import safetensors_of
from ringmoe_cli.app import one_line
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.jobs.conversion import Source, changes, their_config
from ringmoe_cli.jobs.quicklook import rows_of
from ringmoe_cli.jobs.taskdata import listed
from ringmoe_cli.recipe import load_recipe
from ringmoe_cli.scene.labelled import box_formats
from ringmoe_cli.scene.labelled.boxes_io import frames_of, names_beside
from ringmoe_cli.scene.labelled.folders import from_csv
from ringmoe_cli.scene.labelled.labelcode import class_list
from ringmoe_cli.scene.labelled.outlines import coco_outlines


def source(weights: Path, config: Path | None = None) -> Source:
    """Weights to import."""
    return Source(weights, None, None, None, config, "float32", 0)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config": ("config.json", lambda p: read_config(p.parent)),
    "index": ("model.safetensors.index.json", lambda p: weight_map(p.parent)),
    "foreign index": ("model.safetensors.index.json", lambda p: safetensors_of(p.parent)),
    "fields": ("fields.json", lambda p: changes(source(Path("w.npz"), config=p))),
    "foreign config": ("config.json", lambda p: their_config(source(p.parent))),
    "journal": ("metrics.jsonl", lambda p: Journal(p).rows()),
    "curve": ("metrics.jsonl", lambda p: rows_of(str(p.parent), p.name)),
    "list": ("val.txt", lambda p: listed([], p)),
    "recipe": ("mine.yaml", lambda p: load_recipe(str(p))),
    "classes": ("classes.csv", lambda p: class_list(str(p))),
    "images": ("images.csv", from_csv),
    "outlines": ("train.json", coco_outlines),
    "coco": ("boxes.json", box_formats.parse_coco),
    "csv": ("boxes.csv", box_formats.parse_csv),
    "mot": ("gt.txt", box_formats.parse_mot),
    "dota": ("a.txt", box_formats.parse_dota),
    "voc": ("a.xml", box_formats.parse_voc),
    "names": ("data.yaml", lambda p: names_beside(p.parent)),
    "sequence": ("seqinfo.ini", lambda p: frames_of(p.parent)),
}
DAMAGE = {
    "empty": b"",
    "bytes": bytes(range(128, 256)) * 100,
    "zeros": bytes(4096),
    "deep": b"[" * 100_000 + b"\n",
    "list": b"[[]]\n",
    "number": b"1\n",
    "object": b'{"model": [], "weight_map": [1], "images": [1], "annotations": {}}\n',
    "long": b'"' + b"a," * 200_000,
    "interpolation": b"[Sequence]\nimDir=%(x)s\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", READERS)
def test_damaged_file_is_named(reader: str, damage: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    path = tmp_path / "given" / name
    path.parent.mkdir()
    path.write_bytes(DAMAGE[damage])
    said = refusal(read, path)
    if said is None:  # to some readers some of these are no damage
        assert damage != "bytes"
    else:
        assert str(path.parent) in said
        assert len(said) < 1000
        assert "\0" not in said


def refusal(read: Callable[[Path], Any], path: Path) -> str | None:
    """What the user sees, if the file is refused; any other error passes."""
    try:
        read(path)
    except (RingmoeError, ValueError) as error:
        return one_line(error)
    return None
