"""ACER: its steps by hand and by brute force, fixed points, no bias, the average policy, the replay, what is refused."""

import copy
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
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from walks import walks

from sb3_ac_ext.acer import ACER, MlpPolicy, terms
from sb3_ac_ext.buffers.segments import Segment
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, UnsupportedError

CHOICE, BOX_OF_TWO = spaces.Discrete(3), spaces.Box(-1, 2, (2,), np.float64)
either_engine = pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
either_kind = pytest.mark.parametrize("actions", [CHOICE, BOX_OF_TWO], ids=["discrete", "box"])
in_double = pytest.mark.usefixtures("double_precision")


def make(env: Any = None, **kwargs: Any) -> Any:
    env = make_vec_env(lambda: RandomEnv(BOX, CHOICE), n_envs=2) if env is None else env
    return small_model(ACER, env=env, **{"online_update": None, **kwargs})


def logged(model: Any) -> dict[str, float]:
    return model.logger.name_to_value


def close(actual: Any, expected: Any, atol: float = 1e-7) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=atol)


def learn_from(model: Any, *segments: Segment) -> None:
    """One update, as `ACER.train` does it."""
    model._results = segments
    model.train()


def collect(model: Any) -> list[Segment]:
    """What is taken before an update, and no update."""
    _, callback = model._setup_learn(10**6, reset_num_timesteps=False)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model._results


# Steps by hand: state k is the observation with a one in place k, so that what layers give are columns of their matrices


def table(states: int, actions: spaces.Space, columns: dict[str, Any], average: Any, **kwargs: Any) -> Any:
    """
    :param columns: by the layer, what it gives in each state
    :param average: what the average policy's last layer gives
    """
    env = RandomEnv(spaces.Box(0, 1, (states,), np.float64), actions)
    given = {"max_grad_norm": None, "online_update": True, "replay_ratio": 0.0, "average_decay": 1.0, "learning_rate": 0.0}
    model = make(env, policy_kwargs={"net_arch": [], "advantage_net_arch": [], **SGD}, **{**given, **kwargs})
    for policy, layers in ((model.policy, columns), (model.average_policy, {"action_net": average})):
        policy.double()
        with th.no_grad():
            for name, rows in layers.items():
                layer = getattr(policy, name)
                layer.weight.copy_(th.tensor(rows, dtype=th.float64).T)
                layer.bias.zero_()
    return model


def segment(actions: Any, rewards: Any, behaviour: dict[str, Any], states: int = 1) -> Segment:
    """Of one environment that is in states 0, 1, 2, ..."""
    actions, rewards = np.array(actions)[:, None], np.array(rewards)[:, None]
    return Segment(
        observations=np.eye(states)[: len(rewards) + 1, None],
        actions=actions,
        rewards=rewards,
        dones=np.zeros(rewards.shape, dtype=bool),
        infos=[[{}]] * len(rewards),
        behaviour={name: np.array(values)[:, None] for name, values in behaviour.items()},
    )


LOGITS, AVERAGE = [[0.2, -0.4, 0.1], [1.2, -0.3, 0.1], [0, 0, 0]], [[0.1, -0.2, 0.1], [0.2, 0.1, 0], [0, 0, 0]]
MU, Q = [[0.3, 0.4, 0.3], [0.05, 0.5, 0.45], [0.2, 0.3, 0.5]], [[1, 0, 3], [2, -1, 0.5], [0.3, -0.2, 0.1]]
THIRD = [-0.1462963, -0.1462963, 0.29259259]
ASCENT = {
    "probs": [[0.32602833, -0.67064697, 0.34461864], [-1.23555691, 0.51995641, 0.7156005], THIRD],
    "logits": [[0.38704956, -0.73726649, 0.35021693], [-1.15067278, 0.46177919, 0.6888936], THIRD],
    "log_probs": [[0.38704956, -0.73726649, 0.35021693], [-1.71092876, 0.84576307, 0.86516568], THIRD],
}
"""Gradients by the logits."""
ACTIVE = {"probs": 2 / 3, "logits": 0, "log_probs": 1 / 3}


