"""A3C: A2C where they are the same, lags, the numbers of its gradients and updates, its workers, and what is refused."""

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from batches import SGD, engine_on_and_off, flat
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ac_ext.a3c import A3C, Gradient, Worker
from sb3_ac_ext.actors import learner
from sb3_ac_ext.actors.actor import ActorError, Weights
from sb3_ac_ext.base.rmsprop import RMSprop
from sb3_ac_ext.buffers.segments import Segment
from sb3_ac_ext.validation import ArgumentError, NonFiniteError, UnsupportedError

SMALL: dict[str, Any] = {"net_arch": [8]}
AS_A2C: dict[str, Any] = {
    **{"n_actors": 1, "rms_prop_init": 1.0, "rms_prop_eps": 1e-5, "loss_reduction": "mean", "vf_coef": 1.0},
    **{"max_grad_norm": 0.5, "ent_coef": 0.02, "gae_lambda": 1.0},
}
THEIRS: dict[str, Any] = {"vf_coef": 0.5, "ent_coef": 0.02}
DISCRETE = spaces.Discrete(3)


class Cut(RandomEnv):
    """Random observations, and episodes of 3 or 4 steps by turns that end one way or the other."""

    def __init__(self, *spaces_of_it: spaces.Space, truncates: bool = False) -> None:
        super().__init__(*copy.deepcopy(spaces_of_it))
        self.truncates, self.episodes = truncates, 0

    def step(self, action: Any) -> Any:
        obs, reward, _, _, info = super().step(action)
        over = self.t == 3 + self.episodes % 2
        self.episodes += over
        return obs, reward, over and not self.truncates, over and self.truncates, info


def envs(
    n: int = 3, observations: spaces.Space = BOX, actions: spaces.Space = DISCRETE, seed: int = 0, **kwargs: Any
) -> VecEnv:
    return make_vec_env(lambda: Cut(observations, actions, **kwargs), n_envs=n, seed=seed)


def make(env: Any = None, cls: Any = A3C, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    policy_kwargs = {**SMALL, **kwargs.pop("policy_kwargs", {})}
    defaults = {"seed": 0, "device": "cpu", "n_steps": 5, "learning_rate": 0.02}
    model = cls(policy, envs() if env is None else env, policy_kwargs=policy_kwargs, **{**defaults, **kwargs})
    model.set_logger(Logger(None, []))
    return model


def sb3_a2c(env: VecEnv, **kwargs: Any) -> Any:
    """SB3's, with TensorFlow's RMSProp."""
    optimizer = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5, "alpha": 0.99}}
    policy_kwargs = {**optimizer, **kwargs.pop("policy_kwargs", {})}
    return make(env, A2C, policy_kwargs=policy_kwargs, **{**THEIRS, **kwargs})


class Log(BaseCallback):
    """What the policy is when each rollout begins, and what is taken of the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.policies: list[th.Tensor] = []
        self.taken: list[Gradient] = []

    def _on_rollout_start(self) -> None:
        self.policies.append(flat(self.model.policy))

    def _on_step(self) -> bool:
        if "result" in self.locals and not any(one is self.locals["result"] for one in self.taken):
            self.taken.append(self.locals["result"])
        return True


def course(model: Any, steps: int) -> th.Tensor:
    """``(U, P)`` the parameters after each update."""
    log = Log()
    model.set_random_seed(0)
    model.learn(steps, callback=log)
    return th.stack([*log.policies, flat(model.policy)])


def logged(model: Any, steps: int, **kwargs: Any) -> Log:
    """What is seen of `learn`."""
    log = Log()
    model.learn(steps, callback=log, **kwargs)
    return log


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> list[Segment]:
    """All that workers make gradients of."""
    found: list[Segment] = []
    work = Worker.segment

    def noted(worker: Worker, weights: Weights) -> Segment:
        found.append(work(worker, weights))
        return found[-1]

    monkeypatch.setattr(Worker, "segment", noted)
    return found


# A2C


class InDouble(RolloutBuffer):
    """SB3's buffer in float64."""

    def reset(self) -> None:
        super().reset()
        for name, array in vars(self).items():
            if isinstance(array, np.ndarray) and array.dtype == np.float32:
                setattr(self, name, array.astype(np.float64))


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("kwargs", [{}, {"gae_lambda": 0.8, "gamma": 0.9, "learning_rate": "lin_5e-2"}], ids=str)
@engine_on_and_off
def test_one_worker_without_lag_is_a2c(kwargs: dict[str, Any], engine: bool) -> None:
    """In float64, over updates that are recorded, checked and replayed; no episode is truncated."""
    ours = make(envs(), engine=engine, **{**AS_A2C, **kwargs})
    if "learning_rate" in kwargs:
        kwargs = {**kwargs, "learning_rate": lambda remaining: 5e-2 * remaining}
    theirs = sb3_a2c(envs(), **kwargs, rollout_buffer_class=InDouble)
    for model in (ours, theirs):
        model.policy.double()
    squares = ours.policy.optimizer.state
    for parameter in squares:
        squares[parameter]["square_avg"] = squares[parameter]["square_avg"].double()
    found = [course(model, 15 * 12) for model in (theirs, ours)]
    assert len(found[0]) == 13 and found[0].dtype == th.float64
    assert (found[0][1:-1] - found[0][:-2]).abs().amax(dim=1).min() > 1e-3
    th.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("truncates", [False, True], ids=["terminated", "truncated"])
