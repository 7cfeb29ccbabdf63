"""SVPG: one particle is the base, several are a double loop, who sees what, particles that are unlike, temperature, acting."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, RandomEnv, ScriptedEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from models import VARIANTS, small_model
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn
from torch.nn import functional as F

from sb3_ac_ext import PPOX, SVPG, Reinforce
from sb3_ac_ext.svpg import batched
from sb3_ac_ext.svpg.acting import most_frequent
from sb3_ac_ext.svpg.batched import act, blocks, evaluate, values_of
from sb3_ac_ext.svpg.policies import Particles
from sb3_ac_ext.validation import ArgumentError, NonFiniteError, UnsupportedError

ALONE: dict[str, Any] = {"n_particles": 1, "temperature": 1.0, "annealing": "none"}
N, EACH, T = 3, 2, 5
"""Particles, their environments, steps of a batch."""


class OwnBuffer(RolloutBuffer):
    """Of the user, which estimates advantages by itself."""


class OwnDictBuffer(DictRolloutBuffer):
    """The same for dicts."""


def envs(n: int, variant: str = "mlp", limit: int = 5) -> VecEnv:
    """Episodes of different lengths."""
    kind, made = VARIANTS[variant], iter(range(n))

    def make() -> Any:
        env = RandomEnv(*copy.deepcopy((kind.observations or BOX, kind.actions or CONTINUOUS)))
        env.length = 2 + next(made)
        return TimeLimit(env, limit)

    return make_vec_env(make, n)


def make(variant: str = "mlp", n: int = N, each: int = EACH, **changes: Any) -> Any:
    """n particles with some environments each."""
    steps = {} if changes.get("base") == "reinforce" else {"n_steps": T}
    env = changes.pop("env", None) or envs(n * each, variant)
    return small_model(changes.pop("row", "svpg"), variant, env=env, **{"n_particles": n, **steps, **changes})


def log_of(model: Any) -> dict[str, Any]:
    """What is logged last under each name, as it comes."""
    logged: dict[str, Any] = {}
    model.logger.record = lambda name, value, *args, **kwargs: logged.update({name: value})
    return logged


def numbers(policy: Any) -> th.Tensor:
    return th.cat([value.detach().flatten().float() for value in policy.state_dict().values()])


# One particle


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size:UserWarning")
@pytest.mark.parametrize(
    ("variant", "engine"),
    [
        *(("mlp", True), ("mlp", False), ("shared extractor", True), ("shared images", False), ("dict", False)),
        *(("extractors apart", False), ("coins", False)),
    ],
)
def test_one_particle_is_the_base(variant: str, engine: bool) -> None:
    """Bit for bit where neither the order of sums differs, nor how they are written; SB3 estimates its buffer's advantages."""
    kind = VARIANTS[variant]
    own = {"net_arch": [8], **kind.policy_kwargs}
    buffer = OwnDictBuffer if isinstance(kind.observations, spaces.Dict) else OwnBuffer
    sizes = {"n_steps": 8, "rollout_buffer_class": buffer, "gae_lambda": 0.8, "vf_coef": 0.3, "max_grad_norm": 0.5}
    both = {"learning_rate": 1e-2, "gamma": 0.9, "ent_coef": 0.01, "seed": 3, "device": "cpu", "policy_kwargs": own}
    epochs = {"batch_size": 6, "n_epochs": 2}
    episodes = {**both, "policy_kwargs": own | {"share_features_extractor": False}}
    cases: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
        "a2c": (A2C, {**sizes, **both, "use_rms_prop": False}, {**sizes, **both, "normalize_advantage": False}),
        "ppo": (PPOX, {**epochs, **sizes, **both, "engine": False}, {**epochs, **sizes, **both}),
        "reinforce": (
            Reinforce,
            {**episodes, "rollout_episodes": 4, "engine": False},
            {**episodes, "rollout_episodes": 4, "normalize_advantage": False, "vf_coef": 1.0, "max_grad_norm": None},
        ),
    }
    for base, (algorithm, theirs, ours) in cases.items():
        wanted = numbers(algorithm(kind.policy, envs(2, variant), **theirs).learn(64).policy)
        model: Any = SVPG(kind.policy, envs(2, variant), base=base, engine=engine, **ALONE, **ours)  # type: ignore[arg-type]
        before = numbers(model.policy.particles[0])
        found = numbers(model.learn(64).policy.particles[0])
        exact = not engine and not variant.startswith("shared")
        assert (found - wanted).abs().max() <= (0 if exact else 1e-5), base
        assert (wanted - before).abs().max() > 1e-2


# Several particles


