"""What a training run needs before anyone pays for it: memory per rank, traffic, time, a layout.

The layout is that of `model.parallel`: every tensor is sharded over all ranks (FSDP2), experts are
moreover split over `ep` ranks that exchange tokens (all-to-all). Pure arithmetic.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Self

from model.config import ModelConfig
from model.counts import active_experts, block_parameters, multiply_adds, pretraining_parameters

STATE_BYTES = {"weights": 4, "gradients": 4, "optimiser": 8}
"""Bytes per parameter of fp32 weights, fp32 gradients and AdamW's two moments."""
SMALL_TENSORS = 13
"""Saved (token, width) tensors of a block besides the experts' hidden ones: inputs of projections,
q, k, v and their normalised forms, residuals, norms; counted with `saved_tensors_hooks`."""


@dataclass(frozen=True)
class Cluster:
    """The machines."""

    gpus: int
    """Ranks."""
    memory: float
    """Bytes of one rank's device."""
    peak: float = 400e12
    """Multiply-add FLOP/s of one device that the run is expected to reach, 2 per multiply-add."""
    bandwidth: float = 50e9
    """Bytes per second that one rank can send while it receives as many."""
    reserve: float = 0.1
    """Share of the memory left to the allocator and the libraries."""


@dataclass(frozen=True)
class Workload:
    """The model, with its sizes counted once."""

    config: ModelConfig
    parameters: int
    """Encoder, mask token and decoders."""
    blocks: tuple[tuple[int, int], ...]
    """Per block: parameters of all but the routed experts, and of the routed experts."""
    width: int = 2
    """Bytes of an element in the computation: 2 for bf16, 4 for fp32."""
    probabilities: bool = False
    """Attention keeps its probabilities, as on a CPU."""

    @classmethod
    def of(cls, config: ModelConfig, width: int = 2, probabilities: bool = False) -> Self:
        """Count a model on the meta device."""
        blocks = tuple(block_parameters(config))
        return cls(config, pretraining_parameters(config), blocks, width, probabilities)


@dataclass(frozen=True)
class Layout:
    """How the work is spread."""

    ep: int
    """Ranks among which the experts of a layer are split; gpus / ep replicas of such a group."""
    micro_batch: int
    """Images of one forward pass on one rank."""
    accumulate: int
    """Forward passes of one update."""
    checkpointing: bool
    """Blocks are computed again in the backward pass instead of keeping their insides."""


@dataclass(frozen=True)
class Estimate:
    """Cost of one update on one rank."""

    weights: float
    gradients: float
    optimiser: float
    """Bytes of fp32 state, sharded over all ranks."""
    gathered: float
    """Bytes of the blocks that stand whole at one time: this one, the next, and a gradient."""
    activations: float
    """Bytes kept for the backward pass."""
    flops: float
    """Floating point operations, 2 per multiply-add."""
    shard_traffic: float
    """Bytes received to gather weights and to reduce gradients."""
    token_traffic: float
    """Bytes received in the experts' all-to-all."""
    seconds: float
    """At the given peak and bandwidth: weights travel beside the arithmetic, tokens do not."""

    @property
    def memory(self) -> float:
        """Bytes of everything together."""
        return self.weights + self.gradients + self.optimiser + self.gathered + self.activations


def activation_bytes(
    config: ModelConfig, layout: Layout, width: int, probabilities: bool = False
) -> float:
    """Bytes that one forward pass keeps for the backward pass.

    Args:
        config: the model.
        layout: its micro batch and whether blocks are checkpointed.
        width: bytes of an element, 2 for bf16 and 4 for fp32.
        probabilities: attention keeps its (N, N) probabilities in fp32, as on CPU; fused GPU
            kernels do not.
    """
    kept, largest = 0.0, 0.0
    for stage, (depth, dim) in enumerate(zip(config.depths, config.widths, strict=True)):
        stride = config.patch_size * 2**stage
        tokens = layout.micro_batch * ceil(config.image_size / stride) ** 2
        window = config.stage_window(stage) ** 2
        for block in range(depth):
            active = active_experts(config, stage, block)
            elements = 2 * config.mlp_ratio * active + (active - config.shared) + SMALL_TENSORS
            inside = tokens * dim * elements * width
            inside += 4 * tokens * config.num_heads[stage] * window * probabilities
            kept += tokens * dim * width if layout.checkpointing else inside
            largest = max(largest, inside)
    return kept + (largest if layout.checkpointing else 0.0)


