"""AC: equal to SB3's A2C with one step, Sarsa and the deterministic gradient step by step, traces, and how it takes steps."""

import copy
import json
import zipfile
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from batches import flat
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from models import small_model
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn
from walks import AllInDouble, walks

from sb3_ac_ext import AC
from sb3_ac_ext.ac.policies import DeterministicMlpPolicy, QMlpPolicy
from sb3_ac_ext.ac.step import Step
from sb3_ac_ext.networks.actor_critic import policy_parameters, value_parameters
from sb3_ac_ext.validation import NonFiniteError

SMALL: dict[str, Any] = {"net_arch": [8, 8]}
SGD: dict[str, Any] = {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {}}
DETERMINISTIC = {"critic": "q", "deterministic_policy": True}

either_engine = pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])


def make(env: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    return small_model("ac", env=env, policy=policy, **kwargs)


# Equal to SB3

MATRIX = spaces.Box(-1, 2, (2, 2), np.float64)
CASES: dict[str, dict[str, Any]] = {
    "box": {"actions": spaces.Box(-1, 2, (2,), np.float64)},
    "matrix": {"actions": MATRIX},
    "discrete": {"actions": spaces.Discrete(3)},
    "multidiscrete": {"actions": spaces.MultiDiscrete([3, 2])},
    "multibinary": {"actions": spaces.MultiBinary(3)},
    "one environment": {"actions": spaces.Discrete(3), "n_envs": 1},
    "entropy": {"actions": spaces.Discrete(3), "ent_coef": 0.3},
    "gSDE": {"actions": MATRIX, "use_sde": True, "ent_coef": 0.3},
    "unequal": {
        "actions": spaces.Discrete(3),
        "policy_kwargs": {"net_arch": {"pi": [5], "vf": [7, 6, 5]}, "activation_fn": nn.ReLU},
    },
}


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("kwargs", CASES.values(), ids=CASES)
@either_engine
def test_equals_a2c_of_one_step_with_sgd(kwargs: dict[str, Any], engine: bool) -> None:
    given = {"learning_rate": 0.05, "gamma": 0.9, "seed": 0, "policy_kwargs": SMALL, "n_envs": 2, **kwargs}
    actions, n_envs = given.pop("actions"), given.pop("n_envs")
    given["policy_kwargs"] = {**given["policy_kwargs"], **SGD}
    ours = AC("MlpPolicy", walks(actions, n_envs), engine=engine, **given)
    own = {"n_steps": 1, "max_grad_norm": 1e9, "use_rms_prop": False, "rollout_buffer_class": AllInDouble}
    theirs = A2C("MlpPolicy", walks(actions, n_envs), **own, **given)
    for model in (ours, theirs):
        model.set_logger(Logger(None, []))
        model.policy.double()
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0)
    before = flat(ours.policy)
    for update in range(20):
        for model in (ours, theirs):
            th.manual_seed(update)
            model.learn(n_envs, reset_num_timesteps=False)
        assert ours.num_timesteps == theirs.num_timesteps == n_envs * (update + 1)
        assert ours._n_updates == theirs._n_updates
        th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-10)
    assert not th.allclose(flat(ours.policy), before)


@pytest.mark.usefixtures("double_precision")
@either_engine
def test_equals_a2c_over_many_steps(engine: bool) -> None:
    """Nothing is left over from one step to the next, and the random numbers are drawn alike."""
    given = {"learning_rate": 0.02, "gamma": 0.9, "seed": 0, "policy_kwargs": {**SMALL, **SGD}}
    ours = AC("MlpPolicy", walks(spaces.Discrete(3)), engine=engine, **given)
    own = {"n_steps": 1, "max_grad_norm": 1e9, "use_rms_prop": False, "rollout_buffer_class": AllInDouble}
    theirs = A2C("MlpPolicy", walks(spaces.Discrete(3)), **own, **given)
    for model in (ours, theirs):
        model.policy.double()
        th.manual_seed(0)
        model.learn(1100)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-8)


@either_engine
def test_images_have_features_for_each_network(engine: bool) -> None:
    """With these, SB3's A2C has the same networks."""
    given = {"seed": 0, "learning_rate": 0.01, "policy_kwargs": {**SMALL, **SGD, "share_features_extractor": False}}
    policy = make(RandomEnv(IMAGE, spaces.Discrete(3)), "CnnPolicy").policy
    assert policy.pi_features_extractor is not policy.vf_features_extractor
    ours = AC("CnnPolicy", RandomEnv(IMAGE, spaces.Discrete(3)), engine=engine, **given).learn(3)
    own = {"n_steps": 1, "max_grad_norm": 1e9, "use_rms_prop": False}
    theirs = A2C("CnnPolicy", RandomEnv(IMAGE, spaces.Discrete(3)), **own, **given).learn(3)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-5)


