"""IMPALA: equal to A2C without lag, its loss by hand and by brute force, fixed points, what actors are told, the log."""

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from batches import SGD, flat
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from models import small_model
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger, make_output_format
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from walks import AllInDouble, walks

from sb3_ac_ext.actors.actor import Actor
from sb3_ac_ext.actors.tasks import Tasks
from sb3_ac_ext.buffers.segments import Segment, stacked
from sb3_ac_ext.impala import IMPALA
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError

either_engine = pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
TABLE: dict[str, Any] = {"net_arch": [], **SGD}
"""Policy arguments: with observations that have a one in one place, logits and values are columns of matrices."""


def make(env: Any = None, **kwargs: Any) -> Any:
    env = make_vec_env(lambda: RandomEnv(BOX, spaces.Discrete(3)), n_envs=2) if env is None else env
    return small_model(IMPALA, env=env, **kwargs)


def logged(model: Any) -> dict[str, float]:
    return model.logger.name_to_value


class Kept(Logger):
    """Remembers what it wrote last."""

    written: dict[str, float]

    def dump(self, step: int = 0) -> None:
        self.written = dict(self.name_to_value)
        super().dump(step)


def written(model: Any, steps: int) -> dict[str, float]:
    """What is logged at the end of so many steps."""
    model.set_logger(Kept(None, []))
    model.learn(steps, log_interval=1)
    return model.logger.written


def collect(model: Any) -> list[Segment]:
    """What an update is made of, and no update."""
    _, callback = model._setup_learn(10**6, reset_num_timesteps=False)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model._results


# Equal to A2C


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    "actions",
    [spaces.Discrete(3), spaces.Box(-1, 2, (2,), np.float64), spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(3)],
    ids=["discrete", "box", "multidiscrete", "multibinary"],
)
@pytest.mark.parametrize("optimizer", ["RMSProp", "Adam"])
@either_engine
def test_equals_a2c_without_lag(actions: spaces.Space, optimizer: str, engine: bool) -> None:
    """Episodes end in the middle of segments. A2C weighs the whole squared error."""
    given = {"gamma": 0.9, "n_steps": 5, "ent_coef": 0.1, "max_grad_norm": 0.5, "learning_rate": "lin_0.01", "seed": 0}
    given |= {"policy_kwargs": {"net_arch": [8]}, "use_rms_prop": optimizer == "RMSProp", "rms_prop_eps": 1e-5}
    ours = IMPALA("MlpPolicy", walks(actions), vf_coef=0.6, loss_reduction="mean", engine=engine, **given)
    given["learning_rate"] = lambda progress: 0.01 * progress
    if optimizer == "RMSProp":  # as TensorFlow has it
        options = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5}}
        given["policy_kwargs"] = {**given["policy_kwargs"], **options}
    theirs = A2C("MlpPolicy", walks(actions), vf_coef=0.3, rollout_buffer_class=AllInDouble, **given)
    for model in (ours, theirs):
        model.set_logger(Logger(None, []))
        model.policy.double()
        model.policy.optimizer.load_state_dict(copy.deepcopy(model.policy.optimizer.state_dict()))  # in float64
        th.manual_seed(1)
        model.learn(200, log_interval=10**6)
    assert ours._n_updates == theirs._n_updates == 20
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-10)
    assert not engine or ours.engine_report()["update"] == "replayed"
    for name in ("policy_loss", "entropy_loss", "explained_variance"):
        assert logged(ours)[f"train/{name}"] == pytest.approx(logged(theirs)[f"train/{name}"], rel=1e-6), name
    assert logged(ours)["train/value_loss"] == pytest.approx(logged(theirs)["train/value_loss"] / 2, rel=1e-6)


def test_a_sum_is_so_many_means() -> None:
    steps = {}
    for reduction in ("mean", "sum"):
        model = make(
            n_steps=5, loss_reduction=reduction, ent_coef=0.1, max_grad_norm=None, learning_rate=1e-3, policy_kwargs=SGD
        )
        before = flat(model.policy)
        model.learn(10)
        steps[reduction] = flat(model.policy) - before
    th.testing.assert_close(steps["sum"], 10 * steps["mean"], rtol=1e-3, atol=1e-6)


