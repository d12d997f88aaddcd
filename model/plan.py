"""What a training run needs before anyone pays for it: memory per rank, traffic, time, a layout.

The layout is that of `model.parallel`: every tensor is sharded over all ranks (FSDP2), experts are
moreover split over `ep` ranks that exchange tokens (all-to-all). Pure arithmetic, on the peak and
bandwidth that are given or on what `model.timing` measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Self

from model.config import ModelConfig
from model.counts import active_experts, block_parameters, multiply_adds, pretraining_parameters
from model.timing import Pace

STATE_BYTES = {"weights": 4, "gradients": 4, "optimiser": 8}
"""Bytes per parameter of fp32 weights, fp32 gradients and AdamW's two moments."""
SMALL_TENSORS = 13
"""Saved (token, width) tensors of a block besides the experts' hidden ones: inputs of projections,
q, k, v and their normalised forms, residuals, norms; counted with `saved_tensors_hooks`."""


@dataclass(frozen=True)
class Link:
    """A way between ranks."""

    bandwidth: float = 50e9
    """Bytes per second that one rank can send while it receives as many."""
    latency: float = 0.0
    """Seconds of a message, however short."""

    def seconds(self, messages: int, received: float) -> float:
        """Of so many messages with so many bytes in all."""
        return messages * self.latency + received / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """The machines."""

    gpus: int
    """Ranks."""
    memory: float
    """Bytes of one rank's device."""
    peak: float = 400e12
    """Multiply-add FLOP/s of one device that the run is expected to reach, 2 per multiply-add."""
    tokens: Link = Link()
    """What carries tokens to experts."""
    shards: Link = Link()
    """What gathers weights and reduces gradients; copies into and out of messages included."""
    reserve: float = 0.1
    """Share of the memory left to the allocator and the libraries."""
    overhead: float = 0.0
    """Bytes of the libraries in every process."""
    slack: float = 0.0
    """What the allocator takes on top of what lies in its heap (`Estimate.heap`), as a share."""
    waiting: float = 0.0
    """Time between the parts that are counted, as a share of theirs."""
    beside: bool = True
    """Weights travel beside the arithmetic, as on GPUs; on CPUs both want the same cores."""
    pace: Pace | None = None
    """Measured speed of the model's parts; None: the arithmetic at `peak`."""
    whole: bool = False
    """Where experts live on one rank each, the rest stands whole on every rank, as on CPUs."""


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
    """Of an update; tokens wait for the arithmetic and the arithmetic for them."""
    overhead: float = 0.0
    """Bytes of the libraries and of the allocator's slack."""

    @property
    def heap(self) -> float:
        """Bytes among which the allocator leaves gaps.

        Where blocks are gathered, gradients come in buffers as large as theirs, which the system
        gives and takes.
        """
        return self.activations + (0.0 if self.gathered else self.gradients)

    @property
    def memory(self) -> float:
        """Bytes of everything together when most is needed."""
        state = self.weights + self.gradients + self.optimiser
        return state + self.gathered + self.activations + self.overhead


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
    for outside, inside, _ in block_bytes(config, layout, width, probabilities):
        kept += outside if layout.checkpointing else inside
        largest = max(largest, inside)
    return kept + (largest if layout.checkpointing else 0.0)


def block_bytes(
    config: ModelConfig, layout: Layout, width: int, probabilities: bool
) -> Iterator[tuple[float, float, float]]:
    """Of each block: bytes of its input, of what backward needs, of backward's own buffers.

    The buffers are the largest that exist at one time: the gradient of the shared expert's hidden
    activations before and after the GELU, or that of attention's logits before and after softmax.
    """
    for stage, (depth, dim) in enumerate(zip(config.depths, config.widths, strict=True)):
        stride = config.patch_size * 2**stage
        tokens = layout.micro_batch * ceil(config.image_size / stride) ** 2
        attention = 4 * tokens * config.num_heads[stage] * config.stage_window(stage) ** 2
        for block in range(depth):
            active = active_experts(config, stage, block)
            elements = 2 * config.mlp_ratio * active + (active - config.shared) + SMALL_TENSORS
            inside = tokens * dim * elements * width + attention * probabilities
            buffers = 2.0 * max(tokens * dim * config.mlp_ratio * width, attention * probabilities)
            yield tokens * dim * width, inside, buffers


def estimate(work: Workload, cluster: Cluster, layout: Layout) -> Estimate:
    """Cost of one update of pre-training with a layout."""
    config, width = work.config, work.width
    held = held_parameters(work, cluster, layout)
    own = {name: size * sum(held) for name, size in STATE_BYTES.items()}
    own["gradients"], activations = at_the_peak(work, layout, held)
    passes = 4 if layout.checkpointing else 3
    images = layout.micro_batch * layout.accumulate
    flops = 2.0 * passes * images * multiply_adds(config, config.image_size, config.image_size)
    shards = shard_traffic(work, cluster, layout)
    tokens = token_traffic(config, layout, width)
    sharded = cluster.gpus > 1 and not replicated(cluster, layout)
    gathered = width * most_gathered(work, layout) if sharded else 0.0
    cost = Estimate(
        **own,
        gathered=gathered,
        activations=activations,
        flops=flops,
        shard_traffic=shards,
        token_traffic=tokens,
        seconds=update_seconds(work, cluster, layout, flops, sum(held)) * (1 + cluster.waiting),
    )
    return replace(cost, overhead=cluster.overhead + cluster.slack * cost.heap)


