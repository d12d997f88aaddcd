"""Tiling against a serial windowed copy to Zarr with the same codec, in the same run.

    python benchmarks/tiling_cost.py [--side 10980]

Each contender runs in a process of its own: CPU-seconds, wall seconds and peak memory are the
operating system's.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BANDS = ("blue", "green", "red", "nir")


def make_scene(path: Path, side: int) -> None:
    """A uint16 COG-like GeoTIFF with the smoothness and noise of a satellite scene."""
    import rasterio

    rng = np.random.default_rng(0)
    coarse = rng.integers(300, 3000, (4, side // 64 + 2, side // 64 + 2)).astype(np.float32)
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=4, dtype="uint16",
        crs="EPSG:32630", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 6e6), tiled=True,
        blockxsize=512, blockysize=512, compress="deflate", predictor=2, zlevel=1, nodata=0,
    ) as out:  # fmt: skip
        out.descriptions = BANDS
        for row in range(0, side, 512):
            tall = min(512, side - row)
            at = (np.arange(row, row + tall) / 64).astype(int)
            strip = coarse[:, at][:, :, (np.arange(side) / 64).astype(int)]
            noisy = strip + rng.normal(0, 25, strip.shape).astype(np.float32)
            window = rasterio.windows.Window(0, row, side, tall)
            out.write(np.clip(noisy, 1, 65535).astype(np.uint16), window=window)


def copy(scene: Path, out: Path) -> None:
    """The baseline: read 2048² windows one after the other and assign them to a Zarr array."""
    import rasterio
    import zarr

    from ringmoe_cli.scene.raster import SAFE_OPTIONS
    from ringmoe_cli.scene.store.chunks import codec

    with rasterio.Env(**SAFE_OPTIONS), rasterio.open(scene) as source:
        array = zarr.create_array(
            out, shape=(source.count, source.height, source.width), dtype="uint16",
            chunks=(source.count, 256, 256), compressors=[codec()], zarr_format=2,
        )  # fmt: skip
        for row in range(0, source.height, 2048):
            for col in range(0, source.width, 2048):
                window = rasterio.windows.Window(
                    col, row, min(2048, source.width - col), min(2048, source.height - row)
                )
                array[:, row : row + window.height, col : col + window.width] = source.read(
                    window=window
                )


def tile(scene: Path, out: Path, threads: int) -> None:
    """What `ringmoe tile` does: store, validity, statistics, window index, manifest."""
    from ringmoe_cli.cluster import Engine
    from ringmoe_cli.scene.sensors import open_scene
    from ringmoe_cli.scene.tiling import Labelled, Settings, tile_scenes

    settings = Settings(engine=Engine(threads=threads))
    tile_scenes([Labelled(open_scene(scene))], out, settings)


def measured(*arguments: str) -> dict[str, float]:
    """CPU-seconds, wall seconds and peak megabytes of one contender, in its own process."""
    command = [sys.executable, __file__, "--only", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def only(name: str, scene: Path, out: Path) -> None:
    """Run one contender here and print what it cost."""
    start = time.perf_counter()
    copy(scene, out) if name == "copy" else tile(scene, out, int(name.removeprefix("tile")))
    use = resource.getrusage(resource.RUSAGE_SELF)
    row = {"wall": time.perf_counter() - start, "cpu": use.ru_utime + use.ru_stime}
    print(json.dumps({**row, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """Peak memory of this process alone: `ru_maxrss` would begin with the parent's."""
    status = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    """Three rounds in turn; the least of each is shown, as the rest is the machine's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, default=10980)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs=3)
    parser.add_argument("--folder", type=Path, default=None)
    said = parser.parse_args()
    if said.only:
        only(said.only[0], Path(said.only[1]), Path(said.only[2]))
        return
    folder = Path(tempfile.mkdtemp(dir=said.folder))
    scene = folder / "scene.tif"
    make_scene(scene, said.side)
    rows: dict[str, list[dict[str, float]]] = {"copy": [], "tile1": [], "tile2": []}
    for number in range(said.rounds):
        for name, found in rows.items():
            out = folder / f"{name}{number}.zarr"
            found.append(measured(name, str(scene), str(out)))
            shutil.rmtree(out)
    best = {n: {k: min(r[k] for r in found) for k in found[0]} for n, found in rows.items()}
    for name, row in best.items():
        print(name, {k: round(v, 2) for k, v in row.items()})
    print(f"CPU tile1 / copy  {best['tile1']['cpu'] / best['copy']['cpu']:.2f}")
    print(f"CPU tile2 / copy  {best['tile2']['cpu'] / best['copy']['cpu']:.2f}")
    print(f"wall tile2 / copy {best['tile2']['wall'] / best['copy']['wall']:.2f}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