# The loss


def table(states: int, logits: Any = None, values: Any = None, **kwargs: Any) -> Any:
    """A model in float64 whose state k is the observation with a one in place k, with two actions."""
    env = RandomEnv(spaces.Box(0, 1, (states,), np.float64), spaces.Discrete(2))
    model = make(env, policy_kwargs=TABLE, **{"max_grad_norm": None, **kwargs})
    model.policy.double()
    with th.no_grad():
        for layer, columns in ((model.policy.action_net, logits), (model.policy.value_net, values)):
            layer.weight.copy_(th.zeros_like(layer.weight) if columns is None else th.tensor(columns, dtype=th.float64))
            layer.bias.zero_()
    return model


@pytest.mark.usefixtures("double_precision")
@either_engine
def test_loss_and_its_gradient_by_hand(engine: bool) -> None:
    """Numbers that were computed elsewhere."""
    logits, behaviour = [[0.5, 0], [0, 0.3], [-0.2, 0.4]], th.tensor([[1.0, 0], [0.2, 0], [0, 0.9]]).double()
    columns = np.array([*logits, [0, 0]]).T.tolist()
    kwargs = {"gamma": 0.9, "vf_coef": 0.5, "ent_coef": 0.01, "learning_rate": 0.0, "engine": engine}
    model = table(4, columns, [[0.5, 1, 1.5, 2]], n_steps=3, **kwargs)
    actions = np.array([[0], [1], [1]])
    log_mu = behaviour.log_softmax(1).gather(1, th.as_tensor(actions)).numpy()
    rewards = np.array([[1.0], [2.0], [3.0]])
    segment = Segment(
        observations=np.eye(4)[:, None],
        actions=actions,
        rewards=rewards,
        dones=np.zeros((3, 1), dtype=bool),
        infos=[[{}]] * 3,
        behaviour={"log_probs": log_mu},
    )
    for _ in range(3):  # recorded, checked, replayed
        model._results = [segment]
        model.train()
        log = logged(model)
        assert log["train/policy_loss"] == pytest.approx(6.50779343, abs=1e-7)
        assert log["train/value_loss"] == pytest.approx(30.02862367, abs=1e-6)
        assert log["train/entropy_loss"] == pytest.approx(-1.99496397, abs=1e-7)
        rhos = np.array([0.85144932, 1.27606819, 0.90816057])
        assert log["train/rho"] == pytest.approx(rhos.mean(), abs=1e-7)
        assert log["train/rho_clip_fraction"] == pytest.approx(1 / 3)
        assert log["train/approx_kl"] == pytest.approx((rhos - 1 - np.log(rhos)).mean(), abs=1e-7)
        by_logits, by_values = model.policy.action_net.weight.grad, model.policy.value_net.weight.grad
        first = [-1.90908594, 2.14715606, 1.0605705, 0]
        np.testing.assert_allclose(by_logits.numpy(), [first, np.negative(first)], rtol=0, atol=1e-7)
        np.testing.assert_allclose(by_values.numpy(), [[-2.52987442, -2.52361845, -1.49846494, 0]], rtol=0, atol=1e-7)
        assert th.all(by_logits[:, 3] == 0) and by_values[0, 3] == 0  # no gradient goes into the targets
        np.testing.assert_allclose(model._values_and_targets[1].numpy(), [[5.55974884], [6.0472369], [4.49692988]], atol=1e-7)


