"""Imitations of satellite products, small but laid out as GDAL's own drivers expect them."""

import zipfile
from pathlib import Path

import numpy as np
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasters import noise, write_raster

S2_IDS = {
    "B01": 60, "B02": 10, "B03": 10, "B04": 10, "B05": 20, "B06": 20, "B07": 20, "B08": 10,
    "B8A": 20, "B09": 60, "B10": 60, "B11": 20, "B12": 20,
}  # fmt: skip
SIDE = 120
"""Rows and columns of the 10 m grid; divisible by 6."""


def jp2(path: Path, values: np.ndarray, metres: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_raster(
        path, values[None], crs="EPSG:32630", transform=Affine(metres, 0, 5e5, 0, -metres, 6e6),
        driver="JP2OpenJPEG", QUALITY=100, REVERSIBLE="YES", BLOCKXSIZE=64, BLOCKYSIZE=64,
    )  # fmt: skip


def sentinel2(root: Path, level: str = "2A", offset: int | None = -1000) -> dict[str, np.ndarray]:
    """A SAFE folder; returns the counts of every band at its own resolution."""
    name = f"S2B_MSIL{level}_20230823T095559_N0509_R122_T30UWF_20230823T124759"
    folder = root / f"{name}.SAFE"
    granule = f"GRANULE/L{level}_T30UWF_A033753_20230823T095553"
    stem, images, counts = "T30UWF_20230823T095559", [], {}
    for number, (band, metres) in enumerate(S2_IDS.items()):
        if level == "2A" and band == "B10":
            continue
        values = noise(1, SIDE * 10 // metres, SIDE * 10 // metres, seed=number)[0] + 1000
        counts[band] = values
        where = f"R{metres}m/{stem}_{band}_{metres}m" if level == "2A" else f"{stem}_{band}"
        images.append(f"{granule}/IMG_DATA/{where}")
        jp2(folder / f"{images[-1]}.jp2", values, metres)
    if level == "2A":
        scl = np.full((SIDE // 2, SIDE // 2), 4, np.uint8)
        scl[:10, :20] = 9
        images.append(f"{granule}/IMG_DATA/R20m/{stem}_SCL_20m")
        jp2(folder / f"{images[-1]}.jp2", scl, 20)
        counts["SCL"] = scl
        images.append(f"{granule}/IMG_DATA/R20m/{stem}_B02_20m")  # coarser twin of B02
        jp2(folder / f"{images[-1]}.jp2", counts["B02"][::2, ::2], 20)
    (folder / f"MTD_MSIL{level}.xml").write_text(s2_metadata(level, images, offset))
    (folder / granule / "MTD_TL.xml").write_text(s2_tile_metadata(level))
    return counts


def s2_metadata(level: str, images: list[str], offset: int | None) -> str:
    listed = "".join(f"<IMAGE_FILE>{i}</IMAGE_FILE>" for i in images)
    special = "".join(
        f"<Special_Values><SPECIAL_VALUE_TEXT>{t}</SPECIAL_VALUE_TEXT>"
        f"<SPECIAL_VALUE_INDEX>{v}</SPECIAL_VALUE_INDEX></Special_Values>"
        for t, v in (("NODATA", 0), ("SATURATED", 65535))
    )
    quantum = (
        "<QUANTIFICATION_VALUES_LIST><BOA_QUANTIFICATION_VALUE unit='none'>10000"
        "</BOA_QUANTIFICATION_VALUE></QUANTIFICATION_VALUES_LIST>"
        if level == "2A"
        else "<QUANTIFICATION_VALUE unit='none'>10000</QUANTIFICATION_VALUE>"
    )
    tag = "BOA_ADD_OFFSET" if level == "2A" else "RADIO_ADD_OFFSET"
    around = "BOA_ADD_OFFSET_VALUES_LIST" if level == "2A" else "Radiometric_Offset_List"
    offsets = "".join(f"<{tag} band_id='{i}'>{offset}</{tag}>" for i in range(13))
    spectral = "".join(
        f"<Spectral_Information bandId='{i}' physicalBand='{b.replace('B0', 'B')}'>"
        f"<RESOLUTION>{m}</RESOLUTION><Wavelength><MIN unit='nm'>{400 + i}</MIN>"
        f"<MAX unit='nm'>{500 + i}</MAX><CENTRAL unit='nm'>{450 + i}</CENTRAL></Wavelength>"
        "</Spectral_Information>"
        for i, (b, m) in enumerate(S2_IDS.items())
    )
    listing = (
        "<Granule_List><Granule granuleIdentifier='S2B_T30UWF' imageFormat='JPEG2000'>"
        f"{listed}</Granule></Granule_List>"
    )
    kind = f"Level-{level}_User_Product"
    space = f"https://psd-14.sentinel2.eo.esa.int/PSD/User_Product_Level-{level}.xsd"
    return (
        f"<?xml version='1.0' encoding='UTF-8'?><n1:{kind} xmlns:n1='{space}'><n1:General_Info>"
        "<Product_Info><PRODUCT_START_TIME>2023-08-23T09:55:59.024Z</PRODUCT_START_TIME>"
        f"<PRODUCT_URI>S2B_MSIL{level}_20230823T095559_N0509_R122_T30UWF_20230823T124759.SAFE"
        f"</PRODUCT_URI><PROCESSING_LEVEL>Level-{level}</PROCESSING_LEVEL><PRODUCT_TYPE>S2MSI{level}</PRODUCT_TYPE>"
        "<PROCESSING_BASELINE>05.09</PROCESSING_BASELINE><Datatake><SPACECRAFT_NAME>Sentinel-2B"
        "</SPACECRAFT_NAME></Datatake><Query_Options completeSingleTile='true'><PRODUCT_FORMAT>"
        f"SAFE_COMPACT</PRODUCT_FORMAT></Query_Options><Product_Organisation>{listing}"
        f"</Product_Organisation></Product_Info><Product_Image_Characteristics>{special}{quantum}"
        + (f"<{around}>{offsets}</{around}>" if offset is not None else "")
        + f"<Spectral_Information_List>{spectral}</Spectral_Information_List>"
        f"</Product_Image_Characteristics></n1:General_Info></n1:{kind}>"
    )


def s2_tile_metadata(level: str) -> str:
    sizes = "".join(
        f"<Size resolution='{m}'><NROWS>{SIDE * 10 // m}</NROWS>"
        f"<NCOLS>{SIDE * 10 // m}</NCOLS></Size>"
        f"<Geoposition resolution='{m}'><ULX>500000</ULX><ULY>6000000</ULY><XDIM>{m}</XDIM>"
        f"<YDIM>-{m}</YDIM></Geoposition>"
        for m in (10, 20, 60)
    )
    return (
        f"<?xml version='1.0'?><n1:Level-{level}_Tile_ID xmlns:n1='x'><n1:Geometric_Info>"
        "<Tile_Geocoding><HORIZONTAL_CS_NAME>WGS84 / UTM zone 30N</HORIZONTAL_CS_NAME>"
        f"<HORIZONTAL_CS_CODE>EPSG:32630</HORIZONTAL_CS_CODE>{sizes}</Tile_Geocoding>"
        f"</n1:Geometric_Info></n1:Level-{level}_Tile_ID>"
    )


def zipped(folder: Path) -> Path:
    """The same product as an archive, its folder inside."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, str(file.relative_to(folder.parent)))
    return path


def points(height: int, width: int) -> list[GroundControlPoint]:
    return [
        GroundControlPoint(r, c, 5 + c * 1e-4 + r * 2e-5, 45 - r * 1e-4, 100.0)
        for r in np.linspace(0, height - 1, 10)
        for c in np.linspace(0, width - 1, 6)
    ]


def sentinel1(root: Path, kind: str, swaths: dict[str, tuple[str, ...]], bursts: int = 0) -> dict:
    """A SAFE folder; returns (swath, polarisation) -> counts."""
    folder = root / f"S1A_{kind}.SAFE"
    height, width = 90, 80
    counts: dict[tuple[str, str], np.ndarray] = {}
    units, objects, meta = [], [], []
    for swath, polarisations in swaths.items():
        for polarisation in polarisations:
            n = len(units)
            stem = f"s1a-{swath.lower()}-{kind.lower()}-{polarisation}-20210401t052623-00{n}"
            values = noise(1, height, width, "int16", seed=n)
            if kind == "SLC":
                values = (values + 1j * noise(1, height, width, "int16", seed=n + 50)).astype("c8")
            else:
                values = values.astype("uint16")
                values[:, :, :5] = 0
            counts[swath, polarisation] = values[0]
            (folder / "measurement").mkdir(parents=True, exist_ok=True)
            with rasterio.open(
                folder / f"measurement/{stem}.tiff", "w", driver="GTiff", count=1, height=height,
                width=width, dtype="complex_int16" if kind == "SLC" else "uint16",
                gcps=points(height, width), crs=CRS.from_epsg(4326),
            ) as out:  # fmt: skip
                out.write(values)
            (folder / "annotation/calibration").mkdir(parents=True, exist_ok=True)
            (folder / f"annotation/{stem}.xml").write_text(
                s1_annotation(kind, swath, polarisation, height, width, bursts)
            )
            (folder / f"annotation/calibration/calibration-{stem}.xml").write_text(
                s1_calibration(height, width)
            )
            files = {
                "Product": f"annotation/{stem}.xml",
                "Calibration": f"annotation/calibration/calibration-{stem}.xml",
                "Measurement": f"measurement/{stem}.tiff",
            }
            for schema, path in files.items():
                objects.append(
                    f"<dataObject ID='{schema}{n}' repID='s1Level1{schema}Schema'><byteStream>"
                    f"<fileLocation locatorType='URL' href='./{path}'/></byteStream></dataObject>"
                )
            meta += [
                f"<metadataObject ID='m{s}{n}'><dataObjectPointer dataObjectID='{s}{n}'/>"
                "</metadataObject>"
                for s in ("Product", "Calibration")
            ]
            units.append(
                "<xfdu:contentUnit unitType='Measurement Data Unit' "
                f"dmdID='mProduct{n} mCalibration{n}'>"
                f"<dataObjectPointer dataObjectID='Measurement{n}'/></xfdu:contentUnit>"
            )
    (folder / "manifest.safe").write_text(
        "<?xml version='1.0'?><xfdu:XFDU xmlns:xfdu='urn:ccsds:schema:xfdu:1' version='sentinel-1'>"
        "<informationPackageMap><xfdu:contentUnit unitType='SAFE Archive Information Package'>"
        f"{''.join(units)}</xfdu:contentUnit></informationPackageMap>"
        f"<metadataSection>{''.join(meta)}</metadataSection>"
        f"<dataObjectSection>{''.join(objects)}</dataObjectSection></xfdu:XFDU>"
    )
    return counts


def s1_annotation(
    kind: str, swath: str, polarisation: str, height: int, width: int, bursts: int
) -> str:
    pixels = "16 bit Signed Integer" if kind == "SLC" else "16 bit Unsigned Integer"
    listed = "".join("<burst><byteOffset>1</byteOffset></burst>" for _ in range(bursts))
    each = height // bursts if bursts else 0
    return (
        "<product><adsHeader><missionId>S1A</missionId>"
        f"<productType>{kind}</productType><polarisation>{polarisation.upper()}</polarisation>"
        f"<mode>{swath[:2]}</mode><swath>{swath}</swath>"
        "<startTime>2021-04-01T05:26:23.794457</startTime><imageNumber>001</imageNumber></adsHeader>"
        "<generalAnnotation><productInformation><pass>Ascending</pass><projection>"
        f"{'Slant' if kind == 'SLC' else 'Ground'} Range</projection></productInformation>"
        "</generalAnnotation><imageAnnotation><imageInformation>"
        f"<outputPixels>{pixels}</outputPixels><rangePixelSpacing>4.0</rangePixelSpacing>"
        "<azimuthPixelSpacing>12.0</azimuthPixelSpacing>"
        f"<numberOfSamples>{width}</numberOfSamples><numberOfLines>{height}</numberOfLines>"
        "<incidenceAngleMidSwath>30</incidenceAngleMidSwath></imageInformation></imageAnnotation>"
        f"<swathTiming><linesPerBurst>{each}</linesPerBurst><burstList count='{bursts}'>{listed}"
        "</burstList></swathTiming></product>"
    )


def s1_calibration(height: int, width: int) -> str:
    pixels = [0, 40, width - 1]
    vectors = "".join(
        f"<calibrationVector><azimuthTime>2021-04-01T05:26:23</azimuthTime><line>{line}</line>"
        f"<pixel count='3'>{' '.join(map(str, pixels))}</pixel>"
        f"<sigmaNought count='3'>{300 + line} {330 + line} {350 + line}</sigmaNought>"
        f"<betaNought count='3'>200 200 200</betaNought><gamma count='3'>1 1 1</gamma>"
        "<dn count='3'>1 1 1</dn></calibrationVector>"
        for line in (-10, 40, height + 5)
    )
    return (
        "<calibration><calibrationInformation><absoluteCalibrationConstant>1.0"
        "</absoluteCalibrationConstant></calibrationInformation>"
        f"<calibrationVectorList count='3'>{vectors}</calibrationVectorList></calibration>"
    )


def landsat(root: Path, craft: str = "LANDSAT_8", level: str = "L2SP") -> dict[str, np.ndarray]:
    """A Collection 2 folder of seven bands; returns band number -> counts."""
    name = f"LC08_{level}_203023_20210601_20210608_02_T1"
    folder = root / name
    folder.mkdir(parents=True)
    counts = {}
    lines = []
    for number in ("1", "2", "3", "4", "5", "6", "7"):
        values = noise(1, 40, 50, seed=int(number)) + 7000
        values[:, :3] = 0
        counts[number] = values[0]
        middle = "SR_B" if level.startswith("L2") else "B"
        write_raster(folder / f"{name}_{middle}{number}.TIF", values)
        lines.append(f"    REFLECTANCE_MULT_BAND_{number} = 2.75e-05")
        lines.append(f"    REFLECTANCE_ADD_BAND_{number} = -0.2")
    write_raster(folder / f"{name}_ST_B10.TIF", noise(1, 40, 50))
    write_raster(folder / f"{name}_QA_PIXEL.TIF", noise(1, 40, 50))
    scaling = "\n".join(lines)
    wrong = scaling.replace("2.75e-05", "2.0e-05").replace("-0.2", "-0.1")
    (folder / f"{name}_MTL.txt").write_text(
        "GROUP = LANDSAT_METADATA_FILE\n  GROUP = PRODUCT_CONTENTS\n    COLLECTION_NUMBER = 02\n"
        f'    PROCESSING_LEVEL = "{level}"\n  END_GROUP = PRODUCT_CONTENTS\n'
        f'  GROUP = IMAGE_ATTRIBUTES\n    SPACECRAFT_ID = "{craft}"\n'
        "    DATE_ACQUIRED = 2021-06-01\n  END_GROUP = IMAGE_ATTRIBUTES\n"
        f"  GROUP = LEVEL2_SURFACE_REFLECTANCE_PARAMETERS\n{scaling}\n"
        "  END_GROUP = LEVEL2_SURFACE_REFLECTANCE_PARAMETERS\n"
        f'  GROUP = LEVEL1_RADIOMETRIC_RESCALING\n    PROCESSING_LEVEL = "L1TP"\n{wrong}\n'
        "  END_GROUP = LEVEL1_RADIOMETRIC_RESCALING\nEND_GROUP = LANDSAT_METADATA_FILE\nEND\n"
    )
    return counts


def planet(root: Path, bands: int, surface: bool) -> np.ndarray:
    """A PlanetScope folder; returns the counts."""
    root.mkdir(parents=True, exist_ok=True)
    stem = f"20210601_101500_12_227b_3B_AnalyticMS{'_SR' if surface else ''}{'_8b' * (bands == 8)}"
    values = noise(bands, 30, 40)
    write_raster(root / f"{stem}.tif", values, nodata=0)
    each = "".join(
        f"<ps:bandSpecificMetadata><ps:bandNumber>{i + 1}</ps:bandNumber>"
        f"<ps:reflectanceCoefficient>{(i + 1) * 1e-5}</ps:reflectanceCoefficient>"
        "</ps:bandSpecificMetadata>"
        for i in range(bands)
    )
    meta = stem.replace("_SR", "")
    (root / f"{meta}_metadata.xml").write_text(
        "<ps:EarthObservation xmlns:ps='http://schemas.planet.com/ps/v1/planet_product'>"
        "<ps:serialIdentifier>227b</ps:serialIdentifier>"
        f"<ps:acquisitionDateTime>2021-06-01T10:15:00+00:00</ps:acquisitionDateTime>{each}"
        "</ps:EarthObservation>"
    )
    return values