# One step by hand


class TwoStates(gym.Env):
    """(1, 2), then (2, 4) with reward 1, where the episode may end."""

    observation_space = spaces.Box(-9, 9, (2,), np.float32)
    action_space = spaces.Discrete(2)
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, terminated: bool = False, truncated: bool = False) -> None:
        self.ends = terminated, truncated

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.array([1, 2], np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.array([2, 4], np.float32), 1.0, *self.ends, {}


@either_engine
@pytest.mark.parametrize(
    ("ends", "delta"), [((False, False), 1.4), ((True, False), 0.5), ((False, True), 1.4)], ids=["goes on", "ends", "is cut"]
)
def test_temporal_difference(ends: tuple[bool, bool], delta: float, engine: bool) -> None:
    """V = 0.5, V' = 1 and 0.5 again in the next episode: only the episode's own last state gives 1.4 where it is cut."""
    model = make(TwoStates(*ends), gamma=0.9, learning_rate=0.1, policy_kwargs={"net_arch": [], **SGD}, engine=engine)
    value, actor = model.policy.value_net, model.policy.action_net
    value.weight.data[:] = th.tensor([[0.1, 0.2]])
    value.bias.data.zero_()
    actor.weight.data.zero_()
    actor.bias.data.zero_()
    model.learn(1, log_interval=None)  # the log is still there then
    step = 0.1 * delta
    np.testing.assert_allclose(value.weight.detach().numpy(), [[0.1 + step, 0.2 + 2 * step]], rtol=1e-5)
    assert value.bias.item() == pytest.approx(step, rel=1e-5)
    taken = int(model.rollout_buffer.actions[0, 0, 0])
    expected = step * (np.eye(2)[taken] - 0.5)
    np.testing.assert_allclose(actor.bias.detach().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(actor.weight.detach().numpy(), np.outer(expected, [1, 2]), rtol=1e-5)
    assert model.logger.name_to_value["train/critic_loss"] == pytest.approx(delta**2 / 2, rel=1e-5)
    assert model.logger.name_to_value["train/actor_loss"] == pytest.approx(delta * np.log(2), rel=1e-5)


def step_for(model: Any, rows: int = 2, weight: float = 1.0) -> Step:
    """A step of random numbers, the last environment's being its episode's last."""
    numbers = np.random.default_rng(3)
    obs, next_obs = (numbers.normal(size=(rows, *model.observation_space.shape)) for _ in range(2))
    actions = numbers.uniform(-1, 1, (rows, int(np.prod(model.action_space.shape))))
    continues = np.arange(rows)[::-1] > 0
    return Step(obs, actions, numbers.normal(size=rows), next_obs, continues, ~continues, np.full(rows, weight), next_obs)


def update(model: Any, step: Step, times: int = 1) -> None:
    for _ in range(times):
        model._engine.begin()
        th.manual_seed(0)
        model._engine.run(model._update, step, False)


def groups(policy: Any) -> dict[str, th.Tensor]:
    """The parameters of actor and critic."""
    parameters = {"actor": policy_parameters(policy), "critic": value_parameters(policy)}
    return {name: th.cat([p.detach().flatten() for p in own]).clone() for name, own in parameters.items()}


def moved(model: Any, step: Step | None = None, **kwargs: Any) -> dict[str, th.Tensor]:
    """What an update changes."""
    model.policy.double()
    before = groups(model.policy)
    update(model, step or step_for(model, **kwargs))
    return {name: after - before[name] for name, after in groups(model.policy).items()}


VARIANTS = {"v": {}, "q": {"critic": "q"}, "deterministic": DETERMINISTIC}


def seen(model: Any, steps: int, rounds: int = 1) -> list[Step]:
    """What `_update` is given."""
    taken: list[Step] = []
    original = model._as_step
    model._as_step = lambda *args: taken.append(original(*args)) or taken[-1]
    for i in range(rounds):
        model.learn(steps, reset_num_timesteps=i == 0)
    return taken


@pytest.mark.parametrize("weighted", [True, False])
def test_weights_start_anew_with_each_episode(weighted: bool) -> None:
    """In each environment by itself, and across calls of `learn`."""
    env = DummyVecEnv([lambda: ScriptedEnv(3), lambda: ScriptedEnv(2)])
    steps = seen(make(env, gamma=0.5, gamma_t_weight=weighted), 4, rounds=3)
    weights = np.array([step.weights for step in steps])
    first, second = ([1, 0.5, 0.25, 1, 0.5, 0.25], [1, 0.5, 1, 0.5, 1, 0.5])
    np.testing.assert_array_equal(weights.T, [first, second] if weighted else np.ones((2, 6)))


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)
def test_rates_and_bounds_of_each_network(kwargs: dict[str, Any]) -> None:
    own = {"policy_kwargs": {**SMALL, **SGD}, **kwargs}
    env = make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS), 2)
    free = moved(make(env, learning_rate=0.1, **own))
    actor_still = moved(make(env, learning_rate=0.1, actor_learning_rate=0.0, **own))
    critic_half = moved(make(env, learning_rate=0.1, critic_learning_rate=0.05, **own))
    bounded = moved(make(env, learning_rate=1.0, max_grad_norm={"critic": 1e-3}, **own))
    assert not actor_still["actor"].any()
    th.testing.assert_close(actor_still["critic"], free["critic"])
    th.testing.assert_close(critic_half["actor"], free["actor"])
    th.testing.assert_close(2 * critic_half["critic"], free["critic"])
    assert bounded["critic"].norm().item() == pytest.approx(1e-3, rel=1e-2)
    th.testing.assert_close(bounded["actor"], 10 * free["actor"])