def by_brute_force(policy: Any, segment: Segment, settings: Any) -> tuple[th.Tensor, list[float]]:
    """
    The sums' loss from the definition: v_t as the sum over all later steps of its episode, in a loop for each environment.

    :return: the loss, and the targets
    """
    loss, all_targets = th.zeros((), dtype=th.float64), []
    T, N = segment.dones.shape
    for i in range(N):
        observations = th.as_tensor(segment.observations[:, i])
        actions = th.as_tensor(segment.actions[:, i])
        V, log_pi, entropy = policy.evaluate_actions(observations[:-1], actions)
        V = V.flatten()
        with th.no_grad():
            rho = (log_pi - th.as_tensor(segment.behaviour["log_probs"][:, i])).exp()
            behind, discounts, ends = [], [], segment.dones[:, i]
            for t in range(T):
                info = segment.infos[t][i]
                following = observations[t + 1]
                if ends[t]:
                    following = th.as_tensor(info["terminal_observation"])
                behind.append(policy.predict_values(following[None]).item())
                discounts.append(0.0 if ends[t] and not info["TimeLimit.truncated"] else settings.gamma)
            targets = []
            for s in range(T):
                target, factor = V[s].item(), 1.0
                for t in range(s, T):
                    error = segment.rewards[t, i] + discounts[t] * behind[t] - V[t].item()
                    target += factor * min(settings.rho_bar, rho[t].item()) * error
                    factor *= settings.gamma * settings.vtrace_lambda * min(settings.c_bar, rho[t].item())
                    if ends[t]:
                        break
                targets.append(target)
        for t in range(T):
            goes_on = t < T - 1 and not ends[t]
            following = targets[t + 1] if goes_on else behind[t]
            advantage = segment.rewards[t, i] + discounts[t] * following - V[t].item()
            advantage *= min(settings.pg_rho_bar, rho[t].item())
            loss = loss - advantage * log_pi[t] + settings.vf_coef * (targets[t] - V[t]) ** 2 / 2
            loss = loss - settings.ent_coef * (-log_pi[t] if entropy is None else entropy[t])
            loss = loss - settings.kl_coef * log_pi[t]  # log mu is constant
        all_targets.append(targets)
    return loss, all_targets


REPLAY = {"batch_segments": 2, "replayed_segments": 2, "replay_size": 3, "learning_rate": 0.01}
BARS = {"vtrace_lambda": 0.7, "rho_bar": 1.1, "c_bar": 0.9, "pg_rho_bar": 1.05}


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"loss_reduction": "mean"}, {"kl_coef": 0.5}, BARS, REPLAY],
    ids=["plain", "mean", "kl", "bars", "replay"],
)
@pytest.mark.parametrize("actions", [spaces.Discrete(3), spaces.Box(-1, 2, (2,), np.float64)], ids=["discrete", "box"])
@either_engine
def test_gradient_by_brute_force(actions: spaces.Space, kwargs: dict[str, Any], engine: bool) -> None:
    """Of an old policy's segments, whose episodes terminate and are truncated at all their steps."""
    settings: dict[str, Any] = {"gamma": 0.9, "ent_coef": 0.1, "n_steps": 5, "simulated_lag": 3, "learning_rate": 0.03}
    model = make(walks(actions), max_grad_norm=None, policy_kwargs=SGD, engine=engine, **{**settings, **kwargs})
    model.policy.double()
    replayed: list[list[Segment]] = []
    sample = model.replay_buffer.sample

    def remembered(number: int) -> list[Segment]:
        replayed.append(sample(number))
        return replayed[-1]

    model.replay_buffer.sample = remembered
    clipped = 0.0
    for _ in range(8):
        fresh, before = list(collect(model)), copy.deepcopy(model.policy)
        model.train()
        segments = [*fresh, *(replayed[-1] if replayed else [])]
        losses, targets = zip(*(by_brute_force(before, segment, model) for segment in segments), strict=True)
        numbers = sum(segment.rewards.size for segment in segments) if model.loss_reduction == "mean" else 1
        (th.stack(losses).sum() / numbers).backward()
        for one, other in zip(model.policy.parameters(), before.parameters(), strict=True):
            th.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)
        ours = model._values_and_targets[1].numpy()  # (T, N) of all segments
        np.testing.assert_allclose(ours.T, np.concatenate(targets), rtol=0, atol=1e-10)
        clipped += logged(model)["train/rho_clip_fraction"]
    assert clipped > 0
    assert len(model.replay_buffer) == (3 if model.replayed_segments else 0)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    ("rho_bar", "value"), [(0.2, 2.0), (1.0, 4.0), (2.0, 40 / 7), (3.5, 7.0)], ids=["of mu", "1", "2", "of pi"]
)
@pytest.mark.parametrize(("c_bar", "vtrace_lambda"), [(1.0, 1.0), (0.1, 1.0), (1.0, 0.3)])
def test_fixed_point(rho_bar: float, value: float, c_bar: float, vtrace_lambda: float) -> None:
    """One state, pi = (.7, .3), mu = (.2, .8), rewards (1, 0): the value of the policy proportional to min(rho_bar mu, pi)."""
    bars = {"rho_bar": rho_bar, "c_bar": min(c_bar, rho_bar), "vtrace_lambda": vtrace_lambda, "pg_rho_bar": 1e-12}
    logits = np.log([[0.7], [0.3]]).tolist()
    model = table(
        1, logits, gamma=0.9, ent_coef=0.0, vf_coef=1.0, learning_rate=4 / min(1, rho_bar), loss_reduction="mean", **bars
    )
    actions = np.array([*product([0, 1, 1, 1, 1], repeat=3)]).T  # all sequences of three steps, as often as mu has them
    T, N = actions.shape
    segment = Segment(
        observations=np.ones((T + 1, N, 1)),
        actions=actions,
        rewards=1.0 - actions,
        dones=np.zeros((T, N), dtype=bool),
        infos=[[{}] * N] * T,
        behaviour={"log_probs": np.log(np.array([0.2, 0.8]))[actions]},
    )
    for _ in range(150):
        model._results = [segment]
        model.train()
    policy = model.policy
    assert policy.predict_values(th.ones(1, 1).double()).item() == pytest.approx(value, abs=1e-6)
    th.testing.assert_close(
        (policy.action_net.weight[:, 0] + policy.action_net.bias).softmax(0)[0].item(), 0.7, atol=1e-8, rtol=0
    )


