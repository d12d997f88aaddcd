"""Pruning: the paper's sizes, exact sub-models, budgets that are met, work that continues."""

from dataclasses import replace

import pytest
import torch

from model.budget import branches, layers, rows_of
from model.checkpoint import CheckpointConfig, disk_tensors, read_config, save_checkpoint
from model.config import ModelConfig, TaskConfig
from model.encoder import RingMoE
from model.mass import isotropic_mass, mass_of_routers, mass_on_chips
from model.merge import FFN, merge
from model.normalisation import Normalisation
from model.prune import Plan, dense_config, parse_size, plan_pruning, size_of, sub_model
from model.rewrite import prune_checkpoint, result_config
from model.stream import streamed_encoder

SMALL = ModelConfig(
    embed_dim=8, depths=(2, 1), num_heads=(1, 2), image_size=32, window=4,
    channels={"opt": 3, "ms": 4},
)  # fmt: skip
RELEASED = ModelConfig.preset("14b", attention="swin_v1", gate="normalized")


def even_mass(config: ModelConfig) -> dict:
    return {
        layer: {b: [0.4, 0.3, 0.2, 0.1] for b in branches(config) if rows_of(config, layer, b)}
        for layer in layers(config)
    }


def random_encoder(config: ModelConfig) -> RingMoE:
    torch.manual_seed(0)
    net = RingMoE(config)
    for name, parameter in net.named_parameters():
        if "router" in name or ".moe." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


def saved(folder, net, **facts):
    config = CheckpointConfig(net.config, **facts)
    tensors = [(f"encoder.{n}", t) for n, t in disk_tensors(net)]
    save_checkpoint(folder, config, tensors, shard_bytes=100_000)
    return folder


def pruned(source, target, modalities=("opt",), size=None, method=None, mass=None, **changes):
    parent = read_config(source)
    mass = mass or mass_of_routers(source, sub_model(parent.model, modalities))
    plan = plan_pruning(parent.model, modalities, size, mass, method)
    prune_checkpoint(source, target, plan, result_config(parent, plan, size), **changes)
    return plan, RingMoE.from_pretrained(target)


def images(*modalities):
    generator = torch.Generator().manual_seed(1)
    return {m: torch.randn(2, SMALL.channels[m], 40, 32, generator=generator) for m in modalities}


def same(a, b):
    return all(torch.equal(x, y) for m in a for x, y in zip(a[m], b[m], strict=True))


# --- sizes --------------------------------------------------------------------------------------


def test_the_papers_sizes_to_the_parameter():
    mass = even_mass(RELEASED)
    sizes = [plan_pruning(RELEASED, ["opt"], t, mass).after for t in (None, "6.5b", "4.5b", "1b")]
    assert sizes == [6_534_927_140, 6_534_927_140, 4_482_171_428, 1_060_911_908]
    assert size_of(sub_model(RELEASED, ["ms"])) == 6_534_934_308
    assert size_of(sub_model(RELEASED, ["sar-l1"])) == 6_534_962_980


def test_a_softmax_gate_keeps_its_denominator():
    config = replace(RELEASED, gate="softmax")
    plan = plan_pruning(config, ["opt"], "4.5b", even_mass(config))
    assert plan.after - 4_482_171_428 == 3 * sum(
        width * depth for width, depth in zip(config.widths, config.depths, strict=True)
    )


@pytest.mark.parametrize("target", ["25%", "2b", "5b", "1.2b", "6b"])
def test_any_target_is_met_within_two_percent_from_below(target):
    plan = plan_pruning(RELEASED, ["opt"], target, even_mass(RELEASED))
    budget = parse_size(target, plan.before)
    assert 0.98 * budget <= plan.after <= budget
    assert plan.note == ""
    with torch.device("meta"):
        net = RingMoE(plan.result)
    assert sum(p.numel() for p in net.parameters()) == plan.after


def test_a_budget_drops_what_is_used_least():
    mass = even_mass(RELEASED)
    plan = plan_pruning(RELEASED, ["opt"], "6b", mass)
    for layer in layers(RELEASED):
        for branch in branches(plan.result):
            kept = rows_of(plan.result, layer, branch)
            assert kept == tuple(range(len(kept)))


def test_names_of_the_papers_stages_on_smaller_models():
    nano = ModelConfig.preset("nano")
    plan = plan_pruning(nano, ["opt"], "1b", even_mass(nano))
    assert plan.dense
    assert plan.method == "kc"
    base = ModelConfig.preset("base")
    assert size_of(base) > 1e9
    plan = plan_pruning(base, base.modalities, "1b", even_mass(base))
    assert 0.98e9 <= plan.after <= 1e9


