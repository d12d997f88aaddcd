"""A store holds the scene exactly, however the work was cut, stopped, or spread."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasters import noise, write_calibrated, write_raster

from ringmoe_cli.cluster import Engine, parse_slurm
from ringmoe_cli.errors import BadBlockError, OutputExistsError, RingmoeError, StoreError
from ringmoe_cli.scene import tiling
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.radiometry import to_physical
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.store import chunks, regions
from ringmoe_cli.scene.store.layout import VALID_RUN
from ringmoe_cli.scene.store.shards import RUN
from ringmoe_cli.scene.tiles import open_store
from ringmoe_cli.scene.tiling import Labelled, Settings, tile_scenes

NAMES = ("blue", "green", "red", "nir")


@pytest.fixture
def scene(tmp_path):
    return open_scene(write_calibrated(tmp_path / "scene.tif"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def small_regions(monkeypatch):
    monkeypatch.setattr(regions, "REGION_BYTES", 4 * 2 * 64 * 64 * 4)


def test_the_store_holds_values_validity_and_statistics(scene, tmp_path):
    store = tile_scenes([Labelled(scene)], tmp_path / "t.zarr", Settings(tile=64))
    stored = store.scenes[0]
    with SceneReader(scene) as reader:
        for window in (Window(0, 0, 300, 350), Window(-7, 290, 64, 100), Window(63, 63, 2, 2)):
            for ours, theirs in zip(stored.read(window), reader.read(window), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            for ours, theirs in zip(stored.physical(window), reader.physical(window), strict=True):
                np.testing.assert_array_equal(ours, theirs)
        raw, valid = reader.read(Window(0, 0, 300, 350))
    physical = to_physical(raw, scene)
    for name, values in zip(NAMES, physical, strict=True):
        said = stored.statistics[name]
        kept = values[valid].astype(float)
        assert said["count"] == kept.size
        assert said["mean"] == pytest.approx(kept.mean(), rel=1e-6)
        assert said["std"] == pytest.approx(kept.std(), rel=1e-5)
    want = [
        [valid[r : r + 64, c : c + 64].mean() for c in range(0, 350, 64)] for r in range(0, 300, 64)
    ]
    np.testing.assert_allclose(stored.valid_fractions, want, rtol=1e-6)


@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from([16, 64]),
    st.integers(1, 130),
    st.integers(1, 800),
    st.booleans(),
)
@settings(deadline=None)
def test_regions_are_whole_files_that_cover_once(
    height, width, tile, tall_block, wide_block, shards
):
    seen = np.zeros((height, width), int)
    unit = tile * (RUN if shards else VALID_RUN)
    for row, col, tall, wide in regions.region_windows(
        Grid(height, width), tile, 8, (tall_block, min(wide_block, width)), shards
    ):
        assert row % tile == 0
        assert col % unit == 0
        assert (row + tall) % tile == 0 or row + tall == height
        assert (col + wide) % unit == 0 or col + wide == width
        seen[row : row + tall, col : col + wide] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("block", "pixel", "expected"),
    [
        ((512, 512), 8, (1024, 1024)),
        ((1024, 1024), 20, (1024, 1024)),
        ((1, 10980), 8, (256, 11008)),
        ((1, 10980), 36, (256, 7168)),
        ((700, 700), 8, (1280, 1024)),
    ],
)
def test_regions_follow_the_blocks_of_the_file(monkeypatch, block, pixel, expected):
    monkeypatch.setattr(regions, "REGION_BYTES", 16 * 2**20)
    first = regions.region_windows(Grid(20000, 10980), 256, pixel, block)[0]
    assert (first.height, first.width) == (expected[0], min(expected[1], 10980))


def test_threads_do_not_change_a_byte(scene, tmp_path):
    for count in (1, 4):
        settings = Settings(tile=64, engine=Engine(threads=count))
        tile_scenes([Labelled(scene)], tmp_path / f"t{count}.zarr", settings)
    assert contents(tmp_path / "t1.zarr") == contents(tmp_path / "t4.zarr")


def test_a_finished_store_is_not_touched_without_overwrite(scene, tmp_path):
    out = tmp_path / "t.zarr"
    tile_scenes([Labelled(scene)], out, Settings(tile=64))
    before = contents(out)
    with pytest.raises(OutputExistsError):
        tile_scenes([Labelled(scene)], out, Settings(tile=64))
    assert contents(out) == before
    tile_scenes([Labelled(scene)], out, Settings(tile=32, overwrite=True))
    assert open_store(out).scenes[0].tile_size == 32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scene.tif", "t.zarr"]


def test_a_second_run_in_one_process_reads_and_writes_anew(tmp_path):
    out = tmp_path / "t.zarr"
    for seed, tile in ((1, 64), (2, 32)):
        values = noise(3, 90, 70, "uint8", seed)
        fresh = write_raster(tmp_path / "new.tif", values, photometric="RGB")
        fresh.rename(tmp_path / "s.tif")
        scenes = [Labelled(open_scene(tmp_path / "s.tif"))]
        stored = tile_scenes(scenes, out, Settings(tile=tile, overwrite=True)).scenes[0]
        np.testing.assert_array_equal(stored.read(Window(0, 0, 90, 70))[0], values)
        assert stored.image.chunks == (3, tile, tile)


class StoppedError(Exception):
    """The run ends here."""


def stop_after(monkeypatch, count):
    """Let so many regions be finished, then fail."""
    done = []
    honest = regions.write_region

    def write(region):
        if len(done) == count:
            raise StoppedError
        done.append(region)
        return honest(region)

    monkeypatch.setattr(tiling, "write_region", write)
    return done


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("damage", ["none", "chunk", "line"])
def test_an_interrupted_run_is_continued_bit_for_bit(scene, tmp_path, monkeypatch, damage, shards):
    out, part = tmp_path / "t.zarr", tmp_path / "t.zarr.part"
    side = 16 if shards else 64
    monkeypatch.setattr(regions, "REGION_BYTES", 4 * 2 * 64 * 64)
    how = Settings(tile=side, shards=shards, engine=Engine(threads=1))
    tile_scenes([Labelled(scene)], tmp_path / "whole.zarr", how)
    stop_after(monkeypatch, 3)
    with pytest.raises(StoppedError):
        tile_scenes([Labelled(scene)], out, how)
    assert not out.exists()
    manifest = (part / "manifest.jsonl").read_text()
    finished = [json.loads(x) for x in manifest.splitlines() if x]
    assert len(finished) >= 2
    if damage == "chunk":
        row, col = (v // side for v in finished[0]["window"][:2])
        name = f"c.0.{row}.{col // RUN}" if shards else f"0.{row}.{col}"
        (part / "scene" / "image" / name).write_bytes(b"torn")
        (part / "scene" / ".0f0f.partial").write_bytes(b"left by a killed writer")
    if damage == "line":
        (part / "manifest.jsonl").write_text(manifest + '{"scene": "sce')
    again = stop_after(monkeypatch, 10**6)
    tile_scenes([Labelled(scene)], out, how)
    total = len((out / "manifest.jsonl").read_text().splitlines())
    assert len(again) == total - len(finished) + (damage == "chunk")
    assert contents(out) == contents(tmp_path / "whole.zarr")


def test_a_full_disk_loses_nothing(scene, tmp_path, monkeypatch):
    out, one = tmp_path / "t.zarr", Engine(threads=1)
    written, honest = [], chunks.overwrite

    def overwrite(path, data):
        if len(written) == 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        honest(path, data)

    monkeypatch.setattr(chunks, "overwrite", overwrite)
    with pytest.raises(StoreError, match=r"t\.zarr\.part: the disk is full; make room"):
        tile_scenes([Labelled(scene)], out, Settings(tile=32, engine=one))
    assert not out.exists()
    monkeypatch.undo()
    tile_scenes([Labelled(scene)], out, Settings(tile=32, engine=one))
    tile_scenes([Labelled(scene)], tmp_path / "whole.zarr", Settings(tile=32, engine=one))
    assert contents(out) == contents(tmp_path / "whole.zarr")


def test_two_runs_do_not_write_one_store(scene, tmp_path, monkeypatch):
    out, part = tmp_path / "t.zarr", tmp_path / "t.zarr.part"
    stop_after(monkeypatch, 1)
    with pytest.raises(StoppedError):
        tile_scenes([Labelled(scene)], out, Settings(tile=64, engine=Engine(threads=1)))
    with tiling.locked(part), pytest.raises(StoreError, match="another run is writing"):
        tile_scenes([Labelled(scene)], out, Settings(tile=64))


def test_unfinished_work_of_other_inputs_is_not_mixed_in(scene, tmp_path, monkeypatch):
    out = tmp_path / "t.zarr"
    stop_after(monkeypatch, 1)
    with pytest.raises(StoppedError):
        tile_scenes([Labelled(scene)], out, Settings(tile=64, engine=Engine(threads=1)))
    with pytest.raises(StoreError, match="other inputs or settings; delete it"):
        tile_scenes([Labelled(scene)], out, Settings(tile=32))
    with pytest.raises(StoreError, match=r"t\.zarr\.part is unfinished"):
        open_store(out)


KILLED = """
import os, signal, sys
from ringmoe_cli.scene import tiling
from ringmoe_cli.scene.store import chunks, regions
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.tiling import Labelled, Settings, tile_scenes
regions.REGION_BYTES = 4 * 2 * 64 * 64
honest, done = regions.write_region, []
def write(region):
    if len(done) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(1)
    return honest(region)
