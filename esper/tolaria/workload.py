"""What is trained on what: a model, its data, its task, and who makes its optimizer. Knows no growth.

Data come as tensors, as a map-style `Dataset`, or as a factory of loaders. For the first two the order of samples is
a function of (seed, epoch) alone, so that a run can go on in the middle; a factory answers for its own order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from esper.leyline.chains import Tail
from esper.leyline.errors import DataError
from esper.tolaria.optim import OptimizerFactory, SchedulerFactory
from esper.tolaria.task import Task
from esper.tolaria.weights import Trained

Batch = tuple[Any, Any]
"""(inputs, targets); inputs are a tensor, or a tuple of the model's positional arguments."""

LoaderFactory = Callable[[int, int, int], Iterable[Batch]]
"""(rank, world, epoch) -> this rank's batches of that epoch, such as a `DataLoader`; with a length for training."""

Data = Any
"""(inputs, targets) tensors, a `TensorDataset`, a map-style `Dataset` of (inputs, target), or a `LoaderFactory`."""


@dataclass(frozen=True)
class Workload:
    """One training problem.

    Attributes:
        model: the host, not wrapped yet.
        example: the model's positional arguments for a small batch; sites are found by one forward of it.
        train, val, test: see `Data`. Test data are touched once, after the last epoch.
        optimizer: makes the host's optimizer.
        scheduler: makes its scheduler from (optimizer, total steps); None is a constant rate.
        trained: what the model was trained to before, so that its quality is measured before the first step; None is
            a new model.
        tails: by site, what the model computes from there on; see `esper.kasmina.tails`.
    """

    model: nn.Module
    example: tuple[Any, ...]
    train: Data
    val: Data
    task: Task
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None = None
    test: Data | None = None
    trained: Trained | None = None
    tails: Mapping[str, Tail] = field(default_factory=dict)


class Batches(Protocol):
    """One split, as batches."""

    def num_batches(self, *, world: int) -> int:
        """Batches of one epoch on one rank.

        Raises:
            DataError: if the length cannot be known.
        """
        ...

    def epoch(self, epoch: int, *, rank: int, world: int) -> Iterator[Batch]:
        """The batches of one epoch on this rank, in order."""
        ...


def training_batches(data: Data, *, batch_size: int, seed: int, field: str = "train_data") -> Batches:
    """Shuffled batches of `batch_size` samples over all ranks together; a last batch that is short is dropped.

    Raises:
        DataError: if the data are of no known kind, or too few for one batch.
    """
    if (samples := _samples(data, field)) is None:
        return _Loaders(data, field)
    if len(samples) == 0:
        raise DataError("no samples", field=field)
    return _Shuffled(samples, min(batch_size, len(samples)), seed)


def evaluation_batches(data: Data, *, batch_size: int, field: str = "val_data") -> Batches:
    """All samples once, in order, dealt out over ranks.

    Raises:
        DataError: if the data are of no known kind, or empty.
    """
    if (samples := _samples(data, field)) is None:
        return _Loaders(data, field)
    if len(samples) == 0:
        raise DataError("no samples", field=field)
    return _InOrder(samples, batch_size)


def model_args(inputs: Any) -> tuple[Any, ...]:
    """The model's positional arguments."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def parts_of(batch: Batch, num: int) -> list[Batch]:
    """The batch in `num` consecutive parts whose sizes differ by one at most, or in as many as it has samples; tensors
    of another length go whole into each.

    Ranks whose shares differ a little must come to the same number: kernels' gradients are averaged after each.

    Args:
        batch: (inputs, targets).
        num: 1 gives the batch itself.
    """
    num_samples = batch_len(batch)
    num_parts = min(num, num_samples)
    if num_parts <= 1:
        return [batch]
    ends = [(part + 1) * num_samples // num_parts for part in range(num_parts)]
    return [_slice(batch, first, last, num_samples) for first, last in zip([0, *ends], ends, strict=False)]


def _slice(value: Any, first: int, last: int, num_samples: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[first:last] if value.dim() > 0 and value.shape[0] == num_samples else value
    if isinstance(value, (tuple, list)):
        return type(value)(_slice(item, first, last, num_samples) for item in value)
    if isinstance(value, dict):
        return {key: _slice(item, first, last, num_samples) for key, item in value.items()}
    return value


def batch_len(batch: Batch) -> int:
    """Samples of a batch: the first dimension of its first input, or of the first entry of that where it is a dict."""
    return samples_of(model_args(batch[0]))


def samples_of(args: tuple[Any, ...]) -> int:
    """Samples that a model's positional arguments hold."""
    first = args[0]
    while isinstance(first, dict):
        first = next(entry for entry in first.values() if not isinstance(entry, torch.Tensor) or entry.dim() > 0)
    return len(first)


