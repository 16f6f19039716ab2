"""One client of `bench throughput`: asks one question over one connection again and again. The standard library alone.

    python -S -E http_client.py HOST PORT SECONDS KIND SEED PATH...

`read` asks for the paths in turn; `submit` posts designs, each another. Prints one JSON object: seconds, CPU seconds,
milliseconds of each answer, and how many answers were no success. As little work as possible is done a request: the
clients share the machine with what they measure.
"""

from __future__ import annotations

import json
import socket
import sys
import time

_END = b"\r\n\r\n"
_LENGTH = b"content-length:"


def main(arguments: list[str]) -> None:
    """Asks for so many seconds and prints what it saw."""
    host, port, seconds, kind, seed = arguments[:5]
    requests = [_get(host, path) for path in arguments[5:]]
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    taken, num_failed, number = [], 0, 0
    began = time.perf_counter()
    end = began + float(seconds)
    cpu = time.process_time()
    while (at := time.perf_counter()) < end:
        request = _post(host, seed, number) if kind == "submit" else requests[number % len(requests)]
        number += 1
        connection.sendall(request)
        num_failed += not 200 <= _status(connection) < 300
        taken.append(round((time.perf_counter() - at) * 1e3, 3))
    found = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
    print(json.dumps(found | {"ms": taken, "num_failed": num_failed}))


def _get(host: str, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def _post(host: str, seed: str, number: int) -> bytes:
    nodes = [
        {"id": "down", "op": "linear", "params": {"out": 1 + number}},
        {"id": "up", "op": "linear", "inputs": ["down"], "params": {"out": "C"}},
    ]
    ir = {"fit": ["vector"], "nodes": nodes, "output": "up"}
    target = {"kind": "vector", "channels": 8}
    body = json.dumps({"ir": ir, "name": f"bench-{seed}", "targets": [target], "pipelines": ["fast"]}).encode()
    head = f"POST /api/v1/blueprints HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _status(connection: socket.socket) -> int:
    """Reads one whole answer; returns its status."""
    data = b""
    while (place := data.find(_END)) < 0:
        data += _more(connection)
    head = data[:place].lower()
    start = head.index(_LENGTH) + len(_LENGTH)
    size = place + len(_END) + int(head[start:].split(b"\r\n", 1)[0])
    left = size - len(data)
    while left > 0:
        left -= len(_more(connection))
    return int(head[9:12])


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 18)
    if not data:
        raise ConnectionError("the gateway closed the connection")
    return data


if __name__ == "__main__":
    main(sys.argv[1:])
