"""Pre-training that goes on from a checkpoint: what it takes over, what starts at random."""

from dataclasses import replace

import pytest
import torch

from model.adapt import adapted
from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint, weight_map
from model.config import ModelConfig, PretrainConfig
from model.inherit import Heritage, inherited
from model.normalisation import Normalisation
from model.pretrain import MaskedImageModel
from model.shards import Files
from model.start import drawn, fill

CONFIG = ModelConfig(
    embed_dim=8, depths=(1, 2), num_heads=(1, 2), image_size=32, window=4, mask_cell=8,
    channels={"opt": 3, "ms": 4, "sar-l1": 4},
)  # fmt: skip
OBJECTIVE = PretrainConfig()
SAME = {m: tuple(range(c)) for m, c in CONFIG.channels.items()}
SAR = {"sar-l1": Normalisation(("hh",), (0.0,), (1.0,), (0.0, 5.0))}


def network(config=CONFIG, objective=OBJECTIVE):
    with torch.device("meta"):
        return MaskedImageModel(config, objective, SAR)


def weights(source, config=CONFIG, objective=OBJECTIVE):
    net = network(config, objective)
    fill(net, source)
    return net.state_dict()


def saved(folder, kind="pretraining", dtype=torch.float32):
    """A checkpoint whose weights are drawn from another seed than any run here, and the weights."""
    net = network()
    fill(net, drawn(CONFIG, OBJECTIVE, 99))
    net.to(dtype)
    whole = kind == "pretraining"
    about = CheckpointConfig(CONFIG, kind=kind, pretraining=OBJECTIVE if whole else None)
    tensors = disk_tensors(net)
    if not whole:
        tensors = ((n, t) for n, t in tensors if n.startswith("encoder."))
    save_checkpoint(folder, about, tensors, shard_bytes=20_000)
    return net.state_dict()


def differing(ours, theirs):
    assert ours.keys() == theirs.keys()
    return {n for n in ours if not torch.equal(ours[n], theirs[n])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_takes_everything_over_in_full_precision(tmp_path, dtype):
    before = saved(tmp_path, dtype=dtype)
    after = weights(inherited(Heritage(tmp_path, SAME), CONFIG, OBJECTIVE, 1))
    assert {t.dtype for t in after.values()} == {torch.float32}
    assert not differing(after, {n: t.float() for n, t in before.items()})


def test_a_bare_encoder_gets_the_decoders_of_the_seed(tmp_path):
    before = saved(tmp_path, kind="encoder")
    after = weights(inherited(Heritage(tmp_path, SAME), CONFIG, OBJECTIVE, 1))
    fresh = weights(drawn(CONFIG, OBJECTIVE, 1))
    new = {n for n in after if not n.startswith("encoder.")}
    assert new == {"mask_token"} | {n for n in after if n.startswith("decoders.")}
    expected = {**before, **{n: fresh[n] for n in new}}
    assert not differing(after, expected)


def test_modalities_come_and_go(tmp_path):
    before = saved(tmp_path)
    heritage = Heritage(tmp_path, {"ms": SAME["ms"]})
    config = heritage.model({"ms": 4, "sar-l2": 2})
    after = weights(inherited(heritage, config, OBJECTIVE, 1), config)
    fresh = weights(drawn(config, OBJECTIVE, 1), config)
    new = {n for n in after if "sar-l2" in n}
    assert {n.split(".")[0] for n in new} == {"encoder", "decoders"}
    assert not any("opt" in n for n in after)
    expected = {n: fresh[n] if n in new else before[n] for n in after}
    assert not differing(after, expected)
    assert len(new) > 10


def test_other_bands_start_from_their_sources_and_have_a_new_decoder(tmp_path):
    before = saved(tmp_path)
    sources = (3, 0, 0, 1, 2)
    heritage = Heritage(tmp_path, {**SAME, "ms": sources})
    config = heritage.model({**CONFIG.channels, "ms": 5})
    after = weights(inherited(heritage, config, OBJECTIVE, 1), config)
    name = "encoder.patch_embeds.ms.projection.weight"
    assert torch.equal(after[name], adapted(before[name], sources))
    fresh = weights(drawn(config, OBJECTIVE, 1), config)
    decoder = {"decoders.ms.weight", "decoders.ms.bias"}
    assert all(torch.equal(after[n], fresh[n]) for n in decoder)
    rest = after.keys() - decoder - {name}
    assert not differing({n: after[n] for n in rest}, {n: before[n] for n in rest})


def test_another_target_has_a_new_decoder(tmp_path):
    before = saved(tmp_path)
    pixels = replace(OBJECTIVE, sar_l1_target="pixels")
    after = weights(inherited(Heritage(tmp_path, SAME), CONFIG, pixels, 1), CONFIG, pixels)
    assert len(after["decoders.sar-l1.weight"]) == 4 * len(before["decoders.sar-l1.weight"])
    rest = {n for n in after if not n.startswith("decoders.sar-l1")}
    assert not differing({n: after[n] for n in rest}, {n: before[n] for n in rest})


def test_a_lost_tensor_is_not_drawn(tmp_path):
    saved(tmp_path)
    lost = "encoder.stages.1.blocks.0.moe.specialised.ms.2.fc1.weight"
    shard = tmp_path / weight_map(tmp_path)[lost]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=shard.name):
        weights(inherited(Heritage(tmp_path, SAME), CONFIG, OBJECTIVE, 1))


def test_a_process_reads_its_own_experts_only(tmp_path, monkeypatch):
    before = saved(tmp_path)
    read, honest = [], Files.read
    monkeypatch.setattr(
        Files, "read", lambda self, e, t: (read.append(e.spec.name), honest(self, e, t))
    )
    seen = []
    for rank in range(2):
        read.clear()
        source = inherited(Heritage(tmp_path, SAME, (rank, 2)), CONFIG, OBJECTIVE, 1)
        after = weights(source)
        seen.append({n for n in read if ".moe.collaborative." in n or ".moe.specialised." in n})
        assert {n.split(".")[-3] for n in seen[-1]} == {str(2 * rank), str(2 * rank + 1)}
        for name, tensor in after.items():
            routed = ".moe.collaborative." in name or ".moe.specialised." in name
            mine = slice(2 * rank, 2 * rank + 2) if routed else slice(None)
            assert torch.equal(tensor[mine], before[name][mine]), name
    assert len(seen[0]) == len(seen[1])
    assert not seen[0] & seen[1]
    routed = [n for n in weight_map(tmp_path) if "collaborative" in n or "specialised" in n]
    assert {n for n in routed if ".router." not in n} == seen[0] | seen[1]