@either_engine
@pytest.mark.parametrize("n_steps", [1, 8])
def test_rho_is_one_without_lag(n_steps: int, engine: bool) -> None:
    """To the last bit where both policies are asked for the same rows."""
    model = make(n_steps=n_steps, learning_rate=0.05, engine=engine)
    for _ in range(10):
        collect(model)
        model.train()
        assert logged(model)["train/rho"] == (1 if n_steps == 1 else pytest.approx(1, abs=1e-5))
        assert logged(model)["train/policy_lag"] == 0


@pytest.mark.parametrize(
    ("observations", "actions", "policy"),
    [
        (BOX, spaces.Discrete(3), "MlpPolicy"),
        (BOX, CONTINUOUS, "MlpPolicy"),
        (BOX, spaces.Box(-1, 1, (2, 2), np.float32), "MlpPolicy"),
        (BOX, spaces.MultiDiscrete([3, 2]), "MlpPolicy"),
        (BOX, spaces.MultiBinary(3), "MlpPolicy"),
        (spaces.Discrete(4), spaces.Discrete(3), "MlpPolicy"),
        (IMAGE, CONTINUOUS, "CnnPolicy"),
        (spaces.Box(0, 255, (36, 36, 1), np.uint8), spaces.Discrete(3), "CnnPolicy"),
        (DICT, CONTINUOUS, "MultiInputPolicy"),
    ],
    ids=["discrete", "box", "matrix", "several", "coins", "numbered states", "images", "channels last", "dict"],
)
def test_spaces(observations: spaces.Space, actions: spaces.Space, policy: str) -> None:
    """What the learner makes of a segment is what the actor made of it, in every space, with truncated episodes."""

    def env() -> gym.Env:
        return gym.wrappers.TimeLimit(RandomEnv(*copy.deepcopy((observations, actions))), 3)

    model = make(make_vec_env(env, n_envs=2), policy=policy, n_steps=5, learning_rate=1e-3)
    for _ in range(4):
        collect(model)
        model.train()
        assert logged(model)["train/rho"] == pytest.approx(1, abs=1e-3)
        assert logged(model)["train/approx_kl"] == pytest.approx(0, abs=1e-5)
    assert model.engine_report()["update"] == "replayed"


# What actors are told


