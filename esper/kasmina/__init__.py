"""Kasmina: the execution layer inside the trainer. Sites, seeds, shadow training, blending, telemetry, kernel cache."""

from esper.kasmina.host import Host, wrap
from esper.kasmina.plain import folded_module as export_folded
from esper.kasmina.plain import plain_module as export

__all__ = ["Host", "export", "export_folded", "wrap"]
