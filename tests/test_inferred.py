"""MADDPG's inferred policies: their losses, what they are fitted to, and what the critics' targets make of them."""

import copy
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from batches import SGD, engine_on_and_off, feed, flat
from environments import BOX, CONTINUOUS, RandomEnv
from matrix_game import MatrixGame
from models import Pair, small_model
from parallel_environments import Crowd, Meadow
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.vec_env import VecNormalize
from test_joint_env import Sloppy
from test_maddpg import Renamed, gradients, joint_batch, shift
from torch import nn
from torch.distributions import Categorical, Normal, TanhTransform, TransformedDistribution, kl_divergence

from sb3_ac_ext import MADDPG
from sb3_ac_ext.functional.divergences import categorical_kl, gaussian_kl
from sb3_ac_ext.functional.inference import LARGEST_ACTION, categorical_fit, gaussian_fit, squashed_gaussian_fit
from sb3_ac_ext.functional.losses import td_target
from sb3_ac_ext.maddpg import JointEnv
from sb3_ac_ext.maddpg.buffer import JointReplayBuffer, PrioritizedJointReplayBuffer
from sb3_ac_ext.maddpg.inferred import LOG_STD
from sb3_ac_ext.maddpg.logged import PRINTED, log_keys

SMALL: dict[str, Any] = {"net_arch": [8]}


def make(env: Any = None, **kwargs: Any) -> Any:
    env = Meadow() if env is None else env
    return small_model("maddpg", env=env, **{"inferred_policies": True, "policy_kwargs": SMALL, **kwargs})


def double(*rows: list[float]) -> th.Tensor:
    return th.tensor(rows, dtype=th.float64)


def given_latest(model: Any, batches: list[Any]) -> None:
    """Let the model's replay buffer return these as its latest transitions, one after another."""
    queue = iter(batches)
    model.replay_buffer.latest = lambda transitions, env=None: next(queue)


# The equations


@pytest.mark.parametrize(
    ("action", "surprise", "loss", "gradient"),
    [
        ([0.0, 1.0, 0.0], 1.47330004, 1.47224259, [0.46161876, -0.77092733, 0.30930857]),
        ([0.2, 0.7, 0.1], 1.30330004, 1.30224259, [0.26161876, -0.47092733, 0.20930857]),
    ],
    ids=["one-hot", "relaxed"],
)
def test_choices_by_hand(action: list[float], surprise: float, loss: float, gradient: list[float]) -> None:
    logits = double([0.5, -0.2, 0.1]).requires_grad_()
    fit = categorical_fit(logits, double(action))
    assert fit.surprise.item() == pytest.approx(surprise, abs=1e-8)
    assert fit.entropy.item() == pytest.approx(1.05745539, abs=1e-8)
    assert fit.loss(1e-3).item() == pytest.approx(loss, abs=1e-8)
    (found,) = th.autograd.grad(fit.loss(1e-3).sum(), logits)
    th.testing.assert_close(found, double(gradient), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("function", "loss", "of_mean", "of_log_std"),
    [
        (gaussian_fit, 1.72032442, [-1.35914091, 0.3], [0.31942954, 0.909]),
        (squashed_gaussian_fit, 1.05874392, [-2.17085327, 0.32364893], [-0.7346701, 0.89425137]),
    ],
)
def test_boxes_by_hand(function: Callable[..., Any], loss: float, of_mean: list[float], of_log_std: list[float]) -> None:
    mean, log_std = double([0.3, -0.1]).requires_grad_(), double([-0.5, 0.0]).requires_grad_()
    fit = function(mean, log_std, double([0.8, -0.4]))
    assert fit.entropy.item() == pytest.approx(2.33787707, abs=1e-8)
    assert fit.loss(1e-3).item() == pytest.approx(loss, abs=1e-8)
    found = th.autograd.grad(fit.loss(1e-3).sum(), (mean, log_std))
    th.testing.assert_close(found, (double(of_mean), double(of_log_std)), rtol=0, atol=1e-8)


def test_log_density_of_a_squashed_action_by_hand() -> None:
    fit = squashed_gaussian_fit(double([0.3, -0.1]), double([-0.5, 0.0]), double([0.8, -0.4]))
    assert -fit.surprise.item() == pytest.approx(-1.0610818, abs=1e-7)