@pytest.mark.parametrize("lag", [0, 1, 4])
@pytest.mark.parametrize("n_actors", [1, 2])
def test_weights_are_those_of_so_many_updates_ago(lag: int, n_actors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And do not change within a segment."""
    acted: list[th.Tensor] = []
    act = Actor._act

    def recorded(actor: Actor, weights: Any) -> Any:
        acted.append(flat(actor.policy).clone())
        return act(actor, weights)

    monkeypatch.setattr(Actor, "_act", recorded)
    model = make(n_steps=3, simulated_lag=lag, n_actors=n_actors, learning_rate=0.05)
    history = []
    for update in range(8):
        history.append(copy.deepcopy(model.policy))
        acted.clear()
        (segment,) = collect(model)
        assert segment.version == max(0, update - lag)
        assert len(acted) == 3
        for weights in acted:
            th.testing.assert_close(weights, flat(history[segment.version]), rtol=0, atol=0)
        batch = stacked([segment], model.action_space, model.device)
        log_probs = history[segment.version].evaluate_actions(batch.observations, batch.actions)[1]
        th.testing.assert_close(batch.behaviour["log_probs"].flatten(), log_probs.detach(), rtol=0, atol=1e-5)
        assert logged(model)["train/policy_lag"] == update - segment.version
        model.logger.dump()
        model.train()
        if update > lag > 0:
            assert logged(model)["train/approx_kl"] > 0


def test_every_segment_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    produced: list[tuple[int, int]] = []
    segment = Actor.segment
    monkeypatch.setattr(Actor, "segment", lambda *args: produced.append((args[0].index, args[0].sequence)) or segment(*args))
    monkeypatch.setattr(IMPALA, "work", Actor.segment)
    model, consumed = make(n_steps=4, batch_segments=3, n_actors=2), []
    train = model.train
    model.train = lambda: consumed.extend((one.actor, one.sequence) for one in model._results) or train()
    model.learn(240)
    assert consumed == produced == [(turn % 2, turn // 2) for turn in range(30)]
    assert model.num_timesteps == 240 and model._n_updates == 10
    assert model._segments_of == {0: 15, 1: 15}


def test_actors_act_in_environments_of_their_own() -> None:
    model = make(make_vec_env("CartPole-v1", n_envs=2, seed=0), n_actors=3, batch_segments=3, n_steps=5)
    first, second, third = collect(model)
    assert len({one.observations.tobytes() for one in (first, second, third)}) == 3
    again = collect(model)
    for one, other in zip((first, second, third), again, strict=True):
        np.testing.assert_array_equal(one.observations[-1], other.observations[0])


def test_segments_that_are_too_old_are_thrown_away() -> None:
    model = make(n_steps=4, max_policy_lag=2, n_actors=2)
    model._setup_learn(10**6)
    take, taken = model._pool.take, []

    def late(weights: Any) -> Segment:
        result = take(weights)
        result.version -= 3 * (len(taken) % 3 == 1)
        taken.append(result)
        return result

    model._pool.take = late
    for _ in range(6):
        (one,) = collect(model)
        assert model._n_updates - one.version == 0
        model.train()
    assert len(taken) == 9 and model._discarded == logged(model)["actors/discarded"] == 3
    assert model.num_timesteps == 6 * 4 * 2


@pytest.mark.parametrize(("simulated_lag", "most"), [(3, 1), (0, -1)])
def test_learning_from_nothing_is_refused_on_a_model_that_is_there_too(simulated_lag: int, most: int) -> None:
    model = make(n_steps=4, simulated_lag=simulated_lag).learn(40)
    model.max_policy_lag = most
    with pytest.raises(ArgumentError, match=f"max_policy_lag must be at least simulated_lag={simulated_lag}, .* got {most}"):
        model.learn(40)


# Replay, saved with what it needs


SCRIPTED_LENGTH = 6


def scripted(n_envs: int = 2) -> Any:
    return make_vec_env(lambda: ScriptedEnv(SCRIPTED_LENGTH, truncates=True), n_envs=n_envs)


@pytest.mark.parametrize(
    "kwargs",
    [{"simulated_lag": 5}, {"replayed_segments": 2, "replay_size": 5, "batch_segments": 2}, {"n_actors": 2}],
    ids=["lag", "replay", "two actors"],
)
def test_learn_after_load_is_the_uninterrupted_learn(kwargs: dict[str, Any], tmp_path: Path) -> None:
    """Episodes end at the save, so that nothing of the environments needs to be stored."""
    kwargs |= {"n_steps": SCRIPTED_LENGTH // 2, "learning_rate": 0.01}
    model = make(scripted(), **kwargs).learn(240)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    model.save(tmp_path / "both", include=["replay_buffer"])
    model.learn(240, reset_num_timesteps=False)
    for name in ("model", "both"):
        np.random.seed(999)
        th.manual_seed(999)
        loaded = IMPALA.load(tmp_path / name, env=scripted())
        if name == "model":
            loaded.load_replay_buffer(tmp_path / "buffer")
        loaded.set_logger(Logger(None, []))
        loaded.learn(240, reset_num_timesteps=False)
        assert loaded.num_timesteps == model.num_timesteps == 480
        th.testing.assert_close(loaded.policy.state_dict(), model.policy.state_dict(), rtol=0, atol=0)
        states = [one.policy.optimizer.state_dict()["state"] for one in (loaded, model)]
        th.testing.assert_close(*states, rtol=0, atol=0)


def test_a_replay_has_its_own_file(tmp_path: Path) -> None:
    model = make(replayed_segments=1, n_steps=4).learn(40)
    model.save_replay_buffer(tmp_path / "buffer")
    assert [path.name for path in tmp_path.iterdir()] == ["buffer.pkl"]
    other = make(n_steps=4)
    assert len(other.replay_buffer) == 0
    other.load_replay_buffer(tmp_path / "buffer.pkl")
    assert len(other.replay_buffer) == 5
    with pytest.raises(ArgumentError, match="n_envs=1 environments, as the model has, got one of 2"):
        make(RandomEnv(BOX, spaces.Discrete(3))).load_replay_buffer(tmp_path / "buffer.pkl")
    off_policy = small_model("td3x").learn(20)
    off_policy.save_replay_buffer(tmp_path / "other")
    with pytest.raises(ArgumentTypeError, match="must be a file of a SegmentReplay"):
        make().load_replay_buffer(tmp_path / "other.pkl")


def test_a_size_that_no_memory_has_is_refused() -> None:
    for kwargs in ({}, {"replayed_segments": 1}):
        if kwargs:
            with pytest.raises(ArgumentError, match=r"replay_size must be .* fit into memory, got 1000000000000"):
                make(replay_size=10**12, **kwargs)
        else:
            make(replay_size=10**12, **kwargs)


def test_other_lengths_of_segments_need_no_new_model() -> None:
    model = make(n_steps=4, replayed_segments=1).learn(40)
    model.n_steps = 5
    model.learn(40, reset_num_timesteps=False)
    assert {one.n_steps for one in model.replay_buffer.segments} == {5}


def test_segments_of_two_lengths_do_not_meet_in_an_update() -> None:
    """As with actors that were at work while ``n_steps`` was set."""
    model = make(n_steps=4, batch_segments=2)
    collect(model)
    long = model._results[0]
    model.n_steps = 3
    collect(model)
    model._results = [long, model._results[0]]
    model.train()
    assert model._values_and_targets[0].shape == (3, 2)


def test_bars_that_contradict_each_other() -> None:
    with pytest.raises(ArgumentError, match=r"c_bar must be at most rho_bar=0.5, got 1.0"):
        make(rho_bar=0.5)


# Several tasks


def task_env(name: str | None, reward: float) -> Callable[[], gym.Env]:
    class Task(RandomEnv):
        def step(self, action: Any) -> Any:
            obs, _, terminated, truncated, info = super().step(action)
            return obs, reward, terminated, truncated, info if name is None else {**info, "task": name}

    return lambda: Monitor(Task(BOX, spaces.Discrete(3)))


@pytest.mark.parametrize("n_actors", [1, 2])
def test_tasks_by_infos(n_actors: int) -> None:
    env = DummyVecEnv([task_env("jump", 1.0), task_env("run", 2.0), task_env("jump", 4.0), task_env("jump", 4.0)])
    model = make(env, n_steps=7, n_actors=n_actors)
    log = written(model, 280)
    assert log["tasks/jump/ep_rew_mean"] == pytest.approx(7 * 3)
    assert log["tasks/run/ep_rew_mean"] == pytest.approx(14)
    assert log["tasks/jump/ep_len_mean"] == log["tasks/run/ep_len_mean"] == 7
    assert log["tasks/jump/share"] == 0.75 and log["tasks/run/share"] == 0.25
    assert log["rollout/ep_rew_mean"] == pytest.approx((7 * 9 + 14) / 4)
    model.learn(280, reset_num_timesteps=False)
    assert model._tasks.steps.total() == 560
    model.learn(28)
    assert model._tasks.steps.total() == 28


class ScriptedChoice(ScriptedEnv):
    """With the spaces of CartPole."""

    def __init__(self) -> None:
        super().__init__(4)
        self.observation_space, self.action_space = BOX, spaces.Discrete(2)

    def reset(self, **kwargs: Any) -> Any:
        super().reset(**kwargs)
        return np.zeros(4, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(4, np.float32), *super().step([action])[1:]


def test_tasks_by_ids_and_classes() -> None:
    env = DummyVecEnv([lambda: Monitor(gym.make("CartPole-v1")), lambda: Monitor(ScriptedChoice())])
    log = written(make(env, n_steps=20), 400)
    assert log["tasks/ScriptedChoice/ep_rew_mean"] == 1 + 2 + 3 + 4
    assert log["tasks/CartPole-v1/ep_len_mean"] == log["tasks/CartPole-v1/ep_rew_mean"] > 5


def test_one_task_is_not_logged() -> None:
    log = written(make(n_steps=5), 100)
    assert "rollout/ep_rew_mean" in log and not [name for name in log if name.startswith("tasks")]


def test_long_names_do_not_break_the_console(tmp_path: Path) -> None:
    tasks, names = Tasks(10), ["a" * 40, "b"]
    segment = collect(make(n_steps=5))[0]
    segment.infos = [[{"episode": {"r": 1.0, "l": 2}}, {"episode": {"r": 3.0, "l": 4}}]]
    tasks.count(segment, names)
    logger = Logger(str(tmp_path), [make_output_format("log", str(tmp_path)), make_output_format("json", str(tmp_path))])
    tasks.record(logger)
    logger.dump(1)
    logger.close()
    assert "b/share" in (tmp_path / "log.txt").read_text() and "aaa" not in (tmp_path / "log.txt").read_text()
    assert f"tasks/{names[0]}/ep_rew_mean" in (tmp_path / "progress.json").read_text()


# SB3's learn()


class Stops(BaseCallback):
    """Sees steps, and stops the training after some."""

    def __init__(self, after: int = 10**9) -> None:
        super().__init__()
        self.after, self.seen = after, []

    def _on_step(self) -> bool:
        self.seen.append(
            (self.num_timesteps, self.locals["rewards"].copy(), self.locals["dones"].copy(), self.locals["actions"])
        )
        return self.n_calls < self.after


@pytest.mark.parametrize("n_actors", [1, 2])
def test_callbacks_see_each_step(n_actors: int) -> None:
    seen = Stops()
    make(scripted(), n_steps=4, n_actors=n_actors).learn(160, callback=seen)
    assert [steps for steps, *_ in seen.seen] == [*range(2, 162, 2)]
    rewards = [row.tolist() for _, row, *_ in seen.seen]
    one = [[float(t % SCRIPTED_LENGTH + 1)] * 2 for t in range(80)]
    if n_actors == 1:
        assert rewards == one
    else:  # in turns
        assert rewards == [row for k in range(10) for row in one[4 * k : 4 * k + 4] * 2]
    assert all((dones == (rewards == SCRIPTED_LENGTH)).all() for _, rewards, dones, _ in seen.seen)


def test_what_is_behind_a_stop_is_not_counted() -> None:
    model = make(scripted(), n_steps=4)
    model.learn(160, callback=Stops(after=10))
    assert model.num_timesteps == 20 and model._n_updates == 2
    assert len(model.ep_info_buffer) == 2


@pytest.mark.parametrize("batch_segments", [1, 2])
def test_a_callback_closes(batch_segments: int) -> None:
    class Close(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 6:
                self.model.close()
            return True

    model = make(n_steps=4, n_actors=2, batch_segments=batch_segments)
    assert model.learn(48, callback=Close()).num_timesteps == 48
    assert model._pool is not None and model._n_updates == 6 / batch_segments


def test_callbacks_of_sb3(tmp_path: Path) -> None:
    model = make(scripted(), n_steps=3, simulated_lag=2)
    evaluation = EvalCallback(scripted(1), eval_freq=10, n_eval_episodes=1, verbose=0, log_path=str(tmp_path))
    checkpoint = CheckpointCallback(12, str(tmp_path), save_replay_buffer=True)
    model.learn(72, callback=[evaluation, checkpoint])
    assert evaluation.evaluations_timesteps == [20, 40, 60]
    assert evaluation.last_mean_reward == sum(range(1, SCRIPTED_LENGTH + 1))
    loaded = IMPALA.load(tmp_path / "rl_model_48_steps")
    assert loaded.num_timesteps == 48 and loaded._n_updates == 7


def test_statistics_of_normalised_environments_are_those_of_a2c() -> None:
    normalizers = []
    for cls, kwargs in ((IMPALA, {"loss_reduction": "mean", "vf_coef": 1.0}), (A2C, {})):
        env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2, seed=0))
        shared = {"max_grad_norm": 0.5, "use_rms_prop": False, "learning_rate": 1e-3, "ent_coef": 0.0, "n_steps": 5, "seed": 0}
        cls("MlpPolicy", env, **shared, **kwargs).learn(500)
        normalizers.append(env)
    ours, theirs = normalizers
    for name in ("obs_rms", "ret_rms"):
        for part in ("mean", "var", "count"):
            one, other = (getattr(getattr(normalizer, name), part) for normalizer in (ours, theirs))
            np.testing.assert_allclose(one, other, rtol=1e-4, err_msg=f"{name}.{part}")


def test_statistics_of_two_actors_are_those_of_each() -> None:
    """Which play the same episodes, as far as the clock and the rewards go."""
    normalizers = []
    for n_actors in (1, 2):
        env = VecNormalize(scripted())
        model = make(env, n_steps=4, n_actors=n_actors).learn(80 * n_actors)
        normalizers.append(env)
        assert model.num_timesteps == 80 * n_actors
    one, two = normalizers
    for name, numbers in (("obs_rms", np.s_[:1]), ("ret_rms", np.s_[...])):
        alone, both = getattr(one, name), getattr(two, name)
        np.testing.assert_allclose(both.mean[numbers], alone.mean[numbers], rtol=1e-4)
        np.testing.assert_allclose(both.var[numbers], alone.var[numbers], rtol=1e-4)
        assert both.count == pytest.approx(2 * alone.count, rel=1e-4)


# It learns


class Regulator(gym.Env):
    """x' = x + a, reward -x'^2 - 0.1 a^2, ten steps: the best is nearly a = -x, and doing nothing costs ten times x^2."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-1, 1, 1).astype(np.float32), 0
        return self.x.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.x, self.t = self.x + action, self.t + 1
        reward = -(self.x[0] ** 2) - 0.1 * action[0] ** 2
        return self.x.copy(), float(reward), False, self.t == 10, {}


@pytest.mark.parametrize("lag", [0, 3])
def test_learns_to_regulate(lag: int) -> None:
    """Doing nothing costs 10/3, the best about 0.05."""
    kwargs = {"n_steps": 8, "learning_rate": 5e-3, "use_rms_prop": False, "loss_reduction": "mean", "ent_coef": 0.0}
    env = make_vec_env(Regulator, n_envs=8, seed=0)
    model = IMPALA("MlpPolicy", env, seed=0, simulated_lag=lag, policy_kwargs={"net_arch": [16]}, **kwargs).learn(12_000)
    mean, _ = evaluate_policy(model, make_vec_env(Regulator, seed=1), 20)
    assert mean > -0.2
