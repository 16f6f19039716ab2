"""How the health of each site moved over the last epochs: a window in Tamiyo's memory, of bounded size.

Of each site four figures are kept for `EPOCHS` epochs, as one block of numbers: 16 bytes a site and epoch. What was not
measured is not a number there, and 0 with its flag 0 in the features. numpy is imported with the first decision.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from esper.leyline import Contract, SystemStatePacket

if TYPE_CHECKING:
    import numpy as np

EPOCHS = 5
"""How long a window is."""

FIGURES = ("activation_variance", "gradient_norm", "grow_potential", "health_score")

TREND_FEATURES = ("variance_trend", "gradient_trend", "potential_trend", "health_trend", "jump", "measured")
"""Of each site: where the newest figure lies beside the mean of those before, relative; `jump` is the largest distance
of a newest figure from that mean, in deviations of those before (share, half at 3); `measured` is the share of the
window's figures that are there."""

_LARGEST = 1e15  # fits a float32 and its square


class SiteWindows(Contract):
    """The window of a run.

    Attributes:
        sites: digest of the sites' names in their order: a host with other sites begins anew.
        epochs: whose figures they are, oldest first.
        figures: (epochs, sites, FIGURES) float32, little-endian, in base64.
    """

    sites: str = ""
    epochs: tuple[Annotated[int, Field(ge=0)], ...] = ()
    figures: str = ""

    @model_validator(mode="after")
    def _holds_whole_epochs(self) -> Self:
        """Refuses a memory that was damaged on its way, where it is read and not where it is used. By its length alone:
        it is read at every decision, and may be a megabyte.
        """
        num_bytes = len(self.figures) // 4 * 3 - self.figures[-2:].count("=")
        row = 4 * len(FIGURES) * len(self.epochs)
        if num_bytes and (not row or num_bytes % row):
            raise ValueError(f"{num_bytes} bytes are no {len(self.epochs)} epochs of {len(FIGURES)} figures")
        return self

    def table(self) -> np.ndarray:
        """Returns (epochs, sites, FIGURES) float64; what was not measured is NaN.

        Raises:
            ValueError: if the block does not hold whole epochs.
        """
        import numpy as np

        block = np.frombuffer(base64.b64decode(self.figures, validate=True), dtype="<f4").astype(np.float64)
        if not self.epochs:
            return np.zeros((0, 0, len(FIGURES)))
        return block.reshape(len(self.epochs), -1, len(FIGURES))


def look(windows: SiteWindows | None, packet: SystemStatePacket) -> SiteWindows:
    """Returns the window with this packet's epoch in it; of an epoch that comes again the newer figures count."""
    import numpy as np

    from esper.tamiyo.table import table_of

    table_now = table_of(packet)
    sites, epoch = table_now.digest, packet.epoch.epoch
    seen = np.stack([table_now.figure(name) for name in FIGURES], axis=1)[None]
    seen[0, table_now.site.numbers("epoch") != epoch] = np.nan  # those of another epoch are none
    epochs, table = (epoch,), np.clip(seen, -_LARGEST, _LARGEST)
    if windows is not None and windows.sites == sites:
        kept = [place for place, past in enumerate(windows.epochs) if past < epoch][-(EPOCHS - 1) :]
        epochs = (*(windows.epochs[place] for place in kept), epoch)
        table = np.concatenate([windows.table()[kept], table]) if kept else table
    return SiteWindows(sites=sites, epochs=epochs, figures=base64.b64encode(table.astype("<f4").tobytes()).decode())


def trend_features(windows: SiteWindows | None, packet: SystemStatePacket) -> np.ndarray:
    """Returns (sites, TREND_FEATURES) float32, of a window that has already seen `packet`; zeros without one."""
    import numpy as np

    from esper.tamiyo.features import relative
    from esper.tamiyo.table import table_of

    num_sites = len(packet.layers)
    if windows is None or not num_sites or windows.sites != table_of(packet).digest:
        return np.zeros((num_sites, len(TREND_FEATURES)), dtype=np.float32)
    table = windows.table()
    past, newest = table[:-1], table[-1]
    there = ~np.isnan(past)
    num = there.sum(axis=0)
    mean = np.where(there, past, 0.0).sum(axis=0) / np.maximum(num, 1)
    spread = np.sqrt(np.where(there, (past - mean) ** 2, 0.0).sum(axis=0) / np.maximum(num, 1))
    known = (num > 0) & ~np.isnan(newest)
    trend = np.where(known, relative(np.nan_to_num(newest), mean), 0.0)
    away = np.where(known & (num > 1), np.abs(np.nan_to_num(newest) - mean), 0.0)
    jump = np.where(away > 0.0, away / (away + 3.0 * spread + 1e-30), 0.0).max(axis=1)
    measured = (~np.isnan(table)).mean(axis=(0, 2)) * (len(table) / EPOCHS)
    return np.concatenate([trend, jump[:, None], measured[:, None]], axis=1).astype(np.float32)
