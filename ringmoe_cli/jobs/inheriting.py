"""What training takes over from a checkpoint: its channels and its normalisation."""

from collections.abc import Mapping
from pathlib import Path

from model.checkpoint import open_tensors, read_config
from model.normalisation import Normalisation
from ringmoe_cli import console
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.scene.bands import WAVELENGTHS

FAR = 5.0
"""Data whose mean is so many deviations from the checkpoint's has other units."""


def check_init(init: Path | None, output: Path) -> None:
    """Refuse a checkpoint to start from before anything is written.

    Raises:
        ValueError: if it is none, or incomplete.
        RingmoeError: if it stands where the run shall go: `--overwrite` would delete it.
    """
    if init is None:
        return
    read_config(init)
    open_tensors(init)
    if init.resolve() == output.resolve():
        raise RingmoeError(f"{output} is the checkpoint to start from; choose another -o")


def inherited_input(
    init: Path, measured: Mapping[str, Normalisation]
) -> tuple[dict[str, list[int]], dict[str, Normalisation]]:
    """How a checkpoint's modalities meet those of some data.

    The checkpoint's normalisation is kept where its bands and units are the data's; otherwise the
    data's own statistics are taken, and said so. Imported weights have none: bands are in order.

    Args:
        init: the checkpoint.
        measured: modality -> normalisation by the data's own statistics, its channels in order.

    Returns:
        Of the checkpoint's modalities, for each channel the checkpoint's that it starts from; and
        the normalisation of all.
    """
    about = read_config(init)
    sources: dict[str, list[int]] = {}
    chosen = dict(measured)
    for m, data in measured.items():
        if m not in about.model.channels:
            continue
        known = about.normalisation.get(m)
        held = known.bands if known else ("",) * about.model.channels[m]
        sources[m] = nearest_channels(data.bands, held)
        kept = picked(known, data.bands) if known else None
        if kept and same_units(kept, data):
            chosen[m] = kept
        elif known:
            why = "units" if kept else f"bands ({', '.join(held)})"
            console.warn(f"{m}: {init} has other {why}; normalising with this data's own")
        else:
            console.say(
                f"{m}: {init} names no bands and no normalisation; "
                f"{', '.join(data.bands)} in its order, normalised with this data's own"
            )
    return sources, chosen


def nearest_channels(wanted: tuple[str, ...], held: tuple[str, ...]) -> list[int]:
    """For each wanted channel the held one of its name, or nearest in wavelength, or in place."""

    def source(position: int, name: str) -> int:
        if name in held:
            return held.index(name)
        waves = {i: WAVELENGTHS[h] for i, h in enumerate(held) if h in WAVELENGTHS}
        if name in WAVELENGTHS and waves:
            return min(waves, key=lambda i: abs(waves[i] - WAVELENGTHS[name]))
        return min(position, len(held) - 1)

    return [source(i, name) for i, name in enumerate(wanted)]


def picked(known: Normalisation, names: tuple[str, ...]) -> Normalisation | None:
    """The checkpoint's normalisation of these channels, or None if it lacks one."""
    if any(n not in known.bands for n in names):
        return None
    at = [known.bands.index(n) for n in names]
    return Normalisation(
        names,
        tuple(known.mean[i] for i in at),
        tuple(known.std[i] for i in at),
        known.power_db,
    )


def same_units(known: Normalisation, measured: Normalisation) -> bool:
    """Whether data with these statistics can be meant by the checkpoint's normalisation."""
    pairs = zip(known.mean, known.std, measured.mean, measured.std, strict=True)
    return all(
        abs(mine - mean) < FAR * std and std / FAR < spread < std * FAR
        for mean, std, mine, spread in pairs
    )