@pytest.mark.parametrize("actions", [DISCRETE, CONTINUOUS, spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(3)], ids=str)
def test_a2c_at_the_ends_of_episodes(truncates: bool, actions: spaces.Space) -> None:
    """With what SB3 adds to the reward of a truncated episode's last step; 4 updates in float32."""
    ours = make(envs(actions=actions, truncates=truncates), **{**AS_A2C, "gae_lambda": 0.7})
    theirs = sb3_a2c(envs(actions=actions, truncates=truncates), gae_lambda=0.7)
    found = [course(model, 15 * 4) for model in (theirs, ours)]
    th.testing.assert_close(found[1], found[0], rtol=0, atol=2e-6)
    other = course(make(envs(actions=actions, truncates=not truncates), **{**AS_A2C, "gae_lambda": 0.7}), 15)
    assert (other[1] - found[0][1]).abs().max() > 2e-5  # the end counts


@pytest.mark.parametrize(
    ("policy", "observations"), [("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)], ids=["images", "dict"]
)
def test_a2c_of_other_observations(policy: str, observations: spaces.Space) -> None:
    small = {"features_extractor_kwargs": {"features_dim": 8} if policy == "CnnPolicy" else {"cnn_output_dim": 8}}
    own = {"policy": policy, "policy_kwargs": small, "n_steps": 3}
    ours = make(envs(2, observations, CONTINUOUS, truncates=True), **AS_A2C, **own)
    theirs = sb3_a2c(envs(2, observations, CONTINUOUS, truncates=True), **own)
    found = [course(model, 6 * 4) for model in (theirs, ours)]
    th.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_a2c_with_normalised_observations_and_rewards() -> None:
    found = []
    for cls, kwargs in ((sb3_a2c, {}), (make, AS_A2C)):
        env = VecNormalize(envs(truncates=True))
        found.append(course(cls(env, **kwargs), 15 * 4))
        assert env.obs_rms.count == pytest.approx(63, abs=0.1)
    th.testing.assert_close(found[1], found[0], rtol=0, atol=2e-6)


@engine_on_and_off
def test_joined_gradients_are_a2cs_of_all_environments(engine: bool, segments: list[Segment]) -> None:
    """Every worker acts with the same weights, and their mean gradient is that of one batch of all of them."""
    own = {"max_grad_norm": 1e3, "learning_rate": 0.005}  # so that a sum of gradients would be another step than their mean
    ours = make(envs(2, truncates=True), **{**AS_A2C, "n_actors": 3, **own}, gradients_per_update=3, engine=engine)
    theirs = sb3_a2c(envs(6, truncates=True), **own)
    log = logged(ours, 30 * 5)
    assert [one.actor for one in log.taken] == [0, 1, 2] * 5
    assert [one.version for one in log.taken] == [version for version in range(5) for _ in range(3)]
    theirs.learn(0)
    for update in range(5):
        th.testing.assert_close(flat(theirs.policy), log.policies[update], rtol=0, atol=3e-6)
        fill(theirs, segments[3 * update : 3 * update + 3])
        theirs.train()
    th.testing.assert_close(flat(theirs.policy), flat(ours.policy), rtol=0, atol=3e-6)


def fill(model: Any, segments: list[Segment]) -> None:
    """SB3's rollout of what several workers have seen, side by side."""
    buffer, policy = model.rollout_buffer, model.policy
    buffer.reset()
    observations = np.concatenate([one.observations for one in segments], axis=1)
    actions = np.concatenate([one.actions for one in segments], axis=1)
    rewards, dones = (np.concatenate([getattr(one, name) for one in segments], axis=1) for name in ("rewards", "dones"))
    infos = [[info for one in segments for info in one.infos[t]] for t in range(len(rewards))]
    starts = np.zeros(observations.shape[1])
    for t in range(len(rewards)):
        obs = th.as_tensor(observations[t])
        with th.no_grad():
            values, log_probs, _ = policy.evaluate_actions(obs, th.as_tensor(actions[t]))
            for i in np.flatnonzero(dones[t]):
                last = th.as_tensor(infos[t][i]["terminal_observation"])[None]
                rewards[t, i] += model.gamma * policy.predict_values(last).item()
        buffer.add(observations[t], actions[t][:, None], rewards[t], starts, values, log_probs)
        starts = dones[t]
    with th.no_grad():
        buffer.compute_returns_and_advantage(policy.predict_values(th.as_tensor(observations[-1])), starts)


# Lags


class Toy:
    """
    Two workers whose gradients are those of 1/2 (x - c)^T diag(1, 2) (x - c), in the place of a pool; each takes the weights
    right after its gradient was used.
    """

    restarts = lost = 0
    centres = ((0.0, 0.0), (2.0, -1.0))

    def __init__(self, model: Any) -> None:
        self.parameter = model.policy.action_net.bias
        self.pulled = {worker: (self.parameter.detach().clone(), 0) for worker in (0, 1)}
        self.taken: list[tuple[int, th.Tensor]] = []
        self.turn = 0

    def take(self, weights: Weights) -> Gradient:
        worker, self.turn = self.turn, 1 - self.turn
        theta, version = self.pulled[worker]
        gradient = th.tensor([1.0, 2.0]) * (theta - th.tensor(self.centres[worker]))
        self.taken.append((worker, gradient))
        one = np.ones((1, 1))
        labels = {"version": version, "actor": worker}
        infos: list[list[dict[str, Any]]] = [[{}]]
        gradients = {"action_net.bias": gradient.numpy()}
        return Gradient(gradients=gradients, measures={}, rewards=one, dones=one > 1, infos=infos, **labels)

    def begin(self, weights: Weights) -> None:
        self.pulled[1 - self.turn] = self.parameter.detach().clone(), weights.version

    def close(self) -> None:
        pass


LAGGED = [
    (0, [1, -2], [0.01, 0.04], [0.96984887, -0.94654775]),
    (1, [-1, 0], [0.0199, 0.0396], [0.99872841, -0.94654775]),
    (1, [0.96984887, -1.8930955], [0.02910707, 0.07504211], [0.97173679, -0.90129956]),
    (1, [-1.00127159, 0.1069045], [0.03884145, 0.07440597], [0.99860831, -0.90385941]),
]
"""Lag, gradient, g and theta after each update."""


@pytest.mark.usefixtures("double_precision")
@engine_on_and_off
def test_late_gradients_and_one_statistic(engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the learner's own loop. Other numbers come of gradients without lag, a statistic per worker, eps outside the root."""
    env = make_vec_env(lambda: RandomEnv(BOX, spaces.Discrete(2)), n_envs=1)
    model = make(env, learning_rate=0.01, max_grad_norm=None, n_steps=1, engine=engine)
    model.policy.double()
    parameter, optimizer = model.policy.action_net.bias, model.policy.optimizer
    parameter.data = th.tensor([1.0, -1.0], dtype=th.float64)
    optimizer.state[parameter]["square_avg"] = th.zeros(2, dtype=th.float64)
    th.set_default_dtype(th.float64)
    try:
        toy = Toy(model)
        monkeypatch.setattr(learner, "InlinePool", lambda work, actors, turn: toy)
        others = {name: value.clone() for name, value in model.policy.state_dict().items() if name != "action_net.bias"}
        for lag, gradient, square, theta in LAGGED:
            model.learn(1, reset_num_timesteps=False)
            assert model.logger.name_to_value["train/policy_lag"] == lag
            assert toy.taken[-1][1].tolist() == pytest.approx(gradient, abs=1e-8)
            assert optimizer.state[parameter]["square_avg"].tolist() == pytest.approx(square, abs=1e-8)
            assert parameter.tolist() == pytest.approx(theta, abs=1e-8)
            model.logger.name_to_value.clear(), model.logger.name_to_count.clear()
    finally:
        th.set_default_dtype(th.float32)
    assert [worker for worker, _ in toy.taken] == [0, 1, 0, 1]
    for name, value in others.items():
        assert th.equal(value, model.policy.state_dict()[name]), name


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_gradients_are_those_of_the_weights_that_they_name(lag: int, segments: list[Segment]) -> None:
    """Each made anew from the weights of its version; the learner has other ones by then."""
    model = make(envs(2), n_actors=2, simulated_lag=lag, loss_reduction="mean", learning_rate=0.01)
    log = logged(model, 10 * 10)
    taken = log.taken
    assert [one.version for one in taken] == [max(update - lag, 0) for update in range(10)]
    assert [one.actor for one in taken] == [0, 1] * 5
    assert [one.sequence for one in taken] == [update // 2 for update in range(10)]
    lags = [min(update, lag) for update in range(10)]
    assert model.logger.name_to_value["train/policy_lag"] == pytest.approx(np.mean(lags))
    policy = copy.deepcopy(model.policy)
    for one, segment in zip(taken, segments, strict=True):
        th.nn.utils.vector_to_parameters(log.policies[one.version], policy.parameters())
        expected = gradient_by_hand(policy, segment, model)
        assert one.gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            np.testing.assert_allclose(one.gradients[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)


def gradient_by_hand(policy: Any, segment: Segment, model: Any) -> dict[str, np.ndarray]:
    """The loss of the paper, one sample after another."""
    policy.zero_grad()
    loss, samples = th.zeros(()), 0
    for i in range(segment.n_envs):
        with th.no_grad():
            value = policy.predict_values(th.as_tensor(segment.observations[-1, i])[None]).item()
        for t in reversed(range(segment.n_steps)):
            if segment.dones[t, i]:
                value = 0.0
                if segment.infos[t][i]["TimeLimit.truncated"]:
                    last = th.as_tensor(segment.infos[t][i]["terminal_observation"])[None]
                    value = policy.predict_values(last).item()
            value = float(segment.rewards[t, i]) + model.gamma * value
            action = th.as_tensor(segment.actions[t, i])[None]
            v, log_prob, entropy = policy.evaluate_actions(th.as_tensor(segment.observations[t, i])[None], action)
            v = v[0, 0]
            loss = loss - (value - v.item()) * log_prob[0] - model.ent_coef * entropy[0]
            loss = loss + model.vf_coef * 0.5 * (value - v) ** 2
            samples += 1
    (loss if model.loss_reduction == "sum" else loss / samples).backward()
    return {name: parameter.grad.numpy().copy() for name, parameter in policy.named_parameters()}


# Numbers of a gradient


class Table:
    """A worker whose states are unit vectors and whose policy is a table, with a segment that is given."""

    def __init__(self, logits: Any, values: Any, **settings: Any) -> None:
        n = len(values)
        env = make_vec_env(lambda: RandomEnv(spaces.Box(0, 1, (n,), np.float32), DISCRETE), n_envs=1)
        self.model = make(env, policy_kwargs={"net_arch": []}, **settings)
        policy = self.model.policy
        with th.no_grad():
            policy.action_net.weight[:, : len(logits)] = th.tensor(logits).t()
            policy.value_net.weight[:] = th.tensor(values)
        self.worker = Worker()
        self.worker.join(env, policy, self.model.engine)
        self.eye = np.eye(n, dtype=np.float32)

    def gradient(self, states: Any, actions: Any, rewards: Any, ends: dict[int, int | None]) -> Gradient:
        """``ends``: steps that end an episode, and the state in which it was truncated, or None."""
        infos: list[list[dict[str, Any]]] = [[{}] for _ in actions]
        for t, last in ends.items():
            infos[t][0] = {
                "terminal_observation": self.eye[0 if last is None else last],
                "TimeLimit.truncated": last is not None,
            }
        segment = Segment(
            observations=self.eye[states][:, None],
            actions=np.array(actions)[:, None],
            rewards=np.array(rewards, np.float32)[:, None],
            dones=np.array([t in ends for t in range(len(actions))])[:, None],
            infos=infos,
            behaviour={"log_probs": np.zeros((len(actions), 1), np.float32)},
        )
        self.worker.segment = lambda weights: segment  # type: ignore[method-assign]
        return self.worker.gradient(self.model._weights())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@engine_on_and_off
def test_numbers_of_a_gradient(reduction: str, engine: bool) -> None:
    """Of two steps with advantages 2 and -1, and the value's half square."""
    table = Table([[0.2, -0.4, 0.1], [0.0, 0.5, -0.5]], [0.5, 1.5, 9.0], loss_reduction=reduction, engine=engine, vf_coef=0.25)
    scale = 1.0 if reduction == "sum" else 0.5
    for _ in range(3):  # recorded, checked, replayed; gradients do not add up
        found = table.gradient([0, 1, 2], [1, 0], [2.5, 0.5], {0: None, 1: None})
        logits = found.gradients["action_net.weight"].T[:2]
        expected = [[0.81580974, -1.55361615, 0.73780641], [0.69231236, -0.50475875, -0.18755361]]
        np.testing.assert_allclose(logits, scale * np.array(expected), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found.gradients["value_net.weight"], scale * 0.25 * np.array([[-2, 1, 0]]), atol=1e-6)
        total = found.measures["policy_loss"] + 0.01 * found.measures["entropy_loss"]
        assert total == pytest.approx(scale * 1.7939945, abs=1e-6)
        assert found.measures["value_loss"] == pytest.approx(scale * 0.5 * (4 + 1))


@pytest.mark.parametrize(
    ("ends", "returns"),
    [({}, [6.688, 6.32, 4.8]), ({1: None}, [2.8, 2.0, 4.8]), ({1: 4}, [6.04, 5.6, 4.8]), ({2: 4}, [8.146, 7.94, 6.6])],
    ids=["within an episode", "terminated", "truncated", "truncated at the end"],
)
def test_numbers_of_returns(ends: dict[int, int | None], returns: list[float]) -> None:
    """R - V is what the value's gradient is of; what is behind an end counts for nothing before it."""
    values = [0.5, 1.0, 1.5, 2.0, 4.0]
    table = Table(np.zeros((5, 3), np.float32).tolist(), values, gamma=0.9, vf_coef=1.0)
    found = table.gradient([0, 1, 2, 3], [0, 1, 2], [1.0, 2.0, 3.0], ends)
    errors = found.gradients["value_net.weight"][0]
    np.testing.assert_allclose(np.array(values[:3]) - errors[:3], returns, atol=1e-5)
    assert not errors[3:].any()  # what is bootstrapped from is no part of the loss


# Workers


def test_workers_take_the_same_number_of_steps_of_environments_of_their_own(segments: list[Segment]) -> None:
    model = make(envs(2), n_actors=3, n_steps=7)
    taken = logged(model, 14 * 9).taken
    assert all(one.rewards.shape == one.dones.shape == (7, 2) for one in taken)
    assert sum(one.n_steps * one.n_envs for one in taken) == model.num_timesteps == 14 * 9
    assert [one.actor for one in taken] == [0, 1, 2] * 3
    assert model._n_updates == 9
    first = {tuple(one.observations[0, i].tolist()) for one in segments[:3] for i in range(2)}
    assert len(first) == 6
    assert len({one.actions.tobytes() for one in segments[:3]}) == 3
    for one, before in zip(segments[3:], segments, strict=False):  # the next one of a worker begins where the last one ended
        assert one.observations.shape == before.observations.shape
    for i in range(6):
        np.testing.assert_array_equal(segments[i + 3].observations[0], segments[i].observations[-1])


VARIANTS: dict[str, tuple[spaces.Space, spaces.Space, str, dict[str, Any], int]] = {
    "discrete": (BOX, DISCRETE, "MlpPolicy", {}, 0),
    "box": (BOX, CONTINUOUS, "MlpPolicy", {}, 2),
    "several choices": (BOX, spaces.MultiDiscrete([3, 2]), "MlpPolicy", {}, 1),
    "images": (IMAGE, DISCRETE, "CnnPolicy", {"features_extractor_kwargs": {"features_dim": 8}}, 1),
    "dict": (DICT, CONTINUOUS, "MultiInputPolicy", {"features_extractor_kwargs": {"cnn_output_dim": 8}}, 0),
}


@pytest.mark.parametrize(("observations", "actions", "policy", "policy_kwargs", "lag"), VARIANTS.values(), ids=VARIANTS)
def test_the_engine_changes_nothing(
    observations: spaces.Space, actions: spaces.Space, policy: str, policy_kwargs: dict[str, Any], lag: int
) -> None:
    found = []
    for engine in (True, False):
        env = envs(2, observations, actions, truncates=True)
        own = {"policy": policy, "policy_kwargs": policy_kwargs, "loss_reduction": "mean", "rms_prop_eps": 1e-2, "n_steps": 3}
        model = make(env, simulated_lag=lag, engine=engine, **own)
        found.append(course(model, 6 * 8))
        if engine:
            report = model.engine_report()
            assert {report[name] for name in ("step_by", "actor differentiate")} == {"replayed"}
    th.testing.assert_close(*found, rtol=0, atol=1e-4)
    assert (found[0][-1] - found[0][0]).abs().max() > 0.01


def test_normalised_by_vec_normalize_for_all_workers() -> None:
    model = make(VecNormalize(envs(2, truncates=True)), loss_reduction="mean")
    model.learn(10 * 6)
    assert flat(model.policy).isfinite().all()


class Scripts(ScriptedEnv):
    """Rewards that differ by the action, so that gradients do."""

    def step(self, action: np.ndarray) -> Any:
        obs, reward, *ends = super().step(action)
        return obs, reward + float(action[0]), *ends


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"simulated_lag": 3}, {"gradients_per_update": 2}, {"use_rms_prop": False}],
    ids=["no lag", "lag", "joined", "adam"],
)
def test_a_saved_model_goes_on_exactly(kwargs: dict[str, Any], tmp_path: Any) -> None:
    """After an odd number of gradients, so that it is the second worker's turn, where an update is made of one."""

    def env() -> VecEnv:
        return make_vec_env(lambda: Scripts(length=5, truncates=True), n_envs=2)

    model, more = make(env(), **kwargs), {"steps": 50, "reset_num_timesteps": False}
    model.learn(10 * 7)
    model.save(tmp_path / "model")
    actors = [one.actor for one in logged(model, **more).taken]
    assert actors[0] == ("gradients_per_update" not in kwargs)
    th.manual_seed(99)
    loaded = A3C.load(tmp_path / "model", env=env())
    loaded.set_logger(Logger(None, []))
    th.manual_seed(98)
    assert [one.actor for one in logged(loaded, **more).taken] == actors
    assert loaded.num_timesteps == model.num_timesteps
    assert th.equal(flat(loaded.policy), flat(model.policy))
    states = [[*one.policy.optimizer.state_dict()["state"].values()] for one in (loaded, model)]
    th.testing.assert_close(*states, rtol=0, atol=0)


def test_the_rate_never_becomes_negative() -> None:
    """Though the last update goes beyond the end."""
    rates = []

    class Rates(BaseCallback):
        def _on_step(self) -> bool:
            rates.append(self.model.policy.optimizer.param_groups[0]["lr"])
            return True

    model = make(envs(3), learning_rate="lin_1e-3")
    model.learn(50, callback=Rates())
    assert model.num_timesteps == 60
    rates.append(model.policy.optimizer.param_groups[0]["lr"])
    assert rates[-1] == 0.0 and rates == sorted(rates, reverse=True)


def test_gradients_do_not_add_up() -> None:
    """With a rate of 0 and plain steps, each gradient is that of its own samples, and so is what an update is given."""
    model = make(envs(2), learning_rate=0.0, policy_kwargs=SGD, max_grad_norm=None)
    norms, taken = [], []
    for _ in range(6):
        taken += logged(model, 10, reset_num_timesteps=False).taken
        norms.append(model.logger.name_to_value["train/policy_grad_norm"])
    own = [np.sqrt(sum((gradient**2).sum() for gradient in one.gradients.values())) for one in taken]
    np.testing.assert_allclose(norms, own, rtol=1e-5)
    assert max(own) < 3 * min(own)


def test_clipped_by_the_learner_as_a_whole() -> None:
    """The mean of the gradients, not each."""
    model = make(envs(1), learning_rate=1.0, policy_kwargs=SGD, max_grad_norm=0.01, gradients_per_update=2)
    before = flat(model.policy)
    taken = logged(model, 10).taken
    mean = np.concatenate([np.mean([one.gradients[name] for one in taken], axis=0).ravel() for name in taken[0].gradients])
    expected = -0.01 * mean / np.linalg.norm(mean)
    np.testing.assert_allclose((flat(model.policy) - before).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("engine", "lag"), [(True, 0), (True, 1), (False, 0)])
def test_frozen_parameters_stay(engine: bool, lag: int) -> None:
    model = make(envs(2), simulated_lag=lag, engine=engine)
    for parameter in model.policy.value_net.parameters():
        parameter.requires_grad = False
    before = copy.deepcopy(model.policy.state_dict())
    taken = logged(model, 60).taken
    model.policy.action_net.weight.requires_grad = False  # the copy that acts with a lag does not know
    frozen = model.policy.action_net.weight.clone()
    taken += logged(model, 60, reset_num_timesteps=False).taken
    assert th.equal(model.policy.action_net.weight, frozen)
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, before[name]) is name.startswith("value_net"), name
    assert not any(name.startswith("value_net") for one in taken for name in one.gradients)


def test_nothing_to_train() -> None:
    model = make(envs(2))
    model.policy.requires_grad_(False)
    before = flat(model.policy)
    model.learn(40)
    assert th.equal(flat(model.policy), before)


@engine_on_and_off
def test_a_replaced_layer_is_trained(engine: bool) -> None:
    model = make(envs(2), engine=engine)
    model.learn(80)
    policy = model.policy
    policy.value_net = th.nn.Linear(8, 1)
    policy.optimizer = RMSprop(policy.parameters(), 0.02, start=0.0)
    before = policy.value_net.weight.clone()
    model.learn(80, reset_num_timesteps=False)
    assert (policy.value_net.weight - before).abs().max() > 1e-3


class Poisoned(Cut):
    """What it shows is not finite from some step on."""

    def __init__(self, *spaces_of_it: spaces.Space, when: int, what: str, truncates: bool = False) -> None:
        super().__init__(*spaces_of_it, truncates=truncates)
        self.when, self.what, self.steps = when, what, 0

    def step(self, action: Any) -> Any:
        obs, reward, *ends = super().step(action)
        self.steps += 1
        late = self.steps >= self.when
        if late and (self.what == "observation" or (self.what == "last observation of an episode" and any(ends[:2]))):
            obs = np.full_like(obs, np.nan)
        return obs, np.nan if late and self.what == "reward" else reward, *ends


@pytest.mark.parametrize("what", ["reward", "observation", "last observation of an episode"])
def test_what_is_not_finite_is_said_of_worker_and_environment(what: str) -> None:

    def second(index: int) -> gym.Env:
        return Poisoned(BOX, DISCRETE, when=6 if index == 1 else 1000, what=what, truncates=True)

    model = make(envs(2, truncates=True), actor_env_fn=second)
    with pytest.raises(NonFiniteError, match=rf"actor 1 \(generation 0\): environment 1 gave a non-finite {what}"):
        model.learn(1000)


@engine_on_and_off
def test_a_gradient_that_is_not_finite_is_said_of_its_worker(engine: bool) -> None:
    """And no update is made of it."""
    model = make(envs(2), engine=engine, vf_coef=3e38)
    before = flat(model.policy)
    with pytest.raises(NonFiniteError, match=r"actor 0 \(generation 0\): the policy's gradient became non-finite; lower the"):
        model.learn(100)
    assert th.equal(flat(model.policy), before)


def test_an_environment_that_fails_is_said_of_its_worker() -> None:
    class Broken(Cut):
        def step(self, action: Any) -> Any:
            raise OSError("the robot is gone")

    model = make(envs(2), actor_env_fn=lambda: Broken(BOX, DISCRETE))
    with pytest.raises(ActorError, match=r"actor 1 \(generation 0\) failed: OSError: the robot is gone"):
        model.learn(100)


# Arguments


def test_log() -> None:
    model = make(envs(2), verbose=0)
    model.learn(10 * 4, log_interval=10)
    logged = {key.removeprefix("train/") for key in model.logger.name_to_value if key.startswith("train/")}
    losses = {"policy_loss", "value_loss", "entropy_loss", "explained_variance", "policy_grad_norm"}
    assert logged == {*losses, "policy_lag", "learning_rate", "n_updates"}


@engine_on_and_off
def test_what_is_set_acts_in_the_next_rollout(engine: bool, segments: list[Segment]) -> None:
    model = make(envs(2), engine=engine)
    model.learn(10 * 8)
    changes = {
        "loss_reduction": "mean",
        "vf_coef": 5.0,
        "ent_coef": 0.7,
        "gamma": 0.5,
        "n_steps": 3,
        "gradients_per_update": 2,
    }
    for name, value in changes.items():
        setattr(model, name, value)
    policy = copy.deepcopy(model.policy)
    taken = logged(model, 1, reset_num_timesteps=False).taken
    assert len(taken) == 2 and model.num_timesteps == 80 + 2 * 6
    for one, segment in zip(taken, segments[-2:], strict=True):
        for name, gradient in gradient_by_hand(policy, segment, model).items():
            np.testing.assert_allclose(one.gradients[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, {"alpha": 0.99, "eps": 0.1, "start": 0.0}),
        ({"rms_prop_eps": 1e-3, "rms_prop_init": 1.0}, {"alpha": 0.99, "eps": 1e-3, "start": 1.0}),
        ({"policy_kwargs": {"optimizer_kwargs": {"alpha": 0.5}}}, {"alpha": 0.5, "eps": 0.1, "start": 0.0}),
    ],
    ids=["defaults", "arguments", "policy's"],
)
def test_options_of_the_optimizer(kwargs: dict[str, Any], expected: dict[str, float], tmp_path: Any) -> None:
    model = make(**copy.deepcopy(kwargs))
    assert isinstance(model.policy.optimizer, RMSprop)
    assert {name: model.policy.optimizer.param_groups[0][name] for name in expected} == expected
    assert {float(state["square_avg"].mean()) for state in model.policy.optimizer.state.values()} == {expected["start"]}
    assert model.policy_kwargs == {**SMALL, **kwargs.get("policy_kwargs", {})}
    model.save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model")
    assert loaded.policy.optimizer.param_groups[0] | {"params": []} == model.policy.optimizer.param_groups[0] | {"params": []}


