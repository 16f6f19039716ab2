"""The register-and-search work of `bench urza` on an MLflow model registry with SQLite.

Run by an interpreter that has mlflow and no Esper: `python mlflow_registry.py DIR ENTRIES SEARCHES`. The last line of
output is JSON: `{version, register: [ms], search: [ms]}`.
"""

from __future__ import annotations

import json
import sys
import time


def main(directory: str, entries: int, searches: int) -> None:
    """Registers one model version an entry, with tags, and searches by a tag."""
    import mlflow  # pyright: ignore[reportMissingImports] - no dependency of ours
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    client = MlflowClient(
        registry_uri=f"sqlite:///{directory}/registry.db", tracking_uri=f"sqlite:///{directory}/runs.db"
    )
    register, search = [], []
    for at in range(entries):
        began = time.perf_counter()
        client.create_registered_model(f"design-{at}")
        client.create_model_version(
            f"design-{at}", source=f"{directory}/{at}", tags={"channels": str(8 + at % 10), "status": "validated"}
        )
        register.append(1e3 * (time.perf_counter() - began))
    for at in range(searches):
        began = time.perf_counter()
        client.search_model_versions(f"tags.channels = '{8 + at % 10}'", max_results=1_000)
        search.append(1e3 * (time.perf_counter() - began))
    print(json.dumps({"version": mlflow.__version__, "register": register, "search": search}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
