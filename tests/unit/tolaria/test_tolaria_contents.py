"""What a host holds beside parameters: buffers that its state_dict leaves out, and extra state of its modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tolaria_support import Crash, CrashAt, config, equal, model, train, workload
from torch import nn

import esper
from esper.leyline import ConfigError
from esper.tolaria.contents import contents, refill, tensors
from esper.tolaria.tree import clone


class Counting(nn.Module):
    """A block that leans on a counter outside its state_dict, and tells of it in its extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(12, 12)
        self.given = None
        self.lock = 1
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.count += 1
        return self.body(x).relu() * (1 + 0.01 * torch.sin(self.count))

    def get_extra_state(self):
        return {"count": float(self.count), "shapes": [(12, 12)], "lock": self.lock}

    def set_extra_state(self, state):
        self.given = state


def counting_model() -> nn.Module:
    host = model()
    host[3] = Counting()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        host[3].body.reset_parameters()
    return host


def test_all_of_it_comes_back():
    host = counting_model()
    host(torch.randn(4, 8))
    state = clone(contents(host))
    counted = host[3].count
    host(torch.randn(4, 8))
    host[3].cache = torch.ones(2)
    assert float(host[3].count) == 2.0
    refill(host, state)
    assert (float(host[3].count), host[3].given) == (1.0, {"count": 1.0, "shapes": [(12, 12)], "lock": 1})
    assert host[3].cache is None
    assert host[3].count is counted  # a compiled host keeps its buffer
    host[3].cache = torch.ones(2)
    longer = clone(contents(host))
    host[3].cache = torch.ones(3)
    refill(host, longer)
    assert torch.equal(host[3].cache, torch.ones(2))


def test_every_tensor_is_seen_and_nothing_else():
    found = tensors(counting_model())
    assert "3.count" in found
    assert "3.cache" not in found
    assert all(isinstance(value, torch.Tensor) for value in found.values())


def test_a_resumed_run_knows_them(tmp_path):
    chosen = config(tolaria__epochs=3)

    def problem():
        return replace(workload(chosen), model=counting_model())

    first, again = problem(), problem()
    _, whole = train(tmp_path / "whole", chosen, problem=first)
    fault = CrashAt("checkpoint", 1)
    with pytest.raises(Crash):
        train(tmp_path / "torn", chosen, problem=problem(), faults=fault)
    _, resumed = train(tmp_path / "torn", chosen, problem=again, resume=True)
    assert fault.fired
    assert whole.pop("3._extra_state") == resumed.pop("3._extra_state")
    assert equal(whole, resumed)
    assert float(first.model[3].count) == float(again.model[3].count) == 9.0  # 3 steps an epoch
    assert again.model[3].given["count"] == 6.0


def test_extra_state_that_no_checkpoint_can_hold_is_refused():
    host = counting_model()
    host[3].lock = object()
    words = r"get_extra_state of Counting at 3 .* state\.lock is a object.*JSON values and tensors"
    with pytest.raises(ConfigError, match=words):
        esper.wrap(host, example=(torch.zeros(2, 8),), sites=["3"])
