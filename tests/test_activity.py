"""Expert statistics by modality, against a loop over tokens."""

import math

import pytest
import torch

from model.activity import DeadExperts, ExpertActivity, drop_rates, entropy, evenness
from model.config import ModelConfig
from model.encoder import RingMoE
from model.router import Router


def encoder(**changes: object) -> RingMoE:
    torch.manual_seed(0)
    sizes = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 8, "image_size": 32}
    net = RingMoE(ModelConfig.preset("nano", **{**sizes, **changes}))
    for module in net.modules():
        if isinstance(module, Router):
            module.weight.data.mul_(50)
    return net


def images(net: RingMoE, *names: str) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return {m: torch.randn(2, net.config.channels[m], 32, 32, generator=random) for m in names}


@pytest.mark.parametrize("top_k", [1, 2])
def test_collaborative_shares_are_those_of_each_modality_alone(top_k: int) -> None:
    net = encoder(specialised=0, top_k=top_k)
    activity = ExpertActivity(net)
    activity.watching = True
    batch = images(net, "opt", "sar-l1", "ms")
    net(batch)
    together = activity.take()["collaborative"]
    assert list(together) == ["opt", "ms", "sar-l1"]
    for name, image in batch.items():  # without neighbours in the batch the routing is the same
        routing = net.encode({name: image}).routing
        for layer, row in enumerate(together[name]):
            counts = routing[layer].branches["collaborative"].counts_E
            assert row == pytest.approx((counts / counts.sum()).tolist())


def test_specialised_shares_are_the_routers_counts() -> None:
    net = encoder()
    activity = ExpertActivity(net)
    activity.watching = True
    routing = net.encode(images(net, "ms", "opt")).routing
    shares = activity.take()["specialised"]
    assert set(shares) == {"opt", "ms"}
    for layer, row in enumerate(shares["ms"]):
        counts = routing[layer].branches["specialised.ms"].counts_E
        assert row == pytest.approx((counts / counts.sum()).tolist())


def test_nothing_is_counted_unless_watching_and_taking_starts_anew() -> None:
    net = encoder()
    activity = ExpertActivity(net)
    net(images(net, "opt"))
    assert activity.take() == {"collaborative": {}, "specialised": {}}
    activity.watching = True
    net(images(net, "opt"))
    assert activity.take()["collaborative"]
    assert activity.take() == {"collaborative": {}, "specialised": {}}


def test_shares_of_processes_are_summed() -> None:
    net = encoder(specialised=0)
    activity = ExpertActivity(net)
    activity.watching = True
    net(images(net, "opt"))
    alone = activity.take()
    net(images(net, "opt"))
    doubled = activity.take(total=lambda counts: counts * 2)
    assert doubled == alone


def test_evenness() -> None:
    assert evenness([0.25] * 4) == pytest.approx(1)
    assert evenness([1.0, 0, 0, 0]) == 0
    assert evenness([0.5, 0.5, 0, 0]) == pytest.approx(math.log(2) / math.log(4))
    assert evenness([1.0]) == 1
    assert entropy({"collaborative": {"opt": [[0.5, 0.5]]}}) == {
        "collaborative": {"opt": [pytest.approx(1)]}
    }


def test_drop_rates_with_capacity() -> None:
    net = encoder(capacity_factor=0.5)
    rates = drop_rates(net.encode(images(net, "opt")).routing)
    assert all(rate >= 0.5 - 1e-9 for rate in rates["collaborative"])
    free = drop_rates(encoder().encode(images(net, "opt")).routing)
    assert set(free) == {"collaborative", "specialised.opt"}
    assert all(rate == 0 for layers in free.values() for rate in layers)


def test_expert_is_dead_only_if_no_modality_ever_used_it() -> None:
    dead = DeadExperts()
    dead.add({"collaborative": {"opt": [[1.0, 0.0, 0.0]], "ms": [[0.0, 1.0, 0.0]]}})
    assert dead.named() == ["collaborative expert 2 of layer 0"]
    dead.add({"specialised": {"opt": [[1.0, 0.0]], "ms": [[0.0, 1.0]]}})
    assert "specialised.opt expert 1 of layer 0" in dead.named()
    dead.add({"collaborative": {"opt": [[0.9, 0.0, 0.1]]}})
    assert "collaborative expert 2 of layer 0" not in dead.named()
    assert dead.reports == 3
