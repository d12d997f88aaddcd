"""Experts in 8-bit integers: exact sums, errors as small as the levels allow, half the memory."""
# ruff: noqa: F401, F811 - fixtures are imported

import pytest
import rasterio
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mapping import model, scene
from test_stream import saved

from model import fused, int8
from model.batch import Batch
from model.config import ModelConfig
from model.experts import ExpertBank, RMoE
from model.packing import pack
from model.tasks.network import load_task_network
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.jobs.maps import load_mapper
from ringmoe_cli.jobs.opening import Wish
from ringmoe_cli.jobs.ways import Ways

pytestmark = pytest.mark.skipif(not int8.runs(), reason="this processor has no 8-bit products")


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(1e-6, 1e6), shift=st.floats(-3, 3), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_levels_are_the_nearest_ones(scale, shift, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = (scale * (torch.randn(7, 9, generator=generator) + shift)).to(dtype)
    before = x.clone()
    whole, step, zero = int8.levels(x)
    assert whole.dtype == torch.uint8
    assert torch.equal(x, before)
    found = (whole.double() - zero) * step
    assert (found - x.double()).abs().max() <= step * 0.501
    assert 0 <= zero <= 255


def test_zeros_stay_zeros():
    whole, step, zero = int8.levels(torch.tensor([0.0, 5.0, -0.17]))
    assert (whole[0] - zero) * step == 0
    assert int8.levels(torch.zeros(4))[0].tolist() == 4 * [0]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number_is_named(bad):
    with pytest.raises(ValueError, match="not finite"):
        int8.levels(torch.tensor([0.0, bad]))


@pytest.mark.parametrize("after", ["none", "gelu"])
def test_products_are_sums_of_integers(after):
    """Against the same rounding written out, summed in float64 where integers are exact."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(40, 24), torch.randn(40), torch.randn(2, 11, 24) + 0.5
    step_O = weight.abs().amax(1) / 127
    rounded = (weight / step_O[:, None]).round().double()
    whole, step, zero = int8.levels(x)
    wanted = ((whole.double() - zero) @ rounded.T) * step * step_O + bias
    wanted = F.gelu(wanted) if after == "gelu" else wanted
    found = int8.linear(x, int8.quantised(weight, bias), torch.float32, after)
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float32, 0.02), (torch.bfloat16, 0.025)],  # some tokens near a tie go elsewhere
)
def test_a_layer_in_integers_is_within_two_percent(dtype, most):
    torch.manual_seed(0)
    moe = RMoE(ModelConfig(embed_dim=256, depths=(1,), num_heads=(1,), channels={"opt": 3}), 0, 0)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.06)
    x_TD = torch.randn(700, 256).to(dtype)
    with torch.inference_mode():
        exact, _ = moe(x_TD.float(), {"opt": 700})
        pack(moe.to(dtype), integers=True)
        rough, _ = moe(x_TD, {"opt": 700})
    assert rough.dtype == dtype
    error = ((rough.float() - exact).norm() / exact.norm()).item()
    assert 0.005 < error < most  # floating point would be below


def test_a_network_is_rounded_as_it_is_read(saved):
    folder, _ = saved
    batch = Batch({"opt": torch.randn(2, 1, 3, 32, 40, generator=torch.Generator().manual_seed(0))})
    exact, _ = load_task_network(folder)
    rough, _ = load_task_network(folder, int8=True)
    banks = [module for module in rough.modules() if isinstance(module, ExpertBank)]
    assert len(banks) == 15
    for bank in banks:
        assert bank.fc1.weight.is_meta
        assert all(expert.fc1.weight.dtype == torch.int8 for expert in bank.packed)
    with torch.inference_mode():
        mine, wanted = rough.predict(batch).dense, exact.predict(batch).dense
    assert mine.shape == wanted.shape
    assert 0 < (mine - wanted).abs().mean() < 0.05


def test_maps_in_rough_numbers_are_nearly_the_same(model, scene, tmp_path):
    """And their settings differ: a run without does not take up their unfinished bands."""
    maps, settings = [], set()
    rough = [Ways(int8=True)]
    if fused.runs(torch.empty(0).bfloat16()):
        rough += [Ways(bf16=True), Ways(bf16=True, int8=True)]
    for ways in (Ways(), *rough):
        wish = Wish(tmp_path / f"{len(maps)}.tif")
        mapper = load_mapper(model, wish, "auto", ways=ways)
        encoder = mapper.network.encoder
        assert (encoder.norm.weight.dtype == torch.bfloat16) == ways.bf16
        mapper.map_scene(str(scene))
        settings.add(mapper.settings)
        with rasterio.open(wish.output) as file:
            maps.append(file.read(1))
        assert (maps[-1] == maps[0]).mean() > 0.9
    assert len(settings) == 1 + len(rough)


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("ways", [Ways(), Ways(streamed=True), Ways(int8=True), Ways(bf16=True)])
def test_beside_a_gpu_what_only_a_cpu_does_goes_there_unasked(name, ways, monkeypatch):
    monkeypatch.setattr(
        "ringmoe_cli.jobs.ways.chosen_device", lambda name: "cuda" if name == "auto" else name
    )
    on_cpu = name == "auto" and (ways.streamed or ways.int8)
    assert ways.device(name) == ("cpu" if on_cpu else "cuda")


@pytest.mark.parametrize(
    ("device", "ways", "words"),
    [
        ("cuda", Ways(int8=True), "not on cuda; leave --device"),
        ("cpu", Ways(int8=True, streamed=True), "leave --stream and --compile"),
        ("cpu", Ways(int8=True, compiled=True), "leave --stream and --compile"),
        ("cpu", Ways(bf16=True, streamed=True), "leave --bf16"),
        ("cuda", Ways(streamed=True), "leave --device"),
    ],
)
def test_ways_that_exclude_each_other_are_named(device, ways, words):
    with pytest.raises(RingmoeError, match=words):
        ways.check(device)


def test_a_processor_without_them_is_named(monkeypatch):
    monkeypatch.setattr("model.int8.runs", lambda: False)
    with pytest.raises(RingmoeError, match="VNNI"):
        Ways(int8=True).check("cpu")
    monkeypatch.setattr("model.fused.runs", lambda _: False)
    with pytest.raises(RingmoeError, match="no bfloat16"):
        Ways(bf16=True).check("cpu")
