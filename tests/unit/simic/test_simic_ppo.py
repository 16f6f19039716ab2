"""PPO learns: a contextual bandit with masks and a small MDP, each solved exactly beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esper.simic.gae import gae
from esper.simic.ppo import Ppo, Samples, normalised
from esper.simic.settings import PpoConfig

FLOOR = 0.02


class Table(torch.nn.Module):
    """A softmax for each state over what its mask allows, with a floor, and a value for each."""

    def __init__(self, masks):
        super().__init__()
        self.masks = torch.tensor(masks, dtype=torch.bool)
        self.logits = torch.nn.Parameter(torch.zeros(self.masks.shape))
        self.values = torch.nn.Parameter(torch.zeros(len(masks)))

    def probabilities(self, states):
        allowed = self.masks[states].float()
        free = torch.softmax(self.logits[states].masked_fill(~self.masks[states], -torch.inf), -1)
        return (1 - FLOOR * allowed.sum(-1, keepdim=True)) * free + FLOOR * allowed

    def evaluate(self, batch, choices):
        chances = self.probabilities(batch)
        chosen = chances.gather(1, torch.as_tensor(choices)[:, None])[:, 0].log()
        entropy = -(chances * torch.where(self.masks[batch], chances, 1.0).log()).sum(-1)
        return chosen, entropy, self.values[batch]


class World:
    """Finite states; `step(state, action) -> (reward, next state or None)`."""

    def __init__(self, masks, step, starts, gamma):
        self.masks, self.step, self.starts, self.gamma = masks, step, starts, gamma

    def best(self):
        """Values of the best policy that the masks allow, by value iteration."""
        values = np.zeros(len(self.masks))
        for _ in range(500):
            values = np.array([max(self.worth(s, a, values) for a in self.allowed(s)) for s in range(len(values))])
        return values

    def worth(self, state, action, values):
        reward, after = self.step(state, action)
        return reward + (0.0 if after is None else self.gamma * values[after])

    def allowed(self, state):
        return [a for a, may in enumerate(self.masks[state]) if may]

    def play(self, net, num, random):
        states, actions, rewards, dones = [], [], [], []
        for _ in range(num):
            state = int(random.choice(self.starts))
            for _ in range(30):
                chances = net.probabilities(torch.tensor([state]))[0].detach().double().numpy()
                action = int(random.choice(len(chances), p=chances / chances.sum()))
                assert self.masks[state][action]
                reward, after = self.step(state, action)
                states.append(state)
                actions.append(action)
                rewards.append(reward)
                dones.append(after is None)
                if after is None:
                    break
                state = after
            dones[-1] = True
        return states, actions, np.array(rewards), np.array(dones)


def train(world, config, *, updates=60, episodes=32, harm=None):
    torch.manual_seed(0)
    random, net = np.random.default_rng(0), Table(world.masks)
    ppo = Ppo(net, torch.tensor, config, seed=0)
    reports = []
    for _ in range(updates):
        states, actions, rewards, dones = world.play(net, episodes, random)
        with torch.no_grad():
            old, _, values = (one.double().numpy() for one in net.evaluate(torch.tensor(states), actions))
        found = gae(rewards, np.append(values, 0.0), dones, gamma=world.gamma, lam=config.lam)
        cost = np.zeros(len(actions)) if harm is None else np.array([*map(harm, states, actions)])
        samples = Samples(states, actions, old, found.advantages, found.returns, cost)
        reports.append(ppo.update(samples, mean_harm=cost.sum() / episodes))
    return net, reports


FAST = PpoConfig(lr=0.05, minibatch=128, target_kl=0.05, entropy_weight=0.0, gamma=0.9)


def greedy(net, world):
    chances = net.probabilities(torch.arange(len(world.masks)))
    return chances.argmax(-1).tolist()


def bandit():
    """Six contexts, four arms; in each the best arm of all is masked out."""
    worth = np.random.default_rng(3).normal(size=(6, 4))
    masks = np.ones((6, 4), dtype=bool)
    masks[np.arange(6), worth.argmax(1)] = False
    return World(masks.tolist(), lambda state, action: (worth[state, action], None), range(6), 1.0)


def chain():
    """Seven places; to the right the reward of 1 at the end is far, to the left 0.2 is near; one detour is masked."""
    masks = [[True, True, True] for _ in range(7)]
    masks[3][2] = False  # the shortcut is closed here

    def step(state, action):
        if action == 0:
            return (0.2, None) if state == 0 else (0.0, state - 1)
        if action == 1:
            return (1.0, None) if state == 6 else (0.0, state + 1)
        return (-0.05, min(state + 3, 6))

    return World(masks, step, range(7), 0.9)


def test_a_masked_contextual_bandit_is_solved():
    world = bandit()
    net, _ = train(world, FAST)
    best = world.best()
    chosen = greedy(net, world)
    assert [world.worth(s, a, best) for s, a in enumerate(chosen)] == pytest.approx(best.tolist())
    chances = net.probabilities(torch.arange(6)).detach()
    assert (chances[~net.masks] == 0).all()
    assert (chances[net.masks] >= FLOOR - 1e-6).all()  # nothing that is allowed became impossible
    assert float(chances.max(-1).values.min()) > 0.6


def test_a_small_mdp_is_solved():
    world = chain()
    net, reports = train(world, FAST, updates=120)
    best = world.best()
    for state, action in enumerate(greedy(net, world)):
        assert world.worth(state, action, best) == pytest.approx(best[state], abs=1e-9), state
    # values are those of the policy as it is played, floors and all
    assert net.values.detach().numpy() == pytest.approx(best, abs=0.15)
    assert reports[-1].value < reports[0].value


def test_without_learning_neither_would_be():
    """Else the tests above could not fail."""
    for world in (bandit(), chain()):
        best = world.best()
        chosen = greedy(Table(world.masks), world)
        assert any(world.worth(s, a, best) < best[s] - 1e-6 for s, a in enumerate(chosen))


def test_harm_beyond_its_limit_comes_to_outweigh_the_reward():
    """The best arm of one context does harm each time: with a limit it is given up, without one it is taken."""
    worth = np.array([[1.0, 0.6, 0.0]])
    world = World([[True, True, True]], lambda state, action: (worth[state, action], None), [0], 1.0)

    def harm(state, action):
        return float(action == 0)

    careless, _ = train(world, FAST.model_copy(update={"harm_lr": 0.0}), harm=harm)
    careful, reports = train(world, FAST.model_copy(update={"harm_lr": 0.5, "max_harm": 0.05}), harm=harm)
    assert greedy(careless, world) == [0]
    assert greedy(careful, world) == [1]
    assert reports[-1].harm_weight > 0.0


def test_the_kl_penalty_adapts():
    config = FAST.model_copy(update={"lr": 0.5, "target_kl": 0.001, "kl_weight": 0.2})
    _, fast = train(bandit(), config, updates=4)
    assert fast[-1].kl_weight > 0.2
    _, slow = train(bandit(), FAST.model_copy(update={"lr": 1e-5, "kl_weight": 0.2}), updates=4)
    assert slow[-1].kl_weight < 0.2
    assert fast[0].num_steps < 4 * slow[0].num_steps or fast[0].kl <= 0.004  # it stops when it has gone too far


def test_gradients_are_clipped():
    net, _ = train(bandit(), FAST.model_copy(update={"clip_norm": 1e-9, "lr": 1e-9}), updates=2)
    assert net.logits.detach().abs().max() < 1e-6


def test_what_is_not_finite_is_refused_before_anything_is_changed():
    net = Table([[True, True]])
    ppo = Ppo(net, torch.tensor, FAST)
    bad = Samples([0, 0], [0, 1], np.array([0.0, np.nan]), np.ones(2), np.ones(2), np.zeros(2))
    with pytest.raises(ValueError, match="log_probs"):
        ppo.update(bad)
    with pytest.raises(ValueError, match="no samples"):
        ppo.update(Samples([], [], *[np.zeros(0)] * 4))
    assert (net.logits == 0).all()


def test_it_goes_on_as_it_would_have():
    """Killed between two updates and begun again from its state: the same weights, bit for bit."""

    def samples(net, seed):
        states, actions, rewards, dones = world.play(net, 16, np.random.default_rng(seed))
        with torch.no_grad():
            old, _, values = (one.double().numpy() for one in net.evaluate(torch.tensor(states), actions))
        found = gae(rewards, np.append(values, 0.0), dones, gamma=1.0, lam=0.95)
        return Samples(states, actions, old, found.advantages, found.returns, np.zeros(len(actions)))

    world = bandit()
    net = Table(world.masks)
    ppo = Ppo(net, torch.tensor, FAST)
    ppo.update(samples(net, 0))
    weights, state = {k: v.clone() for k, v in net.state_dict().items()}, ppo.state_dict()
    again_net = Table(world.masks)
    again_net.load_state_dict(weights)
    again = Ppo(again_net, torch.tensor, FAST, seed=9)
    again.load_state_dict(state)
    ppo.update(samples(net, 1))
    again.update(samples(again_net, 1))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again_net.parameters(), strict=True))


def test_normalised_advantages():
    assert normalised(np.array([1.0, 2.0, 3.0])).mean() == pytest.approx(0.0)
    assert normalised(np.array([1.0, 2.0, 3.0])).std() == pytest.approx(1.0)
    assert normalised(np.full(3, 0.7)).tolist() == [0.0, 0.0, 0.0]
