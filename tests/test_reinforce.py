"""Reinforce: returns of whole episodes, the gradient by enumeration, the same share of every environment, the baseline."""

import itertools
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from batches import flat
from environments import BOX, CONTINUOUS, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer, RolloutBufferSamples
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_ac_ext import Reinforce
from sb3_ac_ext.reinforce import time_limit
from sb3_ac_ext.validation import NonFiniteError

SMALL: dict[str, Any] = {"net_arch": [8, 8]}
SGD = {"optimizer_class": th.optim.SGD}
G = [5.23, 4.7, 3.0]
"""Returns of the rewards 1, 2, 3 with gamma 0.9."""

either_engine = pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])


def make(env: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    own = {"policy_kwargs": SMALL, "seed": 0, "rollout_episodes": 2, "max_rollout_steps": 20}
    model = Reinforce(policy, env or ScriptedEnv(), **{**own, **kwargs})
    model.set_logger(Logger(None, []))
    return model


def scripted(*lengths: int, **kwargs: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda length=length: ScriptedEnv(length, **kwargs) for length in lengths])


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
    model._begin_updates()
    return np.asarray(model._weights(model._samples()))


# Returns


@either_engine
@pytest.mark.parametrize("truncates", [False, True], ids=["terminates", "truncates"])
def test_returns_are_the_sums_to_the_end_of_each_episode(truncates: bool, engine: bool) -> None:
    """Truncated ones too, and whatever the value network says."""
    model = collected(with_value(make(ScriptedEnv(truncates=truncates), gamma=0.9, engine=engine), 7.0))
    samples = model._samples()
    np.testing.assert_allclose(samples.returns, G * 2, rtol=1e-6)
    np.testing.assert_allclose(samples.advantages, np.array(G * 2) - 7, rtol=1e-5)
    assert model.num_timesteps == 6


@either_engine
def test_truncated_episodes_end_with_the_baselines_value_if_asked_for(engine: bool) -> None:
    kwargs = {"gamma": 0.9, "bootstrap_truncated": True, "engine": engine}
    truncated, terminated = (collected(with_value(make(ScriptedEnv(truncates=t), **kwargs), 4.0)) for t in (True, False))
    np.testing.assert_allclose(terminated._samples().returns, G * 2, rtol=1e-6)
    last = 3 + 0.9 * 4
    expected = [1 + 0.9 * (2 + 0.9 * last), 2 + 0.9 * last, last]
    np.testing.assert_allclose(truncated._samples().returns, expected * 2, rtol=1e-6)


def test_truncated_episodes_bootstrap_at_their_own_last_observation() -> None:
    """Which is (3, action); the next episode begins at (0, 0)."""
    model = make(ScriptedEnv(truncates=True), gamma=0.9, bootstrap_truncated=True, policy_kwargs={"net_arch": []})
    model.policy.value_net.weight.data[:] = th.tensor([[2.0, 0.0]])
    model.policy.value_net.bias.data.zero_()
    assert collected(model)._samples().returns[2] == pytest.approx(3 + 0.9 * 2 * 3)


@pytest.mark.parametrize("use_baseline", [True, False])
def test_weights_of_the_log_probabilities(use_baseline: bool) -> None:
    model = with_value(make(gamma=0.9, use_baseline=use_baseline), 7.0)
    expected = np.array(G * 2) - (7 if use_baseline else 0)
    np.testing.assert_allclose(weights(collected(model)), expected, rtol=1e-5)
    model.gamma_t_weight = True
    np.testing.assert_allclose(weights(model), expected * [1, 0.9, 0.81, 1, 0.9, 0.81], rtol=1e-5)


def test_discounted_weights_by_hand() -> None:
    model = collected(make(scripted(3, 3), gamma=0.9, use_baseline=False, gamma_t_weight=True))
    np.testing.assert_allclose(weights(model), [5.23, 4.23, 2.43] * 2, rtol=1e-6)


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
    model = collected(make(scripted(3, 5), rollout_episodes=4, gamma=0.9))
    assert model._rollout_length == 10
    assert model.num_timesteps == 20
    np.testing.assert_array_equal(model._kept, np.stack([np.arange(10) < 6, np.full(10, True)], axis=1))
    long = [1 + 0.9 * (2 + 0.9 * (3 + 0.9 * (4 + 0.9 * 5)))]
    returns = model._samples().returns
    np.testing.assert_allclose(returns[:6], G * 2, rtol=1e-6)
    np.testing.assert_allclose(returns[[6, 11]], long * 2, rtol=1e-6)
    assert len(returns) == 16
    np.testing.assert_array_equal(model._last_episode_starts, [False, True])
    model.learn(1, reset_num_timesteps=False)  # all start anew
    np.testing.assert_array_equal(model.rollout_buffer.observations[0, :, 0], [0, 0])
    assert len(model._samples().returns) == 16


