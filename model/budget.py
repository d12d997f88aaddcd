"""Which experts to keep under a budget of parameters, over all layers and branches at once."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.counts import count_parameters

Kept = dict[str, dict[str, tuple[int, ...]]]
"""As `ModelConfig.kept`: "stage.block" -> branch -> router rows."""
Mass = Mapping[str, Mapping[str, Sequence[float]]]
"""Routing mass: "stage.block" -> branch -> share of the tokens that each router row takes."""


@dataclass(frozen=True)
class Expert:
    """A routed expert that could be dropped."""

    layer: str
    """"stage.block"."""
    branch: str
    """"collaborative" or "specialised.<modality>"."""
    row: int
    """Its router row."""
    mass: float
    """Share of its branch's tokens that it takes."""
    size: int
    """Parameters."""

    @property
    def place(self) -> tuple[str, str]:
        """Its layer and branch."""
        return self.layer, self.branch


def layers(config: ModelConfig) -> list[str]:
    """Names of the layers, "stage.block", in order."""
    return [f"{s}.{b}" for s, depth in enumerate(config.depths) for b in range(depth)]


def branches(config: ModelConfig) -> list[str]:
    """Names of the routed branches of a layer."""
    return ["collaborative", *(f"specialised.{m}" for m in config.modalities)]


def rows_of(config: ModelConfig, layer: str, branch: str) -> tuple[int, ...]:
    """Router rows of the experts present in a branch."""
    stage, block = layer.split(".")
    return config.experts_of(int(stage), int(block), branch)


def heaviest(config: ModelConfig, mass: Mass, branch: str, share: float) -> Kept:
    """The most activated part of one branch in every layer, at least one expert.

    RingMoE §3.5, expert pruning (EP): a quarter of the collaborative experts.
    """
    kept: Kept = {}
    for layer in layers(config):
        rows = rows_of(config, layer, branch)
        if rows:
            count = max(1, -int(-len(rows) * share // 1))
            best = sorted(rows, key=lambda row: -mass[layer][branch][row])[:count]
            kept[layer] = {branch: tuple(sorted(best))}
    return kept


def expert_size(config: ModelConfig, layer: str) -> int:
    """Parameters of one expert of a layer."""
    width = config.widths[int(layer.split(".")[0])]
    return (2 * config.mlp_ratio * width + config.mlp_ratio + 1) * width


def router_size(config: ModelConfig, layer: str, branch: str) -> int:
    """Parameters of one router."""
    rows = config.collaborative if branch == "collaborative" else config.specialised
    return rows * config.widths[int(layer.split(".")[0])]


def candidates(config: ModelConfig, mass: Mass) -> list[Expert]:
    """Every routed expert of a model."""
    return [
        Expert(layer, branch, row, mass[layer][branch][row], expert_size(config, layer))
        for layer in layers(config)
        for branch in branches(config)
        for row in rows_of(config, layer, branch)
    ]


def within_budget(config: ModelConfig, mass: Mass, budget: int) -> Kept:
    """Experts to keep so that the encoder has at most `budget` parameters.

    A branch that loses the share s of its routing mass pays s²: errors of layers add up in
    squares, and a branch suffers more the more it has lost. Experts go in the order of what they
    cost per parameter; what then fits into the room that is left comes back.
    """
    everyone = candidates(config, mass)
    free = [e for e in everyone if e not in last_ones(config, everyone)]
    keep = Selection(config, everyone)
    lost: defaultdict[tuple[str, str], float] = defaultdict(float)
    removed: list[Expert] = []
    while free and keep.size > budget:
        worst = min(free, key=lambda e: cost(e, lost[e.place]))
        lost[worst.place] += worst.mass
        free.remove(worst)
        keep.remove(worst)
        removed.append(worst)
    for expert in reversed(removed):
        keep.add(expert)
        if keep.size > budget:
            keep.remove(expert)
    return keep.kept()


def cost(expert: Expert, lost: float) -> float:
    """What dropping an expert adds to the squared loss of its branch, per parameter."""
    return ((lost + expert.mass) ** 2 - lost**2) / expert.size


def last_ones(config: ModelConfig, everyone: Sequence[Expert]) -> set[Expert]:
    """Experts that must stay: without a shared expert, the heaviest of each layer's branches."""
    if config.shared:
        return set()
    by_branch: dict[tuple[str, str], Expert] = {}
    for expert in everyone:
        if config.collaborative and expert.branch != "collaborative":
            continue
        if expert.place not in by_branch or expert.mass > by_branch[expert.place].mass:
            by_branch[expert.place] = expert
    return set(by_branch.values())


def without_routed(config: ModelConfig) -> int:
    """Parameters of the encoder without routed experts and routers."""
    counts = count_parameters(config)
    routed = ("specialised experts", "collaborative experts", "routers")
    return sum(size for component, size in counts.items() if component not in routed)


class Selection:
    """Experts that stay, and how large the encoder is with them."""

    def __init__(self, config: ModelConfig, experts: Sequence[Expert]) -> None:
        self.config = config
        self.rows: dict[tuple[str, str], set[int]] = {}
        self.size = without_routed(config)
        for expert in experts:
            self.add(expert)

    def add(self, expert: Expert) -> None:
        """Keep an expert; the first of a branch brings its router."""
        rows = self.rows.setdefault(expert.place, set())
        self.size += expert.size + (0 if rows else router_size(self.config, *expert.place))
        rows.add(expert.row)

    def remove(self, expert: Expert) -> None:
        """Drop an expert; the last of a branch takes its router along."""
        rows = self.rows[expert.place]
        rows.remove(expert.row)
        self.size -= expert.size + (0 if rows else router_size(self.config, *expert.place))

    def kept(self) -> Kept:
        """The rows that remain, for `ModelConfig.kept`."""
        kept: Kept = {}
        for (layer, branch), rows in self.rows.items():
            kept.setdefault(layer, {})[branch] = tuple(sorted(rows))
        return kept


def pruned(config: ModelConfig, kept: Kept) -> ModelConfig:
    """The config with fewer experts; routers keep all their rows."""
    merged = {
        layer: {**config.kept.get(layer, {}), **kept.get(layer, {})} for layer in layers(config)
    }
    return replace(config, kept={layer: rows for layer, rows in merged.items() if rows})


def compact(config: ModelConfig) -> ModelConfig:
    """The same model without router rows that nobody needs.

    A normalised gate needs no parent denominator: where every layer keeps equally many experts of
    a branch, the routers lose the other rows too, and the branch simply has fewer experts.
    """
    if config.gate == "normalized":
        return evened(evened(config, "collaborative"), "specialised")
    return config


def evened(config: ModelConfig, branch: str) -> ModelConfig:
    """The config with a smaller number of experts instead of equally long lists of kept rows."""
    names = [b for b in branches(config) if b.startswith(branch)]
    counts = {len(rows_of(config, layer, name)) for layer in layers(config) for name in names}
    if len(counts) != 1 or 0 < (count := counts.pop()) < config.top_k:
        return config
    rest = {
        layer: {name: rows for name, rows in kept.items() if name not in names}
        for layer, kept in config.kept.items()
    }
    kept = {layer: rows for layer, rows in rest.items() if rows}
    if branch == "collaborative":
        return replace(config, kept=kept, collaborative=count)
    return replace(config, kept=kept, specialised=count)