def test_divergences_by_hand() -> None:
    """The second argument is the model."""
    assert categorical_kl(double([0.7, 0.2, 0.1]).log(), double([0.5, -0.2, 0.1])).item() == pytest.approx(
        0.15148149, abs=1e-8
    )
    assert gaussian_kl(double([0.0]), double([0.5]), double([0.3]), double([1.0])).item() == pytest.approx(
        0.36314718, abs=1e-8
    )


@pytest.mark.parametrize(
    ("ent_coef", "optimum", "kl"),
    [(1e-3, [0.6996885, 0.20016139, 0.1001501], 2.47e-7), (0.1, [0.67003969, 0.21483071, 0.1151296], 0.00222495)],
)
def test_the_entropys_weight_biases_towards_the_uniform_policy(ent_coef: float, optimum: list[float], kl: float) -> None:
    """Of a behaviour (0.7, 0.2, 0.1), whose expected one-hot stands for many."""
    behaviour = double([0.7, 0.2, 0.1])

    def gradient(probs: th.Tensor) -> th.Tensor:
        logits = probs.log().requires_grad_()
        return th.autograd.grad(categorical_fit(logits, behaviour).loss(ent_coef).sum(), logits)[0]

    assert gradient(double(optimum)).abs().max() < 2e-8 < gradient(behaviour).abs().max()
    assert categorical_kl(behaviour.log(), double(optimum).log()).item() == pytest.approx(kl, abs=1e-8)


def test_bounds_and_certain_choices_have_finite_losses() -> None:
    logits = th.tensor([[300.0, 0.0, -300.0]]).requires_grad_()
    box = th.zeros(1, 2).requires_grad_()
    for fit, parameter in (
        (categorical_fit(logits, th.eye(3)[2:]), logits),
        (squashed_gaussian_fit(box, box - 2, th.tensor([[1.0, -1.0]])), box),
    ):
        (gradient,) = th.autograd.grad(fit.loss(1e-3).sum(), parameter)
        assert fit.loss(1e-3).isfinite().all() and gradient.isfinite().all()
    at_bound, near = (squashed_gaussian_fit(box, box, th.full((1, 2), a)).surprise for a in (1.0, LARGEST_ACTION))
    assert th.equal(at_bound, near)


# The losses of pairs


def shares(model: Any) -> dict[tuple[int, int], nn.Module]:
    """The network of each pair."""
    return dict(zip(model.policy.inferred.pairs, model.policy.inferred.mu, strict=True))


def expected_losses(model: Any, batch: Any) -> dict[tuple[int, int], th.Tensor]:
    """Pair by pair, with PyTorch's distributions."""
    layout, found = model.policy.layout, {}
    for (i, j), network in shares(model).items():
        rows = batch.active[:, j] == 1
        output = nn.Sequential(*network)(batch.observations[rows][:, layout.observations[j]])
        action = batch.actions[rows][:, layout.actions[j]]
        if layout.choices[j]:
            distribution = Categorical(logits=output)
            log_prob, entropy = distribution.log_prob(action.argmax(dim=1)), distribution.entropy()
        else:
            base = Normal(output[:, : action.shape[1]], output[:, action.shape[1] :].clamp(*LOG_STD).exp())
            log_prob = TransformedDistribution(base, TanhTransform()).log_prob(action).sum(dim=1)
            entropy = base.entropy().sum(dim=1)
        found[i, j] = -log_prob.mean() - model.inferred_ent_coef * entropy.mean()
    return found


