"""Published data sets as they are downloaded: folders, classes, label codes.

Folder structures follow the data sets' own descriptions; names of splits may differ in case.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.labelled.folders import Example, Layout, examples_of, outlined
from ringmoe_cli.scene.labelled.labelcode import IGNORE, ClassList, LabelCode

NO_LIST = ClassList(())


@dataclass(frozen=True)
class Benchmark:
    """One data set."""

    task: str
    """The task it is for."""
    layouts: tuple[Layout, ...]
    """Where images and labels are; the first that fits."""
    classes: ClassList = NO_LIST
    """Class names and label code; no names: the class folders name them, or values."""
    outlines: str = ""
    """Labels are outlines in COCO files: their name before `_<split>.json`."""

    def find(self, root: Path) -> tuple[list[Example], tuple[str, ...]]:
        """Its labelled images under a folder.

        Raises:
            LabelError: if the folder is not laid out like the download.
        """
        if self.outlines:
            found = outlined(root, self.layouts[0], self.outlines)
            if not found:
                raise LabelError(f"{root} has no {self.outlines}_train.json with its images")
            return found, self.classes.names
        for layout in self.layouts:
            examples, classes = examples_of(root, layout)
            if examples:
                return examples, classes
        templates = [t for d in self.layouts[0].images.values() for t in d]
        raise LabelError(f"{root} is not laid out as downloaded: no {templates[0]} with its label")


def colours(**named: tuple[int, int, int]) -> ClassList:
    """Classes by colour; `unlabelled` is not learned."""
    learned = [n for n in named if n != "unlabelled"]
    code = {c: learned.index(n) if n in learned else IGNORE for n, c in named.items()}
    names = tuple(n.replace("_", " ") for n in learned)
    return ClassList(names, tuple(named[n] for n in learned), LabelCode(colours=code))


def values(*names: str, first: int = 0, step: int = 1, ignored: tuple[int, ...] = ()) -> ClassList:
    """Classes by grey level: first, first + step, and so on."""
    code = {IGNORE: IGNORE, **dict.fromkeys(ignored, IGNORE)}
    code |= {first + step * i: i for i in range(len(names))}
    return ClassList(names, (), LabelCode(code))


CLASS_FOLDERS = Benchmark("classification", (Layout({"opt": ("{class}/{id}",)}),))
CHANGE_PAIRS = Benchmark(
    "change",
    (Layout({"opt": ("A/{id}", "B/{id}")}, "label/{id}"),
     Layout({"opt": ("A/{id}", "B/{id}")}, "OUT/{id}")),
    ClassList(("unchanged", "changed"), ((0, 0, 0), (255, 255, 255)), LabelCode(threshold=128)),
)  # fmt: skip
LOVEDA_FOLDERS = Layout({"opt": ("{part}/images_png/{id}",)}, "{part}/masks_png/{id}")
ISAID_COLOURS = colours(
    background=(0, 0, 0), ship=(0, 0, 63), storage_tank=(0, 63, 63), baseball_diamond=(0, 63, 0),
    tennis_court=(0, 63, 127), basketball_court=(0, 63, 191), ground_track_field=(0, 63, 255),
    bridge=(0, 127, 63), large_vehicle=(0, 127, 127), small_vehicle=(0, 0, 127),
    helicopter=(0, 0, 191), swimming_pool=(0, 0, 255), roundabout=(0, 191, 127),
    soccer_ball_field=(0, 127, 191), plane=(0, 127, 255), harbor=(0, 100, 155),
)  # fmt: skip

BENCHMARKS: Mapping[str, Benchmark] = {
    "nwpu-resisc45": CLASS_FOLDERS,
    "aid": CLASS_FOLDERS,
    "ucmerced": CLASS_FOLDERS,
    "whu-rs19": CLASS_FOLDERS,
    "levir-cd": CHANGE_PAIRS,
    "cdd": CHANGE_PAIRS,
    "isaid": Benchmark(
        "segmentation",
        (Layout({"opt": ("images/{id}",)}, "Semantic_masks/images/{id}_instance_color_RGB"),
         Layout({"opt": ("images/images/{id}",)}, "Semantic_masks/images/{id}_instance_color_RGB")),
        ISAID_COLOURS,
    ),
    "potsdam": Benchmark(
        "segmentation",
        (Layout({"opt": ("2_Ortho_RGB/top_potsdam_{id}_RGB",)},
                "5_Labels_all/top_potsdam_{id}_label"),),
        colours(impervious=(255, 255, 255), building=(0, 0, 255), low_vegetation=(0, 255, 255),
                tree=(0, 255, 0), car=(255, 255, 0), clutter=(255, 0, 0)),
    ),
    "potsdam-height": Benchmark(
        "depth",
        (Layout({"opt": ("2_Ortho_RGB/top_potsdam_{id}_RGB",)}, "1_DSM/dsm_potsdam_{id}"),),
    ),
    "loveda": Benchmark(
        "segmentation",
        (LOVEDA_FOLDERS,),
        values("background", "building", "road", "water", "barren", "forest", "agriculture",
               first=1, ignored=(0,)),
    ),
    "whu-opt-sar": Benchmark(
        "segmentation",
        (Layout({"ms": ("optical/{id}",), "sar-l2": ("sar/{id}",)}, "lbl/{id}"),),
        values("farmland", "city", "village", "water", "forest", "road", "others",
               first=10, step=10, ignored=(0,)),
    ),
    "dfc23": Benchmark(
        "depth",
        (Layout({"opt": ("rgb/{id}",), "sar-l2": ("sar/{id}",)}, "dsm/{id}"),
         Layout({"opt": ("rgb/{id}",), "sar-l2": ("sar/{id}",)}, "height/{id}")),
    ),
    "dfc23-buildings": Benchmark(
        "segmentation",
        (Layout({"opt": ("rgb/{id}",), "sar-l2": ("sar/{id}",)}),),
        ClassList(("background", "building")),
        "buildings_only",
    ),
}  # fmt: skip
"""Name -> data set; those with boxes are in `box_benchmarks`."""


def benchmark(name: str) -> Benchmark:
    """A data set by name.

    Raises:
        LabelError: for an unknown one.
    """
    if name not in BENCHMARKS:
        raise LabelError(f"unknown benchmark {name!r}; choose from {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
