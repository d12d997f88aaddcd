"""Exact parameter counts of the 14.7 B model and its parts, without allocating it."""

import pytest
import torch

from model.config import ModelConfig, PretrainConfig
from model.encoder import RingMoE
from model.pretrain import MaskedImageModel


def parameters(match: str = "", **changes: object) -> int:
    """Parameters whose name contains `match`, of the 14b preset in the released layout."""
    config = ModelConfig.preset("14b", **{"attention": "swin_v1", **changes})
    with torch.device("meta"):
        net = RingMoE(config)
    return sum(p.numel() for name, p in net.named_parameters() if match in name)


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("", 14_746_061_540),
        (".moe.specialised.", 10_947_356_672),
        (".moe.collaborative.", 2_736_839_168),
        (".moe.shared.", 684_209_792),
        (".router.", 842_240),
        (".attn.", 342_168_064 + 604_772),
        (".position.", 604_772),
        (".downsample.", 33_730_816),
        (".norm1.", 168_448 // 2),
        (".norm2.", 168_448 // 2),
        ("patch_embeds.", 134_400),
    ],
)
def test_components(match, expected):
    assert parameters(match) == expected


@pytest.mark.parametrize(
    ("modality", "channels", "expected"),
    [("opt", 3, 6_534_927_140), ("ms", 4, 6_534_934_308), ("sar-l1", 8, 6_534_962_980)],
)
def test_sub_models(modality, channels, expected):
    assert parameters(channels={modality: channels}) == expected


def test_one_collaborative_expert():
    assert parameters(channels={"opt": 3}, collaborative=1) == 4_482_171_428


def test_pruned_collaborative_experts_keep_the_rows_of_their_router():
    depths = ModelConfig.preset("14b").depths
    kept = {f"{s}.{b}": {"collaborative": (2,)} for s, n in enumerate(depths) for b in range(n)}
    rows = 3 * sum(n * 448 * 2**s for s, n in enumerate(depths))
    assert parameters(channels={"opt": 3}, kept=kept) == 4_482_171_428 + rows


def test_dense_model():
    dense = {"channels": {"opt": 3}, "specialised": 0, "collaborative": 0}
    assert parameters(**dense) == 1_060_911_908


def test_active_parameters_per_token():
    """One expert of each branch: about 2.43 B."""
    active = parameters(channels={"opt": 3}, specialised=1, collaborative=1, top_k=1)
    assert round(active / 1e9, 2) == 2.43


def test_pretraining_adds_decoders_and_a_mask_token():
    """All of the released 14.81 B but its fifth, unused patch embedding (22,848)."""
    config = ModelConfig.preset("14b", attention="swin_v1")
    with torch.device("meta"):
        net = MaskedImageModel(config, PretrainConfig(sar_l1_target="pixels"))
    counts = {name: p.numel() for name, p in net.named_parameters()}
    assert sum(n for name, n in counts.items() if name.startswith("decoders.")) == 66_078_720
    assert counts["mask_token"] == 448
    assert sum(counts.values()) == 14_812_163_556 - 22_848