@pytest.mark.parametrize(("episodes", "share"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_episodes_are_rounded_up_to_a_share_each(episodes: int, share: int) -> None:
    model = collected(make(scripted(3, 3), rollout_episodes=episodes))
    assert model._rollout_length == 3 * share
    assert model._kept.all()


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


def objective(logits: th.Tensor, gamma: float, discounted: bool) -> th.Tensor:
    """
    J by enumeration, from the table of logits ``(3, 2)``.

    Without ``discounted`` it is a function with the gradient sum_t E[G_t grad log pi(a_t|s_t)], which the practice has.
    """
    total = th.zeros((), dtype=logits.dtype)
    log_pi = logits.log_softmax(dim=1)
    for actions in itertools.product((0, 1), repeat=Chain.horizon):
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
    queue = iter(actions)
    model._actor_critic().act = lambda obs: np.array([next(queue)])
    model.learn(len(actions))
    assert next(queue, None) is None
    return model


TABLE = th.tensor([[0.3, -0.2], [0.1, 0.4], [-0.5, 0.2]], dtype=th.float64)


def expected_step(**kwargs: Any) -> th.Tensor:
    """Mean change of the table of logits by one update with rate 1, over all episodes with their probabilities."""
    mean = th.zeros(3, 2, dtype=th.float64)
    for actions in itertools.product((0, 1), repeat=Chain.horizon):
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


@either_engine
@pytest.mark.parametrize("use_baseline", [True, False], ids=["baseline", "no baseline"])
@pytest.mark.parametrize("discounted", [True, False], ids=["gamma^t", "plain"])
def test_expected_step_is_the_gradient(use_baseline: bool, discounted: bool, engine: bool) -> None:
    """The mean over the steps of an episode, so a third of the sum; the baseline does not matter."""
    logits = TABLE.clone().requires_grad_()
    objective(logits, 0.8, discounted).backward()
    step = expected_step(use_baseline=use_baseline, gamma_t_weight=discounted, engine=engine)
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


class InDouble(RolloutBuffer):
    """SB3's buffer without its cast of actions to float32."""

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> RolloutBufferSamples:
        columns = (self.values, self.log_probs, self.advantages, self.returns)
        rows = (self.observations, self.actions.astype(np.float64), *(column.reshape(-1) for column in columns))
        return RolloutBufferSamples(*(th.as_tensor(row[batch_inds]) for row in rows))


def fill(model: Any, seed: int) -> None:
    """A rollout of random numbers in float64."""
    model.policy.double()
    buffer, numbers = model.rollout_buffer, np.random.default_rng(seed)
    length, n_envs = 12, 2
    buffer.reset()
    buffer.observations = numbers.normal(size=(length, n_envs, *model.observation_space.shape))
    space = model.action_space
    sizes = space.nvec if isinstance(space, spaces.MultiDiscrete) else getattr(space, "n", None)
    if isinstance(space, spaces.Box):
        buffer.actions = numbers.normal(size=(length, n_envs, int(np.prod(space.shape))))
    else:
        buffer.actions = numbers.integers(sizes, size=(length, n_envs, np.size(sizes))).astype(np.float64)
    for name in ("values", "log_probs", "advantages", "returns"):
        setattr(buffer, name, 1 + numbers.normal(size=(length, n_envs)))
    buffer.full, model._rollout_length = True, length


CASES: dict[str, dict[str, Any]] = {
    "box": {},
    "matrix": {"actions": spaces.Box(-1, 2, (2, 2), np.float64)},
    "discrete": {"actions": spaces.Discrete(3)},
    "multidiscrete": {"actions": spaces.MultiDiscrete([3, 2])},
    "gSDE": {"use_sde": True},
    "unequal": {"policy_kwargs": {"net_arch": {"pi": [5], "vf": [7, 6, 5]}, "activation_fn": nn.ReLU}},
    "SGD": {"policy_kwargs": {**SMALL, **SGD}},
    "standardised": {"normalize_advantage": True},
    "images": {"observations": IMAGE, "policy": "CnnPolicy"},
}


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("kwargs", CASES.values(), ids=CASES)
@either_engine
def test_equals_a2c_on_whole_episodes(kwargs: dict[str, Any], engine: bool) -> None:
    """A2C's Adam steps policy and value at once; its value's loss counts as much as ours."""
    given = {"policy_kwargs": SMALL, "policy": "MlpPolicy", "observations": BOX, "actions": CONTINUOUS, **kwargs}
    policy, observations, actions = (given.pop(name) for name in ("policy", "observations", "actions"))
    given = {"ent_coef": 0.1, "learning_rate": lambda progress: 3e-3 * progress, "seed": 0, **given}
    given["policy_kwargs"] = {**given["policy_kwargs"], "share_features_extractor": False}
    env = make_vec_env(lambda: RandomEnv(observations, actions), n_envs=2)
    ours = make(env, policy, engine=engine, **given)
    own = {"n_steps": 12, "vf_coef": 1.0, "max_grad_norm": 1e9, "use_rms_prop": False, "rollout_buffer_class": InDouble}
    theirs = A2C(policy, env, **own, **given)
    theirs.set_logger(Logger(None, []))
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0)
    for update in range(4):
        for model in (ours, theirs):
            fill(model, update)
            model._current_progress_remaining = 1 - update / 10
            model.train()
        th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-10)
    moments = dict(zip(theirs.policy.parameters(), theirs.policy.optimizer.state_dict()["state"].values(), strict=False))
    by_name = {name: moments.get(p) for name, p in theirs.policy.named_parameters()}
    for optimizer in ours._optimizers().values():
        for parameter, state in optimizer.state.items():
            name = next(name for name, p in ours.policy.named_parameters() if p is parameter)
            for key in state.keys() & {"exp_avg", "exp_avg_sq"}:
                th.testing.assert_close(state[key], by_name[name][key], rtol=0, atol=1e-10)


