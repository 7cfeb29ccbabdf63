"""Reinforce: returns of whole episodes, the gradient by enumeration, the same share of every environment, the baseline."""

import itertools
import resource
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from batches import flat
from environments import BOX, CONTINUOUS, RandomEnv, ScriptedEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from models import environment, small_model
from rollout_data import InDouble, rollout, trained
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_ac_ext import PPOX, Reinforce
from sb3_ac_ext.base.episodes import time_limit
from sb3_ac_ext.networks.actor_critic import policy_parameters, value_parameters
from sb3_ac_ext.validation import NonFiniteError

SMALL: dict[str, Any] = {"net_arch": [8, 8]}
SGD: dict[str, Any] = {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {}}
G = [5.23, 4.7, 3.0]
"""Returns of the rewards 1, 2, 3 with gamma 0.9."""


def make(env: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    own = {"rollout_episodes": 2, "max_rollout_steps": 20, "policy_kwargs": SMALL}
    return small_model(Reinforce, env=env or ScriptedEnv(), policy=policy, **{**own, **kwargs})


def scripted(*lengths: int) -> DummyVecEnv:
    return DummyVecEnv([lambda length=length: ScriptedEnv(length) for length in lengths])


def with_value(model: Any, value: float) -> Any:
    """The model with a baseline that is the same everywhere."""
    model.policy.value_net.weight.data.zero_()
    model.policy.value_net.bias.data.fill_(value)
    return model


def collected(model: Any) -> Any:
    """The model with its first rollout, and nothing learned from it."""
    model.train = lambda: None
    model.learn(1)
    del model.train
    return model


def weights(model: Any) -> np.ndarray:
    """What log pi(a|s) is weighted with."""
    return model._weights(model._episodes()).numpy()


# Returns


@pytest.mark.parametrize("truncates", [False, True], ids=["terminates", "truncates"])
def test_returns_are_the_sums_to_the_end_of_each_episode(truncates: bool) -> None:
    """Truncated ones too, and whatever the value network says."""
    model = collected(with_value(make(ScriptedEnv(truncates=truncates), gamma=0.9), 7.0))
    samples = model._samples()
    np.testing.assert_allclose(samples.returns, G * 2, rtol=1e-6)
    np.testing.assert_allclose(samples.advantages, np.array(G * 2) - 7, rtol=1e-5)
    assert model.num_timesteps == 6


def test_truncated_episodes_end_with_the_baselines_value_if_asked_for() -> None:
    """Of their own last observation, which is (3, action); the next episode begins at (0, 0)."""
    for truncates, last in ((False, 3.0), (True, 3 + 0.9 * 2 * 3)):
        model = make(ScriptedEnv(truncates=truncates), gamma=0.9, bootstrap_truncated=True, policy_kwargs={"net_arch": []})
        model.policy.value_net.weight.data[:] = th.tensor([[2.0, 0.0]])
        model.policy.value_net.bias.data.zero_()
        expected = [1 + 0.9 * (2 + 0.9 * last), 2 + 0.9 * last, last]
        np.testing.assert_allclose(collected(model)._samples().returns, expected * 2, rtol=1e-6)


@pytest.mark.parametrize("use_baseline", [True, False])
def test_weights_of_the_log_probabilities(use_baseline: bool) -> None:
    model = collected(with_value(make(gamma=0.9, use_baseline=use_baseline), 7.0))
    expected = np.array(G * 2) - (7 if use_baseline else 0)
    np.testing.assert_allclose(weights(model), expected, rtol=1e-5)
    model.gamma_t_weight = True
    np.testing.assert_allclose(weights(model), expected * [1, 0.9, 0.81, 1, 0.9, 0.81], rtol=1e-5)


def test_standardised_over_the_update_before_the_discount() -> None:
    model = collected(make(scripted(3, 5), gamma=0.9, use_baseline=False, normalize_advantage=True))
    plain = weights(model)
    assert len(plain) == 8
    assert plain.mean() == pytest.approx(0, abs=1e-6)
    assert plain.std(ddof=1) == pytest.approx(1, rel=1e-5)
    model.gamma_t_weight = True
    np.testing.assert_allclose(weights(model), plain * 0.9 ** np.array([0, 1, 2, 0, 1, 2, 3, 4]), rtol=1e-5)


def test_a_single_sample_is_not_standardised() -> None:
    model = make(ScriptedEnv(length=1), rollout_episodes=1, use_baseline=False, normalize_advantage=True)
    assert weights(collected(model)).tolist() == [1.0]
    model.train()
    assert th.isfinite(flat(model.policy)).all()


# Whole episodes, as many of each environment


def test_every_environment_gives_the_same_number_of_episodes() -> None:
    """Three episodes of 3 steps fit into the two of 5; the third of them, and what was begun of a fourth, are not used."""
    model = collected(make(scripted(3, 5), rollout_episodes=4, gamma=0.9, gamma_t_weight=True))
    assert model._rollout_length == 10
    assert model.num_timesteps == 20
    np.testing.assert_array_equal(model._kept, np.stack([np.arange(10) < 6, np.full(10, True)], axis=1))
    long = [1 + 0.9 * (2 + 0.9 * (3 + 0.9 * (4 + 0.9 * 5)))]
    returns = model._samples().returns
    np.testing.assert_allclose(returns[:6], G * 2, rtol=1e-6)
    np.testing.assert_allclose(returns[[6, 11]], long * 2, rtol=1e-6)
    np.testing.assert_allclose(model._episodes().discounts, 0.9 ** np.array([0, 1, 2] * 2 + [0, 1, 2, 3, 4] * 2), rtol=1e-6)
    np.testing.assert_array_equal(model._last_episode_starts, [False, True])
    model.learn(1, reset_num_timesteps=False)  # all start anew
    np.testing.assert_array_equal(model.rollout_buffer.observations[0, :, 0], [0, 0])
    assert len(model._samples().returns) == 16


def test_one_environment_goes_on_without_a_reset() -> None:
    model = make(rollout_episodes=1)
    resets = []
    model.env.reset = lambda: resets.append(1) or DummyVecEnv.reset(model.env)
    model.learn(9)
    assert model.num_timesteps == 9
    assert model._n_updates == 3
    assert len(resets) == 1


def test_room_for_the_longest_episodes() -> None:
    model = make(TimeLimit(RandomEnv(BOX, CONTINUOUS), 9), max_rollout_steps=None, rollout_episodes=5)
    assert model.rollout_buffer.buffer_size == model.n_steps == 45
    assert make(max_rollout_steps=11).n_steps == 11
    both = DummyVecEnv([lambda limit=limit: TimeLimit(ScriptedEnv(), limit) for limit in (4, 6)])
    assert time_limit(both) == 6
    assert make(both, max_rollout_steps=None, rollout_episodes=3).n_steps == 12
    assert time_limit(DummyVecEnv([ScriptedEnv])) is None
    assert time_limit(DummyVecEnv([ScriptedEnv, lambda: gym.make("CartPole-v1")])) is None


def test_what_does_not_fit_is_left_out() -> None:
    model = collected(make(max_rollout_steps=5))
    assert model._kept[:, 0].tolist() == [True, True, True, False, False]
    with pytest.raises(ValueError, match=r"no episode ended within max_rollout_steps=2 steps .*raise max_rollout_steps"):
        make(max_rollout_steps=2).learn(10)


def test_number_and_room_of_episodes_may_change() -> None:
    """A multiple of the number of environments, in more steps than the model was made for, and in fewer."""
    model = make(DummyVecEnv([lambda: TimeLimit(ScriptedEnv(), 9)] * 2), max_rollout_steps=7, rollout_episodes=1)
    for episodes, steps, length in ((1, 7, 3), (2, 7, 3), (3, 7, 6), (16, 30, 24), (16, None, 24), (4, 7, 6), (8, 7, 7)):
        model.rollout_episodes, model.max_rollout_steps = episodes, steps
        model.learn(1, reset_num_timesteps=False)
        assert (model._rollout_length, model._kept.sum()) == (length, 2 * (length // 3 * 3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", 0.5),
        ("ent_coef", 1.0),
        ("use_baseline", False),
        ("baseline_learning_rate", 0.1),
        ("bootstrap_truncated", True),
        ("gamma_t_weight", True),
        ("normalize_advantage", True),
        ("max_grad_norm", 1e-3),
        ("learning_rate", 0.5),
    ],
)
def test_an_argument_that_is_set_later_is_the_constructors(name: str, value: Any) -> None:
    env, kwargs = ScriptedEnv(truncates=True), {"policy_kwargs": {**SMALL, **SGD}}
    live, made, other = make(env, **kwargs), make(env, **kwargs, **{name: value}), make(env, **kwargs)
    setattr(live, name, value)
    live._setup_lr_schedule()  # which SB3 asks for where the rate is changed
    for model in (live, made, other):
        th.manual_seed(0)
        model.learn(1)
    th.testing.assert_close(flat(live.policy), flat(made.policy), rtol=0, atol=0)
    assert not th.equal(flat(other.policy), flat(made.policy))


# The gradient


class Chain(gym.Env):
    """Three states; action 1 goes on by one, action 0 back to the first. The reward depends on state, action and time."""

    observation_space = spaces.Box(0, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    horizon = 3

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = self.state = 0
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[self.state]

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = self.reward(self.t, self.state, int(action))
        self.state = min(self.state + 1, 2) if action else 0
        self.t += 1
        return self.observe(), reward, self.t == self.horizon, False, {}

    @staticmethod
    def reward(t: int, state: int, action: int) -> float:
        return 1.0 + 2 * state * action - 0.5 * t + 0.25 * action


EPISODES = [*itertools.product((0, 1), repeat=Chain.horizon)]


def objective(logits: th.Tensor, gamma: float, discounted: bool) -> th.Tensor:
    """
    J by enumeration, from the table of logits ``(3, 2)``.

    Without ``discounted`` it is a function with the gradient sum_t E[G_t grad log pi(a_t|s_t)], which the practice has.
    """
    total = th.zeros((), dtype=logits.dtype)
    log_pi = logits.log_softmax(dim=1)
    for actions in EPISODES:
        state, log_probs, rewards = 0, [], []
        for t, action in enumerate(actions):
            log_probs.append(log_pi[state, action])
            rewards.append(Chain.reward(t, state, action))
            state = min(state + 1, 2) if action else 0
        log_prob = th.stack(log_probs).sum()
        if discounted:
            total = total + log_prob.exp() * sum(gamma**t * r for t, r in enumerate(rewards))
            continue
        for t, own in enumerate(log_probs):
            returns = sum(gamma ** (k - t) * rewards[k] for k in range(t, Chain.horizon))
            total = total + log_prob.exp().detach() * returns * own
    return total


def forced(model: Any, actions: tuple[int, ...]) -> Any:
    """The model after one update from the episode with these actions."""
    queue, forward = iter(actions), model._forward
    model._forward = lambda obs: (np.array([next(queue)]), *forward(obs)[1:])
    model.learn(len(actions))
    assert next(queue, None) is None
    return model


TABLE = th.tensor([[0.3, -0.2], [0.1, 0.4], [-0.5, 0.2]], dtype=th.float64)


def expected_step(**kwargs: Any) -> th.Tensor:
    """Mean change of the table of logits by one update with rate 1, over all episodes with their probabilities."""
    mean = th.zeros(3, 2, dtype=th.float64)
    for actions in EPISODES:
        own = {"policy_kwargs": {"net_arch": [], **SGD}, "rollout_episodes": 1, "gamma": 0.8, "learning_rate": 1.0}
        model = with_value(make(Chain(), **{**own, **kwargs}), 5.0)
        weight = model.policy.action_net.weight
        weight.data[:] = TABLE.T
        model.policy.action_net.bias.data.zero_()
        state, probability = 0, 1.0
        for action in actions:
            probability *= TABLE[state].softmax(dim=0)[action].item()
            state = min(state + 1, 2) if action else 0
        mean += probability * (forced(model, actions).policy.action_net.weight.detach().double().T - TABLE)
    return mean


@pytest.mark.parametrize("use_baseline", [True, False], ids=["baseline", "no baseline"])
@pytest.mark.parametrize("discounted", [True, False], ids=["gamma^t", "plain"])
def test_expected_step_is_the_gradient(use_baseline: bool, discounted: bool) -> None:
    """The mean over the steps of an episode, so a third of the sum; the baseline does not matter."""
    logits = TABLE.clone().requires_grad_()
    objective(logits, 0.8, discounted).backward()
    step = expected_step(use_baseline=use_baseline, gamma_t_weight=discounted)
    th.testing.assert_close(Chain.horizon * step, logits.grad, rtol=0, atol=2e-6)


class Bandit(gym.Env):
    """One step, rewards 1, 0, 3."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space = spaces.Discrete(3)
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(1, np.float32), [1.0, 0.0, 3.0][int(action)], True, False, {}


@pytest.mark.parametrize(("baseline", "variance"), [(0.0, 1.7998), (5.0, None), ("V", 0.5633)], ids=str)
def test_bandit(baseline: Any, variance: float | None) -> None:
    """The same mean with any baseline, and less variance with a good one."""
    logits = th.tensor([0.2, -0.4, 0.1])
    probs = logits.softmax(dim=0)
    baseline = float(probs @ th.tensor([1.0, 0.0, 3.0])) if baseline == "V" else baseline
    steps = []
    for action in range(3):
        model = make(Bandit(), rollout_episodes=1, learning_rate=1.0, policy_kwargs={"net_arch": [], **SGD})
        model.policy.action_net.bias.data[:] = logits
        steps.append(forced(with_value(model, baseline), (action,)).policy.action_net.bias.detach() - logits)
    stacked = th.stack(steps)
    mean = probs @ stacked
    th.testing.assert_close(mean, th.tensor([-0.20943202, -0.33861034, 0.54804236]), rtol=0, atol=1e-6)
    if variance is not None:
        assert (probs @ stacked.square().sum(dim=1) - mean.square().sum()).item() == pytest.approx(variance, abs=1e-3)


# Equal to SB3's A2C on a whole episode


CASES: dict[str, dict[str, Any]] = {
    "box": {},
    "discrete": {"variant": "discrete"},
    "several choices": {"variant": "several choices"},
    "gSDE": {"variant": "gsde"},
    "unequal": {"policy_kwargs": {"net_arch": {"pi": [5], "vf": [7, 6, 5]}, "activation_fn": nn.ReLU}},
    "SGD": {"policy_kwargs": SGD},
    "standardised": {"normalize_advantage": True},
    "images": {"variant": "images"},
}


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("kwargs", CASES.values(), ids=CASES)
@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_equals_a2c_on_whole_episodes(kwargs: dict[str, Any], engine: bool) -> None:
    """
    A2C's Adam steps policy and value at once; its value's loss counts as much as ours.

    Our policy for images has a features extractor each for policy and value, as two optimizers need.
    """
    changes = {**kwargs}
    variant = changes.pop("variant", "mlp")
    env = make_vec_env(lambda: environment(Reinforce, variant), n_envs=2)
    given = {"env": env, "ent_coef": 0.1, "learning_rate": lambda progress: 3e-3 * progress, **changes}
    ours = small_model(Reinforce, variant, engine=engine, max_rollout_steps=12, **given)
    given["policy_kwargs"] = {"share_features_extractor": False, **kwargs.get("policy_kwargs", {})}
    own = {"n_steps": 12, "vf_coef": 1.0, "max_grad_norm": 1e9, "use_rms_prop": False, "rollout_buffer_class": InDouble}
    theirs = small_model(A2C, variant, **own, **given)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0)
    for model in (ours, theirs):
        model.policy.double()
    for update in range(4):
        arrays = rollout(theirs, update)
        for model in (ours, theirs):
            model._current_progress_remaining = 1 - update / 10
            trained(model, arrays)
        th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-10)
    names = {id(parameter): name for model in (ours, theirs) for name, parameter in model.policy.named_parameters()}
    optimizers = [[ours.policy.optimizer, ours.policy.value_optimizer], [theirs.policy.optimizer]]
    states = [{names[id(p)]: state for o in several for p, state in o.state.items()} for several in optimizers]
    th.testing.assert_close(*states, rtol=0, atol=1e-10)


# The baseline


def moved(model: Any) -> dict[str, th.Tensor]:
    """What one update changes in each network."""
    groups = {"policy": policy_parameters(model.policy), "baseline": value_parameters(model.policy)}
    before = {name: [p.detach().clone() for p in group] for name, group in groups.items()}
    model.train()
    return {n: th.cat([(p.detach() - q).flatten() for p, q in zip(groups[n], before[n], strict=True)]) for n in groups}


def test_each_network_has_its_own_rate_and_loss() -> None:
    def step(**kwargs: Any) -> dict[str, th.Tensor]:
        return moved(collected(make(policy_kwargs={**SMALL, **SGD}, **kwargs)))

    both = step(learning_rate=0.1)
    baseline_still = step(learning_rate=0.1, baseline_learning_rate=0.0)
    policy_still = step(learning_rate=0.0, baseline_learning_rate=0.1)
    half = step(learning_rate=0.1, baseline_learning_rate=0.05)
    assert not baseline_still["baseline"].any() and not policy_still["policy"].any()
    assert baseline_still["policy"].any() and policy_still["baseline"].any()
    th.testing.assert_close(both["policy"], baseline_still["policy"])
    th.testing.assert_close(both["baseline"], policy_still["baseline"])
    th.testing.assert_close(2 * half["baseline"], both["baseline"])


def test_baseline_descends_its_squared_error() -> None:
    model = collected(with_value(make(policy_kwargs={"net_arch": [], **SGD}, learning_rate=0.1, gamma=0.9), 2.0))
    model.train()
    errors = np.array(G * 2) - 2
    assert model.policy.value_net.bias.item() == pytest.approx(2 + 0.1 * 2 * errors.mean(), rel=1e-5)
    assert model.logger.name_to_value["train/baseline_loss"] == pytest.approx((errors**2).mean(), rel=1e-5)


def test_without_baseline_the_value_network_stays_as_it_is() -> None:
    model = collected(make(use_baseline=False))
    assert not moved(model)["baseline"].any()
    assert not {"train/baseline_loss", "train/explained_variance"} & set(model.logger.name_to_value)


def test_gradients_are_clipped_by_network() -> None:
    kwargs = {"policy_kwargs": {**SMALL, **SGD}, "learning_rate": 1.0}
    free = moved(collected(make(**kwargs)))
    clipped = moved(collected(make(max_grad_norm={"policy": 1e-3}, **kwargs)))
    assert free["policy"].norm() > 1e-2
    assert clipped["policy"].norm().item() == pytest.approx(1e-3, rel=1e-2)
    th.testing.assert_close(clipped["baseline"], free["baseline"])


def test_logged_quantities() -> None:
    model = make(scripted(3, 5), rollout_episodes=4).learn(1)
    logged = model.logger.name_to_value
    assert logged["train/samples"] == 16
    assert logged["train/n_updates"] == 1
    losses = {"policy_loss", "baseline_loss", "entropy_loss", "explained_variance", "policy_grad_norm", "baseline_grad_norm"}
    assert {f"train/{name}" for name in losses} <= set(logged)


def test_a_falling_rate_ends_at_zero_where_an_episode_goes_beyond_the_training() -> None:
    model = make(ScriptedEnv(9), rollout_episodes=1, learning_rate=lambda progress: 0.1 * progress)
    before = flat(model.policy)
    model.learn(6)
    assert (model.num_timesteps, model._n_updates, model._current_progress_remaining) == (9, 1, 0)
    th.testing.assert_close(flat(model.policy), before, rtol=0, atol=0)


@pytest.mark.parametrize(("network", "layer"), [("policy", "action_net"), ("baseline", "value_net")])
def test_a_network_that_becomes_nan_is_named(network: str, layer: str) -> None:
    model = collected(make())
    getattr(model.policy, layer).bias.data[0] = float("inf")
    with pytest.raises(NonFiniteError, match=rf"Reinforce: the (parameters|loss) of the {network} became non-finite"):
        model.train()


# Episodes of any length


def resident() -> float:
    """Memory of the process, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.parametrize("cls", [Reinforce, PPOX])
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size", "ignore:rollout='episodes' waits")
def test_memory_does_not_grow_with_rollouts_of_any_size(cls: type) -> None:
    own = {"max_rollout_steps": 1} if cls is Reinforce else {"rollout": "episodes", "batch_size": 2000, "n_epochs": 1}
    model = small_model(cls, policy_kwargs={"net_arch": [64, 64]}, **own)
    numbers, sizes = np.random.default_rng(0), []
    for _ in range(260):
        model.rollout_buffer.buffer_size = int(numbers.integers(2, 2000))
        trained(model)
        sizes.append(resident())
    assert sizes[-1] - max(sizes[:60]) < 10, sizes[::20]
    assert model._engine.memory() < 2**20
