"""OPAC: the updates by hand, what acts and how likely it was, features, the linear variant; the rest is in the contracts."""

import copy
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from batches import SGD, engine_on_and_off, feed
from environments import BOX, CONTINUOUS, DICT, RandomEnv
from gymnasium import spaces
from models import LINEAR, small_model
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_ac_ext import OPAC, TD3X
from sb3_ac_ext.buffers.prioritized import PrioritizedReplayBuffer
from sb3_ac_ext.opac.buffer import LOG_PROB, BehaviourReplayBuffer, BehaviourSamples, DictBehaviourReplayBuffer
from sb3_ac_ext.opac.features import TileCoding
from sb3_ac_ext.validation import UnsupportedError

CHOICES = spaces.Discrete(3)
LOGITS, Q, B = np.array([0.2, -0.4, 0.1]), np.array([1.0, 0.0, 3.0]), np.array([0.6, 0.3, 0.1])
EXACT = (-0.20943202, -0.33861034, 0.54804236)
"""The gradient of sum_a pi(a) Q(a) with respect to the logits."""
BIASED = (-0.04664198, -0.24926927, 0.29591125)
"""What b's actions with weights of at most 1 give instead."""


def bandit(actions: spaces.Space = CHOICES, **changes: Any) -> Any:
    """One state; the actor's outputs and the critic's Q are biases, and each update moves the actor by its gradient."""
    rates = {"actor_learning_rate": 1.0, "critic_learning_rate": 0.0, "ent_coef": 0.0, "tau": 1.0}
    policy_kwargs = {**SGD, "net_arch": [], "n_critics": 1}
    model = small_model("opac", env=RandomEnv(BOX, actions), **rates, policy_kwargs=policy_kwargs, **changes)
    if isinstance(actions, spaces.Discrete):
        model.actor.logits.bias.data = th.tensor(LOGITS, dtype=th.float32)
        for critic in (model.critic, model.critic_target):
            critic.q_networks[0][-1].bias.data = th.tensor(Q, dtype=th.float32)
    return model


def of_one_state(actions: Any, log_probs: Any = 0.0, reward: float = 0.0, done: float = 0.0) -> BehaviourSamples:
    """Transitions from the state whose numbers are 0, to it."""
    n = len(actions)
    states, ones = th.zeros(n, 4), th.ones(n, 1)
    log_probs = th.as_tensor(log_probs, dtype=th.float32) * ones
    return BehaviourSamples(states, actions, states, done * ones, reward * ones, None, log_probs)


def step_of(model: Any, batch: BehaviourSamples, module: Any) -> np.ndarray:
    """By how much an update moves the biases."""
    before = module.bias.detach().clone()
    feed(model, [batch])
    model.train(1, len(batch.actions))
    return (module.bias.detach() - before).numpy()


# Gradients of the actor


@engine_on_and_off
@pytest.mark.parametrize(("rho_max", "expected"), [(None, EXACT), (1.0, BIASED)], ids=["unbiased", "clipped"])
def test_weighted_actions_of_the_behaviour(engine: bool, rho_max: float | None, expected: tuple[float, ...]) -> None:
    """Each action as often as b takes it."""
    model = bandit(variant="is", critic_type="q", rho_max=rho_max, engine=engine)
    actions = th.tensor(np.repeat([0, 1, 2], (10 * B).round().astype(int)))[:, None]
    step = step_of(model, of_one_state(actions, np.log(B)[actions]), model.actor.logits)
    np.testing.assert_allclose(step, expected, atol=1e-6)


def test_exact_gradient() -> None:
    model = bandit()
    np.testing.assert_allclose(step_of(model, of_one_state(th.zeros(4, 1).long()), model.actor.logits), EXACT, atol=1e-6)


@pytest.mark.parametrize("baseline", [None, "leave-one-out", "v"])
def test_score_gradient_has_the_exact_mean(baseline: str | None) -> None:
    model = bandit(actor_gradient="score", baseline=baseline, n_actor_samples=2)
    step = step_of(model, of_one_state(th.zeros(60_000, 1).long()), model.actor.logits)
    np.testing.assert_allclose(step, EXACT, atol=0.02)  # standard errors are below 0.005


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        (None, (-0.31511249, -0.44734322, 0.76245572)),
        ("leave-one-out", (-1.0, 0.0, 1.0)),
        ("v", (-0.45506057, -0.10873288, 0.56379345)),
    ],
)
def test_baselines(baseline: str | None, expected: tuple[float, ...]) -> None:
    """Of the draws 2 and 0."""
    model = bandit(actor_gradient="score", baseline=baseline, n_actor_samples=2, engine=False)
    draws = iter([2, 0])
    original = model.actor.sample

    def sample(outputs: Any) -> Any:
        if not outputs.requires_grad:  # of the target
            return original(outputs)
        return th.full((len(outputs), 1), next(draws)), None

    model.actor.sample = sample
    np.testing.assert_allclose(step_of(model, of_one_state(th.zeros(1, 1).long()), model.actor.logits), expected, atol=1e-6)


