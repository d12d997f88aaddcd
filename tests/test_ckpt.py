"""MindSpore's checkpoints: what is read, and what is refused."""

import random

import pytest
import torch
from ckpt_files import block, checksum, number, parameter, value

from model.ckpt import CkptWeights
from model.weights import open_weights

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "half": torch.tensor([[1.5, -2.0]], dtype=torch.float16),
    "brain": torch.tensor([3.0, 1e30, -7.0], dtype=torch.bfloat16),
    "wide": torch.tensor([2**40, -1]),
    "flag": torch.tensor([True, False]),
    "step": torch.tensor(7.0, dtype=torch.float64),
    "nothing": torch.zeros(2, 0),
}


def content() -> bytes:
    """A file of all kinds of values."""
    inside = b"".join(
        parameter(name, t, pieces=3 if t.ndim == 2 else 1) for name, t in TENSORS.items()
    )
    inside += value("epoch", "str", [0], "7".encode("utf-32-le"))
    inside += value("packed", "Float32", [2, 1], bytes(8), packed=True)
    tensor = number(1 << 3) + number(1) + block(2, b"Int8") + block(3, b"\x05")
    unknown = number(9 << 3 | 5) + bytes(4)
    return inside + block(1, block(1, b"later") + unknown + block(2, tensor))


@pytest.mark.parametrize("tail", [lambda data: b"", checksum])
def test_values_come_back(tmp_path, tail):
    path = tmp_path / "w.ckpt"
    path.write_bytes(content() + tail(content()))
    weights = open_weights(path)
    assert set(weights.specs) == {*TENSORS, "packed", "later"}
    for name, tensor in TENSORS.items():
        got = weights.read(name)
        assert got.dtype == tensor.dtype
        assert weights.specs[name].shape == tuple(tensor.shape)
        assert torch.equal(got, tensor), name
    assert weights.read("packed").shape == (2, 1)
    assert weights.read("later").tolist() == [5]


FLOAT = ("x", "Float32")
DAMAGED = {
    "a length beyond the file": (b"\x0a\xff\xff\xff\xff\x0f", "too late"),
    "a length beyond its message": (b"\x0a\x04\x0a\x05xx" + bytes(9), "too late"),
    "a number without end": (b"\x0a" + b"\xff" * 12, "no number ends"),
    "a field of no type": (b"\x0f", "no field at byte 0"),
    "another message": (b"\x10\x01", "something else"),
    "no name": (block(1, block(2, b"")), "no name"),
    "a name that is no text": (block(1, block(1, b"\xff\xfe")), "no text"),
    "an endless name": (block(1, block(1, b"x" * 5000)), "5000 bytes"),
    "many dimensions": (value(*FLOAT, [1] * 40, bytes(4)), "dimensions"),
    "many packed dimensions": (value(*FLOAT, [1] * 40, bytes(4), packed=True), "dimensions"),
    "less content than its shape": (value(*FLOAT, [2, 3], bytes(20)), "has 20 of 24 bytes"),
    "more content than its shape": (value(*FLOAT, [2], bytes(12)), "has 12 of 8 bytes"),
    "a huge shape": (value(*FLOAT, [1 << 40, 1 << 40], b""), "larger than the file"),
    "a negative shape": (value(*FLOAT, [-1, 0], b""), "larger than the file"),
    "an unknown type": (value("x", "QInt4x2", [2], b"\x01"), "type 'QInt4x2'"),
    "a table": (block(1, block(1, b"x") + block(3, b"")), "table"),
    "a name twice": (
        parameter("x", torch.zeros(1))
        + parameter("y", torch.zeros(1))
        + parameter("x", torch.zeros(1)),
        "x twice",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_named(tmp_path, what):
    data, words = DAMAGED[what]
    (tmp_path / "w.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match=words) as refusal:
        open_weights(tmp_path / "w.ckpt")
    assert "w.ckpt" in str(refusal.value)


def test_another_checksum_is_noticed(tmp_path):
    data = bytearray(content() + checksum(content()))
    data[data.index(b"Float16") + 12] ^= 1
    (tmp_path / "w.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        CkptWeights(tmp_path / "w.ckpt")


def test_no_damage_does_more_than_a_refusal(tmp_path):
    """Cuts and flipped bytes: a line, or tensors that are no larger than the file."""
    whole, path, draw = content(), tmp_path / "w.ckpt", random.Random(0)
    refused = []
    for trial in range(400):
        data = bytearray(whole[: draw.randrange(len(whole))] if trial % 2 else whole)
        for _ in range(draw.randrange(4)):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            weights = CkptWeights(path)
        except ValueError as refusal:
            refused.append(str(refusal))
            continue
        assert sum(spec.nbytes for spec in weights.specs.values()) <= len(data)
        for name, spec in weights.specs.items():
            assert tuple(weights.read(name).shape) == spec.shape
    assert len(refused) > 100
    assert all(str(path) in line for line in refused)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02"])
def test_a_checkpoint_of_pytorch_is_refused(tmp_path, start):
    (tmp_path / "w.ckpt").write_bytes(start + bytes(20))
    with pytest.raises(ValueError, match="can hold code"):
        open_weights(tmp_path / "w.ckpt")
