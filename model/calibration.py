"""Calibration chips on their way through parent and student, one layer at a time.

The student's tokens go through the layers already fitted, the parent's through its own; every
layer also leads the student half the way back to the parent, so that errors do not pile up.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from model.attention import WindowGrid
from model.budget import branches, layers, rows_of
from model.checkpoint import load_module, read_tensors
from model.encoder import Block, Stage
from model.experts import ExpertBank, RMoE
from model.integrate import FitSettings, Task, Tokens, feature_error, fit, joined
from model.merge import FFN, merge
from model.patch import PatchEmbed
from model.prune import Plan
from model.shards import Files, Spec, read_header, write_shard

IMAGES = 32
"""Chips that go through a block at once."""
BACK = 0.5
"""Share of the distance to the parent's tokens that a layer takes back."""
EXPERTS = re.compile(r"^moe\.(collaborative|shared|specialised\.[^.]+)\.fc[12]\.")
"""Parameters of a block that are its experts."""

Grids = dict[str, Tensor]
"""Modality -> (B, H, W, D) tokens of all chips."""

Imitate = Callable[[Iterable[FFN], Tokens, Tensor, Task, FitSettings], FFN]
"""Candidates, tokens, wanted features, the layer, settings -> the dense layer."""


@dataclass
class LayerError:
    """How well a fitted layer does on chips it has not seen."""

    layer: str
    """"stage.block"."""
    error: float
    """Feature error of the layer alone, 1 = as good as the mean."""
    path: float
    """Feature error of the student's tokens after the layer, all layers before included."""


