"""From a large mixture to a small model: what to keep, decided before anything is written.

RingMoE §3.5: the sub-model of some modalities (exact), expert pruning (EP), and dense integration
of every layer's experts into one FFN; and any size in between, by routing mass.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from model.budget import (
    Mass,
    branches,
    compact,
    heaviest,
    layers,
    pruned,
    rows_of,
    within_budget,
)
from model.config import PRESETS, ModelConfig
from model.counts import count_parameters, multiply_adds

Stage = Literal["sub-model", "one quarter", "dense"]
Method = Literal["ks", "ka", "kc", "fit"]

PAPER_STAGES: dict[str, Stage] = {"6.5b": "sub-model", "4.5b": "one quarter", "1b": "dense"}
"""What the sizes of the paper's models mean."""
UNITS = {"b": 1e9, "m": 1e6, "k": 1e3, "": 1.0}
TOLERANCE = 0.02
"""A size is met if the result is at most this share smaller."""


@dataclass(frozen=True)
class Plan:
    """What a pruning will do."""

    source: ModelConfig
    """The model as it is."""
    chosen: ModelConfig
    """What remains of it, in the router rows of the source."""
    result: ModelConfig
    """The model as it will be: `chosen`, without rows that a normalised gate does not need."""
    method: Method | None
    """How dropped experts live on in the shared one; None: they do not."""
    before: int
    """Encoder parameters of the source."""
    after: int
    """Encoder parameters of the result."""
    note: str = ""
    """What the user should know about how the target was read."""

    @property
    def dense(self) -> bool:
        """Every layer becomes one plain FFN."""
        return not (self.result.specialised or self.result.collaborative)

    def experts(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Layer -> branch -> experts after and before."""
        return {
            layer: {
                branch: (
                    len(rows_of(self.result, layer, branch)),
                    len(rows_of(self.source, layer, branch)),
                )
                for branch in branches(self.result)
            }
            for layer in layers(self.source)
        }

    def multiply_adds(self) -> tuple[int, int]:
        """Multiply-adds of one training chip before and after, for one modality."""
        side = self.source.image_size
        return multiply_adds(self.source, side, side), multiply_adds(self.result, side, side)


def size_of(config: ModelConfig) -> int:
    """Parameters of an encoder, counted without allocating them."""
    return sum(count_parameters(config).values())


def dense_config(config: ModelConfig) -> ModelConfig:
    """The same model with one FFN per layer."""
    return replace(config, specialised=0, collaborative=0, shared=1, kept={})


def sub_model(config: ModelConfig, modalities: Sequence[str]) -> ModelConfig:
    """The part of a model that some of its modalities need: their outputs stay the same.

    Raises:
        ValueError: for a modality that the model lacks.
    """
    for name in modalities:
        if name not in config.modalities:
            raise ValueError(
                f"the model has no modality {name!r}; it has {', '.join(config.modalities)}"
            )
    part = config.with_modalities(tuple(m for m in config.modalities if m in modalities))
    gone = {f"specialised.{m}" for m in config.modalities if m not in modalities}
    kept = {
        layer: {branch: rows for branch, rows in rest.items() if branch not in gone}
        for layer, rest in part.kept.items()
    }
    return replace(part, kept={layer: rest for layer, rest in kept.items() if rest})


def parse_size(text: str, whole: int) -> int:
    """Parameters meant by "1b", "300m", "25%" or a plain number.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([bmk%]?)", text.strip().lower())
    if match is None:
        raise ValueError(f"target {text!r} is no size; write 1b, 300m or 25%")
    number = float(match[1])
    return round(whole * number / 100 if match[2] == "%" else number * UNITS[match[2]])


def paper_stage(config: ModelConfig, target: str, whole: int) -> Stage | None:
    """The paper's stage that a target names, if it does.

    6.5b, 4.5b and 1b name the stages for a model of the paper's width, and for any model that has
    fewer parameters than that; for the others they are plain sizes.
    """
    name = target.strip().lower()
    if name not in PAPER_STAGES:
        return None
    papers = config.embed_dim == PRESETS["14b"]["embed_dim"]
    return PAPER_STAGES[name] if papers or parse_size(name, whole) > whole else None


def plan_pruning(
    config: ModelConfig,
    modalities: Sequence[str],
    target: str | None,
    mass: Mass,
    method: str | None = None,
    default: Method = "kc",
) -> Plan:
    """Decide what to keep.

    Args:
        config: the model.
        modalities: those the result should have.
        target: "1b", "300m", "25%" (of the given model) or one of the paper's stages; None: the
            exact sub-model.
        mass: routing mass of every router row of the sub-model.
        method: how a layer becomes dense (`ks`, `ka`, `kc`), or `fit` for any size.
        default: the method of a dense result if none is given.

    Raises:
        ValueError: for a target out of reach, naming the sizes that are.
    """
    part = sub_model(config, modalities)
    chosen, how, note = choice(config, part, target, mass, known(method), default)
    result = compact(chosen)
    return Plan(config, chosen, result, how, size_of(config), size_of(result), note)


def known(method: str | None) -> Method | None:
    """A method by its name.

    Raises:
        ValueError: for an unknown one.
    """
    if method is not None and method not in get_args(Method):
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(get_args(Method))}")
    return cast("Method | None", method)


