"""Recipes: found by name, changed by --set, refused by key."""

import dataclasses
from pathlib import Path

import pytest

from model.config import PretrainConfig
from model.train import TrainConfig
from ringmoe_cli.errors import RecipeError
from ringmoe_cli.recipe import (
    FinetuneRecipe,
    PretrainRecipe,
    find_recipe,
    load_finetune_recipe,
    load_pretrain_recipe,
    load_recipe,
    model_config,
    recipe_folder,
    recipe_names,
)


def written(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_recipe_is_found_by_name_and_by_path() -> None:
    by_name = load_recipe("pretrain-nano")
    assert by_name == load_recipe(str(recipe_folder() / "pretrain_nano.yaml"))
    assert isinstance(by_name, PretrainRecipe)
    assert "pretrain-nano" in recipe_names()


def test_recipes_of_an_installed_package_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "ringmoe_cli"
    (inside / "recipes").mkdir(parents=True)
    (inside / "recipes" / "pretrain_own.yaml").write_text("model: {preset: tiny}\n")
    monkeypatch.setattr("ringmoe_cli.recipe.files", lambda package: inside)
    assert recipe_names() == ["pretrain-own"]
    assert find_recipe("pretrain-own").parent == inside / "recipes"


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.startswith("pretrain")])
def test_every_pretraining_recipe_builds_its_model(name: str) -> None:
    recipe = load_pretrain_recipe(name)
    channels = {"opt": 3, "ms": 4, "sar-l1": 8, "sar-l2": 3}
    config = recipe.model_config(channels)
    assert config.channels == channels
    assert recipe.train.warmup_steps < recipe.train.steps
    header = (recipe_folder() / f"{name.replace('-', '_')}.yaml").read_text()
    for word in ("Source", "Expect", "Hardware", "Time", "Command"):
        assert f"# {word}" in header


def test_values_are_changed_by_set() -> None:
    changes = ["train.steps=7", "train.lr=1e-4", "model.gate=normalized", "modalities.opt.weight=0"]
    recipe = load_pretrain_recipe("pretrain-nano", [*changes, "modalities.ms.bands=[red, nir]"])
    assert recipe.train.steps == 7
    assert recipe.train.lr == 1e-4
    assert recipe.modalities["opt"].weight == 0
    assert recipe.modalities["ms"].bands == ("red", "nir")
    assert recipe.modalities["ms"].weight == 0.1
    assert recipe.model_config({"opt": 3}).gate == "normalized"


def test_every_field_can_be_set() -> None:
    for section, kind in (("train", TrainConfig), ("objective", PretrainConfig)):
        for field in dataclasses.fields(kind):
            change = f"{section}.{field.name}={field.default}"
            recipe = load_pretrain_recipe("pretrain-nano", [change])
            assert getattr(getattr(recipe, section), field.name) == field.default


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.step=5", "unknown key 'step' in train; did you mean 'steps'?"),
        ("trian.steps=5", "unknown key 'trian'; did you mean 'train'?"),
        ("model.gat=softmax", "unknown key 'gat' in model; did you mean 'gate'?"),
        ("model.preset=nanno", "did you mean 'nano'?"),
        ("modalities.sar_l1.weight=1", "did you mean 'sar-l1'?"),
        ("modalities.opt.wieght=1", "unknown key 'wieght' in modalities.opt"),
        ("objective.sar_l1_target=powr", "'power', 'power_paper' or 'pixels', not 'powr'"),
        ("train.steps=many", "train.steps: .* not 'many'"),
        ("train.steps=0", "steps is 0; it must be at least 1"),
        ("train.accumulate=7", "batch_size 20 is not divisible by accumulate 7"),
        ("model.num_heads=[1,2,4,7]", "is not divisible by 7 heads"),
        ("modalities.opt.weight=-1", "weight is -1"),
        ("train", "not key=value"),
        ("train.steps.more=1", "steps is a value, not a section"),
        ("train.steps=[1", "not a YAML value"),
    ],
)
def test_mistakes_are_named_with_what_would_fit(change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as refusal:
        load_recipe("pretrain-nano", [change])
    assert "\n" not in str(refusal.value)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'pretrain-nano'"):
        load_recipe("pretrain-nan")
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe("missing.yaml")


@pytest.mark.parametrize("text", ["", "- 1\n", "just words"])
def test_file_without_sections_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="not a recipe"):
        load_recipe(written(tmp_path, text))


def test_broken_yaml_and_yaml_with_code_are_refused(tmp_path: Path) -> None:
    for text in ("train: [", "train: !!python/object/apply:os.system ['touch owned']"):
        with pytest.raises(RecipeError, match="not YAML"):
            load_recipe(written(tmp_path, text))
    assert not Path("owned").exists()


def test_numbers_in_any_spelling(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, "train: {lr: 1e-3, min_lr: 5E-7, steps: 20}"))
    assert (recipe.train.lr, recipe.train.min_lr) == (1e-3, 5e-7)


def test_the_task_section_decides_which_command_takes_a_recipe(tmp_path: Path) -> None:
    tuned = written(tmp_path, "task: {name: depth}")
    assert isinstance(load_finetune_recipe(tuned), FinetuneRecipe)
    with pytest.raises(RecipeError, match="ringmoe finetune"):
        load_pretrain_recipe(tuned)
    with pytest.raises(RecipeError, match="ringmoe pretrain"):
        load_finetune_recipe("pretrain-nano")


def test_model_section_takes_the_channels_of_the_data() -> None:
    config = model_config({"preset": "nano", "depths": [1, 1, 1, 1]}, {"ms": 13})
    assert config.channels == {"ms": 13}
    assert config.depths == (1, 1, 1, 1)
    with pytest.raises(RecipeError, match="did you mean 'depths'"):
        model_config({"depth": [1]}, {"ms": 13})
