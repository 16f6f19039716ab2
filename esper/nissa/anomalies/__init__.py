"""Streaming detectors over what the bus carries, and the alerts they lead to. Memory is bounded for each stream.

    robust      median and MAD of a window, and scores against them
    change      change points: one-sided CUSUMs
    level       a stream's level against its own past, by both
    loss, health, forest, cache, lag    one kind of signal each: they say what is out of the ordinary, or over
    book        from what they say to alerts: one a kind and place, counted, ended
    watch       from messages to detectors

A detector says nothing before it has seen enough of its own stream, and learns anew where the live path changes: what
a graft does to a loss, to step times or to a layer is no anomaly by itself.
"""

from esper.nissa.anomalies.watch import Watch

__all__ = ["Watch"]
