"""Several processes do what one does: loss, every gradient, clipping, an SGD step (fp64)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model.config import ModelConfig, PretrainConfig
from model.parallel import Ranks, check_ep, ranks
from model.pretrain import MaskedImageModel

HERE = Path(__file__).parent


def torchrun(processes: int, script: str, *words: object) -> None:
    """Run a script of this folder on several processes."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program += [f"--nproc-per-node={processes}", str(HERE / script), *map(str, words)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def compare(
    processes: int, ep: int, folder: Path, scale: float = 1.0, mode: str = "default"
) -> dict[str, float]:
    """Run the worker under torchrun and return its largest differences to one process."""
    torchrun(processes, "parallel_worker.py", ep, folder, scale, mode)
    report: dict[str, float] = json.loads((folder / "report.json").read_text())
    return report


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "ep", "mode"),
    [
        (2, 1, "sharded"),
        (2, 2, "sharded"),
        (2, 2, "whole"),
        (2, 2, "recomputed"),
        (4, 1, "default"),
        (4, 2, "default"),
        (4, 4, "sharded"),
        (4, 4, "default"),
    ],
)
def test_equals_one_process(processes: int, ep: int, mode: str, tmp_path: Path) -> None:
    """Unequal batches, a modality missing on some ranks, experts without tokens."""
    report = compare(processes, ep, tmp_path, mode=mode)
    assert max(report.values()) < 1e-10, report


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["sharded", "whole"])
def test_gradients_of_twice_the_size_are_noticed(mode: str, tmp_path: Path) -> None:
    report = compare(2, 2, tmp_path, scale=2.0, mode=mode)
    assert report["loss"] < 1e-10
    assert min(report["gradient"], report["norm"]) > 1e-3


@pytest.mark.distributed
def test_a_state_saved_on_two_ranks_loads_on_one_and_on_four(tmp_path: Path) -> None:
    """Weights and moments of AdamW, experts split on two and on four ranks."""
    for processes, mode, ep in ((2, "save", 2), (1, "load", 1), (4, "load", 4)):
        torchrun(processes, "state_worker.py", mode, ep, tmp_path)
        report = json.loads((tmp_path / f"{mode}.json").read_text())
        assert report["worst"] < 1e-8, (processes, report)
        assert report["same"]
        assert report["tensors"] > 200


def test_ranks_come_from_torchrun_then_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert ranks() == Ranks(5, 8, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert ranks() == Ranks(2, 4, 2)


@pytest.mark.parametrize(("world", "ep"), [(3, 2), (6, 3)])
def test_a_split_that_leaves_something_over_is_refused(world: int, ep: int) -> None:
    net = MaskedImageModel(
        ModelConfig.preset("nano", embed_dim=8, channels={"opt": 3}), PretrainConfig()
    )
    with pytest.raises(ValueError, match=f"ep {ep} does not divide"):
        check_ep(net, world, ep)