# As in the book


class Copies(BaseCallback):
    """The policy before the update of each step."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.first = copy.deepcopy(model.policy)
        self.policies: list[Any] = []

    def _on_step(self) -> bool:
        self.policies.append(copy.deepcopy(self.first))
        self.policies[-1].load_state_dict(self.model.policy.state_dict())
        return True


class Book:
    """The updates of Sutton and Barto, 13.5 and 13.6, Sarsa and Silver et al., for each environment by itself, by autograd."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.traces: list[dict[str, Any]] = [{} for _ in range(model.n_envs)]

    def step(self, policy: Any, t: int) -> dict[str, th.Tensor]:
        """Actor's and critic's parameters after step t, ``policy`` being the one before its update."""
        model, starts = self.model, self.model.rollout_buffer.episode_starts
        parameters = {"actor": policy_parameters(policy), "critic": value_parameters(policy)}
        lambdas = {"actor": model.actor_trace_lambda, "critic": model.critic_trace_lambda}
        updated = groups(policy)
        for i, trace in enumerate(self.traces):
            if starts[t, i]:
                trace.update(actor=0.0, critic=0.0, I=1.0)
            climbed, weights = self.climbed(policy, t, slice(i, i + 1), 1 - starts[t + 1, i])
            for name, own in parameters.items():
                gradient = th.cat([g.flatten() for g in th.autograd.grad(climbed[name], own, retain_graph=True)])
                own_weight = trace["I"] if name == "actor" else 1.0
                trace[name] = model.gamma * lambdas[name] * trace[name] + own_weight * gradient
                updated[name] += model.learning_rate / model.n_envs * weights[name] * trace[name]
            if model.ent_coef:
                bonus = th.autograd.grad(climbed["entropy"], parameters["actor"], materialize_grads=True)
                updated["actor"] += model.learning_rate / model.n_envs * model.ent_coef * th.cat([g.flatten() for g in bonus])
            trace["I"] *= model.gamma if model.gamma_t_weight else 1.0
        return updated

    def climbed(self, policy: Any, t: int, i: slice, goes_on: float) -> tuple[dict[str, th.Tensor], dict[str, float]]:
        """What actor and critic climb in an environment, and how far."""
        buffer, gamma = self.model.rollout_buffer, self.model.gamma
        obs, new_obs = (th.as_tensor(buffer.observations[k, i]) for k in (t, t + 1))
        taken, next_taken = (th.as_tensor(buffer.actions[k, i]).double() for k in (t, t + 1))
        if isinstance(self.model.action_space, spaces.Discrete):
            taken, next_taken = taken.long().flatten(), next_taken.long().flatten()
        if self.model.critic == "v":
            value, next_value = policy.predict_values(obs), policy.predict_values(new_obs)
        else:
            value, next_value = policy.action_values(obs, taken), policy.action_values(new_obs, next_taken)
        delta = buffer.rewards[t, i].item() + gamma * goes_on * next_value.item() - value.item()
        if self.model.deterministic_policy:
            best = policy.action_values(obs, policy.action(obs)).sum()
            return {"actor": best, "critic": value.sum()}, {"actor": 1.0, "critic": delta}
        distribution = policy.get_distribution(obs)
        climbed = {"actor": distribution.log_prob(taken), "entropy": distribution.entropy(), "critic": value}
        weights = {"actor": delta if self.model.critic == "v" else value.item(), "critic": delta}
        return {name: tensor.sum() for name, tensor in climbed.items()}, weights