def to_device(value: Any, device: torch.device) -> Any:
    """Moves tensors within tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def example_of(data: Data, *, num_samples: int = 2) -> tuple[Any, ...]:
    """The model's positional arguments for the first samples of `data`.

    Raises:
        DataError: if there are none.
    """
    batches = evaluation_batches(data, batch_size=num_samples, field="train_data")
    first = next(batches.epoch(0, rank=0, world=1), None)
    if first is None:
        raise DataError("no batches", field="train_data")
    args = model_args(first[0])
    return args if samples_of(args) <= num_samples else _slice(args, 0, num_samples, samples_of(args))


class _Samples(Protocol):
    def __len__(self) -> int: ...

    def take(self, indices: torch.Tensor, epoch: int) -> Batch: ...


class _Tensors:
    def __init__(self, inputs: tuple[torch.Tensor, ...], targets: torch.Tensor, *, single: bool) -> None:
        self._inputs, self._targets, self._single = inputs, targets, single

    def __len__(self) -> int:
        return len(self._targets)

    def take(self, indices: torch.Tensor, epoch: int) -> Batch:  # noqa: ARG002 - part of the port
        picked = tuple(tensor[indices] for tensor in self._inputs)
        return (picked[0] if self._single else picked), self._targets[indices]


class _Items:
    """A map-style dataset; `set_epoch`, where it has one, is called so that it may draw anew."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset
        self._epoch: int | None = None

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def take(self, indices: torch.Tensor, epoch: int) -> Batch:
        if epoch != self._epoch:
            self._epoch = epoch
            if callable(set_epoch := getattr(self._dataset, "set_epoch", None)):
                set_epoch(epoch)
        inputs, targets = default_collate([self._dataset[int(index)] for index in indices])
        return (tuple(inputs) if isinstance(inputs, list) else inputs), targets


class _Shuffled:
    def __init__(self, samples: _Samples, batch_size: int, seed: int) -> None:
        self._samples, self._batch_size, self._seed = samples, batch_size, seed

    def num_batches(self, *, world: int) -> int:
        self._share(world)
        return len(self._samples) // self._batch_size

    def epoch(self, epoch: int, *, rank: int, world: int) -> Iterator[Batch]:
        share = self._share(world)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._samples), generator=generator)
        for batch in range(self.num_batches(world=world)):
            first = batch * self._batch_size + rank * share
            yield self._samples.take(order[first : first + share], epoch)

    def _share(self, world: int) -> int:
        if self._batch_size % world:
            raise DataError(
                f"{self._batch_size} samples a step do not divide by {world} workers", field="tolaria.batch_size"
            )
        return self._batch_size // world


class _InOrder:
    def __init__(self, samples: _Samples, batch_size: int) -> None:
        self._samples, self._batch_size = samples, batch_size

    def num_batches(self, *, world: int) -> int:
        return -(-len(self._samples) // (self._batch_size * world))

    def epoch(self, epoch: int, *, rank: int, world: int) -> Iterator[Batch]:  # noqa: ARG002 - the same every epoch
        for part in torch.arange(len(self._samples))[rank::world].split(self._batch_size):
            if not len(part):
                return  # more ranks than samples
            yield self._samples.take(part, 0)


class _Loaders:
    def __init__(self, factory: LoaderFactory, field: str) -> None:
        self._factory, self._field = factory, field

    def num_batches(self, *, world: int) -> int:
        loader = self._factory(0, world, 0)
        if not isinstance(loader, Sized):
            raise DataError(
                f"the factory's {type(loader).__name__} has no length", field=self._field, remedy="give it a __len__"
            )
        return len(loader)

    def epoch(self, epoch: int, *, rank: int, world: int) -> Iterator[Batch]:
        for inputs, targets in self._factory(rank, world, epoch):
            yield (tuple(inputs) if isinstance(inputs, list) else inputs), targets


def _samples(data: Data, field: str) -> _Samples | None:
    """The data by index; None for a factory."""
    if isinstance(data, TensorDataset):
        *inputs, targets = data.tensors
        return _Tensors(tuple(inputs), targets, single=len(inputs) == 1)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], torch.Tensor):
        inputs, targets = data
        columns = model_args(inputs)
        short = next((len(column) for column in columns if len(column) != len(targets)), None)
        if short is not None:
            raise DataError(f"{short} inputs but {len(targets)} targets", field=field)
        return _Tensors(columns, targets, single=isinstance(inputs, torch.Tensor))
    if isinstance(data, (DataLoader, IterableDataset)):
        raise DataError(
            f"a {type(data).__name__} has an order of its own that a resumed run could not find again",
            field=field,
            remedy="give its dataset, or a factory: lambda rank, world, epoch: DataLoader(...)",
        )
    if hasattr(data, "__getitem__") and isinstance(data, Sized) and not isinstance(data, (str, bytes, dict)):
        return _Items(data)  # type: ignore[arg-type]
    if callable(data):
        return None
    raise DataError(
        f"cannot read data of type {type(data).__name__}",
        field=field,
        remedy="give (inputs, targets) tensors, a Dataset, or a factory of DataLoaders",
    )