class Oracle(BaseCallback):
    """
    Does every update by plain loops, particle by particle, with an optimizer for each, and compares.

    :param h: bandwidth of squared distances of pairs; None for no kernel
    """

    def __init__(self, h: Callable[[list[float]], float] | None) -> None:
        super().__init__()
        self.h = h
        self.iterations = 0
        self.departures: list[float] = []
        self.largest_repulsion = 0.0

    def _on_training_start(self) -> None:
        self.policies = copy.deepcopy(list(self.model.policy.particles))
        self.optimizers = [th.optim.Adam(policy.parameters(), lr=3e-3, eps=1e-2) for policy in self.policies]

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.compare()

    def compare(self) -> None:
        if self.iterations:
            pairs = zip(self.policies, self.model.policy.particles, strict=True)
            self.departures.append(max((numbers(ours) - numbers(theirs)).abs().max().item() for ours, theirs in pairs))

    def _on_rollout_end(self) -> None:
        model, random = self.model, np.random.RandomState()
        random.set_state(np.random.get_state())
        data = [self.data_of(i) for i in range(len(self.policies))]
        temperature = max(0.5, 2.0 - 0.5 * self.iterations)
        if model.base != "ppo":
            self.update([{name: array for name, array in own.items()} for own in data], temperature)
        for _ in range(model.n_epochs if model.base == "ppo" else 0):
            order = random.permutation(len(data[0]["returns"]))
            for start in range(0, len(order), model.batch_size):
                chosen = order[start : start + model.batch_size]
                self.update([{name: array[chosen] for name, array in own.items()} for own in data], temperature)
        self.iterations += 1

    def data_of(self, i: int) -> dict[str, th.Tensor]:
        """What a particle has collected, one of its environments after another."""
        model, buffer = self.model, self.model.rollout_buffer
        found: dict[str, list[Any]] = {name: [] for name in ("observations", "actions", "log_probs", "advantages", "returns")}
        for env in range(i * EACH, (i + 1) * EACH):
            steps = range(model._rollout_length)
            if model.base == "reinforce":
                begins = [*np.flatnonzero(buffer.episode_starts[: len(steps), env]), len(steps)]
                steps = range(begins[model.rollout_episodes // EACH] if len(begins) > 2 else len(steps))
            for t in steps:
                if model.base == "reinforce":
                    end = next(begin for begin in begins if begin > t)
                    ret = sum(model.gamma ** (k - t) * float(buffer.rewards[k, env]) for k in range(t, end))
                    found["returns"].append(ret)
                    found["advantages"].append(ret - float(buffer.values[t, env]))
                else:
                    found["returns"].append(float(buffer.returns[t, env]))
                    found["advantages"].append(float(buffer.advantages[t, env]))
                for name in ("observations", "actions", "log_probs"):
                    found[name].append(getattr(buffer, name)[t, env])
        tensors = {name: th.as_tensor(np.array(values), dtype=th.float32) for name, values in found.items()}
        if isinstance(model.action_space, spaces.Discrete):
            tensors["actions"] = tensors["actions"].flatten()
        return tensors

    def update(self, data: list[dict[str, th.Tensor]], temperature: float) -> None:
        model, gradients, thetas, kept = self.model, [], [], []
        for policy, own in zip(self.policies, data, strict=True):
            advantages = own["advantages"]
            if model.normalize_advantage:
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            values, log_prob, entropy = policy.evaluate_actions(own["observations"], own["actions"])
            ratio = (log_prob - own["log_probs"]).exp()
            j = log_prob * advantages
            if model.base == "ppo":
                j = th.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            objective = j.mean() + model.ent_coef * entropy.mean()
            actor = [p for name, p in policy.named_parameters() if not self.is_critics(name)]
            gradients.append(th.cat([g.flatten() for g in th.autograd.grad(objective, actor, retain_graph=True)]).double())
            thetas.append(th.cat([p.detach().flatten() for p in actor]).double())
            kept.append((policy, actor, F.mse_loss(values.flatten(), own["returns"])))
        steps = self.phi(thetas, gradients, temperature)
        for (policy, actor, value_loss), step, optimizer in zip(kept, steps, self.optimizers, strict=True):
            optimizer.zero_grad()
            (model.vf_coef * value_loss).backward()
            start = 0
            for p in actor:
                of_value = th.zeros_like(p) if p.grad is None else p.grad  # where the critic shares layers
                p.grad = of_value - step[start : start + p.numel()].view_as(p).float()
                start += p.numel()
            if model.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(policy.parameters(), model.max_grad_norm)
            optimizer.step()

    @staticmethod
    def is_critics(name: str) -> bool:
        return "value_net" in name or name.startswith("vf_features_extractor")

    def phi(self, thetas: list[th.Tensor], gradients: list[th.Tensor], temperature: float) -> list[th.Tensor]:
        n, prior = len(thetas), self.model.prior_precision
        uphill = [g / temperature - prior * theta for g, theta in zip(gradients, thetas, strict=True)]
        if self.h is None:
            return uphill
        squares = [((thetas[i] - thetas[j]) ** 2).sum().item() for i in range(n) for j in range(n)]
        h, found = self.h(squares), []
        for i in range(n):
            total = th.zeros_like(thetas[i])
            for j in range(n):
                k = th.exp(-((thetas[i] - thetas[j]) ** 2).sum() / h)
                repulsion = 2 / h * k * (thetas[i] - thetas[j])
                self.largest_repulsion = max(self.largest_repulsion, repulsion.abs().max().item())
                total += k * uphill[j] + repulsion
            found.append(total / n)
        return found


def over_pairs(squares: list[float]) -> float:
    matrix = np.array(squares).reshape(N, N)
    return float(np.median(matrix[np.triu_indices(N, 1)]) / np.log(N + 1))


RULES: dict[Any, Any] = {
    "offdiag": over_pairs,
    "liu": lambda squares: float(np.median(squares) / np.log(N + 1)),
    "author": lambda squares: float(np.median(squares) / np.log(N + 1) / 2),
    7.0: lambda squares: 7.0,
    None: None,
}
"""h by ``bandwidth``; None for ``kernel=False``."""


@pytest.mark.parametrize(
    ("base", "variant", "bandwidth", "engine", "changes"),
    [
        ("a2c", "mlp", "offdiag", True, {}),
        ("a2c", "mlp", "author", False, {"normalize_advantage": False, "max_grad_norm": None}),
        ("a2c", "shared extractor", "liu", True, {"prior_precision": 0.2}),
        ("a2c", "extractors apart", 7.0, True, {"max_grad_norm": 0.2}),
        ("a2c", "mlp", None, True, {"prior_precision": 0.2}),
        ("ppo", "discrete", "offdiag", True, {"batch_size": 4, "n_epochs": 2}),
        ("ppo", "mlp", "offdiag", False, {"batch_size": 4, "n_epochs": 2}),
        ("reinforce", "mlp", "offdiag", True, {"rollout_episodes": 4}),
        ("reinforce", "discrete", "offdiag", False, {"rollout_episodes": 4, "normalize_advantage": False}),
    ],
)
def test_updates_are_those_of_plain_loops(
    base: str, variant: str, bandwidth: Any, engine: bool, changes: dict[str, Any]
) -> None:
    rule = {"kernel": False} if bandwidth is None else {"bandwidth": bandwidth}
    falling = {"temperature": 2.0, "annealing_start": 0, "annealing_step": 0.5, "temperature_min": 0.5}
    model = make(variant, base=base, engine=engine, ent_coef=0.02, vf_coef=0.4, **rule, **falling, **changes)
    oracle = Oracle(RULES[bandwidth])
    before = numbers(model.policy)
    model.learn(40 * N * EACH if base == "reinforce" else 5 * T * N * EACH, oracle)
    oracle.compare()
    assert len(oracle.departures) >= 4
    assert max(oracle.departures) < 2e-5, oracle.departures
    assert (numbers(model.policy) - before).abs().max() > 1e-3
    assert (oracle.largest_repulsion > 1e-3) == (bandwidth is not None)


class Marked(RandomEnv):
    """Says which one it is, rewards that, and tells what it was given."""

    def __init__(self, number: int) -> None:
        super().__init__(copy.deepcopy(BOX), spaces.Box(-50, 50, (1,), np.float32))
        self.number, self.length, self.given = number, 2 + number, []

    def reset(self, **kwargs: Any) -> Any:
        self.t = 0
        return np.full(4, self.number / 10, np.float32), {}

    def step(self, action: Any) -> Any:
        self.given.append(float(action[0]))
        _, _, over, truncated, info = super().step(action)
        return np.full(4, self.number / 10, np.float32), float(self.number), over, truncated, info


def marked(n: int) -> DummyVecEnv:
    return DummyVecEnv([lambda number=number: Monitor(TimeLimit(Marked(number), 20)) for number in range(n)])


class Telling(SVPG):
    """Keeps what it learns from."""

    def _update(self, batch: Any) -> Any:
        vars(self).setdefault("seen", []).append(batch)
        return super()._update(batch)


@pytest.mark.parametrize("base", ["a2c", "ppo", "reinforce"])
def test_a_particle_acts_and_learns_in_its_own_environments(base: str) -> None:
    own = {"a2c": {}, "ppo": {"batch_size": 4, "n_epochs": 1}, "reinforce": {"rollout_episodes": 4}}[base]
    model = make(env=marked(N * EACH), row=Telling, base=base, engine=False, gamma=0.0, normalize_advantage=False, **own)
    for i, particle in enumerate(model.policy.particles):  # particle i does what its number says
        nn.init.zeros_(particle.action_net.weight)
        particle.action_net.bias.data.fill_(10.0 * i)
        particle.log_std.data.fill_(-5.0)
    model.learn(1)
    for number, env in enumerate(model.env.envs):
        np.testing.assert_allclose(env.unwrapped.given, 10.0 * (number // EACH), atol=1)
    expected_counts = {number: 0 for number in range(N * EACH)}
    for batch in model.seen:
        there = th.ones_like(batch.returns) if batch.weights is None else batch.weights
        whose = (10 * batch.observations[:, 0]).round().int().reshape(there.shape)
        for i in range(N):
            real = there[i].bool()
            assert {*whose[i][real].tolist()} <= {*range(i * EACH, (i + 1) * EACH)}
            th.testing.assert_close(batch.returns[i][real], whose[i][real].float())  # the rewards are of these
            actions = batch.actions.reshape(there.shape)[i][real]
            th.testing.assert_close(actions, th.full_like(actions, 10.0 * i), rtol=0, atol=1)
            for number in whose[i][real].tolist():
                expected_counts[number] += 1
    counts = {number: (2 * (2 + number) if base == "reinforce" else T) for number in range(N * EACH)}
    assert expected_counts == counts


def test_what_is_stored_is_the_own_particles() -> None:
    """Values, densities, values of last observations of truncated episodes, in the memory's order."""
    model = make(env=envs(N * EACH, limit=3), gamma=0.5, gae_lambda=0.0, learning_rate=0.0)
    buffer = model.learn(T * N * EACH).rollout_buffer
    for env in range(N * EACH):
        policy = model.policy.particles[env // EACH]
        observations, actions = (th.as_tensor(array[:, env]) for array in (buffer.observations, buffer.actions))
        values, log_prob, _ = policy.evaluate_actions(observations, actions)
        np.testing.assert_allclose(buffer.values[:, env], values.flatten().detach(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(buffer.log_probs[:, env], log_prob.detach(), rtol=1e-5, atol=1e-6)
        last = policy.predict_values(th.as_tensor(model._last_obs[env : env + 1])).item()
        over = model._last_episode_starts[env]
        wanted = buffer.rewards[-1, env] + (0 if over else 0.5 * last)
        np.testing.assert_allclose(buffer.returns[-1, env], wanted, rtol=1e-4)


def test_truncated_episodes_are_worth_what_the_own_critic_says() -> None:
    n = N * EACH
    model = make(env=marked(n), gamma=0.5)
    for i, particle in enumerate(model.policy.particles):
        nn.init.zeros_(particle.value_net.weight)
        particle.value_net.bias.data.fill_(10.0 * (i + 1))
    infos = [{"terminal_observation": np.zeros(4, np.float32), "TimeLimit.truncated": i != 1} for i in range(n)]
    found = model._bootstrapped(np.ones(n, np.float32), np.ones(n, dtype=bool), infos)
    np.testing.assert_allclose(found, [1 + 5, 1, 1 + 10, 1 + 10, 1 + 15, 1 + 15])
    model.rollout = "episodes"  # of REINFORCE, whose returns end with the last reward
    np.testing.assert_allclose(model._bootstrapped(np.ones(n, np.float32), np.ones(n, dtype=bool), infos), 1)


def test_broken_environments_are_named() -> None:
    env = marked(N * EACH)
    inner = env.envs[4].unwrapped
    inner.step = lambda action: (np.zeros(4, np.float32), float("nan"), False, False, {})
    with pytest.raises(NonFiniteError, match="environment 4 gave a non-finite reward"):
        make(env=env).learn(100)
    env = marked(N * EACH)
    env.envs[3].unwrapped.step = lambda action: (np.full(4, np.nan, np.float32), 0.0, False, False, {})
    with pytest.raises(NonFiniteError, match="environment 3 gave a non-finite observation"):
        make(env=env).learn(100)


def test_without_a_kernel_particles_are_independent_runs() -> None:
    """Each as if it were alone with its own networks and data."""
    model = make(kernel=False, engine=False, annealing="none", temperature=3.0)
    alone = [make(n=1, engine=False, annealing="none", temperature=3.0, normalize_advantage=True) for _ in range(N)]
    for i, one in enumerate(alone):
        one.policy.particles[0].load_state_dict(model.policy.particles[i].state_dict())
    for _ in range(3):
        state = np.random.get_state()
        model.learn(T * N * EACH, reset_num_timesteps=False)
        buffer = model.rollout_buffer
        arrays = ("observations", "actions", "values", "log_probs", "advantages", "returns")
        for i, one in enumerate(alone):
            one.rollout_buffer.reset()
            for name in arrays:
                getattr(one.rollout_buffer, name)[:] = getattr(buffer, name)[:, i * EACH : (i + 1) * EACH]
            one.rollout_buffer.full, one._rollout_length = True, T
            np.random.set_state(state)
            one.train()
            found, wanted = (numbers(policy) for policy in (model.policy.particles[i], one.policy.particles[0]))
            th.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_order_of_particles_does_not_matter() -> None:
    """All directions come from the particles as they were."""
    model = make(row=Telling, engine=False, max_grad_norm=None).learn(T * N * EACH)
    other = copy.deepcopy(list(model.policy.particles))
    model.learn(T * N * EACH, reset_num_timesteps=False)
    turned = make(engine=False, max_grad_norm=None)
    turned.policy = Particles(other[::-1])
    turned._engine.begin()

    def backwards(array: Any, n: int = N) -> Any:
        return None if array is None else array.reshape(n, -1, *array.shape[1:]).flip(0).reshape(array.shape)

    batch = model.seen[-1]
    flipped = batch._replace(
        observations=backwards(batch.observations),
        actions=backwards(batch.actions),
        log_probs=batch.log_probs.flip(0),
        advantages=batch.advantages.flip(0),
        returns=batch.returns.flip(0),
    )
    turned._update(flipped)
    for found, wanted in zip(list(turned.policy.particles)[::-1], model.policy.particles, strict=True):
        th.testing.assert_close(numbers(found), numbers(wanted), rtol=0, atol=1e-6)


# Evaluated together


class Asked(NamedTuple):
    """What particles evaluate."""

    observations: Any
    actions: th.Tensor


def some_observations(model: Any, rows: int) -> Any:
    """Random ones, so many of each particle."""
    space = copy.deepcopy(model.observation_space)
    space.seed(0)
    drawn = [space.sample() for _ in range(rows * len(model.policy.particles))]
    isdict = isinstance(space, spaces.Dict)
    raw = {key: np.stack([one[key] for one in drawn]) for key in space.spaces} if isdict else np.stack(drawn)
    return model.policy.particles[0].obs_to_tensor(raw)[0]


def assert_together_as_one_by_one(model: Any, rows: int = 2) -> None:
    """Few numbers are drawn one after another, so that numbers for a Box are the same ones."""
    particles = list(model.policy.particles)
    model.policy.set_training_mode(False)
    observations = some_observations(model, rows)
    parts = blocks(observations, len(particles))
    close = partial(th.testing.assert_close, rtol=1e-4, atol=1e-5)
    with th.no_grad():
        th.manual_seed(0)
        actions, values, log_prob = act(particles, observations)
        own_actions = actions.chunk(len(particles))
        if isinstance(model.action_space, spaces.Box):
            th.manual_seed(0)
            alone = [particle(part) for particle, part in zip(particles, parts, strict=True)]
            for found, wanted in zip((actions, values, log_prob), zip(*alone, strict=True), strict=True):
                close(found, th.cat(wanted))
        pairs = zip(particles, parts, own_actions, strict=True)
        judged = [particle.evaluate_actions(part, own) for particle, part, own in pairs]
        found = evaluate(particles, Asked(observations, actions))
        for column, wanted in zip(found, zip(*judged, strict=True), strict=True):
            close(column, th.stack([own.flatten() for own in wanted]))
        if not isinstance(model.action_space, spaces.Box):  # whatever was drawn
            close(values.flatten(), found.values.flatten())
            close(log_prob, found.log_prob.flatten())
        own_values = [particle.predict_values(part) for particle, part in zip(particles, parts, strict=True)]
        close(values_of(particles, observations), th.cat(own_values))
    assert actions.shape == (rows * len(particles), *model.action_space.shape)


BATCHED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("mlp", "discrete", "several choices", "coins", "images", "shared images", "dict")},
    **{name: (name, {}) for name in ("extractor", "shared extractor", "extractors apart", "layer norm", "dropout")},
    "relu and two layers": ("mlp", {"policy_kwargs": {"activation_fn": nn.ReLU, "net_arch": [5, 6]}}),
    "leaky": ("mlp", {"policy_kwargs": {"activation_fn": nn.LeakyReLU}}),
    "unknown activation": ("mlp", {"policy_kwargs": {"activation_fn": nn.Softplus}}),
    "no layers": ("mlp", {"policy_kwargs": {"net_arch": []}}),
    "unequal": ("mlp", {"policy_kwargs": {"net_arch": {"pi": [5], "vf": [6, 7]}}}),
    "raw images": ("images", {"policy_kwargs": {"normalize_images": False}}),
    "seen choices": ("mlp", {"env": lambda: RandomEnv(spaces.Discrete(5), CONTINUOUS)}),
    "seen coins": ("mlp", {"env": lambda: RandomEnv(spaces.MultiBinary(5), CONTINUOUS)}),
}


@pytest.mark.parametrize("name", BATCHED)
def test_particles_together_say_what_each_says(name: str) -> None:
    variant, changes = BATCHED[name]
    if "env" in changes:
        changes = {**changes, "env": make_vec_env(changes["env"], N)}
    assert_together_as_one_by_one(make(variant, each=1, **changes))


def test_layers_of_one_kind_are_evaluated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests beside this one would show nothing."""
    model, calls = make(each=1), []
    particles = list(model.policy.particles)
    linear = batched._linear
    monkeypatch.setattr(batched, "_linear", lambda layers, inputs: calls.append(len(layers)) or linear(layers, inputs))
    monkeypatch.setattr(batched, "_one_by_one", None)
    act(particles, some_observations(model, 2))
    assert calls == [N] * 4


class Doubling(nn.Linear):
    """A layer of the user's."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return 2 * super().forward(x)


class OwnExtractor(MlpExtractor):
    """Layers of the user's."""

    def forward(self, x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return 0.5 * self.forward_actor(x), 0.5 * self.forward_critic(x)


class Louder(DiagGaussianDistribution):
    """Another distribution of the user's."""

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> Any:
        return super().proba_distribution(mean_actions, log_std + 0.5)


def halved(function: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return tuple(0.5 * part for part in result) if isinstance(result, tuple) else 0.5 * result

    return replacement


def replaced(of: Callable[[Any], Any], name: str) -> Callable[[Any], None]:
    def do(particle: Any) -> None:
        setattr(of(particle), name, halved(getattr(of(particle), name)))

    return do


def other_activation(particle: Any) -> None:
    particle.mlp_extractor.policy_net[1] = nn.ReLU()


def options_of_an_activation(particle: Any) -> None:
    particle.mlp_extractor.policy_net[1] = nn.LeakyReLU(0.3)


def wider_critic(particle: Any) -> None:
    particle.mlp_extractor.value_net = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    particle.value_net = nn.Linear(5, 1)


def deeper_critic(particle: Any) -> None:
    particle.mlp_extractor.value_net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 8))


def own_layer(particle: Any) -> None:
    particle.mlp_extractor.value_net[0] = Doubling(4, 8)


def own_extractor(particle: Any) -> None:
    particle.mlp_extractor.__class__ = OwnExtractor


def own_distribution(particle: Any) -> None:
    particle.action_dist = Louder(2)


def hook_of_a_layer(particle: Any) -> None:
    particle.mlp_extractor.policy_net[0].register_forward_hook(lambda module, inputs, output: 0.5 * output)


def hook_of_the_extractor(particle: Any) -> None:
    particle.mlp_extractor.register_forward_hook(lambda module, inputs, output: tuple(0.5 * part for part in output))


def hook_of_the_policy(particle: Any) -> None:
    particle.register_forward_hook(lambda module, inputs, output: (output[0], 0.5 * output[1], output[2]))


def other_features(particle: Any) -> None:
    """Without parameters, by which they would be seen."""
    particle.features_extractor = nn.Sequential(nn.Flatten(), nn.Tanh())


def critic_without_bias(particle: Any) -> None:
    particle.value_net = nn.Linear(8, 1, bias=False)


UNLIKE: dict[str, Callable[[Any], None]] = {
    change.__name__.replace("_", " "): change
    for change in (
        *(other_activation, options_of_an_activation, wider_critic, deeper_critic, own_layer, own_extractor),
        *(own_distribution, hook_of_a_layer, hook_of_the_extractor, hook_of_the_policy, other_features, critic_without_bias),
    )
} | {
    "forward of a layer": replaced(lambda particle: particle.action_net, "forward"),
    "forward of the layers": replaced(lambda particle: particle.mlp_extractor.value_net, "forward"),
    "forward of the actor": replaced(lambda particle: particle.mlp_extractor, "forward_actor"),
    "forward of the extractor": replaced(lambda particle: particle.mlp_extractor, "forward"),
    "forward": replaced(lambda particle: particle, "forward"),
    "evaluation": replaced(lambda particle: particle, "evaluate_actions"),
    "values": replaced(lambda particle: particle, "predict_values"),
    "features": replaced(lambda particle: particle, "extract_features"),
    "density": replaced(lambda particle: particle.action_dist, "log_prob"),
    "actions": replaced(lambda particle: particle.action_dist, "sample"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_particles_that_are_unlike(name: str) -> None:
    """One in the middle."""
    model = make(each=1)
    UNLIKE[name](model.policy.particles[1])
    assert_together_as_one_by_one(model)


@pytest.mark.parametrize(
    "name",
    [
        *("options of an activation", "wider critic", "own extractor", "hook of the extractor"),
        *("hook of the policy", "other features", "forward of the extractor", "actions"),
    ],
)
def test_particles_that_become_unlike(name: str) -> None:
    """After all was recorded, in rollouts and updates; other changes are in `interventions`."""
    found = []
    for engine in (True, False):
        model = make(n=2, each=1, engine=engine).learn(8 * T)
        UNLIKE[name](model.policy.particles[1])
        before = numbers(model.policy)
        found.append(numbers(model.learn(4 * T, reset_num_timesteps=False).policy))
        assert (found[-1] - before).abs().max() > 1e-3
    th.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_one_activation_with_other_options() -> None:
    model = make(each=1, policy_kwargs={"activation_fn": nn.LeakyReLU})
    model.policy.particles[1].mlp_extractor.policy_net[1].negative_slope = 0.9
    assert_together_as_one_by_one(model)


def test_a_change_of_a_class_is_seen_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(each=1)
    monkeypatch.setattr(nn.Linear, "forward", halved(nn.Linear.forward))
    assert_together_as_one_by_one(model)
    monkeypatch.setattr(MlpExtractor, "forward_critic", halved(MlpExtractor.forward_critic))
    assert_together_as_one_by_one(model)
    monkeypatch.setattr(DiagGaussianDistribution, "log_prob", halved(DiagGaussianDistribution.log_prob))
    assert_together_as_one_by_one(model)


def test_actors_with_unlike_parameters_are_refused() -> None:
    """There is no distance between them."""
    model = make(each=1)
    model.policy.particles[1].mlp_extractor.policy_net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 8))
    with pytest.raises(ArgumentError, match=r"same shapes.*of particle 0.*of particle 1"):
        model.learn(3 * T)


def test_frozen_layers() -> None:
    """The same of all particles: they stay, and the others learn."""
    model = make(each=1)
    layers = [particle.mlp_extractor.policy_net[0].requires_grad_(False) for particle in model.policy.particles]
    before, heads = copy.deepcopy(layers), [particle.action_net.weight.clone() for particle in model.policy.particles]
    model.learn(9 * T)
    for layer, old in zip(layers, before, strict=True):
        th.testing.assert_close(layer.state_dict(), old.state_dict(), rtol=0, atol=0)
    for particle, old in zip(model.policy.particles, heads, strict=True):
        assert not th.equal(particle.action_net.weight, old)


# Temperature


class Temperatures(BaseCallback):
    """What is said before each iteration, and what is logged of it."""

    def __init__(self) -> None:
        super().__init__()
        self.used: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_training_start(self) -> None:
        direction = self.model._direction

        def noting(theta: Any, gradients: Any, temperature: Any) -> Any:
            self.used.append(float(temperature))
            return direction(theta, gradients, temperature)

        self.model._direction = noting

    def _on_training_end(self) -> None:
        del self.model._direction


ANNEALINGS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "none": ({}, [4, 4, 4, 4, 4, 4]),
    "linear": ({"annealing_start": 2, "annealing_step": 1.5, "temperature_min": 0.3}, [4, 4, 4, 2.5, 1, 0.3]),
    "exponential": ({"annealing_start": 1, "annealing_factor": 0.5, "temperature_min": 0.3}, [4, 4, 2, 1, 0.5, 0.3]),
    "tanh": ({"annealing_slope": 3.0, "annealing_power": 2.0}, [4 / np.tanh((3 * k / 6) ** 2) for k in range(1, 7)]),
}


@pytest.mark.parametrize("annealing", ANNEALINGS)
def test_temperature_falls(annealing: str) -> None:
    changes, expected = ANNEALINGS[annealing]
    seen = Temperatures()
    model = make(each=1, engine=False, temperature=4.0, annealing=annealing, **changes).learn(6 * N * T, seen)
    assert seen.used == pytest.approx(expected)
    assert model.logger.name_to_value.get("train/temperature", expected[-1]) == pytest.approx(expected[-1])


def test_the_first_temperature_may_be_endless() -> None:
    """Where nothing of the training is over, the objective counts nothing."""
    model = make(each=1, annealing="tanh")
    model._current_progress_remaining = 1.0
    assert model.current_temperature() == np.inf


# Acting


def choosing(*choices: Any, actions: spaces.Space | None = None, **changes: Any) -> Any:
    """Particles each of which does one thing alone."""
    space = spaces.Discrete(4) if actions is None else actions
    n = len(choices)
    model = make(n=n, each=1, env=make_vec_env(lambda: RandomEnv(copy.deepcopy(BOX), copy.deepcopy(space)), n), **changes)
    for particle, choice in zip(model.policy.particles, choices, strict=True):
        nn.init.zeros_(particle.action_net.weight)
        if isinstance(space, spaces.Box):
            particle.action_net.bias.data[:] = th.as_tensor(choice)
            continue
        if isinstance(space, spaces.MultiBinary):
            particle.action_net.bias.data[:] = 40.0 * th.tensor(choice) - 20
            continue
        sizes = [space.n] if isinstance(space, spaces.Discrete) else space.nvec
        chosen = zip(sizes, np.atleast_1d(choice), strict=True)
        particle.action_net.bias.data[:] = th.tensor([100.0 * (k == one) for size, one in chosen for k in range(size)])
    return model


BATCH = np.zeros((2, 4), np.float32)


@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_one_particle_acts_or_all(engine: bool) -> None:
    model = choosing(1, 3, 3, engine=engine)
    for _ in range(8):  # so that they are recorded, each by itself
        assert [model.predict(BATCH[0], particle=i)[0] for i in range(3)] == [1, 3, 3]
        np.testing.assert_array_equal(model.predict(BATCH)[0], [1, 1])  # the first one until it is known which is best
        np.testing.assert_array_equal(model.predict(BATCH, particle=np.int64(2))[0], [3, 3])
        np.testing.assert_array_equal(model.predict(BATCH, ensemble="vote")[0], [3, 3])
        assert model.predict(BATCH[0], ensemble="vote", deterministic=True)[0] == 3
        model.policy.best.fill_(1)
        assert model.predict(BATCH[0])[0] == 3
        assert model.policy.predict(BATCH[0])[0] == 3
        model.policy.best.fill_(0)
    assert model.predict(BATCH[0], state=(1,), ensemble="vote")[1] == (1,)


def test_votes() -> None:
    """Ties are for the lowest number, place by place."""
    assert most_frequent(np.array([2, 1, 1, 2, 0])) == 1
    np.testing.assert_array_equal(most_frequent(np.array([[3, 0], [1, 2], [3, 2]])), [3, 2])
    for actions, choices, expected in (
        (spaces.Discrete(4), (3, 2), 2),
        (spaces.MultiDiscrete([3, 4]), ([2, 3], [1, 3], [1, 0]), [1, 3]),
        (spaces.MultiBinary(3), ([1, 0, 1], [0, 0, 1], [1, 1, 1]), [1, 0, 1]),
    ):
        model = choosing(*choices, actions=actions)
        action = model.predict(BATCH[0], ensemble="vote")[0]
        np.testing.assert_array_equal(action, expected)
        assert actions.contains(action)
        assert model.predict(BATCH, ensemble="vote")[0].shape == (2, *actions.shape)


def test_means() -> None:
    """Of actions within the bounds."""
    model = choosing([0.5, 1.0], [-0.5, 9.0], actions=CONTINUOUS)
    action = model.predict(BATCH, ensemble="mean", deterministic=True)[0]
    np.testing.assert_allclose(action, [[0.0, 2.0]] * 2, atol=1e-6)
    assert action.dtype == np.float32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"particle": 3}, r"particle must be an integer in \[0, 2\], got 3"),
        ({"particle": -1}, r"particle must be an integer in \[0, 2\], got -1"),
        ({"particle": 1.5}, r"particle must be an integer.*1\.5"),
        ({"particle": "1"}, r"particle must be an integer.*'1'"),
        ({"particle": True}, r"particle must be an integer.*True"),
        ({"ensemble": "most"}, r"ensemble must be .*'most'"),
        ({"ensemble": "mean"}, r"ensemble must be 'vote' for actions in Discrete\(4\), got 'mean'"),
        ({"ensemble": "vote", "particle": 1}, r"particle and ensemble exclude each other, got 1 and 'vote'"),
    ],
    ids=str,
)
def test_actors_that_there_are_not(given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, UnsupportedError), match=message):
        choosing(1, 3, 3).predict(BATCH, **given)
    if given == {"ensemble": "mean"}:
        with pytest.raises(UnsupportedError, match=r"ensemble must be 'mean' for actions in Box.*got 'vote'"):
            choosing([0.5, 1.0], actions=CONTINUOUS).predict(BATCH, ensemble="vote")


