"""The files of a product: a folder, or a zip archive that GDAL reads in place."""

import re
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from ringmoe_cli.errors import SceneError

MAX_TEXT = 64 * 2**20
"""Bytes of metadata that are read at most."""


@dataclass(frozen=True)
class ProductFiles:
    """A product's files, by their path inside it; nothing outside it can be named."""

    root: Path
    """A folder, or a zip archive."""

    @property
    def name(self) -> str:
        """Name of the product, without .SAFE or .zip."""
        return re.sub(r"\.(SAFE|zip|SAFE\.zip)$", "", self.root.name, flags=re.IGNORECASE)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Paths inside the product, sorted; an archive's single top folder is left out."""
        if self.root.is_dir():
            found = [str(p.relative_to(self.root)) for p in self.root.rglob("*") if p.is_file()]
        else:
            found = [n[len(self._top) :] for n in self._members if n.startswith(self._top)]
        return tuple(sorted(n for n in found if n and not n.endswith("/")))

    @cached_property
    def _members(self) -> tuple[str, ...]:
        try:
            with zipfile.ZipFile(self.root) as archive:
                return tuple(archive.namelist())
        except (zipfile.BadZipFile, OSError) as error:
            raise SceneError(f"{self.root} is no readable zip archive: {error}") from error

    @cached_property
    def _top(self) -> str:
        tops = {n.split("/")[0] for n in self._members}
        return f"{tops.pop()}/" if len(tops) == 1 and "/" in self._members[0] else ""

    def matching(self, pattern: str) -> list[str]:
        """Paths that a regular expression matches whole, ignoring case."""
        return [n for n in self.names if re.fullmatch(pattern, n, re.IGNORECASE)]

    def gdal_path(self, name: str) -> str:
        """What GDAL opens for a file of the product.

        Raises:
            SceneError: if the product has no such file, or it leads outside.
        """
        if name not in self.names:
            raise SceneError(f"{self.root} lacks {name}, which its metadata names")
        if self.root.is_dir():
            path = self.root / name
            if not path.resolve().is_relative_to(self.root.resolve()):
                raise SceneError(f"{path} leads outside its product")
            return str(path)
        return f"/vsizip/{{{self.root}}}/{self._top}{name}"

    def text(self, name: str) -> str:
        """A metadata file.

        Raises:
            SceneError: if it is missing, too large or no text.
        """
        if name not in self.names:
            raise SceneError(f"{self.root} lacks {name}")
        try:
            if self.root.is_dir():
                with Path(self.gdal_path(name)).open("rb") as file:
                    data = file.read(MAX_TEXT + 1)
            else:
                with (
                    zipfile.ZipFile(self.root) as archive,
                    archive.open(self._top + name) as member,
                ):
                    data = member.read(MAX_TEXT + 1)
            if len(data) > MAX_TEXT:
                raise SceneError(f"{self.root}: {name} is too large for metadata")
            return data.decode("utf-8")
        except (OSError, zipfile.BadZipFile, UnicodeDecodeError, RuntimeError) as error:
            raise SceneError(f"{self.root}: {name} cannot be read: {error}") from error

    def xml(self, name: str) -> ElementTree.Element:
        """A metadata file as XML without namespaces.

        Raises:
            SceneError: if it is no plain XML.
        """
        return plain_xml(self.text(name), f"{self.root}: {name}")


def plain_xml(text: str, where: str) -> ElementTree.Element:
    """XML without namespaces; entities and document types are refused.

    Raises:
        SceneError: if it is none.
    """
    if re.search(r"<!(DOCTYPE|ENTITY)", text):
        raise SceneError(f"{where} declares entities; such XML is not read")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise SceneError(f"{where} is no valid XML: {error}") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def find_product(path: str) -> tuple[ProductFiles, str] | None:
    """The product at a path and the part chosen by `product:part`; None for plain files.

    The metadata file inside a product stands for the product, and so does an image that has its
    metadata beside it (PlanetScope).
    """
    base, _, part = path.rpartition(":")
    if part and base and not Path(path).exists() and Path(base).exists():
        path = base
    else:
        part = ""
    at = Path(path)
    if re.fullmatch(r"manifest\.safe|MTD_MSIL\w+\.xml|.*_MTL\.(txt|xml)", at.name):
        at = at.parent
    planet = re.fullmatch(r".*_AnalyticMS.*\.tif", at.name, re.IGNORECASE) and at.is_file()
    if planet and any(at.parent.glob("*_metadata*.xml")):
        return ProductFiles(at.parent), at.stem
    if at.is_dir() or (at.is_file() and zipfile.is_zipfile(at)):
        return ProductFiles(at), part
    return None


def required(root: ElementTree.Element, path: str, where: object) -> str:
    """The text of an element that must be there.

    Raises:
        SceneError: if it is not.
    """
    text = root.findtext(path)
    if text is None or not text.strip():
        raise SceneError(f"{where}: the metadata lack {path.rpartition('/')[2]}")
    return text.strip()


def inside(folder: str, name: str) -> str:
    """A path that metadata give, relative to a folder of the product."""
    return str(PurePosixPath(folder) / re.sub(r"^\./", "", name))
