"""`ringmoe pretrain --init`: a run that goes on from a checkpoint."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import curve, request, simulated_store

from model.checkpoint import read_config, read_tensors, weight_map
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.jobs.pretraining import PretrainRequest, pretrain

STILL = ("train.lr=0", "train.steps=1", "train.warmup_steps=0")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated_store(tmp_path_factory.mktemp("simulated"))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_tensors(folder, weight_map(folder)))


def test_run_goes_on_from_a_checkpoint_with_its_model(store: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain(request(store, first))
    wanted = request(store, second, *STILL, "model.embed_dim=16")
    pretrain(replace(wanted, init=first))
    before, after = tensors_of(first), tensors_of(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert read_config(second).normalisation == read_config(first).normalisation
    assert read_config(second).provenance["init"] == str(first)


def test_other_modalities_and_bands_than_the_checkpoints(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    without = [f"modalities.{m}.weight=0" for m in ("opt", "sar-l1", "sar-l2")]
    pretrain(request(store, first, *without))
    changes = ("modalities.ms.bands=[nir, red]", "modalities.sar-l1.weight=0")
    pretrain(replace(request(store, second, *changes, *STILL), init=first))
    said = " ".join(capsys.readouterr().err.split())
    assert "opt is new to" in said
    assert "sar-l2 is new to" in said
    about = read_config(second)
    assert dict(about.model.channels) == {"opt": 3, "ms": 2, "sar-l2": 3}
    known = read_config(first).normalisation["ms"]
    at = [known.bands.index(b) for b in ("nir", "red")]
    assert about.normalisation["ms"].mean == tuple(known.mean[i] for i in at)
    before, after = tensors_of(first), tensors_of(second)
    name = "encoder.patch_embeds.ms.projection.weight"
    assert torch.equal(after[name], before[name][:, at])
    shared = [n for n in before if ".collaborative." in n or ".specialised.ms." in n]
    assert all(torch.equal(before[n], after[n]) for n in shared)
    pretrain(replace(request(store, tmp_path / "third", *without, *STILL), init=second))
    assert "opt of" in capsys.readouterr().err


def test_stopped_run_from_a_checkpoint_goes_on(store: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    pretrain(request(store, first, "train.steps=1", "train.warmup_steps=0"))

    def wanted(name: str) -> PretrainRequest:
        return replace(request(store, tmp_path / name), init=first)

    pretrain(wanted("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ringmoe_cli.jobs.pretraining.Watch.on_step",
            lambda *_: os.kill(os.getpid(), signal.SIGTERM),
        )
        with pytest.raises(KeyboardInterrupt):
            pretrain(wanted("parts"))
    with pytest.raises(RingmoeError, match=r"a run with init .*first, not None"):
        pretrain(request(store, tmp_path / "parts"))
    pretrain(wanted("parts"))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_the_checkpoint_is_checked_before_anything_is_written(store: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    pretrain(request(store, first, *STILL))
    before = tensors_of(first)
    wanted = replace(request(store, first, *STILL), init=first, overwrite=True)
    with pytest.raises(RingmoeError, match="is the checkpoint to start from"):
        pretrain(wanted)
    assert all(torch.equal(before[n], t) for n, t in tensors_of(first).items())
    second = replace(request(store, tmp_path / "second", *STILL), init=first)
    with pytest.raises(ValueError, match="does not exist"):
        pretrain(replace(second, init=tmp_path / "nothing"))
    with pytest.raises(ValueError, match="is not a checkpoint"):
        pretrain(replace(second, init=tmp_path))
    shard = next(first.glob("model*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=shard.name):
        pretrain(second)
    assert not (tmp_path / "second").exists()
