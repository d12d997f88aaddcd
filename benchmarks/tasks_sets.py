"""The labelled sets of the real data: one stated protocol each, made ready in a work folder."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.windows
from PIL import Image

from ringmoe_cli.jobs.taskdata import DataRequest, TaskData, open_task_data
from ringmoe_cli.recipe import FinetuneRecipe, load_finetune_recipe
from ringmoe_cli.scene.labels import Wanted
from ringmoe_cli.scene.sensors import Said
from ringmoe_cli.scene.store.intake import gather
from ringmoe_cli.scene.tiling import Settings, tile_scenes


@dataclass(frozen=True)
class Case:
    """One labelled set and its protocol."""

    data: tuple[str, ...]
    task: str
    steps: int = 150
    batch: int = 8
    window: int = 64
    validation: str | None = None
    modalities: tuple[str, ...] = ()
    classes: str | None = None
    bands: tuple[str, ...] | None = None
    dropout: float = 0.0
    rotated: bool = False
    protocol: str = ""
    """What trains, what is scored."""
    few: bool = False
    """Under 20 images: a functional check."""
    reference: bool = False
    """The labels are another program's map: agreement, not accuracy."""

    @property
    def updates(self) -> int:
        """Updates of the weights; fewer where the images are few."""
        return FEW_UPDATES.get(self.task, self.steps) if self.few else self.steps

    def request(self, data: Path, work: Path) -> DataRequest:
        """Where the set is."""

        def at(text: str) -> Path:
            return Path(text.format(data=data, work=work))

        classes = self.classes
        if classes and classes.startswith("{"):
            classes = str(at(classes))
        return DataRequest(
            [at(p) for p in self.data], self.task, self.window, modalities=self.modalities,
            validation=at(self.validation) if self.validation else None, classes=classes,
            bands=self.bands, rotated=self.rotated,
        )  # fmt: skip