@pytest.mark.parametrize(
    ("target", "method", "words"),
    [
        ("2b", None, "above the model's 30.3m"),
        ("1m", None, "below 2.3m, the dense model of opt"),
        ("much", None, "no size"),
        ("0%", None, "below"),
        ("120%", None, "above"),
        ("50%", "kc", "keeps experts"),
        ("1b", "magic", "unknown method"),
    ],
)
def test_targets_out_of_reach_are_explained(target, method, words):
    nano = ModelConfig.preset("nano")
    with pytest.raises(ValueError, match=words):
        plan_pruning(nano, ["opt", "ms"][: 1 + (target == "50%")], target, even_mass(nano), method)


def test_a_modality_that_the_model_lacks():
    with pytest.raises(ValueError, match="no modality 'sar-l1'; it has opt, ms"):
        sub_model(SMALL, ["sar-l1"])


def test_without_a_shared_expert_every_layer_keeps_one():
    config = replace(SMALL, shared=0)
    mass = even_mass(config)
    smallest = sum(1 for layer in layers(config) if rows_of(config, layer, "collaborative"))
    target = str(round(0.4 * size_of(config)))
    plan = plan_pruning(config, config.modalities, target, mass)
    kept = [len(rows_of(plan.result, layer, "collaborative")) for layer in layers(config)]
    assert smallest == len(kept)
    assert min(kept) >= 1


# --- what is written ----------------------------------------------------------------------------


def test_the_sub_model_is_exact(tmp_path):
    net = random_encoder(SMALL)
    source = saved(tmp_path / "all", net)
    _, part = pruned(source, tmp_path / "opt")
    assert part.config.modalities == ("opt",)
    assert same(part(images("opt")), {"opt": net(images("opt"))["opt"]})


def test_keeping_every_expert_changes_nothing(tmp_path):
    net = random_encoder(SMALL)
    source = saved(tmp_path / "all", net)
    plan, whole = pruned(source, tmp_path / "same", ("opt", "ms"), "100%")
    assert plan.after == plan.before
    assert same(whole(images("opt", "ms")), net(images("opt", "ms")))


@pytest.mark.parametrize("gate", ["softmax", "normalized"])
def test_expert_pruning_routes_among_the_kept(tmp_path, gate):
    net = random_encoder(replace(SMALL, gate=gate))
    source = saved(tmp_path / "all", net)
    plan, small = pruned(source, tmp_path / "small", size="4.5b")
    by_hand = RingMoE(plan.chosen).eval()
    experts = net.state_dict()
    for name in by_hand.state_dict():
        if ".moe.collaborative" in name:
            layer = ".".join(name.split(".")[i] for i in (1, 3))
            (row,) = rows_of(plan.chosen, layer, "collaborative")
            experts[name] = experts[name][row : row + 1]
    by_hand.load_state_dict({n: experts[n] for n in by_hand.state_dict()})
    assert same(small(images("opt")), by_hand(images("opt")))
    assert sum(p.numel() for p in small.parameters()) == plan.after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["ks", "ka", "kc"])
def test_dense_layers_are_the_merged_experts(tmp_path, method, dtype):
    net = random_encoder(SMALL).to(dtype)
    plan, dense = pruned(saved(tmp_path / "all", net), tmp_path / method, size="1b", method=method)
    assert sum(p.numel() for p in dense.parameters()) == plan.after == size_of(plan.result)
    for stage, block in ((0, 0), (0, 1), (1, 0)):
        moe = net.stages[stage].blocks[block].moe

        def experts(bank):
            parts = (bank.fc1.weight, bank.fc1.bias, bank.fc2.weight, bank.fc2.bias)
            return [FFN(*(part[e] for part in parts)) for e in range(len(bank))]

        by_hand = merge(
            {
                "collaborative": experts(moe.collaborative),
                "specialised.opt": experts(moe.specialised["opt"]),
                "shared": experts(moe.shared),
            },
            method,
        )
        shared = dense.stages[stage].blocks[block].moe.shared
        torch.testing.assert_close(shared.fc1.weight[0], by_hand.fc1_weight)
        torch.testing.assert_close(shared.fc2.bias[0], by_hand.fc2_bias)


def test_prune_again(tmp_path):
    source = saved(tmp_path / "all", random_encoder(SMALL))
    first, _ = pruned(source, tmp_path / "a", ("opt", "ms"), "60%")
    second, _ = pruned(tmp_path / "a", tmp_path / "b", ("ms",), "70%")
    third, dense = pruned(tmp_path / "b", tmp_path / "c", ("ms",), "1b")
    assert first.after > second.after > third.after
    assert dense(images("ms"))["ms"][0].isfinite().all()
    same_config = dense_config(sub_model(SMALL, ["ms"]))
    assert dense.config == same_config


