"""Kasmina: the execution layer inside the trainer. Sites, seeds, shadow training, blending, telemetry, kernel cache."""

from esper.kasmina.host import Host, wrap

__all__ = ["Host", "wrap"]
