"""From a kernel's id to a module that is ready to stand at a site: fetch, verify, rebuild, warm up.

All of it happens in a background thread, never in a step; a step boundary only picks up what is finished. Nothing is
compiled: the module is rebuilt from its IR, and native code is run only out of a container whose signature and hashes
hold (`esper.kasmina.native`). torch's global random state is neither read nor moved, since the thread shares it with
the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from torch import nn

from esper.kasmina.cache import KernelCache
from esper.kasmina.native import open_checked
from esper.kasmina.rests import Rest, Rests, never
from esper.kasmina.seed import KernelFacts
from esper.kasmina.warm_up import warm_up
from esper.leyline.canonical import canonical_hash
from esper.leyline.container import Kernel, KernelManifest, kernel_id_of, unpack
from esper.leyline.errors import KernelRejectedError, TamperedError
from esper.leyline.kernels import Pipeline, SiteSignature
from esper.leyline.lower import lower
from esper.leyline.ports import AssetHub
from esper.leyline.runtime import NativeKernel

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A kernel that passed every check, and its module on the host's device.

    Attributes:
        native: its code, where that may compute it.
        no_native: why it may not; empty for a kernel that was never to have any.
    """

    facts: KernelFacts
    module: nn.Module
    native: NativeKernel | None = None
    no_native: str = ""


class KernelLoader:
    """Loads kernels from a hub.

    Args:
        hub: where containers are.
        public_key: the signer's raw 32 bytes, pinned by the run's configuration.
        cache: of verified kernels.
        native: whether native code may be used at all.
    """

    def __init__(self, hub: AssetHub, public_key: bytes, cache: KernelCache, *, native: bool = True) -> None:
        self._hub = hub
        self._allows_native = native
        self._key = Ed25519PublicKey.from_public_bytes(public_key)
        self._cache = cache
        self._pool: ThreadPoolExecutor | None = None

    def load(
        self, kernel_id: str, signature: SiteSignature, device: torch.device, *, rest: Rest = never
    ) -> LoadedKernel:
        """Loads a kernel in the calling thread, with rests between pieces of the work.

        Raises:
            NotFoundError: if the hub has no such kernel.
            UnavailableError: if the hub does not answer.
            TamperedError: if the bytes are not what the id or the signer say.
            KernelRejectedError: if the kernel does not fit the site, or fails its warm-up.
        """
        kernel = self._verified(kernel_id, signature)
        rest()
        module = build(kernel.manifest, kernel.weights).to(device)
        rest()
        warm_up(module, kernel.manifest.memory_bytes, signature, device, rest=rest)
        if kernel.manifest.pipeline is Pipeline.FAST:
            return LoadedKernel(_facts(kernel), module)
        try:
            return LoadedKernel(_facts(kernel), module, self._native(kernel, lambda: module, device, rest))
        except KernelRejectedError as refusal:
            return LoadedKernel(_facts(kernel), module, no_native=str(refusal))

    def load_native(
        self, kernel_id: str, facts: KernelFacts, device: torch.device, *, rest: Rest = never
    ) -> NativeKernel:
        """Loads the native code of another kernel of the same design and signature, in the calling thread.

        Raises:
            NotFoundError, UnavailableError, TamperedError: as `load`.
            KernelRejectedError: if it is of another design, or its code may not or need not run here.
        """
        kernel = self._verified(kernel_id, facts.signature)
        rest()
        if kernel.manifest.ir_hash != canonical_hash(facts.ir):
            raise KernelRejectedError(f"kernel {kernel_id[:12]} is of another design")
        return self._native(kernel, lambda: build(kernel.manifest, kernel.weights).to(device), device, rest)

    def request_native(self, kernel_id: str, facts: KernelFacts, device: torch.device) -> Future[NativeKernel]:
        """Loads native code in the background; the future raises what `load_native` raises."""
        return self._submit(lambda: self.load_native(kernel_id, facts, device, rest=Rests()))

    def request(self, kernel_id: str, signature: SiteSignature, device: torch.device) -> Future[LoadedKernel]:
        """Loads a kernel in the background; the future raises what `load` raises."""
        return self._submit(lambda: self.load(kernel_id, signature, device, rest=Rests()))

    def close(self) -> None:
        """Lets the thread end; what was requested and not begun is cancelled."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _submit(self, work: Callable[[], _T]) -> Future[_T]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="esper-loader")
        return self._pool.submit(work)

    def _native(
        self, kernel: Kernel, module: Callable[[], nn.Module], device: torch.device, rest: Rest
    ) -> NativeKernel:
        if not self._allows_native:
            raise KernelRejectedError("this run uses no native code: it must not depend on what was built when")
        return open_checked(kernel, module, device, rest=rest)

    def _verified(self, kernel_id: str, signature: SiteSignature) -> Kernel:
        kernel = self._cache.get(kernel_id, lambda: self._fetch(kernel_id))
        if kernel.manifest.signature != signature:
            raise KernelRejectedError(f"was made for {kernel.manifest.signature.key}, the site is {signature.key}")
        return kernel

    def _fetch(self, kernel_id: str) -> tuple[Kernel, int]:
        data = self._hub.fetch(kernel_id)
        if kernel_id_of(data) != kernel_id:
            raise TamperedError(f"the bytes that came for kernel {kernel_id[:12]} have another hash")
        return unpack(data, self._key), len(data)


def build(manifest: KernelManifest, weights: Mapping[str, np.ndarray]) -> nn.Module:
    """Rebuilds a kernel's module with its initial weights.

    Raises:
        KernelRejectedError: if the weights are not those of the design.
    """
    module = lower(manifest.ir, manifest.signature)
    expected = module.state_dict()
    if {key: tuple(tensor.shape) for key, tensor in expected.items()} != {
        key: array.shape for key, array in weights.items()
    }:
        raise KernelRejectedError("the weights in the container are not those of its design")
    module.load_state_dict({key: torch.from_numpy(np.array(array)) for key, array in weights.items()})
    return module


def _facts(kernel: Kernel) -> KernelFacts:
    manifest = kernel.manifest
    return KernelFacts(
        kernel_id=kernel.kernel_id,
        blueprint=manifest.blueprint_name,
        blueprint_id=manifest.blueprint_id,
        ir=manifest.ir,
        signature=manifest.signature,
        num_parameters=manifest.num_parameters,
        flops_per_sample=manifest.flops_per_sample,
        replaces=manifest.replaces,
        zero_at_birth=manifest.zero_at_birth,
    )
