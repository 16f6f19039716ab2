"""Ports for servers that start later."""

from __future__ import annotations

import contextlib
import secrets
import socket
from pathlib import Path

_RAY_WORKERS = range(10_002, 20_000)


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody has at this moment, of those that the system gives to nobody who asks for any.

    There is time until they are listened on, and meanwhile a Ray that starts takes ports by the dozen.
    """
    ports: list[int] = []
    choice = _unassigned()
    with contextlib.ExitStack() as stack:
        while len(ports) < number:
            port = secrets.choice(choice)  # not of `random`, which begins alike in every test
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                ports.append(port)
    return ports


def _unassigned() -> range:
    """Ports between those of Ray's workers and those for outgoing connections, or below both."""
    file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(file.read_text().split()[0]) if file.exists() else 32_768
    return range(_RAY_WORKERS.stop, first) if first > _RAY_WORKERS.stop + 1_000 else range(5_000, _RAY_WORKERS.start)