@in_double
@pytest.mark.parametrize("space", ASCENT)
@either_engine
def test_step_of_choices_by_hand(space: str, engine: bool) -> None:
    """Numbers that were computed elsewhere."""
    kwargs = {"gamma": 0.9, "rho_bar": 2.0, "trust_region_delta": 0.5, "ent_coef": 0.0, "vf_coef": 0.7, "n_steps": 3}
    columns = {"action_net": [*LOGITS, [0, 0, 0]], "value_net": [*Q, [0.25] * 3]}
    model = table(4, CHOICE, columns, [*AVERAGE, [0, 0, 0]], trust_region_space=space, engine=engine, **kwargs)
    data = segment([1, 0, 2], [1.0, -1.0, 0.5], {"logits": np.log(MU)}, states=4)
    for _ in range(3):  # recorded, checked, replayed
        learn_from(model, data)
        close(model.policy.action_net.weight.grad.T, np.append(np.negative(ASCENT[space]) / 3, [[0] * 3], axis=0))
        by_q = np.zeros((4, 3))
        by_q[range(3), [1, 0, 2]] = np.array([0.18448108, 2.565, -0.625]) * 0.7 / 3
        close(model.policy.value_net.weight.grad.T, by_q)  # no gradient goes into V or the targets
        close(model._values_and_targets[1], [-0.18448108, -0.565, 0.725])
        close(logged(model)["train/rho"], np.mean([0.55917903, 12.85346016, 0.66666667]))
        close(logged(model)["train/rho_clip_fraction"], 1 / 3, atol=1e-6)
        close(logged(model)["train/trust_region_fraction"], ACTIVE[space], atol=1e-6)
        errors = np.square([0.18448108, 2.565, 0.625]) / 2
        close(logged(model)["train/value_loss"], errors.mean())
    assert not engine or model.engine_report()["update"] == "replayed"


class Bilinear(nn.Module):
    """A(s, a) = W(s) . a of states that are given by a one in their place."""

    def __init__(self, slopes: Any) -> None:
        super().__init__()
        self.slopes = nn.Parameter(th.tensor(slopes, dtype=th.float64))

    def forward(self, x: th.Tensor) -> th.Tensor:
        states, actions = x.split([len(self.slopes), self.slopes.shape[1]], dim=-1)
        return ((states @ self.slopes) * actions).sum(dim=-1, keepdim=True)


IN_A_BOX = {
    (5.0, 1.0): [0.03541723, 0.42343708],
    (5.0, 20.0): [2.2572846, 3.3859269],
    (1.0, 1.0): [1.09737977, -0.37303483],
    (1.0, 20.0): [2.99475859, 2.15680359],
}
"""z by the bound of the ratios and by delta."""


