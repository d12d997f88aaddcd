"""One rank that saves or loads a training state: state_worker.py save|load EP FOLDER (torchrun)."""

import json
import sys
from pathlib import Path

import torch
from parallel_worker import bare_network, batch_of, masks_of, network, parts_of, share, whole

from model.optim import adamw
from model.parallel import distribute, join, leave, ranks, whole_tensors
from model.pretrain import MaskedImageModel
from model.state import TrainingState, tensors_of
from ringmoe_cli.app import end_at_once


def step(net: MaskedImageModel, optimiser: torch.optim.Optimizer, images: dict) -> None:
    batch = batch_of(images)
    batch.targets["masks"] = masks_of(images)
    net.loss(batch).loss.backward()
    optimiser.step()


def main(mode: str, ep: int, folder: Path) -> None:
    who = ranks()
    join(who, "cpu", timeout=60)
    single = network()
    net = network()
    if who.world > 1:
        net = bare_network().double()
        distribute(net, "cpu", ep=ep, source=parts_of(single))
    optimiser, state = adamw(net, 1e-2, 0.05), TrainingState(folder / "state")
    if mode == "save":
        if who.rank == 0:
            state.prepare(1)
        if who.world > 1:
            torch.distributed.barrier()
        step(net, optimiser, share(who.rank, who.world))
        state.write(1, net, optimiser)
        if who.world > 1:
            torch.distributed.barrier()
        if who.rank == 0:
            state.commit(1, keep_last=1)
    else:
        assert state.load(net, optimiser) == 1
    reference = adamw(single, 1e-2, 0.05)
    step(single, reference, whole(2))
    expected = tensors_of(single, reference)
    ours = tensors_of(net, optimiser)
    worst = 0.0
    for name, tensor in ours.items():
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        worst = max(worst, (full - expected[name]).abs().max().item())
    same = dict(whole_tensors(net)).keys() == single.state_dict().keys()
    if who.rank == 0:
        report = {"worst": worst, "same": same, "tensors": len(ours)}
        (folder / f"{mode}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    end_at_once(0)