tiling.write_region = write
tile_scenes([Labelled(open_scene(sys.argv[1]))], sys.argv[2], Settings(tile=64))
"""


def test_kill_9_and_the_same_command_again(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(regions, "REGION_BYTES", 4 * 2 * 64 * 64)
    out, path = tmp_path / "t.zarr", scene.bands[0].path
    for count in (4, 3):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, path, str(out), str(count)], capture_output=True
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert not out.exists()
    tile_scenes([Labelled(scene)], out, Settings(tile=64))
    tile_scenes([Labelled(scene)], tmp_path / "whole.zarr", Settings(tile=64))
    assert contents(out) == contents(tmp_path / "whole.zarr")


def cut_scene(tmp_path):
    values = noise(3, 256, 256, "uint8")
    path = write_raster(
        tmp_path / "cut.tif", values, photometric="RGB", tiled=True, blockxsize=64, blockysize=64,
        compress="deflate",
    )  # fmt: skip
    path.write_bytes(path.read_bytes()[:-30000])
    return values, open_scene(path)


def test_a_bad_block_fails_the_run_or_is_marked_invalid(tmp_path):
    values, scene = cut_scene(tmp_path)
    with pytest.raises(BadBlockError, match=r"cut\.tif: band 1, 2, 3, rows"):
        tile_scenes([Labelled(scene)], tmp_path / "a.zarr", Settings(tile=128))
    stored = tile_scenes(
        [Labelled(scene)], tmp_path / "b.zarr", Settings(tile=128, skip_bad=True)
    ).scenes[0]
    raw, valid = stored.read(Window(0, 0, 256, 256))
    assert valid[:128].all()
    assert not valid[192:, 192:].any()
    np.testing.assert_array_equal(raw[:, valid], values[:, valid])
    assert not raw[:, ~valid].any()
    assert "could not be decoded" in stored.scene.notes[0]


def test_scenes_of_one_name_are_numbered(scene, tmp_path):
    store = tile_scenes([Labelled(scene)] * 3, tmp_path / "t.zarr", Settings(tile=64))
    assert [s.name for s in store.scenes] == ["scene", "scene_2", "scene_3"]


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_processes_and_a_scheduler_make_the_same_store(scene, tmp_path):
    from distributed import LocalCluster

    whole = tile_scenes([Labelled(scene)], tmp_path / "a.zarr", Settings(tile=64)).path
    local = Settings(tile=64, engine=Engine(workers=2))
    assert contents(tile_scenes([Labelled(scene)], tmp_path / "b.zarr", local).path) == contents(
        whole
    )
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        remote = Settings(tile=64, engine=Engine(scheduler=cluster.scheduler_address))
        made = tile_scenes([Labelled(scene)], tmp_path / "c.zarr", remote).path
    assert contents(made) == contents(whole)


def slow_or_deadly(task):
    """The first worker that meets task 3 dies; anyone else does it."""
    number, marker = task
    if number == 3 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return number


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_killed_worker_costs_a_retry_not_the_run(tmp_path):
    tasks = [(i, str(tmp_path / "died")) for i in range(8)]
    assert sorted(Engine(workers=2).run(slow_or_deadly, tasks)) == list(range(8))
    assert (tmp_path / "died").exists()


SBATCH = """#!{python}
import os, subprocess, sys
script = sys.argv[-1]
log = open(os.path.join("{folder}", "job.log"), "w")
done = subprocess.Popen(["bash", script], stdout=log, stderr=log, start_new_session=True)
open(os.path.join("{folder}", "jobs"), "a").write(open(script).read())
print("Submitted batch job", done.pid)
"""


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_slurm_jobs_do_the_work(scene, tmp_path, monkeypatch):
    """sbatch is played by a script that starts the job here; scancel ends it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(SBATCH.format(python=sys.executable, folder=tmp_path))
    (programs / "scancel").write_text('#!/bin/sh\nkill -- -"$1"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    wanted = parse_slurm("queue=short,cores=1,memory=2GB,walltime=00:10:00")
    whole = tile_scenes([Labelled(scene)], tmp_path / "a.zarr", Settings(tile=64)).path
    settings = Settings(tile=64, engine=Engine(slurm=wanted))
    made = tile_scenes([Labelled(scene)], tmp_path / "b.zarr", settings).path
    assert contents(made) == contents(whole)
    script = (tmp_path / "jobs").read_text()
    assert "#SBATCH -p short" in script
    assert "#SBATCH -t 00:10:00" in script


def test_gdal_settings_travel_to_workers(scene, tmp_path, monkeypatch):
    monkeypatch.setenv("GDAL_NUM_THREADS", "3")
    monkeypatch.setenv("OTHER_SETTING", "4")
    (source,) = tiling.plan_sources([Labelled(scene)], tmp_path, Settings())
    assert source.gdal["GDAL_NUM_THREADS"] == "3"
    assert "OTHER_SETTING" not in source.gdal
    monkeypatch.delenv("GDAL_NUM_THREADS")
    regions.reader_of(source)
    assert os.environ["GDAL_NUM_THREADS"] == "3"
    monkeypatch.setenv("GDAL_NUM_THREADS", "1")
    regions.reader_of(source)
    assert os.environ["GDAL_NUM_THREADS"] == "1"


def test_slurm_settings_are_pairs():
    assert parse_slurm("queue=short, memory=8GB") == {"queue": "short", "memory": "8GB"}
    assert parse_slurm(None) == {}
    with pytest.raises(RingmoeError, match="write key=value pairs"):
        parse_slurm("short")


def test_engines_that_cannot_start_say_so():
    with pytest.raises(RingmoeError, match="no Dask scheduler answers at tcp://127"):
        list(Engine(scheduler="tcp://127.0.0.1:1").run(str, [1]))


def test_the_first_failure_stops_the_rest():
    seen = []

    def work(i):
        seen.append(i)
        if i == 2:
            raise StoppedError
        return i

    with pytest.raises(StoppedError):
        list(Engine(threads=1).run(work, range(1000)))
    assert len(seen) < 20
