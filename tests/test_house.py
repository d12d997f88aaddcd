"""The house rules, held by tests: who imports whom, file length, documented commands."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for folder in ("model", "ringmoe_cli") for p in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def uses(path: Path, library: str) -> bool:
    return any(name == library or name.startswith(library + ".") for name in imports(path))


ONLY_IN = {
    "rasterio": ("ringmoe_cli/scene/", "ringmoe_cli/cluster.py", "ringmoe_cli/rio_plugin.py"),
    "xarray": ("ringmoe_cli/scene/", "ringmoe_cli/cluster.py"),
    "dask": ("ringmoe_cli/scene/", "ringmoe_cli/cluster.py"),
    "distributed": ("ringmoe_cli/scene/", "ringmoe_cli/cluster.py"),
    "zarr": ("ringmoe_cli/scene/", "ringmoe_cli/cluster.py"),
    "typer": ("ringmoe_cli/app.py", "ringmoe_cli/options.py", "ringmoe_cli/commands/"),
    "rich": ("ringmoe_cli/console.py",),
    "torch.distributed": (
        "model/parallel.py",
        "model/exchange.py",
        "model/replicas.py",
        "model/checkpoint.py",
        "model/state.py",
    ),
}


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_stays_in_its_room(library: str) -> None:
    strays = [
        room(p) for p in SOURCES if uses(p, library) and not room(p).startswith(ONLY_IN[library])
    ]
    assert strays == []


def test_model_never_imports_the_command_line() -> None:
    assert [
        room(p) for p in SOURCES if room(p).startswith("model/") and uses(p, "ringmoe_cli")
    ] == []


def test_scene_never_imports_commands() -> None:
    scene = [p for p in SOURCES if room(p).startswith("ringmoe_cli/scene/")]
    assert [room(p) for p in scene if uses(p, "ringmoe_cli.commands")] == []


def test_commands_do_not_import_each_other() -> None:
    commands = [p for p in SOURCES if room(p).startswith("ringmoe_cli/commands/")]
    assert [room(p) for p in commands if uses(p, "ringmoe_cli.commands")] == []


@pytest.mark.parametrize(
    "path",
    [
        *SOURCES,
        *sorted((ROOT / "tests").rglob("*.py")),
        *sorted((ROOT / "benchmarks").glob("*.py")),
    ],
    ids=room,
)
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def commands() -> list[str]:
    from ringmoe_cli.app import COMMANDS

    return [command.__name__ for command in COMMANDS]


@pytest.mark.parametrize("command", commands())
def test_command_is_in_the_readme_with_an_example_in_its_help(command: str) -> None:
    assert f"ringmoe {command}" in (ROOT / "README.md").read_text()
    shown = run("--help", command=command)
    assert f"ringmoe {command}" in shown.replace("Usage: ringmoe", ""), "no example in the help"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_recipe_loads_and_is_in_the_readme(recipe: Path) -> None:
    from ringmoe_cli.recipe import load_recipe

    load_recipe(str(recipe))
    assert recipe.stem.replace("_", "-") in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "script", sorted((ROOT / "recipes").rglob("*.sbatch")), ids=lambda p: p.stem
)
def test_slurm_script_is_in_the_readme(script: Path) -> None:
    assert script.name in (ROOT / "README.md").read_text()


def run(*arguments: str, command: str = "", cwd: Path | None = None) -> str:
    """Output of the installed program, as a user sees it in a pipe."""
    program = Path(sys.executable).parent / "ringmoe"
    words = [str(program), *([command] if command else []), *arguments]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=cwd, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_imports_neither_torch_nor_rasterio() -> None:
    code = (
        "import sys; from ringmoe_cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'rasterio', 'xarray', 'dask', 'zarr', 'numpy', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_version_is_the_one_of_the_package() -> None:
    import ringmoe_cli

    stated = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated is not None
    assert run("--version").strip() == ringmoe_cli.__version__ == stated[1]


def test_decoy_model_in_the_working_folder_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("raise SystemExit('the decoy was imported')")
    assert "opt" in run("--preset", "nano", command="inspect", cwd=tmp_path)


def test_architecture_names_every_file() -> None:
    plan = (ROOT / "ARCHITECTURE.md").read_text()
    assert len(plan.splitlines()) <= 150
    missing = [
        room(p)
        for p in SOURCES
        if p.name not in ("__init__.py", "__main__.py") and p.name not in plan
    ]
    assert missing == []