TWO = spaces.Box(-1, 3, (2,), np.float64)
BOOK: dict[str, tuple[spaces.Space, dict[str, Any]]] = {
    "V": (spaces.Discrete(3), {"gamma_t_weight": True}),
    "V of a box": (TWO, {"ent_coef": 0.3}),
    "both traces": (spaces.Discrete(3), {"actor_trace_lambda": 0.5, "critic_trace_lambda": 0.8}),
    "actor's traces": (spaces.Discrete(3), {"actor_trace_lambda": 0.9, "gamma_t_weight": True, "ent_coef": 0.3}),
    "critic's traces": (TWO, {"critic_trace_lambda": 1.0}),
    "Sarsa": (spaces.Discrete(3), {"critic": "q", "gamma_t_weight": True}),
    "Sarsa of a box": (TWO, {"critic": "q", "ent_coef": 0.3}),
    "Sarsa of coins": (spaces.MultiBinary(2), {"critic": "q"}),
    "Sarsa with traces": (spaces.Discrete(3), {"critic": "q", "critic_trace_lambda": 0.8}),
    "deterministic": (TWO, {**DETERMINISTIC, "gamma_t_weight": True}),
    "deterministic with noise": (TWO, {**DETERMINISTIC, "exploration_std": 0.3}),
}


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(("actions", "kwargs"), BOOK.values(), ids=BOOK)
@either_engine
def test_step_by_step_as_in_the_book(actions: spaces.Space, kwargs: dict[str, Any], engine: bool) -> None:
    """Actor and critic move from the same point; Sarsa's target is that of the action which is taken next."""
    env = walks(actions, truncates=False)
    env.venv.envs[1].t = 2  # its episodes end at other times
    own = {"policy_kwargs": {**SMALL, **SGD}, "learning_rate": 0.1, "gamma": 0.9}
    model = make(env, engine=engine, **own, **kwargs)
    model.policy.double()
    copies, book = Copies(model), Book(model)
    model.learn(2 * 12, callback=copies)
    for t in range(11):
        expected = book.step(copies.policies[t], t)
        th.testing.assert_close(groups(copies.policies[t + 1]), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("actions", [spaces.Discrete(1), CONTINUOUS], ids=["one action", "deterministic"])
@either_engine
def test_sarsa_of_a_truncated_episode_is_at_its_last_state(actions: spaces.Space, engine: bool) -> None:
    """Where there is only one action to be drawn."""

    class Cut(RandomEnv):
        def step(self, action: Any) -> Any:
            obs, *_ = super().step(action)
            self.last = obs
            return obs, 1.0, False, True, {}

    kwargs = {"deterministic_policy": True} if isinstance(actions, spaces.Box) else {}
    env = Cut(BOX, actions)
    model = make(env, critic="q", gamma=0.9, engine=engine, **kwargs)
    policy, first = copy.deepcopy(model.policy), th.as_tensor(model.env.reset())
    model._last_obs, model._last_episode_starts = first.numpy(), np.ones(1, dtype=bool)
    model.learn(1, reset_num_timesteps=False, log_interval=None)
    with th.no_grad():
        last, taken = th.as_tensor(env.last)[None], th.as_tensor(model.rollout_buffer.actions[0])
        action = policy.action(last) if kwargs else th.zeros(1, dtype=th.long)
        target = 1 + 0.9 * policy.action_values(last, action)
        error = target - policy.action_values(first, taken if kwargs else taken.long().flatten())
    assert model.logger.name_to_value["train/critic_loss"] == pytest.approx(0.5 * error.item() ** 2, rel=1e-5)


def test_deterministic_gradient_by_hand() -> None:
    """Q(s, a) = 3 a with mu(s) = tanh(w s + b): the actor climbs by dmu/dw dQ/da, whatever was done."""
    env = RandomEnv(spaces.Box(-1, 1, (1,), np.float32), spaces.Box(-1, 1, (1,), np.float32))
    model = make(env, policy_kwargs={"net_arch": [], **SGD}, learning_rate=0.1, **DETERMINISTIC)
    for module, weight in ((model.policy.action_net, [[0.5]]), (model.policy.value_net, [[0.0, 3.0]])):
        module.weight.data[:] = th.tensor(weight)
        module.bias.data.zero_()
    state, done, one, zero = (np.array(x, np.float32) for x in ([[2.0]], [[-0.9]], [1.0], [0.0]))
    update(model, Step(state, done, one, state, zero, one, one, state))
    slope = 1 - np.tanh(1.0) ** 2
    assert model.policy.action_net.weight.item() == pytest.approx(0.5 + 0.1 * 3 * 2 * slope, rel=1e-5)
    error = 1.0 - 3 * -0.9
    np.testing.assert_allclose(
        model.policy.value_net.weight.detach().numpy(), [[0.1 * error * 2, 3 - 0.1 * error * 0.9]], rtol=1e-5
    )


@pytest.mark.parametrize("std", [0.0, 0.5])
def test_deterministic_policy_acts_as_it_says(std: float) -> None:
    """Scaled to the range of the actions; noise in training only."""
    seen_actions = []

    class Watched(RandomEnv):
        def step(self, action: Any) -> Any:
            seen_actions.append(action)
            return super().step(action)

    model = make(Watched(BOX, CONTINUOUS), learning_rate=0.0, exploration_std=std, **DETERMINISTIC)
    model.learn(400)
    stored = model.rollout_buffer.actions[:400, 0]
    assert np.abs(stored).max() <= 1
    low, high = CONTINUOUS.low, CONTINUOUS.high
    np.testing.assert_allclose(seen_actions, low + (stored + 1) / 2 * (high - low), atol=1e-6)
    predicted = np.stack([model.predict(obs[0])[0] for obs in model.rollout_buffer.observations[:400]])
    difference = stored - (2 * (predicted - low) / (high - low) - 1)
    if std:
        inside = np.abs(stored).max(axis=1) < 1
        assert 0.3 < difference[inside].std() < 0.5
    else:
        np.testing.assert_allclose(difference, 0, atol=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_deterministic_policy_learns_what_pays(seed: int) -> None:
    class Target(RandomEnv):
        def step(self, action: Any) -> Any:
            obs, *_ = super().step(action)
            return obs, -float((action[0] - 0.5) ** 2), True, False, {}

    env = make_vec_env(lambda: Target(BOX, spaces.Box(-1, 1, (1,), np.float32)), 8)
    rates = {"actor_learning_rate": 1e-3, "critic_learning_rate": 1e-2}
    model = make(env, exploration_std=0.4, policy_kwargs=SMALL, seed=seed, **rates, **DETERMINISTIC).learn(8 * 1000)
    actions = model.predict(np.stack([BOX.sample() for _ in range(50)]))[0]
    assert np.abs(actions - 0.5).mean() < 0.12


def test_q_policies_take_actions_one_hot() -> None:
    model = make(RandomEnv(BOX, spaces.MultiDiscrete([3, 2])), critic="q", policy_kwargs={"net_arch": {"pi": [8], "vf": [7]}})
    policy = model.policy
    assert type(policy) is QMlpPolicy
    assert policy.mlp_extractor.value_net[0].weight.shape == (7, 4 + 5)
    obs, actions = th.randn(2, 4), th.tensor([[2, 0], [1, 1]])
    inputs = th.cat([obs, th.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 1.0]])], dim=1)
    expected = policy.value_net(policy.mlp_extractor.value_net(inputs))
    th.testing.assert_close(policy.action_values(obs, actions), expected)
    values, _, _ = policy.evaluate_actions(obs, actions)
    th.testing.assert_close(values, expected)
    chosen, values, _ = policy(obs, deterministic=True)
    th.testing.assert_close(values, policy.action_values(obs, chosen))
    th.testing.assert_close(policy.predict_values(obs), values)