@in_double
@pytest.mark.parametrize(("rho_bar", "delta"), IN_A_BOX)
@either_engine
def test_step_in_a_box_by_hand(rho_bar: float, delta: float, engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that were computed elsewhere, of the first step; the second makes Q_opc another number than Q_ret."""
    mean, mu, other, taken = [0.1, -0.2], [0.0, 0.0], [0.25, -0.45], [0.3, 0.1]
    at_other, at_mean = th.tensor([[other, mean]]), th.tensor([mean, mean])
    monkeypatch.setattr(terms, "drawn", lambda pi, n: at_other if n == 1 else at_mean.expand(n, 2, 2))
    offsets = np.subtract([taken, other], mean)
    slopes = np.linalg.solve(offsets, [1.1 - 0.7, 1.4 - 0.7])
    gamma, v1, v2, shrunk = 0.9, 0.3, 0.25, np.exp(-0.25)  # of the second step rho is exp(-1/2)
    error = 0.3 / (gamma * (1 - shrunk))
    rewards = [1.9 - gamma * (v1 + error), v1 + error - gamma * v2]
    columns = {"action_net": [mean, mean, [0, 0]], "value_net": [[0.7], [v1], [v2]]}
    kwargs = {"gamma": gamma, "vf_coef": 0.7, "n_steps": 2, "rho_bar": rho_bar, "trust_region_delta": delta}
    model = table(3, BOX_OF_TWO, columns, [[-0.05, -0.4], mean, mean], engine=engine, **kwargs)
    model.policy.advantage_net = Bilinear(np.array([slopes, [0, 0], [0, 0]]))
    model.policy.optimizer = th.optim.SGD(model.policy.parameters(), 0.0)
    model.average_policy.advantage_net = copy.deepcopy(model.policy.advantage_net)
    std = np.full((2, 2), 0.3)
    second = [mean[0] + 0.3, mean[1]]  # one standard deviation from the mean, and that of mu
    data = segment([taken, second], rewards, {"mean": [mu, second], "std": std}, states=3)
    for _ in range(3):
        learn_from(model, data)
        close(model._values_and_targets[1][0], [1.6])
        close(logged(model)["train/rho"], (0.84648172 + np.exp(-0.5)) / 2)
        close(model.policy.action_net.weight.grad[:, 0], -np.array(IN_A_BOX[rho_bar, delta]) / 2)
        close(model.policy.advantage_net.slopes.grad[0], -0.5 * offsets[0] * 0.7 / 2)
        close(model.policy.value_net.weight.grad[0, 0], -0.92324086 * 0.7 / 2)
        assert model.policy.value_net.weight.grad[0, 2] == 0  # no gradient goes into the targets


# Steps by brute force


@th.no_grad()
def patterned(pi: Any, n: int) -> th.Tensor:
    """Draws that are known."""
    steps = th.linspace(-1, 1.5, n, dtype=pi.loc.dtype)[:, None, None] * th.tensor([1.0, -0.7], dtype=pi.loc.dtype)
    return pi.loc + pi.scale * steps


def retraced(rewards: Any, q: Any, v: Any, behind: Any, trace: Any, infos: Any, dones: Any, gamma: float) -> list[float]:
    """Q_ret of each step of one environment, each from its definition as a sum."""
    targets = []
    for s in range(len(rewards)):
        target, factor = q[s], 1.0
        for t in range(s, len(rewards)):
            factor *= trace[t] * gamma if t > s else 1.0
            terminated = dones[t] and not infos[t]["TimeLimit.truncated"]
            target += factor * (rewards[t] + (0.0 if terminated else gamma * behind[t]) - q[t])
            if dones[t]:
                break
        targets.append(target)
    return targets


def by_brute_force(model: Any, policy: Any, average: Any, data: Segment) -> th.Tensor:
    """The loss of one segment, step by step; g and k by differentiation."""
    loss, T, N = th.zeros((), dtype=th.float64), *data.dones.shape
    for i in range(N):
        observations = th.as_tensor(data.observations[:, i])
        one = one_environment(model, policy, average, data, i, observations)
        loss = loss + sum(one)
    return loss / (T * N)


def one_environment(model: Any, policy: Any, average: Any, data: Segment, i: int, observations: th.Tensor) -> list[th.Tensor]:
    T, chooses = len(data.dones), isinstance(model.action_space, spaces.Discrete)
    infos, dones, rewards = [row[i] for row in data.infos], data.dones[:, i], data.rewards[:, i]
    actions = th.as_tensor(data.actions[:, i])
    judged = policy.judge(observations[:-1])
    pi, parts = judged.distribution, policy.judge(observations[:-1])
    with th.no_grad():
        behind = []
        for t in range(T):
            following = th.as_tensor(infos[t]["terminal_observation"]) if dones[t] else observations[t + 1]
            behind.append(policy.predict_values(following[None]).item())
        avg = average.get_distribution(observations[:-1]).distribution
    if chooses:
        mu = th.distributions.Categorical(logits=th.as_tensor(data.behaviour["logits"][:, i]))
        q = judged.values[range(T), actions]
        v = (pi.probs * judged.values).sum(1).detach()
        rho = (pi.log_prob(actions) - mu.log_prob(actions)).clamp(-20, 20).exp().detach()
        trace = rho.clamp(max=1)
    else:
        mu = th.distributions.Normal(*(th.as_tensor(data.behaviour[name][:, i]) for name in ("mean", "std")))

        def duelling(at: th.Tensor) -> th.Tensor:
            centre = [policy.advantages(parts.latent, u) for u in patterned(pi, model.advantage_samples)]
            return judged.values.flatten() + policy.advantages(parts.latent, at) - sum(centre) / len(centre)

        q, v = duelling(actions), judged.values.flatten().detach()
        rho = (pi.log_prob(actions) - mu.log_prob(actions)).sum(1).clamp(-20, 20).exp().detach()
        trace = (pi.log_prob(actions) - mu.log_prob(actions)).sum(1).detach().div(2).exp().clamp(max=1)
    args = rewards, q.tolist(), v.tolist(), behind
    q_ret = retraced(*args, trace.tolist(), infos, dones, model.gamma)
    c = model._value("rho_bar")
    losses = []
    for t in range(T):
        if chooses:
            phi = leaf = (pi.probs if model.trust_region_space == "probs" else pi.logits)[t].detach().requires_grad_()
            log_pi = leaf.log() if model.trust_region_space == "probs" else leaf
            log_pi = log_pi.log_softmax(0) if model.trust_region_space == "logits" else log_pi
            p, m = pi.probs[t].detach(), mu.probs[t]
            gain = min(c, rho[t]) * (q_ret[t] - v[t]) * log_pi[actions[t]]
            for a in range(len(p)):
                share = max(0.0, 1 - c * m[a] / p[a]) * p[a] * (judged.values[t, a].detach() - v[t])
                gain = gain + share * log_pi[a]
            gain = gain - model.ent_coef * (log_pi.exp() * log_pi).sum() * model.entropy_in_trust_region
            kl = (avg.probs[t] * (avg.probs[t].log() - log_pi)).sum()
            phi = (pi.probs if model.trust_region_space == "probs" else pi.logits)[t]
        else:
            leaf, phi = pi.loc[t].detach().requires_grad_(), pi.loc[t]
            other = patterned(pi, 1)[0, t]
            normal = th.distributions.Normal(leaf, pi.scale[t])
            q_opc = retraced(*args, [1.0] * T, infos, dones, model.gamma)
            ratio = (pi.log_prob(other)[t] - mu.log_prob(other)[t]).sum().exp().item()
            whole = patterned(pi, 1)[0]
            gain = min(c, rho[t]) * (q_opc[t] - v[t]) * normal.log_prob(actions[t]).sum()
            gain = gain + max(0.0, 1 - c / ratio) * (duelling(whole)[t].detach() - v[t]) * normal.log_prob(other).sum()
            kl = th.distributions.kl_divergence(th.distributions.Normal(avg.loc[t], avg.scale[t]), normal).sum()
            target = min(1.0, rho[t].item()) * (q_ret[t] - q[t].item()) + v[t].item()
            losses.append(model.vf_coef * (target - judged.values[t, 0]) ** 2 / 2)
        g, k = (th.autograd.grad(one, leaf, retain_graph=True)[0] for one in (gain, kl))
        delta, norm = model.trust_region_delta, k.dot(k).item()
        excess = 0.0 if delta is None or norm == 0 else max(0.0, (k.dot(g).item() - delta) / norm)
        z = g - excess * k
        assert delta is None or excess == 0 or k.dot(z) <= delta + 1e-9
        losses.append(-(z * phi).sum() + model.vf_coef * (q_ret[t] - q[t]) ** 2 / 2)
        if chooses and not model.entropy_in_trust_region:
            losses.append(-model.ent_coef * pi.entropy()[t])
    return losses


@in_double
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"trust_region_space": "logits", "batch_segments": 2},
        {"trust_region_space": "log_probs", "entropy_in_trust_region": False, "rho_bar": 0.8},
        {"trust_region_delta": None, "rho_bar": 0.5},
    ],
    ids=["plain", "logits", "log-probabilities", "no trust region"],
)
@either_kind
@either_engine
def test_updates_by_brute_force(
    actions: spaces.Space, kwargs: dict[str, Any], engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Of fresh and of replayed segments, whose episodes terminate and are truncated at all their steps; and the average policy
    after each of them.
    """
    monkeypatch.setattr(terms, "drawn", patterned)
    given = {"gamma": 0.9, "ent_coef": 0.1, "n_steps": 5, "learning_rate": 0.1, "learning_starts": 11, "average_decay": 0.9}
    given |= {"trust_region_delta": 0.05, "online_update": True, "max_grad_norm": None, "buffer_size": 20}
    model = make(walks(actions), policy_kwargs=SGD, engine=engine, **{**given, **kwargs})
    model.policy.double()
    model.average_policy.double()
    update, numbers, acts = model._learn_from, [], []

    def checked(segments: list[Segment]) -> None:
        model.policy.action_dist.distribution = None  # with a graph, which cannot be copied
        before, average = copy.deepcopy(model.policy), copy.deepcopy(model.average_policy)
        update(segments)
        sum(by_brute_force(model, before, average, one) / len(segments) for one in segments).backward()
        for one, other in zip(model.policy.parameters(), before.parameters(), strict=True):
            th.testing.assert_close(one.grad, other.grad, rtol=1e-7, atol=1e-9)
        th.testing.assert_close(flat(model.average_policy), 0.9 * flat(average) + 0.1 * flat(model.policy), rtol=0, atol=1e-12)
        assert not th.equal(flat(model.average_policy), flat(average))
        numbers.append(len(segments))

    model._learn_from = checked
    for _ in range(6):
        collect(model)
        model.train()
        acts.append(logged(model)["train/trust_region_fraction"])
    assert len(numbers) > 10 and {*numbers} == {model.batch_segments}
    assert (max(acts) > 0) == (model.trust_region_delta is not None)
    assert len(model.replay_buffer) == 4


# Properties


def test_fresh_segments_have_ratios_of_one() -> None:
    for actions in (CHOICE, CONTINUOUS):
        model = make(
            make_vec_env(lambda actions=actions: RandomEnv(BOX, actions), n_envs=3), online_update=True, replay_ratio=0.0
        )
        for _ in range(4):
            collect(model)
            model.train()
            assert logged(model)["train/rho"] == pytest.approx(1, abs=1e-5)
        assert len(model.replay_buffer) == 0


def one_state(pi: list[float], mu: list[float], q: Any, actions: np.ndarray, rewards: np.ndarray, **kwargs: Any) -> Any:
    """A model of one state, and a segment of ``(T, N)`` actions in it."""
    T, N = actions.shape
    columns = {"action_net": [np.log(pi).tolist()], "value_net": [q]}
    given = {"gamma": 0.9, "ent_coef": 0.0, "trust_region_delta": None, "n_steps": T, **kwargs}
    model = table(1, spaces.Discrete(len(pi)), columns, [np.log(pi).tolist()], **given)
    data = Segment(
        observations=np.ones((T + 1, N, 1)),
        actions=actions,
        rewards=rewards,
        dones=np.zeros((T, N), dtype=bool),
        infos=[[{}] * N for _ in range(T)],
        behaviour={"logits": np.log(mu) * np.ones((T, N, 1))},
    )
    return model, data


@in_double
@pytest.mark.parametrize("n_steps", [1, 3])
def test_fixed_point(n_steps: int) -> None:
    """pi = (.7, .3), mu = (.2, .8), rewards (1, 0): Q of pi, by the actions of mu, of which it is (2.8, 1.8)."""
    actions = np.array([*product([0, 1, 1, 1, 1], repeat=n_steps)]).T  # all sequences, as often as mu has them
    model, data = one_state([0.7, 0.3], [0.2, 0.8], [0.0, 0.0], actions, 1.0 - actions, vf_coef=1.0, learning_rate=1.0)
    model.policy.action_net.requires_grad_(False)
    for _ in range(400):
        learn_from(model, data)
    close(model.policy.value_net(th.ones(1, 1).double()).detach(), [[7.3, 6.3]], atol=1e-6)


@in_double
@pytest.mark.parametrize("rho_bar", [10.0, 1.0, 0.5])
@pytest.mark.parametrize("space", ASCENT)
def test_no_bias_whatever_the_bound_of_ratios(rho_bar: float, space: str) -> None:
    """Where targets are Q: numbers that were computed elsewhere."""
    actions, q = np.repeat([0, 1, 2], [1, 10, 9])[None], [2.0, -1.0, 0.5]  # as often as mu has them
    pi, rewards = th.tensor([1.2, -0.3, 0.1]).double().softmax(0).tolist(), np.array(q)[actions]
    kwargs = {"gamma": 0.0, "rho_bar": rho_bar, "trust_region_space": space}
    model, data = one_state(pi, [0.05, 0.5, 0.45], q, actions, rewards, **kwargs)
    learn_from(model, data)
    close(-model.policy.action_net.weight.grad.flatten(), [0.48270532, -0.32249308, -0.16021225])
    close(model.policy.value_net.weight.grad, np.zeros((3, 1)))


@in_double
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("space", ASCENT)
def test_entropy_by_hand(inside: bool, space: str) -> None:
    actions = np.array([[0, 1, 2]])
    kwargs = {"gamma": 0.0, "ent_coef": 0.01, "entropy_in_trust_region": inside, "trust_region_space": space}
    model, data = one_state([0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.0] * 3, actions, np.zeros((1, 3)), **kwargs)
    learn_from(model, data)
    close(-model.policy.action_net.weight.grad.flatten(), [-0.00232272, 0.00091808, 0.00140464])
    assert logged(model)["train/entropy_loss"] == pytest.approx(-0.89794572)


@in_double
@either_kind
def test_the_trust_region_holds_the_policy_back(actions: spaces.Space) -> None:
    moved = []
    for delta in (None, 1e-4):
        model = make(walks(actions), trust_region_delta=delta, n_steps=5, learning_starts=0, seed=1, average_decay=1.0)
        model.policy.double()
        model.average_policy.double()
        start = copy.deepcopy(model.policy.state_dict())
        observations = np.random.default_rng(0).normal(size=(50, 3))
        model.learn(400)
        now = model.policy.get_distribution(th.as_tensor(observations)).distribution
        model.policy.load_state_dict(start)
        before = model.policy.get_distribution(th.as_tensor(observations)).distribution
        moved.append(th.distributions.kl_divergence(before, now).mean().item())
    assert moved[1] < moved[0] / 2


# Replay


@either_kind
def test_replays_begin_when_enough_is_stored(actions: spaces.Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are counted for each environment, and so is what the replay holds."""
    monkeypatch.setattr(np.random, "poisson", int)
    env = make_vec_env(lambda: RandomEnv(BOX, spaces.Discrete(3) if actions is CHOICE else CONTINUOUS), n_envs=3)
    model = make(env, n_steps=4, learning_starts=10, buffer_size=14, replay_ratio=2.0)
    online = 1 if actions is CHOICE else 0
    updates = []
    for _ in range(6):
        collect(model)
        before = model._n_updates
        model.train()
        updates.append(model._n_updates - before)
    assert updates == [online] * 2 + [online + 2] * 4
    assert len(model.replay_buffer) == 4 and model.replay_buffer.segments[0].n_envs == 3


def test_the_number_of_replays_is_drawn() -> None:
    model = make(n_steps=5, learning_starts=0, replay_ratio=3.0, learning_rate=0.0)
    numbers, learn = [], model._learn_from
    model._learn_from = lambda segments: numbers.append(segments is model._results) or learn(segments)
    model.learn(1500)
    assert numbers.count(True) == 150
    counts = np.diff([*np.flatnonzero(numbers), len(numbers)]) - 1
    assert abs(counts.mean() - 3) < 0.6 and 1.5 < counts.var() < 5


SCRIPTED_LENGTH = 6


@pytest.mark.parametrize("kwargs", [{}, {"simulated_lag": 3, "trust_region_delta": 0.01}], ids=["plain", "lag"])
def test_learn_after_load_is_the_uninterrupted_learn(kwargs: dict[str, Any], tmp_path: Path) -> None:
    """Episodes end at the save, so that nothing of the environments needs to be stored."""

    def scripted() -> Any:
        return make_vec_env(lambda: ScriptedEnv(SCRIPTED_LENGTH, truncates=True), n_envs=2)

    model = make(scripted(), n_steps=SCRIPTED_LENGTH // 2, learning_rate=0.01, **kwargs).learn(240)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    model.save(tmp_path / "both", include=["replay_buffer"])
    model.learn(240, reset_num_timesteps=False)
    for name in ("model", "both"):
        np.random.seed(999)
        th.manual_seed(999)
        loaded = ACER.load(tmp_path / name, env=scripted())
        if name == "model":
            loaded.load_replay_buffer(tmp_path / "buffer")
        loaded.set_logger(Logger(None, []))
        loaded.learn(240, reset_num_timesteps=False)
        assert loaded._n_updates == model._n_updates
        for one, other in ((loaded.policy, model.policy), (loaded.average_policy, model.average_policy)):
            th.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
        assert not th.equal(flat(model.policy), flat(model.average_policy))


@either_kind
def test_lags_are_counted_in_iterations(actions: spaces.Space) -> None:
    """So that segments of a simulated lag are not too old because of replays."""
    env = make_vec_env(lambda: RandomEnv(BOX, CHOICE if actions is CHOICE else CONTINUOUS), n_envs=2)
    model = make(env, n_steps=4, simulated_lag=2, max_policy_lag=2, learning_starts=0, replay_ratio=5.0)
    lags, train = [], model.train
    model.train = lambda: lags.append(model._iterations - model._results[0].version) or train()
    model.learn(80)
    assert lags == [0, 1, *[2] * 8]
    assert model._n_updates > 20 and model._discarded == 0


def test_two_actors_share_a_replay() -> None:
    env = make_vec_env(lambda: RandomEnv(BOX, CHOICE), n_envs=2)
    model = make(env, n_actors=2, actor_env_fn=lambda: RandomEnv(BOX, CHOICE), n_steps=5, learning_starts=10, buffer_size=15)
    model.learn(200)
    assert model._segments_of == {0: 10, 1: 10} and len(model.replay_buffer) == 6


# Policies


@pytest.mark.parametrize("actions", [CHOICE, CONTINUOUS], ids=["discrete", "box"])
@pytest.mark.parametrize(
    ("policy", "observations"),
    [("MlpPolicy", BOX), ("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)],
    ids=["mlp", "cnn", "dict"],
)
def test_kinds_of_observations_and_actions(policy: str, observations: spaces.Space, actions: spaces.Space) -> None:
    env = make_vec_env(lambda: RandomEnv(observations, actions), n_envs=2)
    model = make(env, policy=policy, n_steps=4, online_update=True)
    before = flat(model.policy)
    model.learn(80)
    assert not th.equal(flat(model.policy), before)
    assert model.engine_report()["update"] == model.engine_report()["actor sample"] == "replayed"


def test_values_of_policies() -> None:
    policy, observations = make().policy, th.randn(6, 4)
    judged = policy.judge(observations)
    assert judged.values.shape == (6, 3)
    expected = (judged.distribution.probs * judged.values).sum(1, keepdim=True)
    for values in (
        policy.predict_values(observations),
        policy(observations)[1],
        policy.evaluate_actions(observations, th.arange(6) % 3)[0],
    ):
        th.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    model = make(RandomEnv(BOX, CONTINUOUS), online_update=True)
    th.testing.assert_close(model.policy.log_std.exp(), th.full((2,), 0.3))
    model.learn(60)
    th.testing.assert_close(model.policy.log_std.exp(), th.full((2,), 0.3))
    wide = make(RandomEnv(BOX, CONTINUOUS), action_std=2.0)
    th.testing.assert_close(wide.policy.log_std.exp(), th.full((2,), 2.0))
    assert wide.policy.advantages(th.zeros(6, 8), th.zeros(4, 6, 2)).shape == (4, 6)


def test_a_duelling_networks_expectation_is_v() -> None:
    """Over actions and those that A is centred by; without noise the two are one."""
    model = make(RandomEnv(BOX, CONTINUOUS))
    judged = model.policy.judge(th.randn(20_000, 4)[:1].expand(20_000, 4))
    with th.no_grad():
        q = terms.duelling(model.policy, judged, terms.drawn(judged.distribution, 1)[0], 5)
    assert q.std() > 0
    assert (q.mean() - judged.values[0, 0]).abs() < 4 * q.std() / 20_000**0.5


def test_a_saved_policy_loads(tmp_path: Path) -> None:
    policy = make(RandomEnv(BOX, CONTINUOUS), policy_kwargs={"advantage_net_arch": [5]}).policy
    policy.save(tmp_path / "policy")
    loaded = MlpPolicy.load(tmp_path / "policy")
    th.testing.assert_close(loaded.state_dict(), policy.state_dict(), rtol=0, atol=0)


# What is refused


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"actions": spaces.MultiDiscrete([3, 2])},
            UnsupportedError,
            r"action_space must be Discrete.* or a Box, got MultiD",
        ),
        ({"actions": spaces.MultiBinary(3)}, UnsupportedError, r"action_space must be Discrete.* or a Box, got MultiB"),
        ({"actions": CONTINUOUS, "replay_ratio": 0.0}, ArgumentError, r"replay_ratio must be more than 0 .* got 0.0"),
        ({"replay_ratio": 0.0, "online_update": False}, ArgumentError, r"replay_ratio must be more than 0 .* got 0.0"),
        ({"learning_starts": 61}, ArgumentError, r"learning_starts must be at most buffer_size=60, .* got 61"),
        (
            {"buffer_size": 10**13},
            ArgumentError,
            r"buffer_size must be .* steps of each environment fit into memory, got 1000",
        ),
        ({"policy": ActorCriticPolicy}, ArgumentTypeError, r"policy must be derived from sb3_ac_ext.acer.policies.MlpPolicy"),
        ({"policy_kwargs": {"use_sde": True}}, UnsupportedError, r"policy_kwargs\['use_sde'\] must be False"),
        ({"average_decay": 1.5}, ArgumentError, r"average_decay must be a number in \[0, 1\] or None, got 1.5"),
    ],
    ids=lambda value: "" if not isinstance(value, dict) else " ".join(value),
)
def test_what_is_refused(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    env = RandomEnv(BOX, kwargs.pop("actions", CHOICE)) if "actions" in kwargs else None
    with pytest.raises(error, match=message):
        make(env, **kwargs)


# It learns


class Regulator(gym.Env):
    """x' = x + a, reward -x'^2 - 0.1 a^2, ten steps; actions are also a third of -1, 0, 1."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, action_space: spaces.Space) -> None:
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-1, 1), 0
        return np.array([self.x], np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        moved = (action - 1) / 3 if isinstance(self.action_space, spaces.Discrete) else action[0]
        self.x, self.t = self.x + moved, self.t + 1
        return np.array([self.x], np.float32), float(-(self.x**2) - 0.1 * moved**2), False, self.t == 10, {}


@pytest.mark.parametrize("actions", [CHOICE, spaces.Box(-2, 2, (1,), np.float32)], ids=["discrete", "box"])
def test_learns_to_regulate(actions: spaces.Space) -> None:
    """Doing nothing costs 10/3, the best about 0.05, and 0.4 if it is by thirds."""
    env = make_vec_env(lambda: Regulator(actions), n_envs=8, seed=0)
    given = {"n_steps": 10, "learning_rate": 3e-3, "use_rms_prop": False, "gamma": 0.9, "learning_starts": 100, "seed": 0}
    model = ACER("MlpPolicy", env, policy_kwargs={"net_arch": [16]}, **given).learn(16_000)
    mean, _ = evaluate_policy(model, make_vec_env(lambda: Regulator(actions), seed=1), 20)
    assert mean > -0.8