@pytest.mark.usefixtures("double_precision")
@engine_on_and_off
def test_a_step_of_each_pair_is_by_its_own_loss(engine: bool) -> None:
    """
    SGD with a rate of 1 moves by the gradient: each pair's by that of its own loss, nothing else; targets follow.

    The parameters of different pairs have no loss in common.
    """
    sgd = {**SMALL, **SGD}
    model = make(Pair(), engine=engine, policy_kwargs=sgd, inferred_learning_rate=1.0, inferred_ent_coef=0.05, tau=0.25)
    model.policy.double()
    batches = [joint_batch(model, seed=seed) for seed in range(3)]
    given_latest(model, batches)
    for target in model.policy.inferred_target.parameters():
        target.data.add_(0.1)
    for batch in batches:
        before = copy.deepcopy(model.policy)
        losses = expected_losses(model, batch)
        by_pair = {pair: gradients(loss, list(model.policy.inferred.parameters())) for pair, loss in losses.items()}
        for pair, gradient in by_pair.items():
            own = {id(parameter) for parameter in shares(model)[pair].parameters()}
            touched = [th.full((p.numel(),), id(p) in own) for p in model.policy.inferred.parameters()]
            assert gradient[th.cat(touched)].abs().max() > 1e-3 and not gradient[~th.cat(touched)].any()
        model._engine.begin()
        fitted = model._infer()
        th.testing.assert_close(fitted["losses"], th.stack([*losses.values()]), rtol=0, atol=1e-10)
        moved = flat(before.inferred) - flat(model.policy.inferred)
        th.testing.assert_close(moved, sum(by_pair.values()), rtol=0, atol=1e-10)
        followed = 0.25 * flat(model.policy.inferred) + 0.75 * flat(before.inferred_target)
        th.testing.assert_close(flat(model.policy.inferred_target), followed, rtol=0, atol=1e-10)
        for name in ("actor", "critic", "actor_target", "critic_target"):
            assert th.equal(flat(getattr(model.policy, name)), flat(getattr(before, name)))


def test_gradients_are_bounded_pair_by_pair() -> None:
    sgd = {**SMALL, **SGD}
    model = make(policy_kwargs=sgd, inferred_learning_rate=1.0, max_grad_norm={"inferred": 0.05})
    given_latest(model, [joint_batch(model, dtype=th.float32)])
    before = {pair: flat(network) for pair, network in shares(model).items()}
    model._engine.begin()
    model._infer()
    for pair, network in shares(model).items():
        assert (flat(network) - before[pair]).norm().item() == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({}, 3e-3),
        ({"actor_learning_rate": 2e-3}, 2e-3),
        ({"actor_learning_rate": 2e-3, "inferred_learning_rate": "lin_1e-2"}, 5e-3),
    ],
)
def test_the_rate_is_the_actors_unless_it_is_given(rates: dict[str, Any], expected: float) -> None:
    model = make(**rates)
    assert th.equal(flat(model.policy.inferred), flat(model.policy.inferred_target))  # at the start
    model._current_progress_remaining = 0.5
    assert model._networks()["inferred"].rate == pytest.approx(expected)


ROWS = 4000
"""From which a linear model, of 10 free parameters, is known to within 10 / 2 / 4000 nats in the mean."""


def test_a_fixed_behaviour_is_found() -> None:
    """Frozen linear actors with clear preferences: the models come near, and their entropies to the true ones."""
    sizes = {"policy_kwargs": {"net_arch": []}, "buffer_size": ROWS, "inferred_batch_size": ROWS}
    model = make(Crowd(2, discrete=True), inferred_learning_rate=0.05, **sizes)
    buffer = model.replay_buffer
    with th.no_grad():
        for network in model.actor.mu:
            network[-1].weight *= 4
        observations = th.randn(ROWS, 8, generator=th.Generator().manual_seed(1))
        logits = model.actor.outputs(observations)
        buffer.observations[:, 0], buffer.actions[:, 0] = observations, model.actor.act(logits)
    buffer.agent_active[:], buffer.full = 1, True
    model._engine.begin()

    def divergences() -> th.Tensor:
        return model._compare((observations, th.ones(ROWS, 2)))["departures"].clone()

    first = divergences()
    for _ in range(200):
        fitted = model._infer()
    assert (first > 0.05).all() and (divergences() < 0.01).all()
    true = [Categorical(logits=part).entropy().mean() for part in (logits[:, 3:], logits[:, :3])]
    th.testing.assert_close(fitted["entropies"], th.stack(true), rtol=0, atol=0.05)


# The critics' targets


