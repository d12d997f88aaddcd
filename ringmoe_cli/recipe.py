"""Recipes: YAML files that become frozen dataclasses; unknown keys are refused by name.

A recipe is found by name (`pretrain-nano` is `recipes/pretrain_nano.yaml`) or by path; single
values are changed with `--set train.steps=500`.
"""

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from model.config import PRESETS, ModelConfig, PretrainConfig
from model.modality import MODALITIES
from model.train import TrainConfig
from ringmoe_cli.errors import RecipeError, RingmoeError
from ringmoe_cli.text_file import read_yaml

T = TypeVar("T")


@dataclass(frozen=True)
class ModalityMix:
    """How one modality takes part in training."""

    weight: float = 1.0
    """Share of the images; the shares of the modalities present are scaled to sum to 1."""
    bands: tuple[str, ...] = ()
    """Bands to read, by name; empty: those of the store."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight is {self.weight}; it must not be negative")


PAPER_MIX = {"opt": 0.7, "ms": 0.2, "sar-l1": 0.05, "sar-l2": 0.05}
"""70 % optical, 20 % multi-spectral, 10 % SAR, as RingMoE was trained."""


def paper_mix() -> dict[str, ModalityMix]:
    """The modality shares of the paper."""
    return {name: ModalityMix(PAPER_MIX[name]) for name in MODALITIES}


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything that fixes a pre-training run but its data."""

    model: Mapping[str, Any] = field(default_factory=lambda: {"preset": "nano"})
    """`preset`, and any field of the model that differs from it."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long and how fast."""
    objective: PretrainConfig = field(default_factory=PretrainConfig)
    """Masks, SAR-L1 target, balance."""
    modalities: Mapping[str, ModalityMix] = field(default_factory=paper_mix)
    """Which modalities, in which shares."""

    def __post_init__(self) -> None:
        check_names("modalities", self.modalities, MODALITIES)

    def model_config(self, channels: Mapping[str, int]) -> ModelConfig:
        """Sizes of the model for data with these channels."""
        return model_config(self.model, channels)


@dataclass(frozen=True)
class TaskRecipe:
    """What to fine-tune for; classes and colours come from the labels."""

    name: str = "segmentation"
    """segmentation, classification, detection, tracking, change or depth."""
    window: int = 0
    """Side of the training window in pixels; 0: the encoder's image size."""
    channels: int = 64
    """Width of the decoder."""
    detail: int = 0
    """Maps and classes: width of the path from the pixels past the encoder; 0: none."""
    rotated: bool = False
    """Detection: boxes carry an angle."""
    freeze: bool = False
    """Train the head only."""
    convpass: int = 0
    """Width of Convpass adapters in a frozen encoder; 0: none."""
    balance_weight: float = 0.004
    """Weight of the routers' balance loss while the encoder trains."""
    layer_decay: float = 1.0
    """With --init, learning rate of each block over that of the next one towards the head."""
    modality_dropout: float = 0.0
    """Chance, per sample, to hide all modalities but one."""


@dataclass(frozen=True)
class FinetuneRecipe:
    """Everything that fixes a fine-tuning run but its data and its starting point."""

    task: TaskRecipe = field(default_factory=TaskRecipe)
    """The head."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long and how fast."""
    model: Mapping[str, Any] = field(default_factory=lambda: {"preset": "nano"})
    """Sizes of the encoder when training starts from random weights."""
    modalities: Mapping[str, ModalityMix] = field(default_factory=dict)
    """Which modalities of the stores to use; empty: all."""

    def __post_init__(self) -> None:
        check_names("modalities", self.modalities, MODALITIES)


def model_config(section: Mapping[str, Any], channels: Mapping[str, int]) -> ModelConfig:
    """A recipe's `model` section with the channels of the data.

    Raises:
        RecipeError: for an unknown field, an unknown preset or sizes that no model can have.
    """
    section = dict(section)
    preset = str(section.pop("preset", "nano"))
    check_names("model.preset", [preset], PRESETS)
    changes = {**PRESETS[preset], **section, "channels": dict(channels)}
    return validated(ModelConfig, changes, "model")


