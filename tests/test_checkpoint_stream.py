"""Safetensors shards as streams, against the safetensors library; damage is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model import shards
from model.checkpoint import (
    CheckpointConfig,
    disk_tensors,
    load_module,
    open_tensors,
    read_tensors,
    save_checkpoint,
    weight_map,
)
from model.config import ModelConfig
from model.shards import Spec, read_header, stream, write_shard

TENSORS = {
    "a": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "b": torch.randn(5, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "empty": torch.zeros(0, 7),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "flags": torch.tensor([True, False]),
}


def specs(tensors):
    return [Spec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def test_written_shards_open_with_the_library(tmp_path):
    path = tmp_path / "x.safetensors"
    write_shard(path, specs(TENSORS), iter(TENSORS.values()), {"who": "me"})
    theirs = load_file(path)
    assert {n: t.dtype for n, t in theirs.items()} == {n: t.dtype for n, t in TENSORS.items()}
    for name, tensor in TENSORS.items():
        assert torch.equal(theirs[name], tensor)
    assert read_header(path)[1] == {"who": "me"}


def test_shards_of_the_library_stream_in_any_order(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    entries, _ = read_header(path)
    order = ["flags", "b", "a", "b", "scalar", "empty", "a"] * 3
    for name, tensor in zip(order, stream([entries[n] for n in order]), strict=True):
        assert torch.equal(tensor, TENSORS[name])


@pytest.mark.parametrize("block", [1, 3, 8, 64, 1000])
def test_tensors_lie_across_blocks_of_the_file(tmp_path, monkeypatch, block):
    monkeypatch.setattr(shards, "CHUNK", block)
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    entries, _ = read_header(path)
    for name, tensor in zip(entries, stream([*entries.values()]), strict=True):
        assert torch.equal(tensor, TENSORS[name])


def test_only_whole_blocks_of_the_file_are_forgotten_by_its_readers(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 64)
    forgotten = []
    monkeypatch.setattr(shards, "forget", lambda _, start, length: forgotten.append(start))
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    entries = sorted(read_header(path)[0].values(), key=lambda entry: entry.start)
    list(stream(entries))
    last = path.stat().st_size // 64 * 64
    assert sorted({*forgotten} - {0}) == [*range(entries[0].start // 64 * 64, last, 64)]


def test_a_stream_may_be_left_early(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    entries, _ = read_header(path)
    reading = stream([entries["a"]] * 50)
    assert torch.equal(next(reading), TENSORS["a"])
    reading.close()


def test_what_fails_while_reading_reaches_the_consumer(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    entries, _ = read_header(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="truncated inside"):
        list(stream(sorted(entries.values(), key=lambda e: e.start)))


def test_a_promise_must_be_kept(tmp_path):
    with pytest.raises(ValueError, match="was promised"):
        write_shard(tmp_path / "x", [Spec("a", torch.float32, (2,))], [torch.zeros(3)], {})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b[:-1], "truncated"),
        (lambda b: b[:5], "truncated or no safetensors"),
        (lambda b: b"", "truncated or no safetensors"),
        (lambda b: b"PK\x03\x04" + b[4:], "truncated or no safetensors"),
        (lambda b: b[:8] + b"\xff" + b[9:], "damaged header"),
        (lambda b: b[:8] + b"[" + b[9:], "damaged header"),
        (lambda b: b.replace(b'"F32"', b'"F99"'), "damaged header"),
        (lambda b: b.replace(b"[3,4]", b"[3,5]"), "does not fit"),
    ],
)
def test_damaged_shards_are_named(tmp_path, damage, words):
    path = tmp_path / "x.safetensors"
    save_file({"a": TENSORS["a"]}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=words) as failure:
        read_header(path)
    assert str(path) in str(failure.value)


class Net(nn.Module):
    """A module with an expert bank's names."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = nn.ModuleDict({"collaborative": nn.ModuleDict({"fc1": nn.Linear(2, 2)})})
        self.moe.collaborative.fc1.weight = nn.Parameter(torch.randn(3, 4, 2))
        self.moe.collaborative.fc1.bias = nn.Parameter(torch.randn(3, 4))


@pytest.fixture
def saved(tmp_path):
    net = Net()
    config = CheckpointConfig(ModelConfig.preset("nano"))
    save_checkpoint(tmp_path / "ckpt", config, disk_tensors(net), shard_bytes=64)
    return net, tmp_path / "ckpt"


def test_a_module_comes_back_from_several_shards(saved):
    net, folder = saved
    assert len(set(weight_map(folder).values())) > 1
    other = Net()
    load_module(folder, other)
    for name, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    double = Net().double()
    load_module(folder, double)
    assert torch.equal(
        double.moe.collaborative.fc1.weight, net.moe.collaborative.fc1.weight.double()
    )


def test_one_expert_is_read_without_the_others(saved):
    net, folder = saved
    name = "moe.collaborative.1.fc1.weight"
    ((found, tensor),) = read_tensors(folder, [name])
    assert found == name
    assert torch.equal(tensor, net.moe.collaborative.fc1.weight[1])
    needed = weight_map(folder)[name]
    for shard in folder.glob("model-*"):
        if shard.name != needed:
            shard.unlink()
    assert torch.equal(next(read_tensors(folder, [name]))[1], tensor)


def test_missing_shards_and_mixed_saves_are_named(saved, tmp_path):
    _, folder = saved
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    shutil.copytree(folder, tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    config["provenance"] = {"step": 2}
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another save"):
        open_tensors(tmp_path / "mixed")
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"{shards[0].name} is missing"):
        open_tensors(folder)
    with pytest.raises(ValueError, match=r"no tensor nothing\.here"):
        open_tensors(folder, ["nothing.here"])


def test_a_module_on_meta_takes_the_dtype_of_the_checkpoint(tmp_path):
    net = Net().bfloat16()
    config = CheckpointConfig(ModelConfig.preset("nano"))
    save_checkpoint(tmp_path, config, disk_tensors(net))
    with torch.device("meta"):
        other = Net()
    load_module(tmp_path, other)
    for name, tensor in net.state_dict().items():
        assert other.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(other.state_dict()[name], tensor)
