"""Many processes, one network: FSDP2 sharding and expert parallelism, applied from outside.

The network is written for one device and does not know. `distribute` shards every block over all
ranks, splits routed experts over `ep` neighbouring ranks, and replaces each layer's dispatch by one
that carries tokens to their experts and back (all-to-all). On CPUs, where every expert lives on one
rank, the rest stands whole on all of them (`Replicas`). Losses are normalised globally, so that
gradients are sums over ranks: no divisor anywhere.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from model.encoder import Block
from model.exchange import ExpertParallel, nothing_for
from model.experts import ExpertBank, Job, RMoE, run_locally
from model.pretrain import MaskedImageModel
from model.replicas import Replicas
from model.router import BranchRouting, LayerRouting, Router
from model.start import Source, blocks_of, fill_part


@dataclass(frozen=True)
class Ranks:
    """Who this process is among all."""

    rank: int = 0
    """Number of this process."""
    world: int = 1
    """Number of processes."""
    local: int = 0
    """Number of this process on its machine, which is the number of its device."""


def ranks() -> Ranks:
    """Ranks from the environment: torchrun's variables, else SLURM's, else a single process."""
    for rank, world, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        if rank in os.environ and world in os.environ:
            return Ranks(
                int(os.environ[rank]), int(os.environ[world]), int(os.environ.get(local, 0))
            )
    return Ranks()


def join(who: Ranks, device: str, timeout: float = 600.0) -> None:
    """Meet the other processes: NCCL between GPUs, gloo between CPUs.

    Raises:
        ValueError: if the place to meet is unknown or the others do not come.
    """
    if who.world == 1 or dist.is_initialized():
        return
    os.environ.setdefault("RANK", str(who.rank))
    os.environ.setdefault("WORLD_SIZE", str(who.world))
    os.environ.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"rank {who.rank} of {who.world} does not know where to meet the others; set "
            "MASTER_ADDR to the first node, e.g. $(scontrol show hostnames | head -n 1)"
        )
    backend = "nccl" if device.startswith("cuda") else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (dist.DistError, TimeoutError) as failure:
        raise ValueError(f"rank {who.rank} of {who.world} met nobody: {failure}") from failure


def leave() -> None:
    """Part from the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(statistic: Tensor) -> Tensor:
    """Sum over ranks of something that carries no gradient."""
    if not dist.is_initialized():
        return statistic
    everyone = statistic.detach().clone()
    dist.all_reduce(everyone)
    return everyone


def distribute(
    network: MaskedImageModel,
    device: str,
    ep: int = 1,
    precision: str = "fp32",
    source: Source | None = None,
    replicate: bool | None = None,
) -> None:
    """Shard a network over all processes; its `loss` then gives this rank's share of the loss.

    Args:
        network: with equal weights on every rank, or on the meta device.
        device: of this rank.
        ep: ranks among which the experts of a branch are split; divides ranks and experts.
        precision: "bf16" gathers weights in bfloat16; gradients are summed in fp32.
        source: weights of a network on the meta device, equal on every rank; each part is sharded
            as soon as it is there, so that a rank never holds more than its shard and one part.
        replicate: keep all but the routed experts whole on every rank, which needs more memory and
            no copies into and out of shards; None: on CPUs, if `ep` is the number of ranks.

    Raises:
        ValueError: if `ep` divides neither ranks nor experts, or replicas hold the same experts.
    """
    check_ep(network, dist.get_world_size(), ep)
    spread = Spread.over(device, ep, precision, replicate)
    for name, block in list(blocks_of(network)):
        if source is not None:
            fill_part(block, source(name))
        spread.block(block)
    if source is not None:
        fill_part(network, source(""))
    network.register_forward_hook(touch_absent)
    known = [dict(routers(block.moe)) for _, block in blocks_of(network)]
    spread.rest(network)
    network.total = total
    network.whole_routing = partial(whole_routing, known)