def recipe_folder() -> Path:
    """Where the recipes are: in an installed package, or beside it in a working copy."""
    package = Path(str(files("ringmoe_cli")))
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the program."""
    return sorted(p.stem.replace("_", "-") for p in recipe_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Path of a recipe given by name or path.

    Raises:
        RecipeError: naming the nearest recipe.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise RecipeError(f"recipe file {name} does not exist")
        return Path(name)
    path = recipe_folder() / f"{name.replace('-', '_')}.yaml"
    if not path.is_file():
        known = recipe_names()
        raise RecipeError(f"unknown recipe {name!r}{nearest(name, known)} ({', '.join(known)})")
    return path


def load_recipe(name: str, changes: Sequence[str] = ()) -> PretrainRecipe | FinetuneRecipe:
    """Read a recipe; one with a `task` section fine-tunes, any other pre-trains.

    Args:
        name: of a recipe, or path of a YAML file.
        changes: `key=value` strings, e.g. `train.steps=500`; values are YAML.

    Raises:
        RecipeError: naming file, key, and what would fit.
    """
    path = find_recipe(name)
    try:
        values = read_yaml(path)
    except RingmoeError as damage:
        raise RecipeError(str(damage)) from damage
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a recipe: it has no sections")
    for change in changes:
        apply_change(values, change)
    try:
        recipe: PretrainRecipe | FinetuneRecipe = (
            validated(FinetuneRecipe, values)
            if "task" in values
            else validated(PretrainRecipe, values)
        )
        model_config(recipe.model, {"opt": 3})
    except (RecipeError, ValueError) as refusal:
        raise RecipeError(f"recipe {name}: {refusal}") from refusal
    return recipe


def load_pretrain_recipe(name: str, changes: Sequence[str] = ()) -> PretrainRecipe:
    """Read a recipe that must be one for pre-training.

    Raises:
        RecipeError: if it is for fine-tuning, or as `load_recipe`.
    """
    recipe = load_recipe(name, changes)
    if not isinstance(recipe, PretrainRecipe):
        raise RecipeError(f"recipe {name} fine-tunes; use it with `ringmoe finetune`")
    return recipe


def load_finetune_recipe(name: str, changes: Sequence[str] = ()) -> FinetuneRecipe:
    """Read a recipe that must be one for fine-tuning.

    Raises:
        RecipeError: if it is for pre-training, or as `load_recipe`.
    """
    recipe = load_recipe(name, changes)
    if not isinstance(recipe, FinetuneRecipe):
        raise RecipeError(f"recipe {name} pre-trains; use it with `ringmoe pretrain`")
    return recipe


def settings(recipe: PretrainRecipe | FinetuneRecipe) -> dict[str, Any]:
    """The recipe as plain values, for a checkpoint's provenance."""
    return asdict(recipe)


def apply_change(values: dict[str, Any], change: str) -> None:
    """Set one value in nested sections: `train.steps=500`.

    Raises:
        RecipeError: if it is not of the form key=value, or passes through a value.
    """
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {change!r} is not key=value, e.g. train.steps=500")
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {key}: {section} is a value, not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {key}: {text!r} is not a YAML value") from None


def validated(kind: type[T], values: Any, where: str = "") -> T:
    """Plain values as a dataclass, after a look at every key.

    Raises:
        RecipeError: naming the key, its value, and what would fit.
    """
    check_keys(kind, values, where)
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as refusal:
        first = refusal.errors()[0]
        key = ".".join([*filter(None, [where]), *map(str, first["loc"])]) or "recipe"
        message = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], Mapping) else f", not {first['input']!r}"
        raise RecipeError(f"{key}: {message}{given}") from None


def check_keys(kind: Any, values: Any, where: str) -> None:
    """Look for unknown keys in nested sections."""
    if not isinstance(values, Mapping):
        return
    if is_dataclass(kind):
        check_names(where, values, [f.name for f in fields(cast(Any, kind))])
        hints = get_type_hints(kind)
        for key, value in values.items():
            check_keys(section_type(hints[key]), value, f"{where}.{key}".lstrip("."))
    elif get_origin(kind) is Mapping:
        for key, value in values.items():
            check_keys(get_args(kind)[1], value, f"{where}.{key}")


def section_type(hint: Any) -> Any:
    """X of `X | None`, anything else as it is."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(a for a in get_args(hint) if a is not type(None))
    return hint


def check_names(where: str, names: Any, known: Any) -> None:
    """Refuse names that are not known.

    Raises:
        RecipeError: naming the nearest known one.
    """
    for name in names:
        if name not in known:
            place = f" in {where}" if where else ""
            raise RecipeError(
                f"unknown key {str(name)!r}{place}{nearest(str(name), known)}; "
                f"known: {', '.join(known)}"
            )


def nearest(name: str, known: Any) -> str:
    """A hint for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