class Scaled(nn.Module):
    """A model that thinks of an action as its observation times a factor, and is certain of it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, observation: th.Tensor) -> th.Tensor:
        return th.cat([(self.factor * observation).atanh(), th.full_like(observation, LOG_STD[0])], dim=1)


class OneNumber(Crowd):
    """Two agents that see one number and do one."""

    def __init__(self) -> None:
        super().__init__(2, size=1)
        self.choice = type(self.choice)(-1, 1, (1,), np.float32)


@pytest.mark.parametrize("inferred_input", ["sample", "probs"])
def test_targets_by_hand(inferred_input: str) -> None:
    """
    Q'_i = a_1 a_2 + 3 a_1 at o' = (2, 1); targets of actors do o'_1 and -o'_2; the first agent thinks the other does -.9 o'_2.

    The true action would give 4.8, the online model (-.5 o'_2) 5.75.
    """
    model = make(OneNumber(), gamma=0.95, inferred_input=inferred_input)
    inferred = model.policy.inferred_target.mu
    inferred[0], inferred[1] = Scaled(-0.9), Scaled(0.3)  # of the second by the first, and the other way round
    model.policy.inferred.mu[0] = Scaled(-0.5)
    model.actor_target.forward = lambda obs: obs * th.tensor([1.0, -1.0])
    model.critic_target.forward = lambda obs, actions: ((actions[..., 0] * actions[..., 1] + 3 * actions[..., 0]).T,)
    batch = joint_batch(model, rows=2, dtype=th.float32)._replace(
        next_observations=th.tensor([[2.0, 1.0]] * 2), rewards=th.ones(2, 2), dones=th.tensor([[0.0, 0.0], [1.0, 1.0]])
    )
    second = 1 + 0.95 * (0.6 * -1 + 3 * 0.6)  # does -1 itself, and thinks the first does .3 o'_1
    th.testing.assert_close(model._target(batch), th.tensor([[4.99, second], [1.0, 1.0]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("inferred_input", ["sample", "probs"])
@pytest.mark.parametrize("n_critics", [1, 2])
def test_with_the_true_policies_as_models_targets_are_the_plain_ones(inferred_input: str, n_critics: int) -> None:
    """Choices are made certain, as two draws are not the same one."""
    model = make(inferred_input=inferred_input, policy_kwargs={**SMALL, "n_critics": n_critics})
    shift(model)
    layout = model.policy.layout
    for agent, choices in enumerate(layout.choices):
        for parameter in model.actor_target.mu[agent][-1].parameters() if choices else ():
            parameter.data *= 1e6
    for (_, j), network in zip(model.policy.inferred.pairs, model.policy.inferred_target.mu, strict=True):
        true, size = model.actor_target.mu[j], model.actor_target.mu[j][-1].out_features
        network[:-1].load_state_dict(true[:-1].state_dict())
        network[-1].weight.data[:size], network[-1].bias.data[:size] = true[-1].weight.data, true[-1].bias.data
        network[-1].weight.data[size:], network[-1].bias.data[size:] = 0, LOG_STD[0]  # of Boxes
    batch = joint_batch(model, dtype=th.float32)
    inferred = model._target(batch)
    assert not th.equal(inferred, batch.rewards)
    model.policy.inferred_policies = False
    th.testing.assert_close(inferred, model._target(batch), rtol=0, atol=1e-5)


def test_draws_are_those_of_the_models() -> None:
    model = make()
    shift(model)
    inferred, layout = model.policy.inferred_target, model.policy.layout
    obs = th.randn(1, layout.observations[-1].stop).expand(20_000, -1)
    own = th.full((20_000, layout.action_dim), 7.0)
    with th.no_grad():
        drawn, likely = (inferred.joint_actions(obs, own, sample) for sample in (True, False))
        outputs = dict(zip(inferred.pairs, inferred.outputs(obs[:1]), strict=True))
    assert drawn.shape == likely.shape == (3, 20_000, 6)
    for i in range(3):
        for j, columns in enumerate(layout.actions):
            draws, mode = drawn[i, :, columns], likely[i, :, columns]
            if i == j:
                assert (draws == 7).all() and (mode == 7).all()
            elif layout.choices[j]:
                assert draws.unique(dim=0).tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
                th.testing.assert_close(draws.mean(dim=0), outputs[i, j][0].softmax(dim=0), rtol=0, atol=0.02)
                th.testing.assert_close(mode[0], outputs[i, j][0].softmax(dim=0))
            else:
                mean, log_std = outputs[i, j][0].chunk(2)
                th.testing.assert_close(draws.atanh().mean(dim=0), mean, rtol=0, atol=0.05)
                th.testing.assert_close(draws.atanh().std(dim=0), log_std.exp(), rtol=0.05, atol=0)
                th.testing.assert_close(mode[0], mean.tanh())


@engine_on_and_off
@pytest.mark.parametrize("env", [Pair, lambda: Crowd(2, discrete=True)], ids=["unequal", "choices"])
def test_policies_of_others_train_nothing(env: Callable[[], Any], engine: bool) -> None:
    """
    Alter those of all agents but one, with the same replay: all that this one learns is the same, bit for bit.

    Actors are updated at the end only, and their losses have others' actions from the replay.
    """
    models = [make(env(), engine=engine, policy_delay=4) for _ in range(2)]
    agent, (one, altered) = 1, models
    for name in ("actor", "actor_target"):
        for i, network in enumerate(getattr(altered, name).mu):
            for parameter in network.parameters() if i != agent else ():
                parameter.data.add_(0.3)
    for model in models:
        batches = [joint_batch(model, dtype=th.float32, seed=seed) for seed in range(4)]
        feed(model, batches)
        given_latest(model, batches)
        th.manual_seed(0)
        for _ in range(4):
            model.train(gradient_steps=1, batch_size=32)
    same = [flat(one.critic.qf0[agent]), flat(one.actor.mu[agent]), flat(one.policy.inferred)]
    others = [flat(altered.critic.qf0[agent]), flat(altered.actor.mu[agent]), flat(altered.policy.inferred)]
    assert all(map(th.equal, same, others))
    assert not th.equal(flat(one.critic.qf0[0]), flat(altered.critic.qf0[0]))


# The latest transitions


def numbered(n_envs: int, steps: int, size: int, **kwargs: Any) -> JointReplayBuffer:
    """Observations are the numbers of the step and of the environment; the second agent is there in every other step."""
    joint = JointEnv(OneNumber())
    buffer = JointReplayBuffer(size * n_envs, joint.observation_space, joint.action_space, "cpu", n_envs=n_envs, **kwargs)
    for step in range(steps):
        obs = np.array([[step, env] for env in range(n_envs)], np.float32)
        info = {"agent_rewards": [0, 0], "agent_terminated": [False, False], "agent_active": [True, step % 2 == 0]}
        buffer.add(obs, obs + np.array([1, 0]), obs / 100, np.zeros(n_envs), np.zeros(n_envs), [info] * n_envs)
    return buffer


UNUSED: dict[str, Any] = {"optimize_memory_usage": True, "handle_timeout_termination": False}


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("kwargs", [{}, UNUSED], ids=["", "observations stored once"])
@pytest.mark.parametrize(
    ("steps", "wanted", "found"),
    [
        (6, 4, [2, 3, 4, 5]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (10, 4, [6, 7, 8, 9]),
        (10, 100, list(range(10))),
        (13, 4, [9, 10, 11, 12]),
        (20, 4, [16, 17, 18, 19]),
        (21, 100, list(range(11, 21))),
    ],
)
def test_the_latest_are_the_newest_in_the_order_of_time(
    n_envs: int, kwargs: dict[str, Any], steps: int, wanted: int, found: list[int]
) -> None:
    """Also where the ring was written around; where observations are stored once the oldest one has lost its own."""
    batch = numbered(n_envs, steps, 10, **kwargs).latest(wanted * n_envs)
    stored = batch.active[:, 0] == 1
    expected = [[step, env] for step in found for env in range(n_envs)]
    if kwargs and steps >= 10 and len(found) == 10:
        expected = expected[n_envs:]
    assert batch.observations[stored].tolist() == expected
    np.testing.assert_allclose(batch.actions[stored], np.array(expected) / 100, atol=1e-6)
    assert batch.next_observations[stored][:, 0].tolist() == [step + 1 for step, _ in expected]
    assert batch.active[stored][:, 1].tolist() == [float(step % 2 == 0) for step, _ in expected]


def test_fewer_than_wanted_are_of_no_agent() -> None:
    """So that batches have one size; whole steps of all environments."""
    buffer = numbered(2, 3, 10)
    batch = buffer.latest(7)
    assert batch.observations.shape == (8, 2)
    assert batch.active[:2].tolist() == [[0, 0]] * 2 and (batch.active[2:, 0] == 1).all()
    assert batch.observations[2:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    buffer.reset()
    assert not buffer.latest(7).active.any()


def test_training_fits_the_latest_transitions_once_and_normalises_them() -> None:
    """Of both environments, whatever the number of gradient steps; priorities do not matter."""
    env = VecNormalize(make_vec_env(lambda: JointEnv(Meadow()), n_envs=2), norm_reward=False)
    model = make(env, gradient_steps=3, inferred_batch_size=9, replay_buffer_class=PrioritizedJointReplayBuffer, engine=False)
    seen: list[Any] = []
    fit = model.policy.inferred.fit
    model.policy.inferred.fit = lambda *batch: seen.append((*batch, model.replay_buffer.pos)) or fit(*batch)
    model.learn(30)
    assert len(seen) == model._n_updates / 3 > 2
    observations, actions, pos = seen[-1]
    rows = slice(pos - 5, pos)
    expected = env.normalize_obs(model.replay_buffer.observations[rows].reshape(10, -1))
    np.testing.assert_allclose(observations, expected, rtol=1e-5)
    np.testing.assert_array_equal(actions, model.replay_buffer.actions[rows].reshape(10, -1))
    assert not np.allclose(expected, model.replay_buffer.observations[rows].reshape(10, -1))


# Whole trainings


SHARED = {**SMALL, "parameter_sharing": "all", "n_critics": 2}
TASKS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "unequal": (Meadow, {"max_grad_norm": 0.05}),
    "probabilities": (Pair, {"inferred_input": "probs", "target_policy_noise": 0.2, "policy_delay": 2}),
    "choices": (lambda: Crowd(2, discrete=True), {"logit_penalty": 0.1}),
    "shared": (lambda: Crowd(2), {"policy_kwargs": SHARED}),
}


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(("env", "kwargs"), TASKS.values(), ids=TASKS)
def test_replayed_updates_are_the_updates(env: Callable[[], Any], kwargs: dict[str, Any]) -> None:
    """Draw for draw."""
    models = [make(env(), engine=engine, **kwargs) for engine in (True, False)]
    for model in models:
        model.policy.double()
        feed(model, [joint_batch(model, seed=i) for i in range(4)])
        given_latest(model, [joint_batch(model, seed=100 + i, rows=20) for i in range(4)])
    for update in range(4):
        states = []
        for model in models:
            th.manual_seed(update)
            model.train(gradient_steps=1, batch_size=32)
            states.append(th.get_rng_state())
        assert th.equal(*states)  # as many draws
        th.testing.assert_close(flat(models[0].policy), flat(models[1].policy), rtol=0, atol=1e-10)
    report = models[0].engine_report()
    assert {how for name, how in report.items() if name.startswith(("update", "compare"))} == {"replayed"}


class Without(MADDPG):
    """Algorithm 1 alone, as if there were no inferred policies."""

    def _networks(self) -> Any:
        critic, actor = self.critic, self.actor
        return {
            "critic": self._network("critic", critic, critic.optimizer, self.critic_target),
            "actor": self._network("actor", actor, actor.optimizer, self.actor_target),
        }

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        with self._updates() as engine:
            for _ in range(gradient_steps):
                self._n_updates += 1
                engine.run(self._update, self._sample(batch_size), bool(self._n_updates % self.policy_delay == 0))

    @th.no_grad()
    def _target(self, batch: Any) -> th.Tensor:
        next_actions = self._smoothed(self.actor_target(batch.next_observations))
        next_q = th.stack(self.critic_target(batch.next_observations, next_actions)).amin(dim=0)
        return td_target(batch.rewards, batch.dones, batch.discounts, next_q)


@engine_on_and_off
def test_switched_off_it_is_not_there(engine: bool, tmp_path: Path) -> None:
    """Bit for bit: every parameter, every draw, what the zip has; and the first weights are the same where it is on."""
    first = {name: value for name, value in make(engine=engine).policy.state_dict().items() if "inferred" not in name}
    models = []
    for cls in ("maddpg", Without):
        model = small_model(cls, env=Meadow(), policy_kwargs=SMALL, engine=engine, target_policy_noise=0.2)
        th.testing.assert_close(model.policy.state_dict(), first, rtol=0, atol=0)
        models.append(model.learn(26))
        model.draws = th.rand(3), np.random.random(3)
    ours, plain = models
    assert ours._n_updates == plain._n_updates == 16
    assert th.equal(flat(ours.policy), flat(plain.policy))
    assert th.equal(ours.draws[0], plain.draws[0]) and (ours.draws[1] == plain.draws[1]).all()
    np.testing.assert_array_equal(ours.replay_buffer.actions, plain.replay_buffer.actions)
    assert not [key for key in ours.logger.name_to_value if "inferred" in key]
    del ours.draws
    ours.save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert "policy.inferred.optimizer.pth" not in archive.namelist()


@pytest.mark.parametrize("inferred_input", ["sample", "probs"])
def test_where_no_action_is_next_nothing_else_learns_otherwise(inferred_input: str) -> None:
    """In games of one step the models go nowhere: actors and critics are the plain ones, bit for bit."""
    noise = {"exploration_noise": {"type": "normal", "start": 0.3}, "engine": False}
    inferring = make(MatrixGame(), inferred_input=inferred_input, **noise)
    before = flat(inferring.policy.inferred)
    inferring.learn(24)
    plain = make(MatrixGame(), inferred_policies=False, **noise).learn(24)
    for name in ("actor", "critic", "actor_target", "critic_target"):
        assert th.equal(flat(getattr(inferring, name)), flat(getattr(plain, name)))
    assert not th.equal(flat(inferring.policy.inferred), before)


class Steady(Pair):
    """Whose episodes all begin alike."""

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        return super().reset(0)


def test_training_goes_on_after_load_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """The episode ends at the save, so nothing of the environment needs to be stored."""
    model = make(Steady(), inferred_learning_rate="lin_1e-2", inferred_batch_size=16)
    model.learn(14)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    model.learn(14, reset_num_timesteps=False)
    np.random.seed(9)
    loaded = MADDPG.load(tmp_path / "model", env=Steady())
    loaded.set_logger(Logger(None, []))
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(14, reset_num_timesteps=False)
    assert loaded.inferred_policies and loaded._n_updates == model._n_updates == 18
    assert th.equal(flat(loaded.policy), flat(model.policy))
    moments = [one.policy.inferred.optimizer.state_dict()["state"] for one in (loaded, model)]
    th.testing.assert_close(*moments, rtol=0, atol=0)
    assert moments[0]


def test_copies_and_pickles_go_on_alone() -> None:
    model = make(Pair(), engine=False).learn(14)
    before = flat(model.policy)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.policy))):
        policy = getattr(twin, "policy", twin)
        assert th.equal(flat(policy), before)
        for parameter in policy.inferred.parameters():
            parameter.data.add_(1)
        assert th.equal(flat(model.policy), before)


def test_policies_save_and_load_by_themselves(tmp_path: Path) -> None:
    policy = make().policy
    policy.save(tmp_path / "policy")
    loaded = type(policy).load(tmp_path / "policy")
    th.testing.assert_close(loaded.state_dict(), policy.state_dict(), rtol=0, atol=0)
    assert loaded.inferred_policies


# What is logged


def test_what_is_logged_of_each_pair() -> None:
    """Means over steps in which the other agent was active; KL from the true policy to its model."""
    model = make(engine=False)
    replayed, latest = (joint_batch(model, dtype=th.float32, seed=seed) for seed in (1, 2))
    feed(model, [replayed])
    given_latest(model, [latest])
    expected = expected_losses(model, latest)
    model.train(gradient_steps=1, batch_size=32)
    logged, layout = model.logger.name_to_value, model.policy.layout
    assert logged["train/inferred_loss"] == pytest.approx(sum(expected.values()).item(), rel=1e-5)
    assert logged["train/inferred_grad_norm"] > 0
    with th.no_grad():
        outputs = model.actor.outputs(replayed.observations)
    # the pairs' losses are those before their step, and the divergences are those after all updates
    for (i, j), network in shares(model).items():
        name = f"inferred/{layout.names[i]}_of_{layout.names[j]}"
        assert logged[f"{name}_loss"] == pytest.approx(expected[i, j].item(), rel=1e-5)
        assert 0 < logged[f"{name}_entropy"] < 4
        rows, true = replayed.active[:, j] == 1, outputs[:, layout.actions[j]]
        model_of = network(replayed.observations[:, layout.observations[j]])
        if layout.choices[j]:
            kl = kl_divergence(Categorical(logits=true), Categorical(logits=model_of))
            assert logged[f"{name}_kl"] == pytest.approx(kl[rows].mean().item(), rel=1e-4)
        else:
            distance = (true.tanh() - model_of[:, : true.shape[1]].tanh()).abs().mean(dim=1)
            assert logged[f"{name}_distance"] == pytest.approx(distance[rows].mean().item(), rel=1e-4)
    assert len([key for key in logged if key.startswith("inferred/")]) == 3 * 6


def test_keys_of_pairs_whose_names_are_long_or_look_alike(tmp_path: Path) -> None:
    start = "a_walker_on_the_northern_side_"
    model = make(Renamed(f"{start}of_the_river", f"{start}of_the_hill", "dog"), engine=False)
    model.set_logger(configure(str(tmp_path), ["stdout", "log", "csv"]))
    model.learn(14, log_interval=1)
    model.logger.close()
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    keys = {key.removeprefix("inferred/") for key in header if key.startswith("inferred/")}
    assert len(keys) == 18 and {"a_walker_on_the_...0_1_entropy", "dog_of_a_walker...2_0_distance"} <= keys
    short = log_keys({"0_1": "a_of_b_of_c", "3_2": "a_of_b_of_c", "0_2": "a_of_c"}, "kl")["kl"]
    assert short == ["a_of_b_of_c...0_1_kl", "a_of_b_of_c...3_2_kl", "a_of_c_kl"]
    assert max(map(len, log_keys({"10_11": 40 * "x", "11_10": 40 * "x"}, "distance")["distance"])) <= PRINTED


class Numbered(Crowd):
    """Agents that are numbers."""

    def __init__(self) -> None:
        super().__init__(2)
        self.possible_agents = [0, 1]  # type: ignore[list-item]

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        observations, _, *rest = super().step(actions)
        return observations, {0: 1.0, 1: -1.0}, *rest  # type: ignore[dict-item]


@pytest.mark.parametrize("env", [Numbered, lambda: Sloppy(None), lambda: Meadow(ends={"fly": (2, "terminates")})])
def test_unusual_environments(env: Callable[[], Any]) -> None:
    """Agents that are numbers; a Box of no dimensions, rewards as arrays, no infos; one that ends early."""
    model = make(env(), engine=False).learn(20)
    assert model._n_updates > 0
    values = [value for key, value in model.logger.name_to_value.items() if key.startswith("inferred/")]
    assert values and np.isfinite(values).all()


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"centralised": False}, r"inferred_policies=True needs centralised=True, got centralised=False"),
        ({"inferred_batch_size": 0}, r"inferred_batch_size must be an integer >= 1, got 0"),
        ({"inferred_ent_coef": -0.1}, r"inferred_ent_coef must be a number >= 0, got -0.1"),
        ({"inferred_learning_rate": -1e-3}, r"inferred_learning_rate must be .*got -0.001"),
        ({"inferred_input": "log_probs"}, r"inferred_input must be one of 'sample', 'probs', got 'log_probs'"),
        ({"inferred_policies": "yes"}, r"inferred_policies must be True or False, got 'yes' of type str"),
        ({"max_grad_norm": {"infer": 1.0}}, r"unexpected key 'infer'; .*legal are actor, critic, inferred|did you mean"),
        ({"inferred_policies": False, "inferred_batch_size": 9}, r"inferred_batch_size=9 needs inferred_policies=True"),
        ({"inferred_policies": False, "max_grad_norm": {"inferred": 1.0}}, r"'inferred'; legal are actor, critic$"),
        (
            {"inferred_policies": False, "policy_kwargs": {"inferred_policies": True}},
            r"inferred_policies must be what the policy was made with, True, got False",
        ),
    ],
    ids=str,
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@pytest.mark.parametrize("env", [lambda: RandomEnv(BOX, CONTINUOUS), lambda: Crowd(1)], ids=["ordinary", "crowd of one"])
def test_one_agent_has_nobody_to_infer(env: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"inferred_policies must be False with one agent, .*, got True"):
        make(env())


def test_on_a_model_that_is_there_the_switch_does_nothing() -> None:
    for made in (True, False):
        found = []
        for value in (True, False):
            model = make(Pair(), inferred_policies=made, engine=False)
            model.inferred_policies = value
            found.append(flat(model.learn(16).policy))
        assert th.equal(*found)


def test_loading_with_another_choice_is_refused(tmp_path: Path) -> None:
    for saved in (True, False):
        make(inferred_policies=saved).save(tmp_path / "model")
        with pytest.raises(ValueError, match=f"inferred_policies.*{not saved}"):
            MADDPG.load(tmp_path / "model", inferred_policies=not saved)


def test_a_model_that_is_not_finite_stops_the_training() -> None:
    model = make(Pair(), engine=False)
    model.policy.inferred.mu[0][0].bias.data[:] = math.nan
    with pytest.raises(ValueError, match=r"of the inferred became non-finite"):
        model.learn(12)
