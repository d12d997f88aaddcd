"""What the training loop adds to the bare arithmetic, and how the model compares with a plain one.

    OMP_NUM_THREADS=1 python benchmarks/pretrain_speed.py STORE.zarr [--rounds 8] [--device cuda]

Three steps take turns of `TURN` steps each, so that a busy machine is unfair to all alike while the
loader gets no more time than in a run of its own; medians over rounds:
  loop   `ringmoe pretrain`: chips from the store, masks, update, journals, routing statistics
  bare   forward, backward, clipping and AdamW of the same model on one cached batch
  plain  the same for Hugging Face's Swin V2 with SimMIM's objective: FFNs of three times the
         width, which is what a token meets in an RMoE layer; one modality, same image count
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import Swinv2Config, Swinv2ForMaskedImageModeling

from model.batch import Batch
from model.journal import Journal
from model.optim import adamw
from model.parallel import Ranks
from model.pretrain import MaskedImageModel
from model.train import TrainConfig, compile_blocks, update
from model.utilisation import Utilisation
from ringmoe_cli.jobs.pretraining import PretrainRequest, masked_batches, open_data
from ringmoe_cli.jobs.watching import RoutingLog, Watch
from ringmoe_cli.recipe import load_pretrain_recipe

TURN = 6
"""Steps in a row: more than the batches that are made ahead."""


def stepper(
    network: nn.Module, config: TrainConfig, forward: Callable[[], torch.Tensor]
) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW, and nothing else."""
    optimiser = adamw(network, 1e-4, config.weight_decay)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        forward().backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimiser.step()

    return step


def plain_model(side: int, batch: int, device: str) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Swin V2 of the nano sizes with FFNs of the active width, and its SimMIM loss."""
    torch.manual_seed(0)
    sizes = Swinv2Config(
        image_size=side, patch_size=4, embed_dim=32, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8],
        window_size=8, mlp_ratio=12.0, encoder_stride=32, drop_path_rate=0.0,
    )  # fmt: skip
    network = Swinv2ForMaskedImageModeling(sizes).to(device).train()
    pixels = torch.randn(batch, 3, side, side, device=device)
    masks = torch.rand(batch, (side // 4) ** 2, device=device) < 0.6
    return network, lambda: network(pixel_values=pixels, bool_masked_pos=masks).loss


def timed(step: Callable[[], object], device: str, times: int = 1) -> tuple[float, float]:
    """Seconds of a step on the clock and of the processor, all threads of this process together."""
    start, busy = time.perf_counter(), time.process_time()
    for _ in range(times):
        step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times, (time.process_time() - busy) / times


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("store", type=Path)
    words.add_argument("--rounds", type=int, default=8)
    words.add_argument("--device", default="cpu")
    words.add_argument("--batch", type=int, default=0, help="images a step; 0: the recipe's")
    words.add_argument("--compiled", action="store_true", help="also the bare step compiled")
    said = words.parse_args()
    size = [f"train.batch_size={said.batch}"] if said.batch else []
    recipe = load_pretrain_recipe("pretrain-nano", ["train.log_every=10", *size])
    config = recipe.train
    data = open_data([said.store], recipe)
    model = recipe.model_config(data.channels)
    torch.manual_seed(0)
    networks = [
        MaskedImageModel(model, recipe.objective, data.normalisation).to(said.device).train()
        for _ in range(3)
    ]
    run = Path(tempfile.mkdtemp())
    request = PretrainRequest((said.store,), run, recipe, said.device)
    stream = masked_batches(data, model, request, 0, Ranks())
    cached: Batch = next(stream).to(said.device)
    optimiser, metrics = (
        adamw(networks[0], config.lr, config.weight_decay),
        Journal(run / "m.jsonl"),
    )
    routing, watch = RoutingLog(networks[0].encoder, config, run, 0), Watch(config, 0)
    waits: list[float] = []
    done = 0

    def loop() -> None:
        nonlocal done
        report, _ = update(networks[0], optimiser, stream, config, done, said.device)
        done = report.step
        metrics.append(report.row())
        watch.on_step(report)
        routing.on_step(report)
        waits.append(report.wait)

    plain, plain_loss = plain_model(model.image_size, config.batch_size, said.device)
    steps = {
        "loop": loop,
        "bare": stepper(networks[1], config, lambda: networks[1].loss(cached).loss),
        "plain": stepper(plain, config, plain_loss),
    }
    if said.compiled:
        compile_blocks(networks[2])
        steps["compiled"] = stepper(networks[2], config, lambda: networks[2].loss(cached).loss)
    for step in steps.values():
        timed(step, said.device)
    waits.clear()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(said.rounds):
        for name, step in steps.items():
            times[name].append(timed(step, said.device, TURN))
    middle = {name: median(clock for clock, _ in found) for name, found in times.items()}
    side, images = model.image_size, config.batch_size
    used = Utilisation.of(model, said.device, torch.float32)
    parameters = {"ours": networks[0], "plain": plain}
    print(f"threads {torch.get_num_threads()}, device {said.device}, {images} images of {side} px")
    for name, network in parameters.items():
        print(f"{name}: {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters")
    for name, seconds in middle.items():
        print(f"{name}: {seconds:.3f} s a step, {images / seconds:.0f} images/s")
    pairs_wanted = [("loop", "bare"), ("bare", "plain"), ("loop", "plain")]
    for one, other in [*pairs_wanted, *[("compiled", "bare")] * said.compiled]:
        pairs = list(zip(times[one], times[other], strict=True))
        clock = median(a[0] / b[0] for a, b in pairs)
        busy = median(a[1] / b[1] for a, b in pairs)
        print(f"{one} / {other}: {clock:.3f} on the clock, {busy:.3f} of processor time")
    total = TURN * sum(clock for clock, _ in times["loop"])
    print(f"data wait {sum(waits) / total:.2%} of the loop")
    for name in ("bare", "plain"):
        print(f"MFU {name} {used.share(images, middle[name]):.1%} of one fp32 matrix product")


if __name__ == "__main__":
    main()
