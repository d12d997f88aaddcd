"""One rank of the equality tests: parallel_worker.py EP FOLDER SCALE MODE (under torchrun)."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import replicas
from model.batch import Batch
from model.config import ModelConfig, PretrainConfig
from model.normalisation import Normalisation
from model.parallel import clip_grad_norm, distribute, join, leave, ranks, whole_tensors
from model.pretrain import MaskedImageModel, batch_masks
from model.start import Source, blocks_of, drawn, fill
from model.train import recompute_blocks
from ringmoe_cli.app import end_at_once

CONFIG = ModelConfig(
    embed_dim=8,
    depths=(1, 2),
    num_heads=(1, 2),
    image_size=32,
    window=4,
    mask_cell=8,
    channels={"opt": 3, "ms": 4, "sar-l1": 8},
)
replicas.LARGE = 200  # so that this network has gradients which travel by themselves, too
SAR = Normalisation(("hh",), (0.0,), (1.0,), (0.0, 5.0))


def bare_network() -> MaskedImageModel:
    with torch.device("meta"):
        return MaskedImageModel(CONFIG, PretrainConfig(), {"sar-l1": SAR})


def network() -> MaskedImageModel:
    net = bare_network()
    fill(net, drawn(CONFIG, PretrainConfig(), 0))
    net.double()
    with torch.no_grad():  # uneven routing: some experts get nearly all tokens
        for name, parameter in net.named_parameters():
            if ".router." in name:
                parameter.mul_(40)
    return net


def parts_of(net: MaskedImageModel) -> Source:
    """The weights of a network, a copy of one part at a time."""

    def part(name: str) -> dict[str, Tensor]:
        inside = {n for n, _ in blocks_of(net)}
        whole = {k: v.clone() for k, v in net.state_dict().items()}
        if name:
            return {k.removeprefix(f"{name}."): v for k, v in whole.items() if f"{name}." in k}
        return {k: v for k, v in whole.items() if not any(k.startswith(f"{n}.") for n in inside)}

    return part


def batch_of(images: dict[str, range]) -> Batch:
    """Images by number; each is the same wherever it is asked for."""
    stacked: dict[str, Tensor] = {}
    for modality, numbers in images.items():
        drawn = []
        for number in numbers:
            generator = torch.Generator().manual_seed(1000 + number)
            shape = (1, CONFIG.channels[modality], 32, 32)
            drawn.append(torch.randn(shape, generator=generator, dtype=torch.float64))
        stacked[modality] = torch.stack(drawn)
    return Batch(stacked)


def share(rank: int, world: int) -> dict[str, range]:
    """Unequal parts: rank 0 has all SAR, the last rank no optical image."""
    parts: dict[str, range] = {"ms": range(2 * rank, 2 * rank + 2)}
    if rank == 0:
        parts["sar-l1"] = range(3)
    if rank < world - 1:
        parts["opt"] = range(3 * rank, 3 * rank + 1 + rank)
    return parts


def whole(world: int) -> dict[str, list[int]]:
    parts: dict[str, list[int]] = {m: [] for m in CONFIG.modalities}
    for rank in range(world):
        for modality, numbers in share(rank, world).items():
            parts[modality] += list(numbers)
    return parts


def masks_of(images: dict[str, range]) -> dict[str, Tensor]:
    masks = {}
    for modality, numbers in images.items():
        one = [
            batch_masks(CONFIG, 0.6, batch_of({modality: [n]}), 0, 0, n)[modality] for n in numbers
        ]
        masks[modality] = torch.cat(one)
    return masks


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    worst = 0.0
    for name, value in theirs.items():
        scale = max(1.0, value.abs().max().item())
        worst = max(worst, (ours[name] - value).abs().max().item() / scale)
    return worst


def gradients(net: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in net.named_parameters():
        grad = parameter.grad
        if grad is None:
            grad = torch.zeros_like(parameter)
        found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
    return found


def main(ep: int, folder: Path, scale: float, mode: str) -> None:
    who = ranks()
    join(who, "cpu", timeout=60)
    single = network()
    net = bare_network().double()
    replicate = {"sharded": False, "whole": True}.get(mode)
    distribute(net, "cpu", ep=ep, source=parts_of(single), replicate=replicate)
    if mode == "recomputed":
        recompute_blocks(net)

    images = whole(who.world)
    batch = batch_of(images)
    batch.targets["masks"] = masks_of(images)
    expected = single.loss(batch).loss
    expected.backward()

    mine = share(who.rank, who.world)
    batch = batch_of(mine)
    batch.targets["masks"] = masks_of(mine)
    for _ in range(2):  # two backward passes of one update
        loss = net.loss(batch).loss
        (scale / 2 * loss).backward()
    summed = loss.detach().clone()
    dist.all_reduce(summed)

    report = {"loss": abs(summed.item() - expected.item())}
    report["gradient"] = largest_error(gradients(net), gradients(single))
    limit = 0.05
    expected_norm = nn.utils.clip_grad_norm_(single.parameters(), limit)
    norm = clip_grad_norm(net.parameters(), limit)
    report["norm"] = abs(norm.item() - expected_norm.item())
    report["clipped"] = largest_error(gradients(net), gradients(single))
    for each in (net, single):
        torch.optim.SGD(each.parameters(), lr=1.0).step()
    report["step"] = largest_error(dict(whole_tensors(net)), single.state_dict())
    if who.rank == 0:
        (folder / "report.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
    end_at_once(0)