@pytest.mark.parametrize(
    ("kwargs", "kind"),
    [({"use_rms_prop": False}, th.optim.Adam), ({"policy_kwargs": SGD}, th.optim.SGD)],
    ids=["SB3's", "policy's"],
)
def test_other_optimizers(kwargs: dict[str, Any], kind: type) -> None:
    model = make(**kwargs)
    model.learn(60)
    assert type(model.policy.optimizer) is kind


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"use_rms_prop": False, "rms_prop_eps": 1e-3}, ArgumentError, "rms_prop_eps=0.001 needs use_rms_prop=True"),
        ({"use_rms_prop": False, "rms_prop_init": 1.0}, ArgumentError, "rms_prop_init=1.0 needs use_rms_prop=True"),
        ({"rms_prop_eps": 0.0}, ArgumentError, "rms_prop_eps must be a number >= 1e-12, got 0.0"),
        ({"rms_prop_init": -1.0}, ArgumentError, "rms_prop_init must be a number >= 0, got -1.0"),
        ({"gradients_per_update": 0}, ArgumentError, "gradients_per_update must be an integer >= 1, got 0"),
        ({"loss_reduction": "max"}, ArgumentError, "loss_reduction must be one of 'mean', 'sum', got 'max'"),
        ({"n_actors": 0}, ArgumentError, "n_actors must be an integer >= 1, got 0"),
        ({"simulated_lag": 3, "max_policy_lag": 2}, ArgumentError, "max_policy_lag must be at least simulated_lag=3"),
        (
            {"policy_kwargs": {"optimizer_kwargs": {"alpha": 1.0}}},
            ArgumentError,
            r"alpha must be a number in \[0, 1\), got 1.0",
        ),
        ({"policy_kwargs": {"use_sde": True}}, UnsupportedError, r"policy_kwargs\['use_sde'\] must be False"),
        ({"use_sde": True}, TypeError, "use_sde"),
    ],
    ids=str,
)
def test_refused(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**kwargs)


def test_a_callback_stops_in_the_middle() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 13

    model = make(envs(2))
    model.learn(1000, callback=Stop())
    assert model.num_timesteps == 26
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps == 46


@engine_on_and_off
def test_policy_can_be_copied_at_any_step(engine: bool) -> None:
    class Copy(BaseCallback):
        def _on_step(self) -> bool:
            copied = pickle.loads(pickle.dumps(copy.deepcopy(self.model.policy)))
            return th.equal(flat(copied), flat(self.model.policy))

    assert make(n_actors=2, engine=engine).learn(45, callback=Copy()).num_timesteps == 45


def test_a_callback_closes() -> None:
    class Close(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 13:
                self.model.close()
            return True

    model = make(envs(2), n_actors=2)
    assert model.learn(60, callback=Close()).num_timesteps == 60