@dataclass
class Spread:
    """How the parts of a network are laid out over all ranks."""

    device: str
    """Of this rank."""
    mesh: DeviceMesh
    """(dp, ep)."""
    everyone: DeviceMesh
    """The same ranks in a row."""
    policy: MixedPrecisionPolicy
    """Of gathered weights."""
    whole: bool
    """All but the routed experts stand whole on every rank."""
    alone: set[nn.Parameter]
    """Experts that live on this rank only: nothing to gather or to reduce."""

    @classmethod
    def over(
        cls, device: str, ep: int, precision: str = "fp32", replicate: bool | None = None
    ) -> Self:
        """The layout of `distribute`, which see for the arguments."""
        world, kind = dist.get_world_size(), torch.device(device).type
        if replicate and ep < world:
            raise ValueError(f"ep {ep} leaves several ranks the same experts: shard them")
        whole = ep == world and kind == "cpu" if replicate is None else replicate
        mesh = init_device_mesh(kind, (world // ep, ep), mesh_dim_names=("dp", "ep"))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if precision == "bf16":
            policy = replace(policy, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return cls(device, mesh, mesh[("dp", "ep")]._flatten("everyone"), policy, whole, set())

    def block(self, block: Block) -> None:
        """Experts to their ranks, the rest over all or whole on all."""
        block.to(self.device)
        split = split_experts(block.moe, self.mesh["ep"])
        block.register_forward_hook(touch_routers)
        if self.mesh["dp"].size() == 1:
            self.alone |= split
            split = set()
        if self.whole:
            Replicas([p for p in block.parameters() if p not in self.alone])
        else:
            shard(block, self.everyone, self.mesh["dp"], split, self.policy, self.alone)

    def rest(self, network: nn.Module) -> None:
        """Everything outside the blocks of a network, which were spread before."""
        network.to(self.device)
        if self.whole:
            inside = {p for _, block in blocks_of(network) for p in block.parameters()}
            last = [p for name, p in network.named_parameters() if name.startswith("decoders.")]
            Replicas(last)  # backward begins with them: they travel while it goes on
            Replicas([p for p in network.parameters() if p not in inside.union(last)])
        else:
            shard(network, self.everyone, self.mesh["dp"], set(), self.policy, self.alone)


def check_ep(network: MaskedImageModel, world: int, ep: int) -> None:
    """Refuse a split that leaves ranks or experts over."""
    config = network.config
    if world % ep:
        raise ValueError(f"ep {ep} does not divide {world} ranks")
    if config.kept and ep > 1:
        raise ValueError("a pruned model trains with ep 1: its layers have unequal experts")
    for branch in ("specialised", "collaborative"):
        if getattr(config, branch) % ep:
            raise ValueError(f"ep {ep} does not divide {getattr(config, branch)} {branch} experts")


def split_experts(moe: RMoE, group: DeviceMesh) -> set[nn.Parameter]:
    """Give each rank of a group its experts, and the layer the dispatch that reaches the others'.

    Returns:
        The parameters that are split; none where the group is one rank.
    """
    banks = routed_banks(moe)
    if group.size() == 1:
        moe.dispatch = AllBanks(banks)
        return set()
    split: set[nn.Parameter] = set()
    for bank in banks:
        for layer in (bank.fc1, bank.fc2):
            for name in ("weight", "bias"):
                whole = layer.get_parameter(name)
                part = distribute_tensor(whole.detach(), group, [Shard(0)], src_data_rank=None)
                layer.register_parameter(name, nn.Parameter(part))
                split.add(layer.get_parameter(name))
    moe.dispatch = ExpertParallel(banks, group)
    return split


def routed_banks(moe: RMoE) -> list[ExpertBank]:
    """The banks of a layer whose tokens a router chooses, in a fixed order."""
    banks = [] if moe.collaborative is None else [moe.collaborative]
    return [*banks, *(cast(ExpertBank, bank) for bank in moe.specialised.values())]


def shard(
    module: nn.Module,
    everyone: DeviceMesh,
    replicas: DeviceMesh,
    split: set[nn.Parameter],
    policy: MixedPrecisionPolicy,
    alone: set[nn.Parameter],
) -> None:
    """FSDP2 over all ranks; split experts over the ranks that hold the same ones, if any do."""
    fully_shard(
        module,
        mesh=everyone,
        shard_placement_fn=expert_placement(split, replicas) if split else None,
        mp_policy=policy,
        ignored_params=alone,
    )
    sharded = cast(FSDPModule, module)
    sharded.set_force_sum_reduction_for_comms(True)
    sharded.set_gradient_divide_factor(1.0)


def expert_placement(split: set[nn.Parameter], replicas: DeviceMesh) -> Callable[..., Any]:
    """Where split parameters are sharded: over the ranks with the same experts, by hidden width."""
    # one FSDP group with parameters on two meshes; torch.distributed.fsdp does not export it yet
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult

    there = ShardPlacementResult(Shard(1), FSDPMeshInfo(replicas, shard_mesh_dim=0))
    return lambda parameter: there if parameter in split else None


class AllBanks:
    """Runs a layer here with all its banks, so that all ranks have the same gradients to reduce."""

    def __init__(self, banks: list[ExpertBank]) -> None:
        self.banks = banks

    def __call__(self, x_TD: Tensor, jobs: list[Job]) -> Tensor:
        """The layer's jobs and an empty one for each bank of an absent modality."""
        there = {id(job.bank) for job in jobs}
        absent = [bank for bank in self.banks if id(bank) not in there]
        return run_locally(x_TD, jobs + [Job(b, nothing_for(b, x_TD)) for b in absent])


class Touch(torch.autograd.Function):
    """Identity that gives some parameters a gradient of zero: ranks must reduce the same ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        """A copy of `x` (FSDP wants no view)."""
        ctx.shapes = [(p.shape, p.dtype, p.device) for p in parameters]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, ...]:
        """Zeros for the parameters."""
        return (dx, *(torch.zeros(s, dtype=t, device=d) for s, t, d in ctx.shapes))


def touch_routers(block: Block, inputs: Any, output: Any) -> Any:
    """Forward hook of a block: a gradient for the routers of absent modalities."""
    x, routing = output
    absent = [r.weight for name, r in routers(block.moe) if name not in routing.branches]
    return (Touch.apply(x, *absent) if absent else x), routing  # type: ignore[no-untyped-call]


def whole_routing(
    known: list[dict[str, Router]], routing: list[LayerRouting]
) -> list[LayerRouting]:
    """The routing of all ranks, by one sum for all layers.

    Counts are summed over ranks and probabilities are not: f_e of the balance loss is that of the
    whole batch, and each rank's loss is its own share of the sum.

    Args:
        known: the routers of every layer, in the same order on all ranks.
        routing: of every layer on this rank.
    """
    here = [
        (layer, name, routing[layer].branches.get(name) or no_routing(router))
        for layer, names in enumerate(known)
        for name, router in names.items()
    ]
    parts = [
        t
        for _, _, branch in here
        for t in (branch.counts_E.new_tensor([branch.tokens, branch.dropped]), branch.counts_E)
    ]
    summed = total(torch.cat(parts)) if parts else torch.zeros(0)
    whole = [LayerRouting({}) for _ in known]
    sizes = [2 + len(branch.counts_E) for *_, branch in here]
    for (layer, name, branch), part in zip(here, summed.split(sizes), strict=True):
        tokens, dropped = part[:2].tolist()
        whole[layer].branches[name] = replace(
            branch, counts_E=part[2:], tokens=tokens, dropped=dropped
        )
    return whole


def routers(moe: RMoE) -> Iterator[tuple[str, Router]]:
    """Branch name and router, in a fixed order."""
    if "collaborative" in moe.router:
        yield "collaborative", cast(Router, moe.router["collaborative"])
    if "specialised" in moe.router:
        for name, router in cast(nn.ModuleDict, moe.router["specialised"]).items():
            yield f"specialised.{name}", cast(Router, router)


def no_routing(router: Router) -> BranchRouting:
    """What a router did that met no token."""
    weight = router.weight
    nothing = torch.zeros(len(weight), device=weight.device)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return BranchRouting(nothing.long(), nothing.to(wide), 0)


def touch_absent(network: MaskedImageModel, inputs: Any, output: Any) -> Any:
    """Forward hook of the network: a gradient for embedding and decoder of absent modalities."""
    absent = [
        parameter
        for name in network.config.modalities
        if name not in output.losses
        for module in (network.encoder.patch_embeds[name], network.decoders[name])
        for parameter in module.parameters()
    ]
    return replace(output, loss=Touch.apply(output.loss, *absent)) if absent else output  # type: ignore[no-untyped-call]


def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients to a norm of at most `limit` and return the norm before.

    Every element of a sharded gradient lives on exactly one rank, whatever its mesh: squares add
    up. A whole gradient is the same on all ranks and counts once.
    """
    given = [p.grad for p in parameters if p.grad is not None]
    gradients = [g.to_local() if isinstance(g, DTensor) else g for g in given]
    norms = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(1)
    shared = norms.new_tensor([0.0 if isinstance(g, DTensor) else 1.0 for g in given] or [0.0])
    squares = norms.square()
    norm = (total((squares * (1 - shared)).sum()) + (squares * shared).sum()).sqrt()
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def whole_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and full tensor of everything in a sharded network; all ranks iterate together."""
    for name, tensor in network.state_dict().items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
