"""Hostile and odd files: a right result or one clear line; never a hang, a flood or a leak."""

import http.server
import json
import resource
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import rasterio
from rasters import noise, write_raster

from ringmoe_cli.errors import RingmoeError, SceneError
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.tiles import open_store

ODD = {
    "12bit.cropped.tiff": "ok",
    "2019_HARV_6_726000_4699000_image_crop_hyperspectral_2019.tif": "ok",
    "BigTIFF.tif": "ok", "RGB.byte.gcp.vrt": "ok", "RGB2.byte.tif": "ok",
    "RGBA.uint16.tif": "ok", "all-nodata.tif": "ok", "alpha.tif": "ok",
    "bitflips_400.tif": "cannot be decoded", "byte-tile.tiff": "ok",
    "clp.tif": "ok", "cmyk-4c-8b.tiff": "ok", "cog_dateline.tif": "ok", "cog_fullearth.tif": "ok",
    "cog_hirise_mars.tif": "ok", "cog_scale.tif": "ok", "cog_world.tif": "large",
    "colormap-shl-overflow.tiff": "cannot be opened", "corrupt.tif": "cannot be decoded",
    "float_nan.tif": "ok", "float_raster_with_nodata.tif": "ok", "int16_zstd.tif": "ok",
    "inverted_lat.tif": "ok", "issue_69_lzw.tiff": "ok",
    "jpeg-test-deflate-small.tif": "cannot be decoded", "multipage_diff_sizes.tif": "ok",
    "nan_block_f32.tif": "ok", "no_crs_no_transform.tif": "ok", "one_pixel.tif": "ok",
    "per_band_nodata.vrt": "ok", "planar-rgb-u8.tif": "ok", "png_named.tif": "ok",
    "random-fp16.tiff": "ok", "rotated.tif": "ok", "s1_ew_slc_zstd.tiff": "large",
    "s1_slc_sparse_huge.tiff": "empty or broken", "sparse_120000x120000.tif": "empty or broken",
    "strip_1x900.tif": "ok", "test_esri_wkt.tif": "ok", "tiled-oversize-gray-i8.tif": "ok",
    "truncated_60pct.tif": "cannot be decoded", "truncated_header.tif": "cannot be opened",
    "uint64.tif": "ok", "zero_bytes.tif": "is empty",
}  # fmt: skip
"""What becomes of each file: it is tiled exactly, or its message contains this."""

TILE = """
import json, resource, sys, time
from pathlib import Path
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.scene.products.plain import Said
from ringmoe_cli.scene.store.intake import gather
from ringmoe_cli.scene.labels import Wanted
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.tiling import Settings, tile_scenes
import warnings
warnings.simplefilter("error")
out = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    start = time.process_time()
    try:
        plain = open_scene(path, modality="ms", unnamed="number") if "slc" not in path else \\
            open_scene(path, bands=["hh"])
        names = plain.band_names if plain.named else tuple(f"b{i}" for i in range(len(plain.bands)))
        modality = "sar-l1" if "slc" in path else "ms"
        names = ("hh",) if "slc" in path else names
        scenes = gather([path], Said(modality, names), [], Wanted("segmentation"))
        tile_scenes(scenes, out / f"{Path(path).name}.zarr", Settings(tile=256))
        said = "ok"
    except RingmoeError as error:
        said = str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([Path(path).name, said, time.process_time() - start, peak / 1024]), flush=True)
"""


