"""`ringmoe pretrain` from stores to a run folder, and how it stops."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import SMALL, curve, request, simulated_store

from model.checkpoint import read_config
from model.encoder import RingMoE
from model.journal import Journal
from model.plan import Cluster, Workload, plan
from model.pretrain import MaskedImageModel
from ringmoe_cli.errors import OutputExistsError, RingmoeError, StoreError
from ringmoe_cli.jobs.pretraining import PretrainRequest, open_data, pretrain
from ringmoe_cli.jobs.runs import claim_run, first_difference, stop_requests
from ringmoe_cli.recipe import load_pretrain_recipe

PROGRAM = Path(sys.executable).parent / "ringmoe"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated_store(tmp_path_factory.mktemp("simulated"))


def test_run_folder_is_a_checkpoint_that_opens_by_modality(store: Path, tmp_path: Path) -> None:
    found = pretrain(request(store, tmp_path / "pre"))
    assert found["step"] == 4
    assert {"opt", "ms", "sar-l1", "sar-l2", "balance"} <= set(found)
    assert 0.2 < found["sar_l1_floor"] < 1.2
    config = read_config(tmp_path / "pre")
    assert config.kind == "pretraining"
    assert set(config.normalisation) == set(config.model.modalities) == set(config.gsd)
    assert config.gsd["opt"] == 5.0
    assert config.provenance["step"] == 4
    net = RingMoE.from_pretrained(tmp_path / "pre", modality="ms")
    assert net({"ms": torch.zeros(1, 4, 32, 32)})["ms"][-1].shape == (1, 64, 1, 1)


def test_stopped_run_continues_on_real_data_bit_for_bit(store: Path, tmp_path: Path) -> None:
    pretrain(request(store, tmp_path / "whole", "train.steps=6"))

    def stop_here(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringmoe_cli.jobs.pretraining.Watch.on_step", stop_here)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                pretrain(request(store, tmp_path / "parts", "train.steps=6", "train.save_every=9"))
    pretrain(request(store, tmp_path / "parts", "train.steps=6"))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    whole, parts = ((tmp_path / n).glob("model*.safetensors") for n in ("whole", "parts"))
    assert [p.read_bytes()[-4096:] for p in whole] == [p.read_bytes()[-4096:] for p in parts]


def test_accumulation_sees_the_same_number_of_images(store: Path, tmp_path: Path) -> None:
    pretrain(request(store, tmp_path, "train.accumulate=2"))
    assert len(curve(tmp_path)) == 4


def test_finished_run_is_refused_without_overwrite(store: Path, tmp_path: Path) -> None:
    wanted = request(store, tmp_path, "train.steps=1", "train.warmup_steps=0")
    pretrain(wanted)
    before = curve(tmp_path)
    with pytest.raises(OutputExistsError):
        pretrain(wanted)
    pretrain(replace(wanted, overwrite=True))
    assert curve(tmp_path) == before


def test_missing_modalities_are_fine_and_none_is_an_error(store: Path, tmp_path: Path) -> None:
    one = request(
        store, tmp_path, *(f"modalities.{m}.weight=0" for m in ("opt", "sar-l1", "sar-l2"))
    )
    assert list(open_data([store], one.recipe).normalisation) == ["ms"]
    chosen = request(store, tmp_path, "modalities.ms.bands=[nir, red]")
    assert open_data([store], chosen.recipe).normalisation["ms"].bands == ("nir", "red")
    none = replace(one.recipe, modalities={})
    with pytest.raises(StoreError, match="holds opt, ms, sar-l1, sar-l2; the recipe uses"):
        open_data([store], none)


# run folders


def test_other_settings_are_named(tmp_path: Path) -> None:
    facts = {"command": "pretrain", "recipe": {"train": {"lr": 1e-3, "save_every": 5}}}
    assert claim_run(tmp_path, facts, 10, overwrite=False) == 0
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "latest").write_text("4\n")
    saving = {"command": "pretrain", "recipe": {"train": {"lr": 1e-3, "save_every": 9}}}
    assert claim_run(tmp_path, saving, 10, overwrite=False) == 4
    other = {"command": "pretrain", "recipe": {"train": {"lr": 1e-4, "save_every": 5}}}
    with pytest.raises(RingmoeError, match=r"recipe.train.lr 0.001, not 0.0001"):
        claim_run(tmp_path, other, 10, overwrite=False)
    assert claim_run(tmp_path, other, 10, overwrite=True) == 0
    assert not (tmp_path / "state").exists()


def test_folder_with_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError):
            claim_run(tmp_path, {}, 10, overwrite)
    assert (tmp_path / "thesis.tex").exists()


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    claim_run(tmp_path, {}, 10, overwrite=False)
    claim_run(tmp_path, {}, 10, overwrite=False)
    again = "import pathlib, ringmoe_cli.jobs.runs as r; r.claim_run(pathlib.Path(), {}, 10, False)"
    other = subprocess.run(
        [sys.executable, "-P", "-c", again],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "another process is training in" in other.stderr


def test_difference_names_the_innermost_key() -> None:
    assert first_difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}) == "a.b [1, 2], not [1, 3]"
    assert first_difference({"a": 1, "step": 3}, {"a": 1, "step": 9}) == ""
    assert first_difference({}, {"a": 1}) == "a None, not 1"


def test_first_signal_asks_and_the_second_insists() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_requests() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun sends one after Ctrl-C: no insisting
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# the program


def program(*words: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(PROGRAM), "pretrain", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=cwd, env=environment,
    )  # fmt: skip


def small(*changes: str) -> list[str]:
    return [word for change in (*SMALL, *changes) for word in ("--set", change)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signal_saves_and_the_same_command_goes_on(
    store: Path, tmp_path: Path, number: signal.Signals
) -> None:
    words = [str(store), "-o", "pre", *small("train.steps=400", "train.save_every=400")]
    running = program(*words, cwd=tmp_path)
    rows = Journal(tmp_path / "pre" / "metrics.jsonl")
    deadline = time.monotonic() + 60
    while len(rows.rows()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(number)
    said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    done = int((tmp_path / "pre" / "state" / "latest").read_text())
    assert [row["step"] for row in rows.rows()] == [*range(1, done + 1)]
    assert f"saved after step {done} of 400" in said[1]
    assert said[0] == ""
    assert read_config(tmp_path / "pre").provenance["step"] == done
    assert "Traceback" not in said[1]


def test_stdout_has_the_folder_or_json_lines(store: Path, tmp_path: Path) -> None:
    plain = program(str(store), "-o", "a", *small(), cwd=tmp_path)
    lines = program(str(store), "-o", "b", "--json", *small(), cwd=tmp_path)
    out, err = plain.communicate(timeout=100)
    assert (plain.returncode, out) == (0, "a\n"), err
    shown = [line for line in err.splitlines() if line.startswith("{")]
    assert [json.loads(line)["step"] for line in shown] == [2, 4]
    assert "speckle alone leaves" in err
    out, err = lines.communicate(timeout=100)
    said = [json.loads(line) for line in out.splitlines()]
    assert [row["step"] for row in said] == [2, 4, 4]
    assert said[-1]["run"] == "b"


def test_unknown_key_and_missing_store_are_one_line(tmp_path: Path) -> None:
    for words in (["--set", "train.step=3"], ["missing.zarr"]):
        running = program(*words, cwd=tmp_path)
        out, err = running.communicate(timeout=60)
        assert running.returncode == 1
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert not (tmp_path / "runs" / "pre" / "state").exists()


def test_tensorboard_has_every_step(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(replace(request(store, tmp_path), tensorboard=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(
        [row["loss"] for row in curve(tmp_path)]
    )


def test_missing_tensorboard_says_how_to_get_it(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'ringmoe\[tensorboard\]'"):
        pretrain(replace(request(store, tmp_path), tensorboard=True))


def test_routing_is_logged_and_dead_experts_are_called(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(request(store, tmp_path / "a", "train.log_every=1"))
    rows = Journal(tmp_path / "a" / "routing.jsonl").rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    shares = rows[-1]["shares"]
    assert set(shares) == {"collaborative", "specialised"}
    for by_modality in shares.values():
        assert set(by_modality) == {"opt", "ms", "sar-l1", "sar-l2"}
        for layers in by_modality.values():
            assert len(layers) == 4
            assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in layers)
    assert set(rows[-1]["entropy"]["collaborative"]) == set(shares["collaborative"])
    assert rows[-1]["dropped"]["collaborative"] == [0, 0, 0, 0]
    assert "no token has met" not in capsys.readouterr().err
    lonely = ("train.log_every=1", "train.steps=10", "train.warmup_steps=2", "train.batch_size=4")
    pretrain(request(store, tmp_path / "b", *lonely, "model.specialised=16"))
    assert "no token has met" in capsys.readouterr().err


def test_terminal_gets_a_live_bar_and_stdout_the_folder_alone(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        pretrain(request(store, tmp_path, "train.save_every=4"))
        monkeypatch.undo()
    drawn = os.read(ours, 1 << 20).decode()
    os.close(ours)
    for word in ("pretrain", "4/4", "opt ", "sar-l1 ", "balance ", "lr ", "img/s", "mfu ", "wait "):
        assert word in drawn, word
    assert "\x1b[" in drawn
    assert "{" not in drawn
    assert capsys.readouterr().out == ""


def test_coregistered_modalities_share_a_step(store: Path, tmp_path: Path) -> None:
    """The simulated scene shows one place to four sensors; each step has a loss for each."""
    wanted = request(store, tmp_path, "modalities.opt.weight=1", "modalities.sar-l2.weight=1")
    data = open_data(wanted.stores, wanted.recipe)
    grids = {m: {s.scene.grid for t in data.stores for s in t.scenes_of(m)} for m in data.channels}
    assert grids["opt"] == grids["sar-l2"]
    pretrain(wanted)
    for row in Journal(tmp_path / "metrics.jsonl").rows():
        assert row["opt"] > 0
        assert row["sar-l2"] > 0


@pytest.mark.parametrize(
    ("name", "gpus", "memory"),
    [("pretrain-tiny", 1, 24e9), ("pretrain-base", 8, 80e9), ("pretrain-14b", 256, 80e9)],
)
def test_larger_recipes_fit_their_hardware_and_train_when_shrunk(
    name: str, gpus: int, memory: float, store: Path, tmp_path: Path
) -> None:
    recipe = load_pretrain_recipe(name)
    work = Workload.of(recipe.model_config({"opt": 3, "ms": 4, "sar-l1": 8, "sar-l2": 3}))
    assert plan(work, Cluster(gpus, memory), recipe.train.batch_size)
    steps = ("train.steps=2", "train.warmup_steps=1", "train.log_every=1", "train.keep_every=0")
    sizes = ("model.num_heads=[1,2,4,8]", *(c for c in SMALL if "train.s" not in c))
    shrunk = load_pretrain_recipe(name, [*sizes, *steps])
    assert shrunk.train.precision == "bf16"
    found = pretrain(PretrainRequest((store,), tmp_path, shrunk))
    assert found["step"] == 2
    assert RingMoE.from_pretrained(tmp_path).config.embed_dim == 8


def test_recipe_asks_for_compilation(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[MaskedImageModel] = []
    monkeypatch.setattr("ringmoe_cli.jobs.pretraining.compile_blocks", compiled.append)
    pretrain(request(store, tmp_path, "train.compile=true"))
    assert [type(network) for network in compiled] == [MaskedImageModel]