@pytest.mark.parametrize("actor_gradient", ["reparam", "score"])
def test_gradients_in_a_box(actor_gradient: str) -> None:
    """Of Q = -(a - 1)^2, a = tanh(u), u ~ N(m, s^2), against quadrature."""
    model = bandit(spaces.Box(-1, 1, (1,)), actor_gradient=actor_gradient, engine=False)
    model.actor.mu.bias.data.fill_(0.3)
    raw = math.log(0.5 - 0.05)  # the smallest std is added
    model.actor.log_std.bias.data.fill_(raw)
    model.critic.forward = lambda obs, actions: (-(actions - 1).square(),)
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    a = np.tanh(0.3 + 0.5 * points)
    slope = -2 * (a - 1) * (1 - a**2)
    expected = [np.average(slope, weights=weights), np.average(slope * points, weights=weights) * math.exp(raw)]
    before = [layer.bias.item() for layer in (model.actor.mu, model.actor.log_std)]
    feed(model, [of_one_state(th.zeros(100_000, 1))])
    model.train(1, 100_000)
    step = [layer.bias.item() - was for layer, was in zip((model.actor.mu, model.actor.log_std), before, strict=True)]
    np.testing.assert_allclose(step, expected, atol=0.02)


@pytest.mark.parametrize("actions", [CHOICES, spaces.Box(-1, 1, (1,))], ids=["choices", "box"])
def test_entropy_is_ascended(actions: spaces.Space) -> None:
    model = bandit(actions, actor_gradient="score")
    model.ent_coef = 1.0
    if isinstance(actions, spaces.Discrete):
        model.critic.q_networks[0][-1].bias.data.zero_()
        step = step_of(model, of_one_state(th.zeros(4, 1).long()), model.actor.logits)
        probs = np.exp(LOGITS) / np.exp(LOGITS).sum()
        np.testing.assert_allclose(step, -probs * (np.log(probs) - (probs * np.log(probs)).sum()), atol=1e-6)
    else:
        model.critic.forward = lambda obs, actions: (0.0 * actions,)
        model.actor.log_std.bias.data.fill_(-3.0)
        assert step_of(model, of_one_state(th.zeros(1000, 1)), model.actor.log_std)[0] > 0.1


# Targets and the critic


@pytest.mark.parametrize(
    ("target", "done", "expected"),
    [("exact", 0, {2.36248541}), (None, 0, {2.36248541}), ("sample", 0, {1.9, 1.0, 3.7}), ("exact", 1, {1.0})],
)
def test_targets(target: str | None, done: float, expected: set[float]) -> None:
    """Not that of the replayed action, which is 1; the first update moves Q(s, 1) by its share of (y - 0)."""
    seen = set()
    for seed in range(1 if target != "sample" else 12):
        model = bandit(target=target, gamma=0.9, seed=seed)
        model.critic_learning_rate = 1.0
        step = step_of(model, of_one_state(th.ones(1, 1).long(), reward=1.0, done=done), model.critic.q_networks[0][-1])
        seen.add(round(float(step[1]), 5))
        assert step[0] == step[2] == 0
    assert seen == {round(value, 5) for value in expected}


