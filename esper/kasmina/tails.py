"""Tails: what a host computes from a site's tensor on.

A kernel that trains behind the host needs the site's tensor and all that follows, but the whole forward is replayed for
it, unless somebody says what follows: then the tensor is taken from the step's own forward, and only the tail is
replayed. The owner of a host names a tail by site, or gives the model a method `tail_of(site)` that returns it or None;
of a host that is a plain `nn.Sequential` it is known.

    esper.wrap(model, example=(x,), tails={"encoder.2": lambda model, h, x: model.head(model.encoder[3](h))})

A tail is called with the model, the tensor that the site puts out from now on, and the model's own positional inputs,
and returns what the model returns. It must reach the modules through the model that it is given (which is a copy, in
`esper.grow`) and call them as modules, so that grown sites after this one grow.

The gradients are those of a full replay with the same weights, bit for bit, where nothing before the site draws random
numbers. The step's own forward ran before the update of the host, so its tensor is one step older than a replay's.
A hook on a module around the site may change what follows: then the whole host is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from esper.kasmina.outputs import MARK, part_of, path_of, put, take
from esper.kasmina.probe import detached, forked_rng, tensors_of
from esper.leyline.chains import Tail, around, is_chain, rest_of
from esper.leyline.compiled import eagerly, runs_compiled
from esper.leyline.errors import SiteError


def find_tails(
    model: nn.Module, example: tuple[Any, ...], sites: Iterable[str], declared: Mapping[str, Tail]
) -> dict[str, Tail]:
    """The tails of a host by site: those that were declared, once they are seen to hold, and those that are known.

    Raises:
        SiteError: if a tail is of no site, fails, or puts out something else than the model does.
    """
    known = list(sites)
    for site in declared:
        if site not in known:
            remedy = f"its sites are {', '.join(known)}"
            raise SiteError(f"a tail for {site!r}, which is no site of this model", field="tails", remedy=remedy)
    for site in declared:
        if runs_compiled(model, path_of(site)):
            remedy = "leave its tail out, or compile less"
            raise SiteError(f"{site} lies in what torch.compile compiled", field="tails", remedy=remedy)
    free = [site for site in known if not runs_compiled(model, path_of(site))]
    told = {site: tail for site in free if (tail := _told(model, site)) is not None} | dict(declared)
    for site, tail in told.items():
        _check(model, example, site, tail)
    return {site: partial(_rest, path=site) for site in free if MARK not in site and is_chain(model, site)} | told


def applies(model: nn.Module, path: str, own: int | None) -> bool:
    """Whether nothing but the modules after it changes what the site put out: no hook on it or on a module around it.

    Args:
        model: the host.
        path: of the site's module.
        own: id of the hook that grows the site, if it is there.
    """
    # torch has no public question for hooks
    is_hooked = any(module._forward_hooks for module in around(model, path))  # noqa: SLF001
    return not is_hooked and set(model.get_submodule(path)._forward_hooks) <= {own}  # noqa: SLF001


class FromSite(nn.Module):
    """The host from a site on: its forward takes the site's tensor, and then the host's own inputs.

    The host is its child `host`, so that `functional_call` can run it with other tensors than its own.
    """

    def __init__(self, host: nn.Module, tail: Tail, grow: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.host = host
        self._tail, self._grow = tail, grow

    def forward(self, h: torch.Tensor, *inputs: Any) -> Any:
        """What the host puts out, if its site puts out what `grow` makes of `h`."""
        return self._tail(self.host, self._grow(h), *inputs)

    def tensors(self, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The host's tensors, by the names that they have here."""
        return {f"host.{name}": tensor for name, tensor in own.items()}


def _told(model: nn.Module, site: str) -> Tail | None:
    tail_of: Callable[[str], Tail | None] | None = getattr(model, "tail_of", None)
    return None if tail_of is None else tail_of(site)


def _rest(model: nn.Module, h: torch.Tensor, *_inputs: Any, path: str) -> Any:
    return rest_of(model, path, h)


def _check(model: nn.Module, example: tuple[Any, ...], site: str, tail: Tail) -> None:
    """Compares a tail with the model on the example, in eval mode; neither leaves a trace."""
    remedy = "it is called with (model, h, *inputs), runs all that follows the site, and returns what the model returns"
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> Any:
        seen.append(take(output, part_of(site)).clone())
        return put(output, part_of(site), seen[-1].clone())

    training = [(module, module.training) for module in model.modules()]
    handle = model.get_submodule(path_of(site)).register_forward_hook(keep)
    try:
        model.eval()
        with torch.no_grad(), eagerly(model), forked_rng(model):
            tensors = detached(model)
            expected = torch.func.functional_call(model, tensors, example)
            handle.remove()
            whole = FromSite(model, tail, lambda h: h)
            try:
                found = torch.func.functional_call(whole, whole.tensors(tensors), (seen[0], *example))
            except Exception as error:
                words = f"the tail of {site} raised {type(error).__name__}: {error}"
                raise SiteError(words, field="tails", remedy=remedy) from error
    finally:
        handle.remove()
        for module, mode in training:
            module.training = mode
    pairs = list(zip(tensors_of(expected), tensors_of(found), strict=False))
    alike = len(list(tensors_of(expected))) == len(list(tensors_of(found))) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs
    )
    if not alike:
        raise SiteError(f"the tail of {site} does not put out what the model does", field="tails", remedy=remedy)
