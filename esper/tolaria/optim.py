"""The optimizer and its scheduler, grown together.

A kernel joins as a parameter group of its own, tagged with its seed, under the hyper-parameters that group 0 has at
that moment; the state of the old parameters is not touched. It leaves with its group and its state. A scheduler keeps
one entry a group in several lists, which torch does not extend by itself: `LambdaLR` raises at the next step and
`OneCycleLR` misses keys. Only schedulers whose lists are known here are accepted.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from esper.leyline.errors import ConfigError, ConflictError

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]
"""(optimizer, total steps) -> a scheduler that is stepped once an optimizer step."""

SEED_KEY = "esper_seed"
"""Key of a parameter group that belongs to a seed."""

RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""Keys of a group that hold a learning rate: torch's own, and those of its schedulers."""

SUPPORTED_SCHEDULERS: tuple[type[LRScheduler], ...] = (
    lr_scheduler.LambdaLR,
    lr_scheduler.OneCycleLR,
    lr_scheduler.CosineAnnealingLR,
    lr_scheduler.StepLR,
    lr_scheduler.MultiStepLR,
    lr_scheduler.ConstantLR,
    lr_scheduler.LinearLR,
    lr_scheduler.SequentialLR,
)

UNSUITED: Mapping[type[Optimizer], str] = MappingProxyType(
    {
        torch.optim.LBFGS: "it calls the model again and again within one step, and takes one group of parameters",
        torch.optim.SparseAdam: "it takes sparse gradients only",
        torch.optim.Muon: "it takes matrices only, and a kernel may bring a bias, a norm or a convolution",
    }
)
"""Optimizers of torch that cannot follow a network that grows, and why."""

Named = Iterable[tuple[str, nn.Parameter]]


class Optimization:
    """An optimizer, its scheduler, and the order in which seeds joined.

    Args:
        optimizer: holds the host's parameters.
        scheduler: stepped once an optimizer step; None is a constant rate.
        scaler: of losses in float16; it leaves out the steps whose gradients overflow.

    Raises:
        ConfigError: for an optimizer or a scheduler that cannot grow.
    """

    def __init__(
        self, optimizer: Optimizer, scheduler: LRScheduler | None = None, scaler: GradScaler | None = None
    ) -> None:
        for kind, words in UNSUITED.items():
            if isinstance(optimizer, kind):
                raise ConfigError(
                    f"{kind.__name__} cannot follow a network that grows: {words}",
                    field="optimizer",
                    remedy="use AdamW, SGD or another of torch.optim",
                )
        if scheduler is not None:
            require_supported(scheduler)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self._names: dict[str, list[str]] = {}  # seed id -> names of its parameters, in joining order

    @property
    def seeds(self) -> tuple[str, ...]:
        """Ids of the seeds that joined, in order."""
        return tuple(self._names)

    @property
    def learning_rate(self) -> float:
        """The rate of group 0 for the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """One optimizer step, through the scaler where there is one, and one scheduler step."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() < scale:
                return  # the step was left out: it moves no rate either
        if self.scheduler is not None:
            self.scheduler.step()

    def join(self, seed_id: str, parameters: Sequence[nn.Parameter], *, live: Named, lr_factor: float = 1.0) -> None:
        """Adds a seed's parameters.

        Args:
            seed_id: whose they are.
            parameters: on the live path, and in no group yet.
            live: names and parameters of the live path, among them these; names make the group restorable.
            lr_factor: its learning rates, as a factor of group 0's, whatever the scheduler makes of those.

        Raises:
            ConflictError: if the seed is in already, or a parameter is not on the live path.
        """
        if seed_id in self._names:
            raise ConflictError(f"seed {seed_id} is in the optimizer already")
        names = self._names[seed_id] = _names_of(parameters, live, seed_id)
        first = self.optimizer.param_groups[0]
        hyper = {key: _own(value) for key, value in first.items() if key not in ("params", "param_names", SEED_KEY)}
        hyper |= {key: lr_factor * hyper[key] for key in RATES if hyper.get(key) is not None}
        # torch takes names in all groups or in none
        joining = list(zip(names, parameters, strict=True)) if "param_names" in first else list(parameters)
        self.optimizer.add_param_group({**hyper, "params": joining, SEED_KEY: seed_id})
        if self.scheduler is not None:
            _extend(self.scheduler, lr_factor)

    def adopt(self, on_trial: Mapping[str, tuple[Sequence[nn.Parameter], float]], *, live: Named) -> None:
        """Takes over an optimizer that holds kernels already, as a second session of the same model begins with.

        Groups that an earlier `Optimization` made are known again. A kernel on trial that lies in a group of the
        owner's, as in an optimizer that was made anew, gets its own, with its state.

        Args:
            on_trial: seed id to its parameters and `lr_factor`, of the seeds that are blended in and may still leave.
            live: names and parameters of the live path.

        Raises:
            ConflictError: if the optimizer holds a kernel that is not on the live path.
        """
        named = list(live)
        for group in self.optimizer.param_groups:
            if SEED_KEY in group and group[SEED_KEY] not in self._names:
                self._names[group[SEED_KEY]] = _names_of(group["params"], named, group[SEED_KEY])
        for seed_id, (parameters, lr_factor) in on_trial.items():
            own = {id(parameter) for parameter in parameters}
            held = [p for group in self.optimizer.param_groups for p in group["params"] if id(p) in own]
            if seed_id in self._names or not held:
                continue
            for group in self.optimizer.param_groups:
                _take_out(group, own)
            self.join(seed_id, held, live=named, lr_factor=lr_factor)

    def hold_all_but(self, seeds: Collection[str]) -> None:
        """Drops the gradients of all but these seeds: the next step leaves the rest, and its state, as they are."""
        for group in self.optimizer.param_groups:
            if group.get(SEED_KEY) not in seeds:
                for parameter in group["params"]:
                    parameter.grad = None

    def leave(self, parameters: Iterable[nn.Parameter]) -> None:
        """Removes parameters with their state; a seed's group that is empty then goes too."""
        gone = {id(parameter) for parameter in parameters}
        for index in range(len(self.optimizer.param_groups) - 1, -1, -1):
            group = self.optimizer.param_groups[index]
            for parameter in group["params"]:
                if id(parameter) in gone:
                    self.optimizer.state.pop(parameter, None)
            _take_out(group, gone)
            if not group["params"] and SEED_KEY in group:
                self._remove_group(index)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of all, with the layout that `load_state_dict` needs. Tensors are not copies."""
        return {
            "layout": [[seed_id, list(names)] for seed_id, names in self._names.items()],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, live: Named) -> None:
        """Restores in place, whatever seeds are in now; the topology of `state` must be loaded already.

        Args:
            state: from `state_dict`.
            live: names and parameters of the live path after the topology was restored.

        Raises:
            ConflictError: if the live path does not hold the parameters of `state`, or if only one of the two has a
                scheduler, or a scaler.
        """
        for index in range(len(self.optimizer.param_groups) - 1, -1, -1):
            if SEED_KEY in self.optimizer.param_groups[index]:
                for parameter in self.optimizer.param_groups[index]["params"]:
                    self.optimizer.state.pop(parameter, None)
                self._remove_group(index)
        by_name = dict(live)
        for seed_id, names in state["layout"]:
            missing = [name for name in names if name not in by_name]
            if missing:
                raise ConflictError(f"the live path has no {missing[0]}, which the optimizer's state names")
            self.join(seed_id, [by_name[name] for name in names], live=by_name.items())
        # torch keeps references to what it is given: a snapshot must stay as it was
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for name, own in (("scheduler", self.scheduler), ("scaler", self.scaler)):
            if (own is None) != (state.get(name) is None):  # the scaler's is younger than the first checkpoints
                raise ConflictError(f"the saved run and this one differ in having a {name}", field=name)
        if self.scaler is not None:
            self.scaler.load_state_dict(dict(state["scaler"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
            _mend(self.scheduler)

    def _remove_group(self, index: int) -> None:
        group = self.optimizer.param_groups.pop(index)
        self._names.pop(group[SEED_KEY], None)
        if self.scheduler is not None:
            _shrink(self.scheduler, index)


def require_supported(scheduler: LRScheduler) -> None:
    """Raises `ConfigError` unless the scheduler, and every one inside it, is known to grow correctly."""
    # exact types: a subclass may keep lists of its own
    if type(scheduler) not in SUPPORTED_SCHEDULERS:
        raise ConfigError(
            f"{type(scheduler).__name__} cannot follow a network that grows",
            field="scheduler",
            remedy=f"use one of {', '.join(kind.__name__ for kind in SUPPORTED_SCHEDULERS)}",
        )
    for inner in _inner(scheduler):
        require_supported(inner)


def clip_norms(groups: Iterable[Sequence[nn.Parameter]], max_norm: float) -> None:
    """Clips each group's gradient norm apart, so that a new kernel's gradient does not shrink the host's."""
    for group in groups:
        if group:
            torch.nn.utils.clip_grad_norm_(group, max_norm)