@engine_on_and_off
def test_weighted_value_by_hand(engine: bool) -> None:
    """The weight stands before the square, targets are of the other network, advantages those of before the critic's step."""
    model = small_model("opac", "weighted", learning_rate=1.0, policy_kwargs=SGD, ent_coef=0.0, rho_max=1.5, engine=engine)
    for parameter in model.critic.parameters():
        parameter.data.add_(0.1)
    generator = th.Generator().manual_seed(3)
    s, next_s, r = (th.randn(16, n, generator=generator) for n in (4, 4, 1))
    a, d = th.randint(3, (16, 1), generator=generator), (th.rand(16, 1, generator=generator) < 0.3).float()
    log_b = th.randn(16, 1, generator=generator) - 1
    feed(model, [BehaviourSamples(s, a, next_s, d, r, None, log_b)])

    log_pi = th.distributions.Categorical(logits=model.actor(s)).log_prob(a[:, 0])[:, None]
    rho = (log_pi - log_b).exp().clamp(max=1.5).detach()
    assert (rho == 1.5).any() and (rho < 1.5).any()
    next_v = th.minimum(*model.critic_target(next_s)).detach()
    y = r + 0.99 * (1 - d) * next_v
    values = model.critic(s)
    critic_loss = sum(0.5 * (rho * (y - v) ** 2).mean() for v in values)
    actor_loss = -(rho * (y - th.minimum(*values)).detach() * log_pi).mean()
    losses = ((model.critic, critic_loss), (model.actor, actor_loss))
    expected = [
        [p - g for p, g in zip(net.parameters(), th.autograd.grad(loss, [*net.parameters()]), strict=True)]
        for net, loss in losses
    ]
    model.train(1, 16)
    assert model.logger.name_to_value["train/importance_ratio"] == pytest.approx(rho.mean().item(), rel=1e-5)
    for (net, _), wanted in zip(losses, expected, strict=True):
        for parameter, value in zip(net.parameters(), wanted, strict=True):
            th.testing.assert_close(parameter, value, rtol=1e-4, atol=1e-5)


# What acts, and how likely it was


def drawn(model: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """``(n, ...)`` actions as they are stored, at one observation, and log b of them."""
    model._last_obs = np.tile(np.float32([0.3, -0.2, 0.5, 0.1]), (n, 1))
    model._set_training_mode(False)
    _, stored = model._sample_action(model.learning_starts, None, n)
    return stored, model._log_probs


def epsilon(behaviour: str) -> dict[str, float]:
    return {"epsilon": 0.4} if behaviour == "epsilon" else {}


@pytest.mark.parametrize("behaviour", ["policy", "uniform", "epsilon"])
def test_frequencies_of_choices_are_what_is_stored(behaviour: str) -> None:
    n = 20_000
    model = small_model("opac", "weighted", behaviour=behaviour, learning_starts=0, **epsilon(behaviour))
    model.actor.logits.bias.data = th.tensor([1.5, 0.0, -2.0])
    model.num_timesteps = 1
    actions, log_b = drawn(model, n)
    with th.no_grad():
        pi = model.actor(th.as_tensor(model._last_obs[:1])).softmax(dim=1)[0].numpy()
    expected = {"policy": pi, "uniform": np.full(3, 1 / 3), "epsilon": 0.6 * pi + 0.4 / 3}[behaviour]
    np.testing.assert_allclose(log_b, np.log(expected)[actions], atol=1e-5)
    shares = np.bincount(actions, minlength=3) / n
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / n))


@pytest.mark.parametrize("behaviour", ["policy", "uniform", "epsilon", "policy_noise"])
def test_densities_in_a_box_are_what_is_stored(behaviour: str) -> None:
    """The mean of 1 / b over what b draws in a part of the space is the volume of the part; actions are not in [-1, 1]."""
    n = 20_000
    noise = {"behaviour_noise": 0.7} if behaviour == "policy_noise" else {}
    model = small_model("opac", "weighted Q", behaviour=behaviour, learning_starts=0, **noise, **epsilon(behaviour))
    model.actor.log_std.bias.data.fill_(-0.5)
    model.num_timesteps = 1
    actions, log_b = drawn(model, n)
    for low, high in ((-0.6, 0.0), (0.0, 0.6)):
        inside = ((actions > low) & (actions < high)).all(axis=1)
        terms = inside * np.exp(-log_b)
        assert abs(terms.mean() - 0.36) < 4 * terms.std() / math.sqrt(n) < 0.07
    if behaviour == "epsilon":
        pi = model.policy.log_prob(th.as_tensor(model._last_obs), th.as_tensor(actions)).detach().numpy()[:, 0]
        np.testing.assert_allclose(np.exp(log_b), 0.6 * np.exp(pi) + 0.4 / 4, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("variant", "expected"), [("weighted", -1.09861229), ("weighted Q", -1.38629436)])
