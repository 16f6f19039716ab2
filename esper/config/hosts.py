"""The host of a run, the network that is to grow: a union on `type`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from esper.config.section import PositiveInt, Section


class _Host(Section):
    """What every host may start from."""

    weights: str | None = None
    """Trained weights to start from, a `state_dict` of this very host: a safetensors file, or one of `torch.save`; a
    path or any fsspec address. Null starts from new ones."""
    weights_options: dict[str, Any] = Field(default_factory=dict)
    """Of the fsspec driver, for an address with a scheme. Secrets belong in its environment variables."""


class MlpHost(_Host):
    """Linear layers with ReLU: inputs -> hidden... -> classes."""

    type: Literal["mlp"] = "mlp"
    hidden: tuple[PositiveInt, ...] = (8, 10)


class CnnHost(_Host):
    """Stages of 3x3 convolution, batch norm and ReLU; each but the first halves the resolution. A linear head."""

    type: Literal["cnn"] = "cnn"
    patch: PositiveInt = 1
    """Side in pixels of the squares that a convolution before the first stage reads, without overlap; 1 is none."""
    channels: tuple[PositiveInt, ...] = (4, 8)
    blocks_per_stage: PositiveInt = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class ResNetHost(_Host):
    """Stages of residual blocks (two 3x3 convolutions with batch norm); each but the first halves the resolution."""

    type: Literal["resnet"] = "resnet"
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (8, 16)
    blocks_per_stage: PositiveInt = 1


class VitHost(_Host):
    """A vision transformer on square patches: pre-norm, learned positions, the mean over positions in a linear head."""

    type: Literal["vit"] = "vit"
    patch: PositiveInt = 2
    """Side of a patch in pixels."""
    width: PositiveInt = 32
    depth: PositiveInt = 2
    heads: PositiveInt = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class GptHost(_Host):
    """A decoder-only transformer, pre-norm, learned positions, tied or untied head."""

    type: Literal["gpt"] = "gpt"
    width: PositiveInt = 64
    depth: PositiveInt = 2
    heads: PositiveInt = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tied: bool = False


class ImportedHost(_Host):
    """Your own model: `target: package.module:function`, called with `args`; must return an `nn.Module`."""

    type: Literal["import"] = "import"
    target: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    args: dict[str, Any] = Field(default_factory=dict)


class RunHost(_Host):
    """The network that a run left, what it grew included, which is an ordinary part of this host."""

    type: Literal["run"] = "run"
    run: Annotated[str, Field(min_length=1)]
    """The run's folder, a path or any address that `storage_options` open; `esper train --from RUN` finds it."""
    epoch: Annotated[int, Field(ge=0)] | None = None
    """Of its checkpoint, as its folder is numbered. Null: the last, whose number a run notes when it begins."""


class GivenHost(_Host):
    """A model handed over in Python (`esper.grow`)."""

    type: Literal["given"] = "given"


Host = Annotated[
    MlpHost | CnnHost | ResNetHost | VitHost | GptHost | ImportedHost | RunHost | GivenHost, Field(discriminator="type")
]