def _names_of(parameters: Iterable[nn.Parameter], live: Named, seed_id: str) -> list[str]:
    names = {id(parameter): name for name, parameter in live}
    try:
        return [names[id(parameter)] for parameter in parameters]
    except KeyError as error:
        raise ConflictError(f"a parameter of seed {seed_id} is not on the live path") from error


def _take_out(group: dict[str, Any], gone: Collection[int]) -> None:
    stay = [place for place, parameter in enumerate(group["params"]) if id(parameter) not in gone]
    for key in {"params", "param_names"} & group.keys():
        group[key] = [group[key][place] for place in stay]


def _inner(scheduler: LRScheduler) -> list[LRScheduler]:
    return list(getattr(scheduler, "_schedulers", ()))


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _lists(scheduler: LRScheduler) -> dict[str, list[Any]]:
    """The lists of a scheduler that hold one entry a parameter group, by name."""
    found = {name: getattr(scheduler, name, None) for name in ("base_lrs", "_last_lr", "lr_lambdas")}
    return {name: entries for name, entries in found.items() if isinstance(entries, list)}


def _extend(scheduler: LRScheduler, lr_factor: float) -> None:
    for inner in _inner(scheduler):
        _extend(inner, lr_factor)
    for name, entries in _unaliased(scheduler).items():
        entries.append(_own(entries[0]) if name == "lr_lambdas" else lr_factor * entries[0])


def _shrink(scheduler: LRScheduler, index: int) -> None:
    for inner in _inner(scheduler):
        _shrink(inner, index)
    for entries in _unaliased(scheduler).values():
        del entries[index]


def _unaliased(scheduler: LRScheduler) -> dict[str, list[Any]]:
    # SequentialLR takes over the very list object of its current scheduler
    last = getattr(scheduler, "_last_lr", None)
    if isinstance(last, list):
        scheduler._last_lr = list(last)  # noqa: SLF001 - torch has no public setter
    return _lists(scheduler)


def _mend(scheduler: LRScheduler) -> None:
    """Gives back the types that a round trip through JSON loses."""
    for inner in _inner(scheduler):
        _mend(inner)
    if isinstance(scheduler, lr_scheduler.MultiStepLR):
        scheduler.milestones = Counter(scheduler.milestones)