class Calibration:
    """Fits the dense layers of a plan in order; called with "stage.block" by the rewriting."""

    def __init__(
        self,
        source: Path,
        plan: Plan,
        chips: Mapping[str, Tensor],
        settings: FitSettings | None = None,
        held_out: float = 0.25,
        imitate: Imitate = fit,
        state: Path | None = None,
    ) -> None:
        """Embed the chips.

        Args:
            source: the parent's checkpoint.
            plan: what is kept.
            chips: modality -> (B, C, H, W), normalised; all modalities of the result.
            settings: of the fit.
            held_out: share of the chips that only measure.
            imitate: makes the dense layer; `model.integrate.fit`, or another method to compare.
            state: file that remembers how far the chips have come, so that work can continue.

        Raises:
            ValueError: if a modality has no chips.
        """
        self.source, self.plan = source, plan
        self.settings = settings or FitSettings()
        self.held_out = held_out
        self.imitate = imitate
        self.errors: list[LayerError] = []
        self.state = state
        self.done: tuple[str, FFN] | None = None
        self.parent: Grids = {}
        for name in plan.chosen.modalities:
            if name not in chips or len(chips[name]) < 2:
                raise ValueError(f"there are no {name} chips to calibrate with")
            self.parent[name] = self.embed(name, chips[name])
        self.student = dict(self.parent)

    @torch.no_grad()
    def embed(self, name: str, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H/4, W/4, D) by the parent's patch embedding."""
        with torch.device("meta"):
            embed = PatchEmbed(self.plan.chosen.channels[name], self.plan.chosen)
        load_module(self.source, embed, f"encoder.patch_embeds.{name}.")
        tokens: Tensor = embed.float()(images)
        return tokens

    def __call__(self, layer: str) -> FFN:
        """The fitted FFN of a layer; the chips move on behind it."""
        if self.done is None and self.state is not None and self.state.is_file():
            self.recall(self.state)
        if self.done is None or self.done[0] != layer:
            self.done = layer, self.advance(layer)
            if self.state is not None:
                self.remember(self.state)
        return self.done[1]

    def advance(self, layer: str) -> FFN:
        """Fit a layer and take the chips through it."""
        stage, block = (int(n) for n in layer.split("."))
        parent = self.load(stage, block)
        kept = kept_part(parent, self.plan, layer)
        whole = Moe(parent.moe)
        task = Task(parent.norm2, self.plan.source.gelu, whole, kept and Moe(kept), whole.let_go)
        with torch.no_grad():
            ahead = {m: forward(parent, m, x) for m, x in self.parent.items()}
            seen = {m: attended(parent, x) for m, x in self.student.items()}
            truth: Tensor = task.norm(whole({m: flat(x) for m, x in self.unseen(seen).items()}))
        train = {m: flat(x[: self.first(x)]) for m, x in seen.items()}
        wanted = self.goal(task, train, ahead)
        ffn = self.imitate(starts(parent.moe), train, wanted, task, self.settings)
        with torch.no_grad():
            self.measure(layer, task, ffn, seen, ahead, truth)
            self.student = {m: x + said(task, ffn, m, x) for m, x in seen.items()}
            self.parent = ahead
            if block == self.plan.source.depths[stage] - 1:
                self.merge(stage)
        return ffn

    @torch.no_grad()
    def goal(self, task: Task, train: Tokens, ahead: Grids) -> Tensor:
        """What the layer should say: the parent layer's answer, and a way back to the parent."""
        own: Tensor = task.norm(task.parent(train))
        there = joined({m: flat(x[: self.first(x)]) for m, x in ahead.items()})
        return own + BACK * (there - joined(train) - own)

    def remember(self, path: Path) -> None:
        """Write down the last layer and where the chips are."""
        assert self.done is not None
        tensors = dict(zip(FFN._fields, self.done[1], strict=True))
        tensors |= {f"parent.{m}": x for m, x in self.parent.items()}
        tensors |= {f"student.{m}": x for m, x in self.student.items()}
        specs = [Spec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
        errors = json.dumps([asdict(e) for e in self.errors])
        part = path.with_name(path.name + ".part")
        write_shard(part, specs, tensors.values(), {"layer": self.done[0], "errors": errors})
        part.replace(path)

    def recall(self, path: Path) -> None:
        """Go on where an earlier run stopped."""
        entries, facts = read_header(path)
        tensors = {name: torch.empty(e.spec.shape) for name, e in entries.items()}
        with Files() as files:
            for name, entry in entries.items():
                files.read(entry, tensors[name])
        self.done = facts["layer"], FFN(*(tensors[name] for name in FFN._fields))
        self.errors = [LayerError(**e) for e in json.loads(facts["errors"])]
        self.parent = {m: tensors[f"parent.{m}"] for m in self.parent}
        self.student = {m: tensors[f"student.{m}"] for m in self.student}

    def first(self, x: Tensor) -> int:
        """How many of the chips are fitted to; the others only measure."""
        return max(1, round(len(x) * (1 - self.held_out)))

    def load(self, stage: int, block: int) -> Block:
        """A block of the parent with the modalities that stay.

        All but its experts in float32; those become so when they are asked.
        """
        config = replace(self.plan.source, channels=self.plan.chosen.channels)
        with torch.device("meta"):
            parent = Block(config, stage, block)
        load_module(self.source, parent, f"encoder.stages.{stage}.blocks.{block}.")
        for name, parameter in parent.named_parameters():
            if not EXPERTS.search(name):
                parameter.data = parameter.data.float()
        return parent.requires_grad_(False)

    def merge(self, stage: int) -> None:
        """Take all tokens to the next stage."""
        with torch.device("meta"):
            downsample = Stage(self.plan.source, stage).downsample
        if downsample is not None:
            load_module(self.source, downsample, f"encoder.stages.{stage}.downsample.")
            downsample.float()
            self.parent = {m: downsample(x) for m, x in self.parent.items()}
            self.student = {m: downsample(x) for m, x in self.student.items()}

    def unseen(self, grids: Grids) -> Grids:
        """The chips that only measure."""
        return {m: x[self.first(x) if self.held_out < 1 else 0 :] for m, x in grids.items()}

    def measure(
        self, layer: str, task: Task, ffn: FFN, seen: Grids, ahead: Grids, truth: Tensor
    ) -> None:
        """Note the errors on the chips held out; `truth` is the parent layer's answer there."""
        tokens = {m: flat(x) for m, x in self.unseen(seen).items()}
        found = task.output(ffn, tokens)
        there = joined({m: flat(x) for m, x in self.unseen(ahead).items()})
        self.errors.append(
            LayerError(
                layer, feature_error(found, truth), feature_error(joined(tokens) + found, there)
            )
        )


def layer_errors(
    source: Path, pruned: Path, plan: Plan, chips: Mapping[str, Tensor]
) -> list[LayerError]:
    """Feature errors of a finished pruning, layer by layer, on calibration chips.

    Args:
        source: the parent's checkpoint.
        pruned: the result; every layer of it has a shared expert.
        plan: what was kept.
        chips: modality -> (B, C, H, W), normalised; all of them measure.
    """
    walk = Calibration(source, plan, chips, held_out=1.0)
    for layer in layers(plan.source):
        ffn = shared_expert(pruned, layer)
        walk.imitate = lambda *_, ffn=ffn: ffn
        walk(layer)
    return walk.errors


def shared_expert(checkpoint: Path, layer: str) -> FFN:
    """The shared expert of one layer of a checkpoint, in float32."""
    stage, block = layer.split(".")
    base = f"encoder.stages.{stage}.blocks.{block}.moe.shared.0."
    names = [base + part.replace("_", ".") for part in FFN._fields]
    found = dict(read_tensors(checkpoint, names))
    return FFN(*(found[name].float() for name in names))


@dataclass(frozen=True)
class Moe:
    """An RMoE layer as a function of the tokens of each modality."""

    layer: RMoE
    """The layer."""

    def __call__(self, tokens: Tokens) -> Tensor:
        """(T, D) per modality -> (ΣT, D)."""
        y_TD, _ = self.layer(joined(tokens), {m: len(x) for m, x in tokens.items()})
        return cast(Tensor, y_TD)

    def let_go(self) -> None:
        """Free the experts, which are most of a layer; it cannot be asked any more."""
        for bank in banks(self.layer).values():
            for parameter in bank.parameters():
                parameter.data = parameter.data.new_empty(0)


def flat(x: Tensor) -> Tensor:
    """(B, H, W, D) -> (T, D)."""
    return x.flatten(0, 2)


def attended(block: Block, x: Tensor) -> Tensor:
    """What a block's experts see: the tokens after its attention."""
    grid = WindowGrid(x.shape[1], x.shape[2], block.window, block.shift)
    return torch.cat([part + block.norm1(block.attn(part, grid)) for part in x.split(IMAGES)])


def forward(block: Block, modality: str, x: Tensor) -> Tensor:
    """A whole block on chips of one modality."""
    parts: list[Tensor] = [block(part, {modality: len(part)})[0] for part in x.split(IMAGES)]
    return torch.cat(parts)


def said(task: Task, ffn: FFN, modality: str, x: Tensor) -> Tensor:
    """What the fitted layer adds to the tokens of one modality."""
    parts = [task.output(ffn, {modality: flat(part)}).view_as(part) for part in x.split(IMAGES)]
    return torch.cat(parts)


def starts(moe: RMoE) -> Iterator[FFN]:
    """Where the fit may begin, one after another: the merged experts, the shared one."""
    layer = {}
    for name, bank in banks(moe).items():
        stacks = (bank.fc1.weight, bank.fc1.bias, bank.fc2.weight, bank.fc2.bias)
        layer[name] = [FFN(*(stack[e] for stack in stacks)) for e in range(len(bank))]
    yield in_float32(merge(layer, "kc"))
    yield in_float32(merge(layer, "ka"))
    if layer.get("shared"):
        yield in_float32(layer["shared"][0])


def in_float32(ffn: FFN) -> FFN:
    """The same weights, wide enough to be fitted."""
    return FFN(*(part.float() for part in ffn))


def banks(moe: RMoE) -> dict[str, ExpertBank]:
    """The banks of a layer by branch."""
    found = {f"specialised.{m}": cast(ExpertBank, bank) for m, bank in moe.specialised.items()}
    if moe.collaborative is not None:
        found["collaborative"] = moe.collaborative
    if moe.shared is not None:
        found["shared"] = moe.shared
    return found


def kept_part(parent: Block, plan: Plan, layer: str) -> RMoE | None:
    """The routed experts that stay in a layer, with the parent's weights; None if none does."""
    stage, block = (int(n) for n in layer.split("."))
    if not any(rows_of(plan.chosen, layer, branch) for branch in branches(plan.chosen)):
        return None
    config = replace(plan.chosen, shared=0)
    with torch.device("meta"):
        kept = RMoE(config, stage, block)
    weights = parent.moe.state_dict()
    for name in kept.state_dict():
        branch = name.rpartition(".fc")[0]
        if not name.startswith("router."):
            there = rows_of(plan.source, layer, branch)
            places = [there.index(row) for row in rows_of(config, layer, branch)]
            weights[name] = weights[name][places]
    kept.load_state_dict({name: weights[name] for name in kept.state_dict()}, assign=True)
    return kept.requires_grad_(False)