@pytest.mark.parametrize("base", ["a2c", "reinforce"])
def test_the_best_by_its_last_episodes_acts(base: str) -> None:
    """The environments of higher numbers reward more; in the end these stop."""
    own = {"rollout_episodes": EACH} if base == "reinforce" else {}
    env = DummyVecEnv([lambda i=i: Monitor(TimeLimit(Marked(i // EACH), 20)) for i in range(N * EACH)])
    model = make(env=env, base=base, stats_window_size=4, **own)
    logged = log_of(model)
    model.learn(120)
    returns = [number * (2 + number) for number in range(N)]
    assert logged["particles/best"] == N - 1 == model.policy.best
    assert logged["particles/best_return"] == max(returns)
    assert logged["particles/mean_return"] == pytest.approx(np.mean(returns))
    assert logged["particles/return_std"] == pytest.approx(np.std(returns))
    wanted = [model.policy.particles[-1].predict(BATCH, deterministic=True)[0], model.predict(BATCH, deterministic=True)[0]]
    np.testing.assert_allclose(*wanted, rtol=1e-5)
    for i in range(EACH):
        model.env.envs[-1 - i].unwrapped.number = 0
    model.learn(180, reset_num_timesteps=False)
    assert model.policy.best == N - 2
    assert [len(own) for own in model._returns] == [4] * N


def test_evaluation_is_of_the_best() -> None:
    model = choosing(1, 3, 2)
    model.policy.best.fill_(1)
    env = Monitor(RandomEnv(copy.deepcopy(BOX), spaces.Discrete(4)))
    assert evaluate_policy(model, env, 2, warn=False)[0] == 3 * env.unwrapped.length


def test_log() -> None:
    """Distances and bandwidth are of the actors before the last update."""
    model = make(each=1, learning_rate=0.0, bandwidth="author")
    logged = log_of(model)
    model.learn(N * T)
    names = {"policy_loss", "value_loss", "entropy_loss", "distance", "bandwidth", "temperature", "std", "explained_variance"}
    names |= {f"particle_{i}_grad_norm" for i in range(N)} | {"n_updates", "learning_rate"}
    assert {f"train/{name}" for name in names} <= logged.keys()
    actors = [
        th.cat([p.detach().flatten() for name, p in policy.named_parameters() if not Oracle.is_critics(name)])
        for policy in model.policy.particles
    ]
    squares = [((one - other) ** 2).sum().item() for one in actors for other in actors]
    assert logged["train/distance"] == pytest.approx(np.sum(np.sqrt(squares)) / (N * (N - 1)), rel=1e-5)
    assert logged["train/bandwidth"] == pytest.approx(RULES["author"](squares), rel=1e-5)
    assert logged["train/temperature"] == 10


# What is kept


def scripted(n: int) -> VecEnv:
    return make_vec_env(lambda: ScriptedEnv(length=T), n)


@pytest.mark.parametrize("base", ["a2c", "ppo", "reinforce"])
def test_resume_is_exact(base: str, tmp_path: Path) -> None:
    """Every particle and optimizer, the temperature, the returns by which the best is chosen."""
    epochs, episodes = {"batch_size": 4, "n_epochs": 2}, {"rollout_episodes": N, "max_rollout_steps": 40}
    own = {"a2c": {"annealing": "exponential"}, "ppo": epochs, "reinforce": episodes}[base]
    falls = {"annealing_start": 1, "temperature": 3.0}
    model = make(each=1, env=scripted(N), base=base, engine=base == "a2c", **falls, **own).learn(4 * N * T)
    model.save(tmp_path / "model")
    returns, temperature = copy.deepcopy(model._returns), model.current_temperature()
    model.learn(4 * N * T, reset_num_timesteps=False)
    loaded = SVPG.load(tmp_path / "model", env=scripted(N))
    assert (loaded._returns, loaded.current_temperature()) == (returns, temperature)
    assert temperature != 3.0
    loaded.learn(4 * N * T, reset_num_timesteps=False)
    th.testing.assert_close(loaded.get_parameters(), model.get_parameters(), rtol=0, atol=0)
    assert len(model.get_parameters()) == 1 + N
    assert loaded._returns == model._returns


def test_a_loaded_model_predicts_with_any_number_of_environments(tmp_path: Path) -> None:
    model = make(each=1, env=marked(N)).learn(120)
    model.save(tmp_path / "model")
    expected = [model.predict(BATCH, deterministic=True, particle=i)[0] for i in (None, *range(N))]
    for env in (None, Marked(0), marked(4)):
        loaded = SVPG.load(tmp_path / "model", env=env)
        for i, wanted in zip((None, *range(N)), expected, strict=True):
            np.testing.assert_array_equal(loaded.predict(BATCH, deterministic=True, particle=i)[0], wanted)
        if env is not None:
            with pytest.raises(ArgumentError, match=r"n_envs must be a multiple of n_particles=3.*got [14]"):
                loaded.learn(10)
    loaded = SVPG.load(tmp_path / "model", env=marked(2 * N)).learn(2 * N * T)
    assert loaded._envs_each == 2


@pytest.mark.parametrize("n", [2, 4])
def test_another_number_of_particles_is_refused_at_load(n: int, tmp_path: Path) -> None:
    make(each=1).save(tmp_path / "model")
    with pytest.raises(ArgumentError, match=rf"n_particles={n}: the parameters are of {N} particles, and there are {n}$"):
        SVPG.load(tmp_path / "model", n_particles=n)


def test_the_policy_alone_is_saved(tmp_path: Path) -> None:
    model = make(each=1, env=marked(N)).learn(120)
    model.policy.save(tmp_path / "policy")
    for loaded in (Particles.load(tmp_path / "policy", device="cpu"), pickle.loads(pickle.dumps(model.policy))):
        assert loaded.best == model.policy.best == N - 1
        th.testing.assert_close(loaded.state_dict(), model.policy.state_dict(), rtol=0, atol=0)
        np.testing.assert_array_equal(*(one.predict(BATCH, deterministic=True)[0] for one in (loaded, model.policy)))


class Copying(BaseCallback):
    """Copies and saves the model in the middle."""

    def _on_step(self) -> bool:
        if self.n_calls == 12:
            self.copied = copy.deepcopy(self.model)
            self.model.save(io.BytesIO())
            pickle.dumps(self.model.policy)
        return True


def test_copies_and_evaluations_disturb_no_training() -> None:
    expected = make(n=2, each=1, seed=1).learn(40)
    copying = Copying()
    evaluation = EvalCallback(
        make_vec_env(lambda: RandomEnv(copy.deepcopy(BOX), CONTINUOUS)), eval_freq=7, n_eval_episodes=1, verbose=0
    )
    for callback in (copying, evaluation):
        found = make(n=2, each=1, seed=1).learn(40, callback)
        th.testing.assert_close(numbers(found.policy), numbers(expected.policy), rtol=0, atol=0)
    copied = copying.copied
    assert not ({id(p) for p in copied.policy.parameters()} & {id(p) for p in found.policy.parameters()})
    before = numbers(copied.policy)
    copied.learn(20, reset_num_timesteps=False)
    assert not th.equal(numbers(copied.policy), before)


def test_normalised_environments() -> None:
    env = VecNormalize(envs(N))
    model = make(each=1, env=env).learn(9 * N * T)
    assert env.obs_rms.count > 9 * N * T
    assert model.predict(BATCH)[0].shape == (2, 2)


# Arguments


def test_an_environments_id_is_for_each_particle() -> None:
    model = SVPG("MlpPolicy", "CartPole-v1", n_particles=3, n_steps=4, device="cpu", seed=0)
    assert model.n_envs == 3
    first = model.env.reset()
    assert not np.array_equal(first[0], first[1])  # with seeds of their own
    assert all(isinstance(env, Monitor) for env in model.env.envs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_particles": 4}, r"n_envs must be a multiple of n_particles=4.*got 3"),
        ({"n_particles": 0}, r"n_particles must be an integer >= 1, got 0"),
        ({"n_particles": 1.5}, r"n_particles must be an integer.*got 1\.5"),
        ({"base": "trpo"}, r"base must be .*'trpo'"),
        ({"temperature": 0}, r"temperature must be .*got 0"),
        ({"temperature_min": -1}, r"temperature_min must be .*got -1"),
        ({"annealing": "cosine"}, r"annealing must be .*'cosine'"),
        ({"annealing_start": -1}, r"annealing_start must be .*got -1"),
        ({"annealing_step": -0.1}, r"annealing_step must be .*got -0\.1"),
        ({"annealing_factor": 2.0, "annealing": "exponential"}, r"annealing_factor must be .*got 2"),
        ({"annealing_factor": 0.5}, r"annealing_factor=0\.5 needs annealing='exponential', got annealing='linear'"),
        ({"annealing_slope": 2.0}, r"annealing_slope=2\.0 needs annealing='tanh'"),
        ({"bandwidth": 0}, r"bandwidth must be .*got 0"),
        ({"bandwidth": "median"}, r"bandwidth must be .*'median'"),
        ({"kernel": 1}, r"kernel must be .*got 1"),
        ({"prior_precision": -1.0}, r"prior_precision must be .*got -1"),
        ({"batch_size": 8}, r"batch_size=8 needs base='ppo', got base='a2c'"),
        ({"rollout_episodes": 8}, r"rollout_episodes=8 needs base='reinforce'"),
        ({"max_grad_norm": {"particle_7": 1.0}}, r"max_grad_norm.*particle_7"),
        ({"policy_kwargs": {"use_sde": True}}, r"policy_kwargs\['use_sde'\] must be False.*got True"),
        ({"base": "reinforce", "rollout_buffer_class": OwnBuffer}, r"rollout_buffer_class"),
    ],
    ids=str,
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, UnsupportedError), match=message):
        make(each=1, **changes)


def test_whole_episodes_need_a_time_limit() -> None:
    with pytest.raises(ArgumentError, match=r"max_rollout_steps must be .*None"):
        make(base="reinforce", env=make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS), N))