def test_warm_up_is_stored_as_uniform(variant: str, expected: float) -> None:
    model = small_model("opac", variant, learning_starts=12, behaviour="policy").learn(20)
    log_probs = model.replay_buffer.log_probs[:20, 0]
    np.testing.assert_allclose(log_probs[:12], expected, rtol=1e-6)
    assert (log_probs[12:] != log_probs[0]).all()


@pytest.mark.parametrize("variant", ["weighted", "weighted Q"])
def test_weights_of_the_policys_own_actions_are_1(variant: str) -> None:
    """Whatever rounding does to actions, and however close to their limits they are."""
    model = small_model("opac", variant, learning_starts=0, learning_rate=0.0, behaviour="policy")
    if variant == "weighted Q":
        model.actor.mu.bias.data.fill_(4.0)
        model.actor.log_std.bias.data.fill_(1.0)
    model.learn(60)
    model.train(1, 200)
    assert model.logger.name_to_value["train/importance_ratio"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", ["array", "dict", "memory"])
def test_log_probabilities_stay_with_their_transitions(kind: str, tmp_path: Path) -> None:
    space = DICT if kind == "dict" else BOX
    cls = DictBehaviourReplayBuffer if kind == "dict" else BehaviourReplayBuffer
    options = {"optimize_memory_usage": True, "handle_timeout_termination": False} if kind == "memory" else {}
    buffer = cls(30, space, CONTINUOUS, "cpu", n_envs=3, **options)
    for _ in range(25):  # more than there is room for
        actions = np.random.uniform(-1, 1, (3, 2)).astype(np.float32)
        observations = [{k: np.stack([v] * 3) for k, v in space.sample().items()} if kind == "dict" else np.zeros((3, 4))] * 2
        infos = [{LOG_PROB: action.sum(), "TimeLimit.truncated": True} for action in actions]
        buffer.add(*observations, actions, actions[:, 0] - actions[:, 1], np.ones(3), infos)
    batch = buffer.sample(64)
    th.testing.assert_close(batch.log_probs, batch.actions.sum(dim=1, keepdim=True))
    th.testing.assert_close(batch.rewards, batch.actions[:, :1] - batch.actions[:, 1:])
    assert (batch.dones == (1 if kind == "memory" else 0)).all()
    with pytest.raises(ValueError, match=LOG_PROB):
        buffer.add(*observations, actions, np.zeros(3), np.ones(3), [{}] * 3)


def test_resumed_training_has_the_same_weights(tmp_path: Path) -> None:
    model = small_model("opac", "weighted").learn(28)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = OPAC.load(tmp_path / "model", env=model.env)
    loaded.load_replay_buffer(tmp_path / "buffer")
    np.testing.assert_array_equal(loaded.replay_buffer.log_probs, model.replay_buffer.log_probs)
    for one in (loaded, model):
        one.set_logger(Logger(None, []))
        one._random_state = OPAC.load(tmp_path / "model")._random_state
        one.train(6, 8)
    assert all(map(th.equal, loaded.policy.parameters(), model.policy.parameters()))


def test_buffers_without_log_probabilities_are_refused(tmp_path: Path) -> None:
    small_model("opac", "discrete").learn(12).save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match=r"must store log b.*ReplayBuffer"):
        small_model("opac", "weighted").load_replay_buffer(tmp_path / "buffer")


# The linear variant


class Scripted(gym.Env):
    """Observations and rewards that follow one another; ends after ``length`` steps."""

    def __init__(self, length: int, truncates: bool) -> None:
        self.length, self.truncates = length, truncates
        self.observation_space, self.action_space = spaces.Box(-2, 2, (2,), np.float32), spaces.Discrete(2)
        self.total = 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        self.t = 0
        return self.seen(), {}

    def seen(self) -> np.ndarray:
        return np.float32([math.sin(self.total + self.length), math.cos(2 * self.total)])

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t, self.total = self.t + 1, self.total + 1
        over = self.t == self.length
        return self.seen(), float(action) + 0.1 * self.t, over and not self.truncates, over and self.truncates, {}


def linear(env: Any, **changes: Any) -> Any:
    rates = {"actor_learning_rate": 0.05, "critic_learning_rate": 0.1, "correction_learning_rate": 0.01}
    arguments = {"variant": "degris", "features": "identity", "gamma": 0.9, "seed": 0, "device": "cpu", **rates, **changes}
    model = OPAC("MlpPolicy", env, **arguments)
    model.set_logger(Logger(None, []))
    return model