# The baseline


def moved(model: Any, **kwargs: Any) -> dict[str, th.Tensor]:
    """What one update changes in each network."""
    groups = {"policy": model.policy.policy_parameters(), "baseline": model.policy.value_parameters()}
    before = {name: [p.detach().clone() for p in group] for name, group in groups.items()}
    model.train()
    return {n: th.cat([(p.detach() - q).flatten() for p, q in zip(groups[n], before[n], strict=True)]) for n in groups}


@either_engine
def test_each_network_has_its_own_rate_and_loss(engine: bool) -> None:
    def step(**kwargs: Any) -> dict[str, th.Tensor]:
        return moved(collected(make(policy_kwargs={**SMALL, **SGD}, engine=engine, **kwargs)))

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
    logged = model.logger.name_to_value
    assert logged["train/baseline_loss"] == pytest.approx((errors**2).mean(), rel=1e-5)


def test_without_baseline_the_value_network_stays_as_it_is() -> None:
    model = make(use_baseline=False)
    before = th.cat([p.detach().flatten() for p in model.policy.value_parameters()])
    model.learn(12)
    th.testing.assert_close(th.cat([p.detach().flatten() for p in model.policy.value_parameters()]), before, rtol=0, atol=0)
    assert list(model._optimizers()) == ["policy"]
    assert not {"train/baseline_loss", "train/explained_variance"} & set(model.logger.name_to_value)


def test_gradients_are_clipped_by_network() -> None:
    kwargs = {"policy_kwargs": {**SMALL, **SGD}, "learning_rate": 1.0}
    free = moved(collected(make(**kwargs)))
    clipped = moved(collected(make(max_grad_norm={"policy": 1e-3}, **kwargs)))
    assert free["policy"].norm() > 1e-2
    assert clipped["policy"].norm().item() == pytest.approx(1e-3, rel=1e-2)
    th.testing.assert_close(clipped["baseline"], free["baseline"])


def test_logged_quantities() -> None:
    model = make(scripted(3, 5), rollout_episodes=4)
    model.learn(1)
    logged = model.logger.name_to_value
    assert logged["train/samples"] == 16
    assert logged["train/n_updates"] == 1
    losses = {"policy_loss", "baseline_loss", "entropy_loss", "explained_variance", "policy_grad_norm", "baseline_grad_norm"}
    assert {f"train/{name}" for name in losses} <= set(logged)


def test_own_names_of_sb3s_policies() -> None:
    """The policy for images has separate features, as two optimizers need."""
    model = make(RandomEnv(IMAGE, CONTINUOUS), "CnnPolicy")
    assert model.policy.pi_features_extractor is not model.policy.vf_features_extractor


def test_a_falling_rate_ends_at_zero_where_an_episode_goes_beyond_the_training() -> None:
    model = make(ScriptedEnv(9), rollout_episodes=1, learning_rate=lambda progress: 0.1 * progress)
    before = flat(model.policy)
    model.learn(6)
    assert (model.num_timesteps, model._n_updates, model._current_progress_remaining) == (9, 1, 0)
    th.testing.assert_close(flat(model.policy), before, rtol=0, atol=0)


@pytest.mark.parametrize(("network", "layer"), [("policy", "action_net"), ("baseline", "value_net")])
@either_engine
def test_a_network_that_becomes_nan_is_named(network: str, layer: str, engine: bool) -> None:
    model = collected(make(engine=engine))
    getattr(model.policy, layer).bias.data[0] = float("inf")
    with pytest.raises(NonFiniteError, match=rf"Reinforce: the (parameters|loss) of the {network} became non-finite"):
        model.train()