def most_gathered(work: Workload, layout: Layout) -> float:
    """Parameters of a block, of the one gathered ahead of it, and of its gradient, at most."""
    sizes = [0.0, *(dense + experts / layout.ep for dense, experts in work.blocks)]
    return max(2 * this + before for before, this in pairwise(sizes))


def replicated(cluster: Cluster, layout: Layout) -> bool:
    """Whether all but the routed experts stands whole on every rank (`model.parallel`)."""
    return cluster.whole and layout.ep == cluster.gpus > 1


def held_parameters(work: Workload, cluster: Cluster, layout: Layout) -> list[float]:
    """Parameters that a rank holds: of each block, and last of everything outside them."""
    share = 1.0 if replicated(cluster, layout) else 1 / cluster.gpus
    rest = work.parameters - sum(map(sum, work.blocks))
    blocks = [dense * share + experts / cluster.gpus for dense, experts in work.blocks]
    return [*blocks, rest * share]


def at_the_peak(work: Workload, layout: Layout, held: list[float]) -> tuple[float, float]:
    """Bytes of gradients and of activations, buffers included, when both together are most.

    The backward pass frees activations from the last block to the first, while gradients come;
    with several passes per update, those of the earlier ones are there all the time.
    """
    size = STATE_BYTES["gradients"]
    blocks = list(block_bytes(work.config, layout, work.width, work.probabilities))
    there = size * held[-1]
    moments = [(size * sum(held), 0.0)]
    for block in reversed(range(len(blocks))):
        kept = sum(
            outside if layout.checkpointing else inside for outside, inside, _ in blocks[:block]
        )
        now = kept + blocks[block][1] + blocks[block][2]
        moments.append((size * sum(held) if layout.accumulate > 1 else there, now))
        there += size * held[block]
    return max(moments, key=sum)


def update_seconds(
    work: Workload, cluster: Cluster, layout: Layout, flops: float, held: float
) -> float:
    """Seconds of one update: arithmetic, AdamW, messages."""
    pace, config = cluster.pace, work.config
    compute, update = flops / cluster.peak, 0.0
    if pace is not None:
        lines = [line for line, n in zip(pace.stages, config.depths, strict=True) for _ in range(n)]
        again = 4 / 3 if layout.checkpointing else 1.0
        one = again * sum(line.at(layout.micro_batch) for line in lines)
        compute = layout.accumulate * (one + pace.rest.at(layout.micro_batch))
        update = held * pace.update
    if cluster.gpus == 1:
        return compute + update
    if pace is not None and pace.together:
        return compute + update + rest_messages(work, cluster, layout)
    blocks = len(work.blocks)
    passes = layout.accumulate * (3 if layout.checkpointing else 2)
    bundles = (blocks + 1) * (1 if replicated(cluster, layout) else passes + 1)
    shards = cluster.shards.seconds(bundles, shard_traffic(work, cluster, layout))
    journeys = blocks * passes * (2.5 if layout.ep > 1 else 0.5)  # and the counts, forward only
    tokens = cluster.tokens.seconds(round(journeys), token_traffic(config, layout, work.width))
    both = max(compute, shards) if cluster.beside else compute + shards
    return both + update + tokens


def rest_messages(work: Workload, cluster: Cluster, layout: Layout) -> float:
    """Seconds of the messages for everything outside the blocks."""
    rest = replace(work, parameters=work.parameters - sum(map(sum, work.blocks)), blocks=())
    bundles = 1 if replicated(cluster, layout) else 1 + layout.accumulate
    return cluster.shards.seconds(bundles, shard_traffic(rest, cluster, layout))


def shard_traffic(work: Workload, cluster: Cluster, layout: Layout) -> float:
    """Bytes a rank receives per update: weights gathered twice a pass, gradients reduced once."""
    replicas = cluster.gpus / layout.ep
    rest = work.parameters - sum(map(sum, work.blocks))
    if replicated(cluster, layout):  # one sum of the gradients, there and back
        dense = rest + sum(dense for dense, _ in work.blocks)
        return 8 * dense * (1 - 1 / cluster.gpus)
    total = rest * (1 - 1 / cluster.gpus) * (work.width * layout.accumulate + 4)
    for dense, experts in work.blocks:
        received = dense * (1 - 1 / cluster.gpus) + experts / layout.ep * (1 - 1 / replicas)
        total += received * (2 * work.width * layout.accumulate + 4)
    return total


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