def test_table_of_the_specification() -> None:
    """x of three states, rho by log b; the first psi is (.5, -.5) of the uniform policy times x."""
    model = linear(Scripted(9, False))
    model._setup_learn(2)
    policy = model.policy
    policy.v.copy_(th.tensor([0.1, 0.2]))
    policy.w.copy_(th.tensor([0.3, -0.2]))
    states = np.float32([[[1, 0]], [[0.5, 1]], [[0, 1]]])
    model._last_obs, model._last_original_obs = states[0], states[0]
    table = [
        (1.0, 0.5, (0.5, 0), (0.1522, 0.1919), (0.302625, -0.2)),
        (2.0, 2.0, (1.36, 2), (0.41124056, 0.57221722), (0.32877249, -0.16141893)),
    ]
    for t, (r, rho, e, v, w) in enumerate(table):
        with th.no_grad():
            log_pi = policy.log_prob(th.as_tensor(states[t]), th.zeros(1, 1).long()).numpy()[:, 0]
        model._log_probs = log_pi - np.float32(math.log(rho))
        model._store_transition(model.replay_buffer, np.array([0]), states[t + 1], np.array([r]), np.array([False]), [{}])
        for actual, expected in ((model._traces["critic"][0], e), (policy.v, v), (policy.w, w)):
            np.testing.assert_allclose(actual, expected, atol=1e-6)
        if t == 0:
            np.testing.assert_allclose(model._traces["actor"][0], [[0.25, 0], [-0.25, 0]], atol=1e-6)
            np.testing.assert_allclose(policy.u, [[0.0140625, 0], [-0.0140625, 0]], atol=1e-6)


def algorithm_1(steps: list[Any], model: Any) -> tuple[np.ndarray, ...]:
    """The weights after steps of several environments, as the paper has it, in loops."""
    n, gamma, lam = len(steps[0]), model.gamma, model.trace_lambda
    v, w, u = np.zeros(2), np.zeros(2), np.zeros((2, 2))
    e, e_u, gamma_t = [np.zeros(2)] * n, [np.zeros((2, 2))] * n, [0.0] * n
    for of_all in steps:
        changes = []
        for i, (x, a, r, next_x, terminated, ended, b) in enumerate(of_all):
            pi = np.exp(u @ x) / np.exp(u @ x).sum()
            rho = pi[a] / b if b is not None else 1.0
            here = 0.0 if terminated else gamma
            delta = r + here * v @ next_x - v @ x
            e[i] = rho * (x + gamma_t[i] * lam * e[i])
            of_actor = (gamma_t[i] if model.actor_trace_gamma else gamma_t[i] > 0) * lam
            e_u[i] = rho * (np.outer(np.eye(2)[a] - pi, x) + of_actor * e_u[i])
            correction = here * (1 - lam) * (w @ e[i]) * next_x
            changes.append((0.1 * (delta * e[i] - correction), 0.01 * (delta * e[i] - (w @ x) * x), 0.05 * delta * e_u[i]))
            gamma_t[i] = 0.0 if ended else gamma
        v, w, u = (value + sum(change) / n for value, change in zip((v, w, u), zip(*changes, strict=True), strict=True))
    return v, w, u