@pytest.fixture(scope="module")
def tiled(data_dir, tmp_path_factory):
    """Every small file tiled in one process: name -> (what it said, CPU-seconds, MB)."""
    out = tmp_path_factory.mktemp("weird")
    paths = [str(data_dir / "11_weird" / n) for n, what in ODD.items() if what != "large"]
    done = subprocess.run(
        [sys.executable, "-c", TILE, str(out), *paths], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return out, {name: rest for name, *rest in rows}


def test_the_list_of_odd_files_is_complete(data_dir):
    import csv

    with (data_dir / "11_weird/INDEX.csv").open() as file:
        assert {row["file"] for row in csv.DictReader(file)} == set(ODD)


@pytest.mark.parametrize("name", [n for n, what in ODD.items() if what != "large"])
def test_an_odd_file_is_tiled_or_refused_in_one_line(tiled, name):
    said, seconds, megabytes = tiled[1][name]
    assert ODD[name] in said
    assert "\n" not in said
    assert len(said) < 500
    assert seconds < 20
    assert megabytes < 600


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("name", [n for n, what in ODD.items() if what == "ok"])
def test_a_tiled_odd_file_holds_what_rasterio_reads(tiled, data_dir, name):
    stored = open_store(tiled[0] / f"{name}.zarr").scenes[0]
    raw, valid = stored.read(Window(0, 0, stored.grid.height, stored.grid.width))
    with rasterio.open(data_dir / "11_weird" / name) as source:
        alpha = [
            i for i, c in zip(source.indexes, source.colorinterp, strict=True) if c.name == "alpha"
        ]
        kept = [i for i in source.indexes if i not in alpha]
        values = source.read(kept)
        np.testing.assert_array_equal(raw, values)
        masks = source.read_masks(kept).all(0)
        finite = np.isfinite(values).all(0) if values.dtype.kind == "f" else True
        np.testing.assert_array_equal(valid, masks & finite)
        assert stored.grid.transform == tuple(source.transform)[:6]
        assert len(stored.grid.gcps) == len(source.gcps[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [n for n, what in ODD.items() if what == "large"])
def test_a_large_odd_file_is_tiled_in_bounded_memory(data_dir, tmp_path, name):
    path = str(data_dir / "11_weird" / name)
    done = subprocess.run(
        [sys.executable, "-c", TILE, str(tmp_path), path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    _, said, seconds, megabytes = json.loads(done.stdout)
    assert said == "ok"
    assert seconds < 60
    assert megabytes < 700


class Listener:
    """A web server that notes who comes."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        listener = self

        class Note(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listener.seen.append(self.path)
                self.send_error(404)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Note)
        self.url = f"http://127.0.0.1:{self.server.server_port}/x.tif"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def listener():
    found = Listener()
    yield found
    found.server.shutdown()
    found.server.server_close()


VRT = """<VRTDataset rasterXSize="20" rasterYSize="10"><VRTRasterBand dataType="Byte" band="1">
<ColorInterp>Red</ColorInterp><SimpleSource>
<SourceFilename relativeToVRT="{relative}">{source}</SourceFilename>
<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"""


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "private").mkdir()
    return write_raster(tmp_path / "private/secret.tif", noise(1, 10, 20, "uint8"))


@pytest.mark.parametrize("name", ["scene.vrt", "scene.tif", "scene.png"])
def test_a_vrt_reads_nothing_outside_its_folder_whatever_its_name(tmp_path, secret, name):
    folder = tmp_path / "data"
    folder.mkdir()
    near = write_raster(folder / "near.tif", noise(1, 10, 20, "uint8"))
    link = folder / "link.tif"
    link.symlink_to(secret)
    for source in (secret, "../private/secret.tif", "link.tif", f"/vsizip/{secret}"):
        (folder / name).write_text(VRT.format(relative=1, source=source))
        with pytest.raises(SceneError, match=r"outside its own folder|does not exist"):
            open_scene(folder / name, modality="ms", bands=["red"])
    (folder / name).write_text(VRT.format(relative=1, source="near.tif"))
    scene = open_scene(folder / name, modality="ms", bands=["red"])
    with SceneReader(scene) as reader, rasterio.open(near) as source:
        np.testing.assert_array_equal(reader.read(Window(0, 0, 10, 20))[0], source.read())
    (folder / name).write_text(VRT.format(relative=0, source=secret))
    scene = open_scene(folder / name, modality="ms", bands=["red"], allow_remote=True)
    assert scene.grid.width == 20


def test_a_vrt_inside_a_vrt_is_checked_too(tmp_path, secret):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "inner.tif").write_text(VRT.format(relative=0, source=secret))
    (folder / "outer.vrt").write_text(VRT.format(relative=1, source="inner.tif"))
    with pytest.raises(SceneError, match="outside its own folder"):
        open_scene(folder / "outer.vrt", modality="ms", bands=["red"])
    for name in ("outer.vrt", "inner.tif"):
        other = "inner.tif" if name == "outer.vrt" else "outer.vrt"
        (folder / name).write_text(VRT.format(relative=1, source=other))
    with pytest.raises(SceneError, match="reads itself"):
        open_scene(folder / "outer.vrt", modality="ms", bands=["red"])


TRICKS = {
    "warped": "<VRTDataset subClass='VRTWarpedDataset' rasterXSize='20' rasterYSize='10'>"
    "<GDALWarpOptions><SourceDataset relativeToVRT='0'>{}</SourceDataset></GDALWarpOptions>"
    "</VRTDataset>",
    "raw": "<VRTDataset rasterXSize='20' rasterYSize='10'><VRTRasterBand dataType='Byte' band='1' "
    "subClass='VRTRawRasterBand'><SourceFilename relativetoVRT='0'>{}</SourceFilename>"
    "</VRTRasterBand></VRTDataset>",
    "overview": "<VRTDataset rasterXSize='20' rasterYSize='10'><VRTRasterBand dataType='Byte' "
    "band='1'><Overview><SourceFilename>{}</SourceFilename></Overview></VRTRasterBand>"
    "</VRTDataset>",
    "mask": "<VRTDataset rasterXSize='20' rasterYSize='10'><MaskBand><VRTRasterBand "
    "dataType='Byte'><SimpleSource><SourceFilename>{}</SourceFilename></SimpleSource>"
    "</VRTRasterBand></MaskBand></VRTDataset>",
    "nested xml": "<VRTDataset rasterXSize='20' rasterYSize='10'><VRTRasterBand dataType='Byte' "
    "band='1'><SimpleSource><SourceFilename>&lt;VRTDataset&gt;{}&lt;/VRTDataset&gt;"
    "</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_other_ways_of_a_vrt_to_name_files(tmp_path, secret, listener, trick):
    folder = tmp_path / "data"
    folder.mkdir()
    for source in (secret, f"/vsicurl/{listener.url}", listener.url):
        (folder / "scene.vrt").write_text(TRICKS[trick].format(source))
        with pytest.raises(SceneError):
            open_scene(folder / "scene.vrt", modality="ms", bands=["red"])
    assert not listener.seen


WMS = "<GDAL_WMS><Service name='TMS'><ServerUrl>{}</ServerUrl></Service></GDAL_WMS>"


def test_no_file_makes_a_network_request(tmp_path, listener):
    for name, text in (
        ("a.tif", VRT.format(relative=0, source=f"/vsicurl/{listener.url}")),
        ("b.tif", VRT.format(relative=0, source=listener.url)),
        ("c.xml", WMS.format(listener.url)),
        ("d.tif", WMS.format(listener.url)),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(SceneError):
            open_scene(tmp_path / name, modality="ms", bands=["red"])
    for path in (listener.url, f"/vsicurl/{listener.url}"):
        with pytest.raises(SceneError, match="is remote; pass --allow-remote"):
            open_scene(path)
    time.sleep(0.1)
    assert not listener.seen
    with pytest.raises(SceneError):
        open_scene(listener.url, allow_remote=True)
    assert listener.seen


SIDE_FILE = """<PAMDataset>{}<PAMRasterBand band="1">{}</PAMRasterBand></PAMDataset>"""
ITEM = """<Metadata domain="OVERVIEWS"><MDI key="{}">{}</MDI></Metadata>"""


@pytest.mark.parametrize("key", ["OVERVIEW_FILE", "MASK_FILE"])
@pytest.mark.parametrize("target", ["/vsicurl/{}", "{}", "/etc/passwd"])
@pytest.mark.parametrize("where", ["side file", "band", "tag", "source of a vrt"])
def test_metadata_that_name_other_files_are_refused(tmp_path, listener, key, target, where):
    item = ITEM.format(key, target.format(listener.url))
    path = write_raster(tmp_path / "s.tif", noise(1, 10, 20, "uint8"), names=("red",))
    if where == "tag":
        with rasterio.open(path, "r+") as out:
            out.update_tags(ns="OVERVIEWS", **{key: target.format(listener.url)})
    else:
        side = SIDE_FILE.format("", item) if where == "band" else SIDE_FILE.format(item, "")
        path.with_name("s.tif.aux.xml").write_text(side)
    if where == "source of a vrt":
        path = tmp_path / "s.vrt"
        path.write_text(VRT.format(relative=1, source="s.tif"))
    with pytest.raises(SceneError, match=rf"s\.tif names .* as its {key}"):
        open_scene(path, modality="ms", bands=["red"])
    assert not listener.seen


def test_declared_sizes_and_blocks_are_checked_before_reading(tmp_path):
    huge = tmp_path / "huge.tif"
    with rasterio.open(
        huge, "w", driver="GTiff", width=700_000, height=700_000, count=1, dtype="uint16",
        tiled=True, blockxsize=4096, blockysize=4096, SPARSE_OK=True, BIGTIFF="YES",
        crs="EPSG:32630", transform=rasterio.Affine(1, 0, 5, 0, -1, 0),
    ):  # fmt: skip
        pass
    with pytest.raises(SceneError, match="declares 1 x 700000 x 700000"):
        open_scene(huge, bands=["red"], modality="ms")
    block = tmp_path / "block.tif"
    with rasterio.open(
        block, "w", driver="GTiff", width=32768, height=32768, count=1, dtype="uint8", tiled=True,
        blockxsize=32768, blockysize=32768, SPARSE_OK=True, compress="deflate",
        crs="EPSG:32630", transform=rasterio.Affine(1, 0, 5, 0, -1, 0),
    ):  # fmt: skip
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SceneError, match="blocks of 32768 x 32768 pixels"):
        open_scene(block, bands=["red"], modality="ms")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"II*\x00",
        b"II*\x00" + b"\xff" * 200,
        b"\x89PNG\r\n",
        b"hello",
        b"<VRTDataset",
        b"PK\x03\x04",
    ],
)
def test_garbage_is_one_line(tmp_path, content):
    path = tmp_path / "scene.tif"
    path.write_bytes(content)
    with pytest.raises(RingmoeError) as failure:
        open_scene(path, modality="ms", unnamed="number")
    assert "\n" not in str(failure.value)
    assert "scene.tif" in str(failure.value)


def test_the_shell_shows_one_line_and_no_traceback(tmp_path, data_dir):
    done = subprocess.run(
        [
            sys.executable, "-m", "ringmoe_cli", "tile",
            str(data_dir / "11_weird/truncated_60pct.tif"), "-o", str(tmp_path / "t.zarr"),
            "--bands", "red,green,blue,nir",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "truncated_60pct.tif: band 1, 2, 3, 4, rows" in line
    assert not (tmp_path / "t.zarr").exists()