FEW_UPDATES = {"segmentation": 100, "depth": 100, "detection": 100, "change": 300}
"""Updates on sets of under 20 images: what is rare, like change, takes longer to learn."""
BLOCKS = "held-out blocks of 128 pixels (64 in small scenes) that no training window touches"
SAR = ("sar-l2",)
CASES = {
    "airsar": Case(("{work}/airsar0.zarr",), "segmentation", validation="{work}/airsar2.zarr",
                   protocol="AIRSAR T3, 5 classes: strip 0 trains, strip 2 is the test, the 256 "
                            "columns between are the guard"),
    "dubai": Case(("{work}/dubai/train",), "segmentation", validation="{work}/dubai/test",
                  classes="{work}/dubai/classes.csv",
                  protocol="48 images at half size, 5 classes: parts 1-4 of every tile train, "
                           "5-6 are the test"),
    "eurosat": Case(("{data}/05_scene_classification/eurosat_rgb",), "classification", 100, 16,
                    validation="{work}/eurosat-test.txt",
                    protocol="5,400 chips, 10 classes: the test are the files whose name has an "
                             "md5 divisible by 5; pre-training has not seen them either"),
    "mstar": Case(("{work}/mstar-middle/train",), "classification", 100, 16, 64,
                  "{work}/mstar-middle/test", SAR,
                  protocol="standard operating conditions: 2,747 chips at 17 degrees train, 2,425 "
                           "at 15 degrees are the test; the middle 64 x 64 pixels of every chip"),
    "mstar-clutter": Case(("{work}/mstar-clutter/train",), "classification", 100, 16, 64,
                          "{work}/mstar-clutter/test", SAR,
                          protocol="the whole chips at half size, the middle 64 x 64 pixels, "
                                   "which the rows above see, painted over: clutter only"),
    "floods-ms": Case(("{work}/floods.zarr",), "segmentation", modalities=("ms",), few=True,
                      protocol=f"one Sentinel-2 scene, water or land by hand: {BLOCKS}"),
    "floods-sar": Case(("{work}/floods.zarr",), "segmentation", modalities=SAR, few=True,
                       protocol="the Sentinel-1 scene of the same place, same blocks"),
    "floods-both": Case(("{work}/floods.zarr",), "segmentation", modalities=("ms", "sar-l2"),
                        dropout=0.5, few=True,
                        protocol="both fused, modality dropout 0.5, same blocks"),
    "landsat-roi": Case(("{work}/roi.zarr",), "segmentation", few=True,
                        protocol=f"one Landsat-7 scene, sparse regions drawn by hand: {BLOCKS}"),
    "aberystwyth": Case(("{work}/aber-map-left.zarr",), "segmentation", few=True, reference=True,
                        validation="{work}/aber-map-right.zarr",
                        protocol="Sentinel-2, 10 bands, against a clump classification by the "
                                 "data's authors: columns 0-575 train, 608-929 are the test"),
    "aberystwyth-height": Case(("{work}/aber-dem-left.zarr",), "depth", few=True,
                               validation="{work}/aber-dem-right.zarr",
                               protocol="Sentinel-2 against SRTM elevations, metres: same halves"),
    "neon-height": Case(("{work}/neon.zarr",), "depth", few=True,
                        protocol=f"one aerial image of 400 x 400, canopy height, metres: {BLOCKS}"),
    "pleiades-height": Case(("{work}/pleiades",), "depth", few=True,
                            modalities=("opt",), bands=("pan",),
                            protocol="one panchromatic image of 700 x 700 against stereo heights, "
                                     f"metres: {BLOCKS}"),
    "levir": Case(("{data}/07_change_detection/levir_samples",), "change", few=True,
                  protocol="6 pairs: one, drawn by seed, is the test"),
    "dsifn": Case(("{data}/07_change_detection/dsifn_samples",), "change", few=True,
                  protocol="10 pairs: two, drawn by seed, are the test"),
    "sar-change": Case(("{work}/sar-change",), "change", modalities=SAR, few=True,
                       protocol="yellow A and B, Ottawa and Bern train, Sulzberger is the test",
                       validation="{work}/sar-change-test"),
    "lakes": Case(("{data}/08_detection/bhuvan_lake_river",), "detection", 200, 4, 192,
                  classes="lake,river", modalities=("opt",),
                  protocol="as shipped: 79 images train, 18 are the test"),
    "kit": Case(("{work}/kit",), "detection", 300, 8, 96, classes="car,minibus",
                modalities=("opt",),
                protocol="one street: frames 1-14 train, 17-20 are the test; the same parked cars "
                         "are in both"),
    "neon-trees": Case(("{work}/neon",), "detection", 250, 8, 96, classes="tree", few=True,
                       modalities=("opt",), protocol="two images: OSBS trains, SJER is the test"),
    "spacenet": Case(("{work}/spacenet",), "detection", 250, 8, 96, classes="object", few=True,
                     modalities=("opt",), bands=("band_1",), rotated=True,
                     protocol=f"one image, rotated boxes of roofs: {BLOCKS}"),
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where everything is, and what is asked."""

    data: Path
    work: Path
    name: str
    pretrained: Path | None

    @property
    def case(self) -> Case:
        """The set's protocol."""
        return CASES[self.name]

    def found(self) -> TaskData:
        """The set, normalised by its own training part."""
        found = open_task_data(self.case.request(self.data, self.work))
        found.training.normalisation = found.held_out.normalisation = found.measure()
        return found

    def recipe(self, *more: str) -> FinetuneRecipe:
        """The task's recipe, with the set's sizes."""
        case = self.case
        said = [f"train.steps={case.updates}", f"train.batch_size={case.batch}",
                "train.save_every=100000", f"task.window={case.window}",
                f"task.modality_dropout={case.dropout}",
                f"task.rotated={str(case.rotated).lower()}"]  # fmt: skip
        return load_finetune_recipe(f"finetune-{case.task}", [*said, *more])

    def run(self, name: str) -> Path:
        """Folder of a training."""
        return self.work / "runs" / f"{self.name}-{name}"


def store(out: Path, groups: list[tuple[list[Path], Said, dict[str, Any]]]) -> None:
    """Tile scenes into one store, unless it is there; a group is paths, what is said, labels."""
    if out.exists():
        return
    found = []
    for paths, said, given in groups:
        wanted = Wanted(given.get("task", "segmentation"), given.get("classes"))
        labels = [str(given["label"])] if "label" in given else []
        found += gather([str(p) for p in paths], said, labels, wanted)
    tile_scenes(found, out, Settings())


TEN = ("blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir08", "swir16",
       "swir22")  # fmt: skip
ROI_BANDS = ("blue", "green", "red", "nir", "swir16", "swir22", "-", "-")
ABER_CLASSES = "1=forest,2=grass,3=urban,4=water"
T3_CLASSES = "1=bare soil,2=mountain,3=water,4=urban,5=vegetation"


def prepare(data: Path, work: Path) -> None:
    """Stores of the scenes, and copies of the folders with the splits as folders."""
    rgb = Said("opt", ("red", "green", "blue"))
    for strip in (0, 2):
        labels = data / f"06_segmentation/airsar_polsf_labels/labels_strip{strip}.png"
        given = {"label": labels, "classes": T3_CLASSES}
        scene = data / f"04_sar_complex/airsar_sf_T3/strip{strip}"
        store(work / f"airsar{strip}.zarr", [([scene], Said(), given)])
    flood = data / "06_segmentation/sen1floods11_spain/Spain_7370579_"
    water = {"label": Path(f"{flood}LabelHand.tif"), "classes": "0=land,1=water"}
    store(
        work / "floods.zarr",
        [
            ([Path(f"{flood}S2Hand.tif")], Said(scale="0.0001"), water),
            ([Path(f"{flood}S1Hand.tif")], Said(scale="db"), {"classes": "0=land,1=water"}),
        ],
    )
    roi = data / "06_segmentation/landsat7_roi"
    given = {
        "label": roi / "training_data.gtif",
        "classes": "1=forest,2=water,3=herbaceous,4=barren,5=urban",
    }
    store(
        work / "roi.zarr",
        [([roi / "LE70220491999322EDC01_stack.gtif"], Said("ms", ROI_BANDS), given)],
    )
    aber = data / "02_multispectral/s2_aberystwyth_10band"
    for side, columns in (("left", (0, 576)), ("right", (608, 930))):
        scene = [cropped(aber / "mosaic_10band.tif", work / f"aber-{side}.tif", columns)]
        said = Said(bands=TEN, scale="0.001")
        given = {"label": aber / "sen2_20210527_aber_cls.tif", "classes": ABER_CLASSES}
        store(work / f"aber-map-{side}.zarr", [(scene, said, given)])
        given = {"label": f"depth={aber / 'SRTM_aber.tif'}", "task": "depth"}
        store(work / f"aber-dem-{side}.zarr", [(scene, said, given)])
    neon = data / "09_height/neon_OSBS_029"
    chm = f"depth={neon / 'OSBS_029_chm_0p5m_derived.tif'}"
    store(work / "neon.zarr", [([neon / "OSBS_029.tif"], rgb, {"label": chm, "task": "depth"})])
    pleiades(data / "09_height/s2p_pleiades_height", work)
    chips = (data / "05_scene_classification/eurosat_rgb").rglob("*.jpg")
    tests = [p.name for p in sorted(chips) if md5_of(p.name) % 5 == 0]
    (work / "eurosat-test.txt").write_text("\n".join(tests) + "\n")
    copy_dubai(data / "06_segmentation/dubai", work / "dubai")
    if not (work / "mstar").exists():
        shutil.copytree(data / "05_scene_classification/mstar_soc", work / "mstar")
        clutter_only(work / "mstar", work / "mstar-clutter")
    middles(work / "mstar", work / "mstar-middle")
    sar_pairs(data / "07_change_detection", work)


def cropped(source: Path, out: Path, columns: tuple[int, int]) -> Path:
    """Some columns of a scene, on the ground where they are."""
    if not out.exists():
        with rasterio.open(source) as file:
            window = ((0, file.height), columns)
            about = {**file.profile, "width": columns[1] - columns[0], "compress": "deflate",
                     "transform": file.window_transform(
                         rasterio.windows.Window(columns[0], 0, 1, 1))}  # fmt: skip
            pixels = file.read(window=window)
        with rasterio.open(out, "w", **about) as file:
            file.write(pixels)
    return out


def pleiades(source: Path, work: Path) -> None:
    """The part of image 2 that the stereo heights are in the geometry of."""
    root = work / "pleiades"
    if root.exists():
        return
    for kind in ("images", "heights"):
        (root / kind).mkdir(parents=True)
    with rasterio.open(source / "img_02.tif") as file:
        pixels = file.read(window=((150, 850), (150, 850)))
    with rasterio.open(source / "height_map.tif") as file:
        heights = file.read()
    for kind, values in (("images", pixels), ("heights", heights)):
        about = {"driver": "GTiff", "count": 1, "height": 700, "width": 700, "dtype": values.dtype}
        with rasterio.open(root / kind / "scene.tif", "w", **about) as file:
            file.write(values)


def md5_of(name: str) -> int:
    """A number that a name has on every machine."""
    return int(hashlib.md5(name.encode()).hexdigest(), 16)


def copy_dubai(source: Path, out: Path) -> None:
    """Parts 5 and 6 of every tile are the test split; everything at half size."""
    if out.exists():
        return
    for kind in ("images", "masks"):
        for path in sorted((source / "train" / kind).iterdir()):
            split = "test" if int(path.stem[-1]) >= 5 else "train"
            (out / split / kind).mkdir(parents=True, exist_ok=True)
            image, how = Image.open(path), Image.Resampling
            small = (image.width // 2, image.height // 2)
            resized = image.resize(small, how.BOX if kind == "images" else how.NEAREST)
            resized.save(out / split / kind / path.name, quality=95)
    (out / "classes.csv").write_text(
        "building,60,16,152\nland,132,41,246\nroad,110,193,228\nvegetation,254,221,58\n"
        "water,226,169,41\nunlabelled,155,155,155\n"
    )


def middles(source: Path, out: Path) -> None:
    """The middle 64 x 64 pixels of every chip, at the size they were measured."""
    if out.exists():
        return
    for path in source.rglob("*.jpeg"):
        image = Image.open(path).convert("L")
        left, top = (image.width - 64) // 2, (image.height - 64) // 2
        target = (out / path.relative_to(source)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        image.crop((left, top, left + 64, top + 64)).save(target)


def clutter_only(source: Path, out: Path) -> None:
    """The same chips with the 64 x 64 pixels in their middle, the vehicle, painted over."""
    for path in source.rglob("*.jpeg"):
        pixels = np.asarray(Image.open(path).convert("L")).copy()
        middle = tuple(slice(n // 2 - 32, n // 2 + 32) for n in pixels.shape)
        pixels[middle] = np.median(pixels)
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target, quality=95)


def sar_pairs(source: Path, work: Path) -> None:
    """Pairs of radar images and their changes as A, B and label folders of grey images."""
    names = {
        "sar-change": ("sar_and_hetero/yellow_A", "sar_and_hetero/yellow_B", "sar_cd/ottawa",
                       "sar_cd/bern"),
        "sar-change-test": ("sar_cd/Sulzberger1",),
    }  # fmt: skip
    for folder, pairs in names.items():
        for pair in pairs:
            for kind, suffix in (("A", "1"), ("B", "2"), ("label", "gt")):
                out = work / folder / kind / f"{Path(pair).name}.png"
                out.parent.mkdir(parents=True, exist_ok=True)
                Image.open(source / f"{pair}_{suffix}.bmp").convert("L").save(out)