@pytest.mark.parametrize(
    "changes",
    [
        {"behaviour": "uniform"},
        {"behaviour": "uniform", "trace_lambda": 0.9, "actor_trace_gamma": False},
        {"behaviour": "policy", "trace_lambda": 0.0, "learning_starts": 0},
        {"behaviour": "epsilon", "epsilon": 0.5, "trace_lambda": 1.0},
    ],
    ids=["uniform", "lambda alone", "on policy", "epsilon"],
)
def test_linear_training_by_hand(changes: dict[str, Any]) -> None:
    """Two environments, one of which terminates and one of which truncates: traces are cleared by both."""
    steps: list[Any] = []
    model = linear(DummyVecEnv([lambda: Scripted(3, True), lambda: Scripted(4, False)]), trace_lambda=0.4)
    for name, value in changes.items():
        setattr(model, name, value)
    model.learning_starts = changes.get("learning_starts", 10)
    original = model._learn_from

    def learn_from(obs: Any, actions: Any, new_obs: Any, rewards: Any, dones: Any, infos: Any) -> None:
        own = changes["behaviour"] == "policy"
        steps.append(
            [
                (
                    *(obs[i].astype(float), int(actions[i]), float(rewards[i])),
                    infos[i].get("terminal_observation", new_obs[i]).astype(float),
                    *(dones[i] and not infos[i]["TimeLimit.truncated"], dones[i]),
                    None if own else math.exp(model._log_probs[i]),
                )
                for i in range(2)
            ]
        )
        original(obs, actions, new_obs, rewards, dones, infos)

    model._learn_from = learn_from
    model.learn(60)
    assert len(steps) == 30 and model._n_updates == 30
    for actual, expected in zip((model.policy.v, model.policy.w, model.policy.u), algorithm_1(steps, model), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert model.policy.u.abs().max() > 0.01


def test_linear_training_goes_on_exactly(tmp_path: Path) -> None:
    """With traces, where the environment goes on too."""
    model = linear(DummyVecEnv([lambda: Scripted(30, True)]), behaviour="epsilon", trace_lambda=0.9)
    model.learn(15)
    model.save(tmp_path / "model")
    loaded = OPAC.load(tmp_path / "model", env=copy.deepcopy(model.env), force_reset=False)
    for one in (loaded, model):
        one.set_logger(Logger(None, []))
    model._random_state = OPAC.load(tmp_path / "model")._random_state
    for one in (loaded, model):
        one.learn(10, reset_num_timesteps=False)
    assert th.equal(loaded.policy.u, model.policy.u) and th.equal(loaded._traces["actor"], model._traces["actor"])
    other = OPAC.load(tmp_path / "model", env=DummyVecEnv([lambda: Scripted(5, True)] * 3)).learn(6)
    assert other._traces["critic"].shape == (3, 2)


class Chain(gym.Env):
    """Five states in a row; right at the last one is 1, everything else 0. Starts anywhere."""

    observation_space, action_space = spaces.Discrete(5), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, **kwargs: Any) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(5))
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        over = self.state == 4 and action == 1
        self.state = min(max(self.state + (1 if action else -1), 0), 4)
        return self.state, float(over), over, False, {}


def test_linear_variant_learns_a_chain_from_random_actions() -> None:
    rates = {"actor_learning_rate": 1.0, "critic_learning_rate": 0.3, "correction_learning_rate": 1e-3}
    model = linear(make_vec_env(Chain, 8, seed=0), behaviour="uniform", **rates).learn(20_000)
    right = model.policy.u.softmax(dim=0)[1]
    assert (right > 0.95).all(), right
    assert [model.predict(state, deterministic=True)[0] for state in range(5)] == [1] * 5


def test_linear_error_that_is_not_finite() -> None:
    model = linear(Scripted(30, True), behaviour="uniform", critic_learning_rate=1e6)
    with pytest.raises(ValueError, match="error of the critic became non-finite"):
        model.learn(200)


def test_linear_observation_that_is_not_finite() -> None:
    env = Scripted(9, False)
    env.seen = lambda: np.float32([np.nan if env.total == 12 else 1, 0])
    with pytest.raises(ValueError, match=r"environment 0 gave a non-finite observation"):
        linear(env, features="tile").learn(20)


# Features


def test_tiles_by_hand() -> None:
    space = spaces.Box(np.float32([-1, 0]), np.float32([1, 10]))
    tiles = TileCoding(space, n_tilings=4, n_tiles=5)
    assert tiles.size == 4 * 36
    observations = [space.sample() for _ in range(50)] + [space.low, space.high, space.high + 3]
    features = tiles(th.as_tensor(np.stack(observations)))
    for obs, x in zip(observations, features, strict=True):
        expected = np.zeros((4, 6, 6))
        for t in range(4):
            scaled = np.clip((obs.astype(float) - [-1, 0]) / [2, 10], 0, 1) * 5
            i, j = (int(scaled[k] + (t * (2 * k + 1) % 4) / 4) for k in range(2))
            expected[t, j, i] = 1
        np.testing.assert_array_equal(x, expected.flatten())
    assert (features.sum(dim=1) == 4).all()


def test_near_observations_share_tiles() -> None:
    tiles = TileCoding(spaces.Box(0, 1, (2,)), n_tilings=8, n_tiles=4)
    here, near, far = tiles(th.tensor([[0.5, 0.5], [0.55, 0.5], [0.9, 0.1]]))
    assert 4 <= here @ near < 8
    assert here @ far == 0


def test_features_of_the_users() -> None:
    model = linear(RandomEnv(BOX, CHOICES), features=lambda obs: th.cat([obs, obs.square()], dim=1)).learn(20)
    assert model.policy.u.shape == (3, 8)
    assert model.policy.u.abs().max() > 0


