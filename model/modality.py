"""The four modalities of RingMoE (RingMoE §3.1), as frozen records.

A modality has its own patch embedding, specialised experts, router and decoder; everything else
is shared. To add a fifth: one record here, a recipe that names it, a fixture in the tests.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Modality:
    """One kind of sensor data."""

    name: str
    """Short name used in recipes, checkpoints and `--modality`."""
    title: str
    """Name for people."""
    bands: tuple[str, ...]
    """Default bands in channel order; users may bring others (4 to 13 for multi-spectral)."""
    polarimetric: bool = False
    """Complex channels: one scalar scale, no mean, and never resized (power must survive)."""

    @property
    def channels(self) -> int:
        """Default number of channels, as in the released model."""
        return len(self.bands)


MODALITIES: dict[str, Modality] = {
    m.name: m
    for m in (
        Modality("opt", "optical", ("red", "green", "blue")),
        Modality("ms", "multi-spectral", ("blue", "green", "red", "nir")),
        Modality(
            "sar-l1",
            "complex SAR",
            ("hh_re", "hh_im", "hv_re", "hv_im", "vh_re", "vh_im", "vv_re", "vv_im"),
            polarimetric=True,
        ),
        Modality("sar-l2", "amplitude SAR", ("vv", "vh", "vv/vh")),
    )
}