Choice = tuple[ModelConfig, Method | None, str]
"""What remains of the model, how the rest lives on in it, and a word about it."""


def choice(
    config: ModelConfig,
    part: ModelConfig,
    target: str | None,
    mass: Mass,
    method: Method | None,
    default: Method,
) -> Choice:
    """Decide what a target means for a sub-model."""
    dense = dense_config(part)
    if target is None:
        if method is None and part == config:
            raise ValueError("nothing to prune: say which modality to keep, or a target size")
        return (dense, method, "") if method else (part, None, "")
    names, whole = ", ".join(part.modalities), size_of(config)
    stage = paper_stage(config, target, whole)
    if stage == "sub-model":
        return part, None, f"{target}: the sub-model of {names}"
    if stage == "one quarter":
        kept = heaviest(part, mass, "collaborative", 0.25)
        note = f"{target}: the most activated quarter of the collaborative experts of every layer"
        return pruned(part, kept), fit_only(method, target), note
    if stage == "dense":
        return dense, method or default, f"{target}: every layer of {names} becomes one FFN"
    budget = parse_size(target, whole)
    check_budget(target, budget, whole, dense)
    if size_of(dense) >= (1 - TOLERANCE) * budget:
        return dense, method or default, ""
    return by_budget(part, mass, budget, method, target)


def by_budget(
    part: ModelConfig, mass: Mass, budget: int, method: Method | None, target: str
) -> Choice:
    """What remains at a plain size between the dense floor and the sub-model."""
    if size_of(part) <= budget:
        return part, None, f"the sub-model of {', '.join(part.modalities)} is within {target}"
    chosen = pruned(part, within_budget(part, mass, budget))
    missed = 1 - size_of(compact(chosen)) / budget
    note = f"{missed:.1%} below {target}: no single expert fits into the rest"
    return chosen, fit_only(method, target), note if missed > TOLERANCE else ""


def fit_only(method: Method | None, target: str) -> Method | None:
    """Methods that merge a whole layer cannot make a size that keeps experts.

    Raises:
        ValueError: if one of them was asked for.
    """
    if method in ("ks", "ka", "kc"):
        raise ValueError(
            f"method {method} makes a dense model, but target {target} keeps experts; "
            "leave --method out, use fit, or choose --target 1b"
        )
    return method


def check_budget(target: str, budget: int, whole: int, dense: ModelConfig) -> None:
    """Refuse a size that no pruning of this model can have.

    Raises:
        ValueError: naming the size that is possible.
    """
    if budget > whole:
        raise ValueError(f"target {target} is above the model's {human(whole)} parameters")
    if budget < size_of(dense):
        raise ValueError(
            f"target {target} is below {human(size_of(dense))}, the dense model of "
            f"{', '.join(dense.modalities)}; fewer modalities or a smaller preset would fit"
        )


def human(parameters: int) -> str:
    """A number of parameters for people: 14.7b, 300m, 12k."""
    for unit, scale in (("b", 1e9), ("m", 1e6), ("k", 1e3)):
        if parameters >= scale:
            return f"{parameters / scale:.3g}{unit}"
    return str(parameters)