def test_tile_coding_by_name() -> None:
    options = {"low": [-2.4, -3, -0.21, -3], "high": [2.4, 3, 0.21, 3], "n_tilings": 3, "n_tiles": 2}
    model = OPAC("LinearPolicy", "CartPole-v1", variant="degris", policy_kwargs=options, seed=0, device="cpu").learn(50)
    assert model.policy.features.size == 3 * 3**4
    assert "features" not in options


# Errors


DISCRETE = {"env": RandomEnv(BOX, CHOICES)}
CARTPOLE = {"env": "CartPole-v1", "variant": "degris"}
IS = {"variant": "is"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"variant": "acer"}, ValueError, r"variant must be one of 'q', 'is', 'degris', got 'acer'"),
        ({"behaviour": "greedy"}, ValueError, r"behaviour must be one of 'policy', .*got 'greedy'"),
        ({"epsilon": 0.2}, ValueError, r"epsilon=0.2 needs behaviour='epsilon', got behaviour='policy'"),
        ({"epsilon": 1.5, "behaviour": "epsilon"}, ValueError, r"epsilon must be a number in \[0, 1\], got 1.5"),
        ({"behaviour_noise": 0.1}, ValueError, r"behaviour_noise=0.1 needs behaviour='policy_noise'"),
        ({"rho_max": 1.0}, ValueError, r"rho_max=1.0 needs variant='is', got variant='q'"),
        ({"rho_max": 0.0, **IS}, ValueError, r"rho_max must be a number >= 1e-12 or None, got 0.0"),
        ({"critic_type": "q"}, ValueError, r"critic_type='q' needs variant='is'"),
        ({"actor_gradient": "score", **IS}, ValueError, r"actor_gradient='score' needs variant='q', got variant='is'"),
        ({"actor_gradient": "exact"}, UnsupportedError, r"actor_gradient='exact' needs Discrete actions, got Box"),
        ({"actor_gradient": "reparam", **DISCRETE}, UnsupportedError, r"actor_gradient='reparam' needs a Box of actions"),
        ({"target": "exact"}, UnsupportedError, r"target='exact' needs Discrete actions, got Box"),
        ({"target": "sample", **IS}, ValueError, r"target='sample' needs critic_type='q' with variant='is'"),
        ({"baseline": "v", "actor_gradient": "score"}, UnsupportedError, r"baseline='v' needs Discrete actions"),
        ({"baseline": "v"}, ValueError, r"baseline='v' needs actor_gradient='score', got actor_gradient=None"),
        (
            {"n_actor_samples": 1, "actor_gradient": "score"},
            ValueError,
            r"n_actor_samples must be an integer >= 2 with baseline='leave-one-out', got 1",
        ),
        ({"behaviour": "policy_noise", **DISCRETE}, UnsupportedError, r"behaviour='policy_noise' needs a Box of actions"),
        (
            {"action_noise": NormalActionNoise(np.zeros(1), np.ones(1)), **DISCRETE},
            UnsupportedError,
            r"action_noise needs a Box of actions",
        ),
        (
            {"exploration_noise": {"type": "normal", "start": 0.1}, **IS},
            ValueError,
            r"exploration_noise needs variant='q' and behaviour='policy'.*got variant='is'",
        ),
        ({"n_steps": 3, **IS}, UnsupportedError, r"n_steps must be 1 with variant='is', got 3"),
        ({"replay_buffer_class": ReplayBuffer, **IS}, UnsupportedError, r"derived from .*StoresLogProbs.*log b.*ReplayBuffer"),
        ({"replay_buffer_class": HerReplayBuffer, **IS}, UnsupportedError, r"derived from .*StoresLogProbs.*HerReplayBuffer"),
        ({"replay_buffer_class": PrioritizedReplayBuffer, **IS}, UnsupportedError, r"StoresLogProbs.*PrioritizedReplayBuffer"),
        ({"policy_kwargs": {"critic_type": "v"}}, ValueError, r"critic_type must be what the policy .*'v', got 'q'"),
        ({"policy_kwargs": {"n_critics": 0}}, ValueError, r"n_critics'\] must be an integer >= 1, got 0"),
        ({"policy_kwargs": {"min_std": 0.0}}, ValueError, r"min_std'\] must be a number >= 1e-12, got 0.0"),
        ({"policy": "LinearPolicy"}, TypeError, r"policy must be derived from .*opac.policies.MlpPolicy, got .*LinearPolicy"),
        ({"policy": TD3X.policy_aliases["MlpPolicy"]}, TypeError, r"policy must be one for OPAC, got .*td3x.MlpPolicy"),
        ({"features": "identity"}, ValueError, r"features='identity' needs variant='degris', got variant='q'"),
        ({"trace_lambda": 0.5}, ValueError, r"trace_lambda=0.5 needs variant='degris'"),
        ({"actor_trace_gamma": False}, ValueError, r"actor_trace_gamma=False needs variant='degris'"),
        ({"variant": "degris"}, UnsupportedError, r"variant='degris' needs Discrete actions, got Box"),
        ({**CARTPOLE, "features": "rbf"}, ValueError, r'features must be "tile", "identity", or a function .*got \'rbf\''),
        ({**CARTPOLE, "features": 3}, TypeError, r"features must be .*got 3 of type int"),
        ({**CARTPOLE, "features": lambda obs: obs[:, 0]}, ValueError, r"features must be .*which gives \[2\] for 2"),
        ({**CARTPOLE, "features": lambda obs: obs @ th.ones(7)}, ValueError, r"features must be .*which fails"),
        (CARTPOLE, ValueError, r"give policy_kwargs\['low'\] and \['high'\], as dimension 1, 3 of the observations has none"),
        ({**CARTPOLE, "policy_kwargs": {"low": 1, "high": 0}}, ValueError, r"dimension 0, 1, 2, 3 .*got low=1, high=0"),
        (
            {**CARTPOLE, "policy_kwargs": {"low": [0, 1], "high": 2}},
            ValueError,
            r"as many as an observation has, got \[0, 1\]",
        ),
        (
            {**CARTPOLE, "policy_kwargs": {"low": -1, "high": 1, "n_tiles": 99}},
            ValueError,
            r"at most 10000000 tiles, got 10 and 99, which make 1000000000 of 4 dimensions",
        ),
        ({**CARTPOLE, "ent_coef": 0.1}, ValueError, r"ent_coef=0.1 needs variant='q' or variant='is'"),
        ({**CARTPOLE, "max_grad_norm": 1.0}, ValueError, r"max_grad_norm must be None with variant='degris', got 1.0"),
        (
            {**CARTPOLE, "replay_buffer_class": HerReplayBuffer},
            ValueError,
            r"replay_buffer_class must be None with variant='degris'",
        ),
        ({"env": RandomEnv(spaces.Discrete(4), CHOICES), "variant": "degris"}, UnsupportedError, r"take features='identity'"),
        (
            {"policy": "LinearPolicy", "env": RandomEnv(DICT, CHOICES), "variant": "degris"},
            UnsupportedError,
            r"needs observations in one array, got Dict",
        ),
        ({"env": RandomEnv(BOX, spaces.Discrete(3, start=1))}, UnsupportedError, r"must count its choices from 0"),
        ({"env": RandomEnv(BOX, spaces.MultiDiscrete([2, 3]))}, UnsupportedError, r"MultiDiscrete"),
        ({"env": RandomEnv(BOX, spaces.Box(-1, np.inf, (1,)))}, UnsupportedError, r"finite lower and upper bound"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"policy": "MlpPolicy", "env": RandomEnv(BOX, CONTINUOUS), "device": "cpu", **arguments}
    with pytest.raises(error, match=message):
        OPAC(given.pop("policy"), given.pop("env"), **given)


def test_noise_that_comes_later_is_refused() -> None:
    model = small_model("opac", "weighted Q").learn(12)
    model.exploration_noise = {"type": "normal", "start": 0.1}
    with pytest.raises(ValueError, match=r"action_noise must be None where log b\(a\|s\) is needed"):
        model.learn(5, reset_num_timesteps=False)


def test_variants_are_for_life(tmp_path: Path) -> None:
    small_model("opac", "weighted").save(tmp_path / "v")
    small_model("opac", "linear").save(tmp_path / "linear")
    for name, kwargs, message in (
        ("v", {"variant": "q"}, r"critic_type must be what the policy was made with, 'v', got 'q' with variant='q'"),
        ("linear", {"variant": "q", "features": "tile"}, r"policy must be derived from .*MlpPolicy"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            OPAC.load(tmp_path / name, **kwargs)
    assert LINEAR["features"] == OPAC.load(tmp_path / "linear").features