@pytest.mark.parametrize(("policy", "space"), [("MlpPolicy", BOX), ("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)])
@pytest.mark.parametrize("kwargs", [{"critic": "q"}, DETERMINISTIC], ids=["q", "deterministic"])
def test_q_policies_for_every_observation(policy: str, space: spaces.Space, kwargs: dict[str, Any], tmp_path: Any) -> None:
    env = RandomEnv(space, CONTINUOUS)
    model = make(env, policy, **kwargs).learn(8)
    assert isinstance(model.policy, DeterministicMlpPolicy if "deterministic_policy" in kwargs else QMlpPolicy)
    assert not set(map(id, policy_parameters(model.policy))) & set(map(id, value_parameters(model.policy)))
    trained = sum(p.numel() for p in (*policy_parameters(model.policy), *value_parameters(model.policy)))
    assert trained == sum(p.numel() for p in model.policy.parameters())
    model.save(tmp_path / "model")
    loaded = AC.load(tmp_path / "model", env=env)
    assert type(loaded.policy) is type(model.policy)
    obs = space.sample()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    model.policy.save(tmp_path / "policy")
    again = type(model.policy).load(tmp_path / "policy")
    np.testing.assert_array_equal(again.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


# Traces


@either_engine
def test_traces_with_adam_and_images(engine: bool) -> None:
    """Gradients end up where Adam reads them."""
    model = make(RandomEnv(IMAGE, spaces.Discrete(3)), "CnnPolicy", critic_trace_lambda=0.5, ent_coef=0.1, engine=engine)
    before = groups(model.policy)
    model.learn(3)
    for name, after in groups(model.policy).items():
        assert not th.equal(after, before[name])
    adam = [make(engine=engine, **kwargs).learn(20) for kwargs in ({"actor_trace_lambda": 1e-12}, {})]
    th.testing.assert_close(flat(adam[0].policy), flat(adam[1].policy), rtol=1e-3, atol=1e-5)


def test_traces_are_not_in_a_zip(tmp_path: Any) -> None:
    """They belong to episodes, and those start anew."""
    make(critic_trace_lambda=0.5).learn(3).save(tmp_path / "model")
    data = json.loads(zipfile.ZipFile(tmp_path / "model.zip").read("data"))
    assert data.keys().isdisjoint({"_weights", "_traces"})


# Steps


class OwnPolicy(ActorCriticPolicy):
    """A user's, whose values are scaled."""

    def predict_values(self, obs: Any) -> th.Tensor:
        return 0.5 * super().predict_values(obs)


class Counter(BaseCallback):
    """What SB3's callbacks look at."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at, self.rollouts, self.updates = stop_at, 0, []

    def _on_rollout_start(self) -> None:
        self.rollouts += 1

    def _on_step(self) -> bool:
        names = {"new_obs", "rewards", "dones", "infos", "actions", "clipped_actions", "values", "log_probs", "obs_tensor"}
        assert names <= set(self.locals)
        self.updates.append(self.model._n_updates)
        return self.n_calls != self.stop_at


@pytest.mark.parametrize(("n_envs", "steps", "taken"), [(1, 7, 7), (2, 7, 8), (1, 1003, 1003)])
def test_as_many_steps_as_were_asked_for(n_envs: int, steps: int, taken: int) -> None:
    counter = Counter()
    model = make(make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS), n_envs)).learn(steps, callback=counter)
    assert model.num_timesteps == taken
    assert model._n_updates == taken // n_envs
    assert counter.updates == list(range(taken // n_envs))  # each before the update of its step
    assert counter.rollouts == 1 + steps // 501


@pytest.mark.parametrize(("every", "draws"), [(-1, 1), (4, 1 + 3)])
def test_noise_of_gsde_is_drawn_as_often_as_was_asked_for(every: int, draws: int) -> None:
    model = make(use_sde=True, sde_sample_freq=every)
    drawn = []
    original = model.policy.reset_noise
    model.policy.reset_noise = lambda n_envs: drawn.append(n_envs) or original(n_envs)
    model.learn(10)
    assert drawn == [1] * draws


def test_stops_where_a_callback_says_so() -> None:
    model = make().learn(100, callback=Counter(stop_at=12))
    assert (model.num_timesteps, model._n_updates) == (12, 11)


def test_the_buffer_counts_its_steps() -> None:
    class Sizes(BaseCallback):
        def _on_step(self) -> bool:
            sizes.append((self.model.rollout_buffer.pos, self.model.rollout_buffer.size()))
            return True

    sizes: list[tuple[int, int]] = []
    make().learn(502, callback=Sizes())
    assert sizes == [*((i, i) for i in range(500)), (0, 0), (1, 1)]


def setting(**values: Any) -> Callable[[Any], None]:
    return lambda model: vars(model).update(values)


CHANGES: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "frozen with traces": (lambda model: model.policy.action_net.requires_grad_(False), {"actor_trace_lambda": 0.8}),
    "gamma": (setting(gamma=0.1), {}),
    "ent_coef": (setting(ent_coef=0.5), {}),
    "no ent_coef": (setting(ent_coef=0.0), {"ent_coef": 0.5}),
    "gamma_t_weight": (setting(gamma_t_weight=True), {"gamma": 0.5}),
    "traces": (setting(actor_trace_lambda=0.9, critic_trace_lambda=0.9), {}),
    "other traces": (setting(actor_trace_lambda=0.0, critic_trace_lambda=0.2), {"actor_trace_lambda": 0.9}),
    "noise": (setting(exploration_std=0.5), DETERMINISTIC),
}


@pytest.mark.parametrize(("change", "kwargs"), CHANGES.values(), ids=CHANGES)
def test_what_a_callback_changes_acts_at_once(change: Callable[[Any], Any], kwargs: dict[str, Any]) -> None:
    """Not in the next rollout; without the engine that is so by itself. The contracts have what all algorithms read."""

    class Change(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 10:
                change(self.model)
            return True

    def trained(engine: bool, callback: BaseCallback | None) -> th.Tensor:
        # with Adam's eps of 1e-2 rounding stays what it is, also where a gradient is 0
        policy_kwargs = {"optimizer_kwargs": {"eps": 1e-2}}
        actions = CONTINUOUS if "critic" in kwargs else spaces.Discrete(2)
        model = make(RandomEnv(BOX, actions), engine=engine, policy_kwargs=policy_kwargs, learning_rate=0.01, **kwargs)
        model.env.seed(3)
        model.learn(14, callback=callback)
        return th.cat([flat(model.policy), th.as_tensor(model.rollout_buffer.actions[:14].flatten())])

    changed = trained(True, Change())
    th.testing.assert_close(changed, trained(False, Change()), rtol=0, atol=1e-5)
    assert not th.allclose(changed, trained(True, None), rtol=0, atol=1e-4)


@either_engine
def test_layers_act_and_train_in_their_own_mode(engine: bool) -> None:
    modes: list[tuple[bool, bool]] = []

    class Noted(FlattenExtractor):
        def forward(self, observations: th.Tensor) -> th.Tensor:
            modes.append((self.training, th.is_grad_enabled()))
            return super().forward(observations)

    policy_kwargs = {**SMALL, "features_extractor_class": Noted}
    make(policy_kwargs=policy_kwargs, engine=engine).learn(3)
    assert all(training == with_gradient for training, with_gradient in modes)
    assert {True, False} == {training for training, _ in modes}


def test_logged_quantities() -> None:
    model = make(learning_rate="lin_1e-3", critic_learning_rate=2e-3).learn(600, log_interval=None)
    logged = model.logger.name_to_value
    names = {"actor_loss", "critic_loss", "entropy_loss", "actor_grad_norm", "critic_grad_norm", "std", "n_updates"}
    assert {f"train/{name}" for name in names} <= set(logged)
    assert "train/explained_variance" not in logged
    assert logged["train/n_updates"] == 600
    assert logged["train/critic_learning_rate"] == 2e-3
    assert logged["train/learning_rate"] == pytest.approx(1e-3 * (1 - 500 / 600))
    assert {"train/actor_loss", "train/critic_loss"} <= set(
        make(**DETERMINISTIC).learn(5, log_interval=None).logger.name_to_value
    )


@pytest.mark.parametrize(
    ("policy", "observations", "actions", "kwargs"),
    [
        ("MlpPolicy", BOX, spaces.Discrete(2), {}),
        ("MlpPolicy", spaces.Discrete(3), spaces.MultiDiscrete([3, 2]), {"actor_trace_lambda": 0.5}),
        ("MlpPolicy", BOX, spaces.MultiBinary(2), {"critic": "q", "critic_trace_lambda": 0.5}),
        ("MlpPolicy", BOX, CONTINUOUS, {"use_sde": True, "sde_sample_freq": 3}),
        ("MlpPolicy", BOX, CONTINUOUS, {**DETERMINISTIC, "exploration_std": 0.1}),
        ("CnnPolicy", IMAGE, CONTINUOUS, {}),
        ("MultiInputPolicy", spaces.Dict({"vector": BOX, "choice": spaces.Discrete(3)}), CONTINUOUS, {"critic": "q"}),
        (OwnPolicy, BOX, CONTINUOUS, {"policy_kwargs": {"activation_fn": nn.ELU}}),
    ],
)
def test_steps_are_replayed(policy: Any, observations: spaces.Space, actions: spaces.Space, kwargs: dict[str, Any]) -> None:
    model = make(make_vec_env(lambda: RandomEnv(observations, actions), 2), policy, **kwargs).learn(40)
    assert {text for name, text in model.engine_report().items() if name.startswith("update(True)")} == {"replayed"}
    assert make(engine=False).engine_report() == {"engine": "engine=False"}


# What is not finite


class Broken(RandomEnv):
    """Takes any action, and gives NaN from the tenth step on."""

    def __init__(self, what: str, action_space: spaces.Space) -> None:
        super().__init__(BOX, action_space)
        self.what, self.steps = what, 0

    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(self.action_space.sample())
        self.steps += 1
        if self.steps >= 10 and self.what == "observation":
            obs = np.full_like(obs, np.nan)
        return obs, np.nan if self.steps >= 10 and self.what == "reward" else reward, *rest


@pytest.mark.parametrize("actions", [spaces.Discrete(2), spaces.Box(-1, 1, (2,), np.float32)], ids=["discrete", "box"])
@pytest.mark.parametrize("what", ["observation", "reward"])
@pytest.mark.parametrize("steps", [2000, 20], ids=["on the way", "at the end"])
@either_engine
def test_an_environment_that_gives_nan_is_named(actions: spaces.Space, what: str, steps: int, engine: bool) -> None:
    envs = [lambda: RandomEnv(BOX, actions), lambda: Broken(what, actions)]
    model = make(DummyVecEnv(envs), engine=engine)
    with pytest.raises(NonFiniteError, match=rf"environment 1 gave a non-finite {what}"):
        model.learn(steps)
    assert model.num_timesteps <= 22


@pytest.mark.parametrize("actions", [spaces.Discrete(2), CONTINUOUS], ids=["discrete", "box"])
@pytest.mark.parametrize(("network", "net"), [("actor", "action_net"), ("critic", "value_net")])
@either_engine
def test_a_network_that_becomes_nan_is_named(actions: spaces.Space, network: str, net: str, engine: bool) -> None:
    class Break(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 10:
                getattr(self.model.policy, net).bias.data[0] = float("nan")
            return True

    model = make(Broken("nothing", actions), engine=engine)
    with pytest.raises(
        NonFiniteError, match=rf"AC: the parameters of the {network if network == 'actor' else '(actor|critic)'}"
    ):
        model.learn(2000, callback=Break())
    assert model.num_timesteps < 30


class Replaces(FlattenExtractor):
    """Knows what to do with NaN."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations).nan_to_num(0.5)


@either_engine
def test_nan_that_a_policy_knows_is_no_fault(engine: bool) -> None:
    policy_kwargs = {"features_extractor_class": Replaces}
    model = make(Broken("observation", CONTINUOUS), policy_kwargs=policy_kwargs, engine=engine).learn(30)
    assert flat(model.policy).isfinite().all() and model._n_updates == 30
    with pytest.raises(NonFiniteError, match="environment 0 gave a non-finite reward"):
        make(Broken("reward", CONTINUOUS), policy_kwargs=policy_kwargs, engine=engine).learn(30)


@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True}, DETERMINISTIC], ids=["gaussian", "gSDE", "deterministic"])
@either_engine
def test_steps_that_are_far_too_large_end_in_an_error_that_says_so(kwargs: dict[str, Any], engine: bool) -> None:
    with pytest.raises(NonFiniteError, match=r"AC: .* became .* lower the learning rate"):
        make("Pendulum-v1", learning_rate=1e30, engine=engine, **kwargs).learn(2000)


@pytest.mark.parametrize(
    ("log_std", "cause"), [(90.0, "parameters of the actor became .*nan"), (-200.0, "standard deviation of actions became 0")]
)
def test_a_standard_deviation_that_is_none_is_named(log_std: float, cause: str) -> None:
    class Explode(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 10:
                self.model.policy.log_std.data.fill_(log_std)
            return True

    with pytest.raises(NonFiniteError, match=f"AC: the {cause}"):
        make(Broken("nothing", CONTINUOUS)).learn(600, callback=Explode())
