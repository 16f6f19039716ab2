"""GAE, V-trace and PPO's losses beside the numbers of torchrl (versions in the fixture), and what must hold of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.simic.gae import effective_share, gae, vtrace
from esper.simic.ppo import losses

NUMBERS = json.loads((Path(__file__).parent / "fixtures" / "torchrl_numbers.json").read_text())


def arrays(part, *names):
    return [np.array(NUMBERS[part][name]) for name in names]


@pytest.mark.parametrize("case", NUMBERS["gae"]["cases"], ids=lambda case: f"{case['gamma']}-{case['lam']}")
def test_gae_is_that_of_torchrl(case):
    rewards, values, dones = arrays("gae", "rewards", "values", "dones")
    found = gae(rewards, values, dones, gamma=case["gamma"], lam=case["lam"])
    np.testing.assert_allclose(found.advantages, case["advantages"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.returns, case["returns"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", NUMBERS["vtrace"]["cases"], ids=lambda case: f"{case['gamma']}-{case['rho']}")
def test_vtrace_is_that_of_torchrl(case):
    rewards, values, dones, log_pi, log_mu = arrays("vtrace", "rewards", "values", "dones", "log_pi", "log_mu")
    found = vtrace(rewards, values, dones, log_pi - log_mu, gamma=case["gamma"], rho=case["rho"], c=case["c"])
    np.testing.assert_allclose(found.returns, case["targets"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.advantages, case["advantages"], rtol=1e-6, atol=1e-7)


class Linear(torch.nn.Module):
    """The policy and the value of the fixture."""

    def __init__(self):
        super().__init__()
        policy, value = arrays("ppo", "policy", "value")
        self.policy = torch.nn.Parameter(torch.from_numpy(policy))
        self.value = torch.nn.Parameter(torch.from_numpy(value))

    def evaluate(self, batch, choices):
        log_probs = torch.log_softmax(batch @ self.policy, -1)
        chosen = log_probs.gather(1, torch.tensor(choices)[:, None])[:, 0]
        return chosen, -(log_probs.exp() * log_probs).sum(-1), batch @ self.value


def test_ppo_losses_and_their_gradients_are_those_of_torchrl():
    net, told = Linear(), NUMBERS["ppo"]
    x, old, advantages, returns = (
        torch.from_numpy(one) for one in arrays("ppo", "x", "old_log_probs", "advantages", "returns")
    )
    found = losses(net, x, told["actions"], old, advantages, returns, told["clip"])
    assert found.policy.item() == pytest.approx(told["loss_policy"], rel=1e-6)
    assert told["value_weight"] * found.value.item() == pytest.approx(told["loss_value"], rel=1e-6)
    assert -told["entropy"] * found.entropy.item() == pytest.approx(told["loss_entropy"], rel=1e-6)
    (found.policy + told["value_weight"] * found.value - told["entropy"] * found.entropy).backward()
    np.testing.assert_allclose(net.policy.grad.T.numpy(), told["policy_gradient"], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(net.value.grad.numpy(), told["value_gradient"], rtol=1e-5, atol=1e-8)


@st.composite
def episodes(draw):
    num = draw(st.integers(1, 12))
    figures = st.floats(-2, 2, allow_nan=False, width=32)
    rewards, values = (np.array(draw(st.lists(figures, min_size=n, max_size=n))) for n in (num, num + 1))
    dones = np.array(draw(st.lists(st.booleans(), min_size=num, max_size=num)))
    return rewards, values, dones


@given(episodes(), st.floats(0.5, 1.0))
def test_vtrace_of_the_policy_that_chose_is_gae_with_lambda_1(episode, gamma):
    rewards, values, dones = episode
    own, others = (
        gae(rewards, values, dones, gamma=gamma, lam=1.0),
        vtrace(*episode, np.zeros(len(rewards)), gamma=gamma),
    )
    np.testing.assert_allclose(own.returns, others.returns, atol=1e-9)


@given(episodes())
def test_nothing_passes_the_end_of_an_episode(episode):
    rewards, values, dones = episode
    dones[len(dones) // 2] = True
    cut = len(dones) // 2 + 1
    whole = gae(rewards, values, dones, gamma=1.0, lam=0.9)
    first = gae(rewards[:cut], values[: cut + 1], dones[:cut], gamma=1.0, lam=0.9)
    np.testing.assert_allclose(whole.advantages[:cut], first.advantages)


def test_samples_of_another_policy_are_worth_less():
    alike, other = np.zeros(100), np.random.default_rng(0).normal(0, 1.5, 100)
    assert effective_share(alike) == pytest.approx(1.0)
    assert effective_share(alike - 3.0) == pytest.approx(1.0)
    assert 0.0 < effective_share(other) < 0.5
    assert effective_share(np.zeros(0)) == 0.0