def test_heads_and_normalisation_follow(tmp_path):
    net = random_encoder(SMALL)
    norm = Normalisation(("a",), (0.0,), (1.0,))
    task = TaskConfig("segmentation", ("x", "y"), modalities=("opt", "ms"))
    facts = {"kind": "task", "normalisation": {"opt": norm, "ms": norm}, "task": task}
    tensors = [(f"encoder.{n}", t) for n, t in disk_tensors(net)]
    tensors += [("head.weight", torch.ones(2)), ("decoders.opt.weight", torch.ones(1))]
    tensors += [("decoders.ms.weight", torch.ones(1))]
    save_checkpoint(tmp_path / "all", CheckpointConfig(SMALL, **facts), tensors)
    pruned(tmp_path / "all", tmp_path / "ms", ("ms",), "1b")
    config = read_config(tmp_path / "ms")
    assert config.task.modalities == ("ms",)
    assert list(config.normalisation) == ["ms"]
    from model.checkpoint import weight_map

    others = [n for n in weight_map(tmp_path / "ms") if not n.startswith("encoder.")]
    assert others == ["decoders.ms.weight", "head.weight"]
    parent = read_config(tmp_path / "all")
    parent = replace(parent, task=replace(task, modalities=("ms",)))
    plan = plan_pruning(SMALL, ["opt"], None, {})
    with pytest.raises(ValueError, match="head reads ms"):
        result_config(parent, plan, None)


class StoppedError(Exception):
    pass


def test_interrupted_work_continues_to_the_same_bytes(tmp_path):
    source = saved(tmp_path / "all", random_encoder(SMALL))
    pruned(source, tmp_path / "whole", size="1b")
    calls = []

    def stop_in_the_third_layer(_):
        calls.append(_)
        if (tmp_path / "broken.part").exists() and len(list(shards("broken.part"))) == 2:
            raise StoppedError

    def shards(name):
        return sorted((tmp_path / name).glob("model-*"))

    with pytest.raises(StoppedError):
        pruned(source, tmp_path / "broken", size="1b", advance=stop_in_the_third_layer)
    assert not (tmp_path / "broken").exists()
    before = {p.name: p.stat().st_mtime_ns for p in shards("broken.part")}
    pruned(source, tmp_path / "broken", size="1b")
    assert not (tmp_path / "broken.part").exists()
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "broken").iterdir())
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    after = {p.name: p.stat().st_mtime_ns for p in shards("broken")}
    assert before.items() <= after.items()


def test_work_in_progress_of_another_plan_is_not_continued(tmp_path):
    source = saved(tmp_path / "all", random_encoder(SMALL))

    def stop(_):
        if len(list((tmp_path / "out.part").glob("model-*"))) == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        pruned(source, tmp_path / "out", size="1b", method="ks", advance=stop)
    pruned(source, tmp_path / "out", size="1b", method="ka")
    pruned(source, tmp_path / "fresh", size="1b", method="ka")
    for path in (tmp_path / "fresh").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


# --- scores -------------------------------------------------------------------------------------


def test_mass_is_what_the_routers_did():
    net = random_encoder(SMALL)
    mass = mass_on_chips(net, [images("opt", "ms"), images("ms")])
    routing = net.encode({"opt": images("opt")["opt"]}).routing
    counts = routing[0].branches["specialised.opt"].counts_E
    assert mass["0.0"]["specialised.opt"] == (counts / counts.sum()).tolist()
    with pytest.raises(ValueError, match="no calibration chips"):
        mass_on_chips(net, [])


def test_mass_without_chips_prefers_the_louder_router_rows():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[2] *= 10
    mass = isotropic_mass(weight, [0, 2, 3], top_k=1)
    assert mass[1] == 0
    assert mass[2] > 0.45
    assert sum(mass) == pytest.approx(1)


# --- streaming ----------------------------------------------------------------------------------


def test_a_streamed_encoder_is_the_encoder(tmp_path):
    net = random_encoder(SMALL)
    source = saved(tmp_path / "all", net)
    streamed = streamed_encoder(source, ("ms",))
    blocks = [p for n, p in streamed.named_parameters() if ".blocks." in n]
    for _ in range(2):
        with torch.no_grad():
            assert same(streamed(images("ms")), {"ms": net(images("ms"))["ms"]})
        assert all(p.is_meta for p in blocks)
        blocks = [p for n, p in streamed.named_parameters() if ".blocks." in n]


def test_plan_counts_experts_and_work():
    plan: Plan = plan_pruning(SMALL, ["opt"], "1b", even_mass(SMALL))
    assert plan.experts()["0.0"] == {"collaborative": (0, 4), "specialised.opt": (0, 4)}
    before, after = plan.multiply_adds()
    assert before > after
