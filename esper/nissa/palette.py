"""The report's colours: each name has a light and a dark value, and charts are drawn with the light ones.

The page's script exchanges light for dark by this table, so that one drawing serves both themes. No light value
stands for two dark ones.
"""

from __future__ import annotations

from types import MappingProxyType

from esper.nissa.stages import LOOKS

_NAMED: dict[str, tuple[str, str]] = {
    "ink": ("#1b2430", "#e6eaf0"),
    "muted": ("#5b6675", "#9aa6b5"),
    "line": ("#e3e7ec", "#2a323d"),
    "page": ("#f6f7f9", "#0f1319"),
    "card": ("#ffffff", "#171c24"),
    "accent": ("#0f7a4d", "#3ecf8e"),
    "accent_soft": ("#e3f4ec", "#12291f"),
    "train": ("#8b97a8", "#77849a"),
    "loss": ("#2f5fd0", "#7aa5ff"),
    "warn": ("#8a5a00", "#f0b849"),
    "warn_soft": ("#fdf3dc", "#2b2313"),
    "bad": ("#b3261e", "#ff8a80"),
    "host": ("#2b5a86", "#6ea8dc"),
    "shadow": ("#8e5bd0", "#b794f6"),
    "validation": ("#c98a1b", "#e5b454"),
    "telemetry": ("#2f9aa0", "#5cc9cf"),
    "control": ("#a8516e", "#e08ba8"),
    "checkpoint": ("#6b7480", "#98a2b0"),
    # text on bars; the light values differ by a hair, so that each has its own dark one
    "on_strong": ("#fffffe", "#10151c"),
    "on_soft": ("#1b2431", "#10151c"),
    "on_faint": ("#1b2432", "#e6eaf0"),
}

LIGHT = MappingProxyType({name: light for name, (light, _) in _NAMED.items()})
DARK = MappingProxyType({name: dark for name, (_, dark) in _NAMED.items()})

TO_DARK = MappingProxyType(dict(_NAMED.values()) | {k.light: k.dark for k in LOOKS.values()})
"""Light colour -> its dark counterpart, for everything that a chart draws with."""
