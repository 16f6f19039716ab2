"""A storage address read without Urza: the state as of now, folded from its log. Writes nothing, takes nothing over."""

from __future__ import annotations

from esper.leyline import Blueprint, CompiledKernelArtifact, SiteSignature
from esper.leyline.catalogue import (
    BlueprintPage,
    BlueprintQuery,
    Census,
    Ids,
    KernelEntry,
    KernelPage,
    KernelQuery,
    Outlook,
)
from esper.storage import Storage
from esper.urza.blobs import Blobs, StoredBlobs
from esper.urza.catalog import Catalog, Target
from esper.urza.events import read_events


class Reader:
    """The queries of a `Hub` over one moment's state of a storage address.

    Fetches that were not written down yet, and what is decided from now on, are not seen.
    """

    def __init__(self, catalog: Catalog, blobs: Blobs) -> None:
        self._catalog = catalog
        self._blobs = blobs

    @classmethod
    def of(cls, storage: Storage) -> Reader:
        """Reads an address.

        Raises:
            NotFoundError: if no catalogue lies there.
            StorageError: if it cannot be read, or is of a newer schema.
        """
        return cls(Catalog(read_events(storage)), StoredBlobs(storage))

    def blueprint(self, blueprint_id: str) -> Blueprint:
        """Raises `NotFoundError` for an unknown id."""
        return self._catalog.blueprint(blueprint_id)

    def search_blueprints(self, query: BlueprintQuery) -> BlueprintPage:
        """See `Hub.search_blueprints`."""
        return self._catalog.search_blueprints(query)

    def ids(self, prefix: str) -> Ids:
        """See `Hub.ids`."""
        return self._catalog.ids(prefix)

    def lineage(self, blueprint_id: str) -> list[Blueprint]:
        """See `Hub.lineage`."""
        return self._catalog.lineage(blueprint_id)

    def descendants(self, blueprint_id: str) -> list[Blueprint]:
        """See `Hub.descendants`."""
        return self._catalog.descendants(blueprint_id)

    def outlook(self, blueprint_id: str) -> Outlook:
        """See `Hub.outlook`."""
        return self._catalog.outlook(blueprint_id)

    def signatures(self) -> list[SiteSignature]:
        """See `Hub.signatures`."""
        return self._catalog.signatures()

    def census(self) -> Census:
        """See `Hub.census`."""
        return self._catalog.census()

    def targets(self, blueprint_id: str) -> list[Target]:
        """See `Hub.targets`."""
        return self._catalog.targets(blueprint_id)

    def kernel(self, kernel_id: str) -> CompiledKernelArtifact:
        """Raises `NotFoundError` for an unknown id."""
        return self._catalog.kernel(kernel_id)

    def kernel_entry(self, kernel_id: str) -> KernelEntry:
        """See `Hub.kernel_entry`."""
        return self._catalog.entry(kernel_id)

    def search_kernels(self, query: KernelQuery) -> KernelPage:
        """See `Hub.search_kernels`."""
        return self._catalog.search_kernels(query)

    def fetch(self, kernel_id: str) -> memoryview:
        """See `AssetHub`; the fetch is not counted."""
        return memoryview(self._blobs.get(self.kernel(kernel_id).kernel_id))
