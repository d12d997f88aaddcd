"""Networks larger than memory: blocks come from disk when they are called, and answer the same."""

import pytest
import torch

from model.adapt import insert_convpass
from model.batch import Batch
from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.config import ModelConfig, TaskConfig
from model.encoder import Block, RingMoE
from model.tasks.network import TaskNetwork, load_task_network

SMALL = ModelConfig(
    embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 2), image_size=32, window=4,
    channels={"opt": 3, "ms": 4},
)  # fmt: skip


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def saved(request, tmp_path):
    task = TaskConfig("segmentation", ("a", "b"), modalities=("opt",), channels=8, adapter=4)
    torch.manual_seed(0)
    network = TaskNetwork(RingMoE(SMALL), task)
    insert_convpass(network.encoder, task.adapter)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network = network.to(request.param).eval()
    config = CheckpointConfig(SMALL, kind="task", task=task)
    save_checkpoint(tmp_path, config, disk_tensors(network))
    return tmp_path, request.param


def test_a_streamed_network_answers_like_one_in_memory(saved):
    folder, dtype = saved
    generator = torch.Generator().manual_seed(0)
    batch = Batch({"opt": torch.randn(2, 1, 3, 32, 40, generator=generator)})
    whole, _ = load_task_network(folder)
    streamed, _ = load_task_network(folder, streamed=True)
    expected = whole.predict(batch).dense
    for _ in range(2):
        assert torch.equal(streamed.predict(batch).dense, expected)
    assert whole.encoder.norm.weight.dtype == dtype
    assert list(whole.encoder.patch_embeds) == ["opt"]


def test_a_streamed_network_holds_no_block(saved):
    streamed, _ = load_task_network(saved[0], streamed=True)
    streamed.predict(Batch({"opt": torch.zeros(1, 1, 3, 32, 32)}))
    blocks = [module for module in streamed.modules() if isinstance(module, Block)]
    assert len(blocks) == 5
    assert all(p.is_meta for block in blocks for p in block.parameters())
    assert not any(p.is_meta for p in streamed.head.parameters())


def test_a_block_that_vanished_is_named(saved):
    folder, _ = saved
    streamed, _ = load_task_network(folder, streamed=True)
    for shard in folder.glob("model-*"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"model-.*is missing"):
        streamed.predict(Batch({"opt": torch.zeros(1, 1, 3, 32, 32)}))
