"""How a stage looks and reads: one table for the terminal, the end table and the report."""

from __future__ import annotations

from typing import NamedTuple

from esper.leyline.seeds import SeedStage


class StageLook(NamedTuple):
    """A stage's word, what it means, and its colours.

    Attributes:
        style: a rich style, from the terminal's own palette.
        light, dark: colours of the report's two themes, chosen to be told apart by lightness too.
        text: the palette's name for text upon them.
    """

    word: str
    meaning: str
    style: str
    light: str
    dark: str
    text: str = "on_soft"


LOOKS: dict[SeedStage, StageLook] = {
    SeedStage.DORMANT: StageLook(
        "dormant", "waits and watches; does no arithmetic", "dim", "#d5dbe3", "#39424f", "on_faint"
    ),
    SeedStage.GERMINATED: StageLook(
        "germinated", "its kernel is being fetched and checked", "cyan", "#7cc4d4", "#4aa3b8"
    ),
    SeedStage.TRAINING: StageLook(
        "training",
        "the kernel learns behind the host, which does not feel it",
        "bright_blue",
        "#3f74d6",
        "#6c9bf2",
        "on_strong",
    ),
    SeedStage.GRAFTING: StageLook(
        "grafting", "the kernel is blended into the live path", "magenta", "#8d4fd0", "#b284ee", "on_strong"
    ),
    SeedStage.STABILIZING: StageLook("stabilizing", "fully blended; the host settles", "yellow", "#e0a52c", "#e6b450"),
    SeedStage.EVALUATING: StageLook("evaluating", "checked for harm", "bright_yellow", "#d9822b", "#f09a4a"),
    SeedStage.FINE_TUNING: StageLook("fine-tuning", "host and kernel train together", "green", "#6bb58a", "#6fc497"),
    SeedStage.FOSSILIZED: StageLook(
        "fossilized", "a permanent part of the network", "bold green", "#14804a", "#2fa866", "on_strong"
    ),
    SeedStage.CULLED: StageLook(
        "culled", "removed for cause; the site rests", "red", "#c8403a", "#f0716a", "on_strong"
    ),
    SeedStage.CANCELLED: StageLook("cancelled", "its kernel never came", "bright_black", "#8a94a3", "#8a94a3"),
    SeedStage.ROLLED_BACK: StageLook(
        "rolled back", "the governor restored the state before the graft", "bold red", "#8f1d2c", "#e0606f", "on_strong"
    ),
}

TRACK: tuple[SeedStage, ...] = (
    SeedStage.GERMINATED,
    SeedStage.TRAINING,
    SeedStage.GRAFTING,
    SeedStage.STABILIZING,
    SeedStage.EVALUATING,
    SeedStage.FINE_TUNING,
    SeedStage.FOSSILIZED,
)
"""The stations a seed passes on its way to permanence."""


def word(stage: SeedStage) -> str:
    """The stage as it stands in a sentence."""
    return LOOKS[stage].word


def css_name(stage: SeedStage) -> str:
    """The stage as part of a class's name: `fine-tuning`."""
    return stage.value.lower().replace("_", "-")