def estimate(work: Workload, cluster: Cluster, layout: Layout) -> Estimate:
    """Cost of one update of pre-training with a layout."""
    config, width = work.config, work.width
    own = {name: size * work.parameters / cluster.gpus for name, size in STATE_BYTES.items()}
    largest = max(dense + experts / layout.ep for dense, experts in work.blocks)
    passes = 4 if layout.checkpointing else 3
    images = layout.micro_batch * layout.accumulate
    flops = 2.0 * passes * images * multiply_adds(config, config.image_size, config.image_size)
    shards = shard_traffic(work, cluster, layout)
    tokens = token_traffic(config, layout, width)
    seconds = max(flops / cluster.peak, shards / cluster.bandwidth) + tokens / cluster.bandwidth
    return Estimate(
        **own,
        gathered=largest * width * 3 if cluster.gpus > 1 else 0.0,
        activations=activation_bytes(config, layout, width, work.probabilities),
        flops=flops,
        shard_traffic=shards,
        token_traffic=tokens,
        seconds=seconds,
    )


def shard_traffic(work: Workload, cluster: Cluster, layout: Layout) -> float:
    """Bytes a rank receives per update: weights gathered twice a pass, gradients reduced once."""
    replicas = cluster.gpus / layout.ep
    total = 0.0
    for dense, experts in work.blocks:
        total += dense * (1 - 1 / cluster.gpus) + experts / layout.ep * (1 - 1 / replicas)
    return total * (2 * work.width * layout.accumulate + 4)


def token_traffic(config: ModelConfig, layout: Layout, width: int) -> float:
    """Bytes a rank receives per update to bring tokens to routed experts and their outputs back."""
    total = 0.0
    for stage, (depth, dim) in enumerate(zip(config.depths, config.widths, strict=True)):
        tokens = ceil(config.image_size / (config.patch_size * 2**stage)) ** 2
        routed = sum(active_experts(config, stage, b) - config.shared for b in range(depth))
        total += tokens * routed * dim * width
    passes = 3 if layout.checkpointing else 2
    images = layout.micro_batch * layout.accumulate
    return 2 * passes * images * total * (1 - 1 / layout.ep)


def layouts(config: ModelConfig, gpus: int, batch: int) -> Iterator[Layout]:
    """Layouts from the simplest to the most frugal: few expert ranks, no recomputation first."""
    per_rank = max(1, batch // gpus)
    sizes = [per_rank // n for n in range(1, per_rank + 1) if per_rank % n == 0]
    experts = [n for n in (config.specialised, config.collaborative) if n]
    for checkpointing in (False, True):
        for ep in range(1, min([gpus, *experts]) + 1):
            if gpus % ep or any(n % ep for n in experts):
                continue
            for micro in sizes:
                yield Layout(ep, micro, per_rank // micro, checkpointing)


def plan(work: Workload, cluster: Cluster, batch: int) -> list[tuple[Layout, Estimate]]:
    """Layouts that fit, the fastest first; ties go to the simplest.

    Args:
        work: the model.
        cluster: the machines.
        batch: images of one update over all ranks.
    """
    room = cluster.memory * (1 - cluster.reserve)
    costs = [(x, estimate(work, cluster, x)) for x in layouts(work.config, cluster.gpus, batch)]
    return sorted((c for c in costs if c[1].memory <= room), key=lambda cost: cost[1].seconds)


def smallest(work: Workload, cluster: Cluster) -> tuple[Layout, Estimate]:
    """The most frugal layout, to say what is missing when nothing fits."""
    frugal = layouts(work.config, cluster.gpus, cluster.gpus)
    costs = [(layout, estimate(work, cluster, layout)) for layout in frugal]
    return min(costs, key=lambda cost: cost[1].memory)
