"""Retrace and stochastic duelling against numbers worked out by hand, loops, enumerations, and what known mistakes give."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from sb3_ac_ext.functional.retrace import duelling_value_target, retrace, retrace_coefficient, stochastic_duelling
from sb3_ac_ext.functional.returns import monte_carlo_returns, n_step_returns

Arguments = dict[str, Any]


def tensor(values: Any) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


def column(*values: float) -> th.Tensor:
    return tensor(values)[:, None]


RHO = column(0.5, 2, 0.8)
RETRACE, OPC = retrace_coefficient(RHO.log()), th.ones_like(RHO)


def three_steps(
    trace: th.Tensor = RETRACE, terminated: int | None = None, truncated: int | None = None, final: float = 0.0
) -> th.Tensor:
    """Three steps in one environment, the episode ended after the step of this index, by an observation of value ``final``."""
    next_value, ends = column(1, 1.5, 2), []
    for step in (terminated, truncated):
        ends.append(column(*(float(t == step) for t in range(3))))
        if step is not None:
            next_value[step] = final
    return retrace(column(1, 2, 3), column(0.4, 0.8, 1.2), next_value, trace, *ends, gamma=0.9)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({}, (6.5278, 5.942, 4.8)),
        ({"trace": OPC}, (7.111, 6.59, 4.8)),
        ({"trace": retrace_coefficient(0 * RHO)}, (7.111, 6.59, 4.8)),
        ({"terminated": 1}, (2.98, 2, 4.8)),
        ({"terminated": 1, "trace": OPC}, (2.98, 2, 4.8)),
        ({"truncated": 1, "final": 4}, (6.22, 5.6, 4.8)),
        ({"truncated": 1, "final": 4, "trace": OPC}, (6.22, 5.6, 4.8)),
        ({"trace": retrace_coefficient(RHO.log(), 2)}, (6.80314969, 6.2479441, 4.8)),
        ({"trace": retrace_coefficient(RHO.log(), 3)}, (6.90197461, 6.35774956, 4.8)),
        ({"trace": RHO.clamp(max=0.5)}, (3.7765, 4.97, 4.8)),
        ({"terminated": 2}, (5.3614, 4.646, 3)),
        ({"truncated": 2, "final": 7}, (9.4438, 9.182, 9.3)),
    ],
    ids=[
        "base",
        "Q_opc",
        "on the policy",
        "terminated",
        "terminated, Q_opc",
        "truncated",
        "truncated, Q_opc",
        "two dimensions",
        "three dimensions",
        "coefficients of at most 0.5",
        "terminated at the last step",
        "truncated at the last step",
    ],
)
def test_three_steps_by_hand(steps: Arguments, expected: tuple[float, ...]) -> None:
    th.testing.assert_close(three_steps(**steps), column(*expected), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("steps", "wrong"),
    [
        ({"truncated": 1, "final": 4}, (6.5278, 5.942, 4.8)),
        ({"truncated": 1, "final": 4}, (2.98, 2, 4.8)),
        ({}, (6.1048, 5.672, 4.8)),
        ({}, (11.1556, 5.942, 4.8)),
    ],
    ids=["truncation ignored", "truncation taken for termination", "Q(s, a) for V(s)", "ratio not truncated"],
)
def test_is_not_what_known_mistakes_give(steps: Arguments, wrong: tuple[float, ...]) -> None:
    assert not th.allclose(three_steps(**steps), column(*wrong), rtol=0, atol=1e-3)


def test_published_numbers_of_another_program() -> None:
    """TRFL's test (Apache 2.0, its authors 2018), which has lambda 0.9, a discount for each step and all ratios below 1."""
    probs = tensor([[[0.41, 0.28, 0.31], [0.19, 0.77, 0.04]], [[0.22, 0.44, 0.34], [0.14, 0.25, 0.61]]])
    probs = th.cat([probs, tensor([[[0.16, 0.72, 0.12], [0.33, 0.3, 0.37]]])])
    next_q = tensor([[[7, 6, 5], [4, 3, 2]], [[3, 5, 7], [4, 6, 9]], [[2, 8, 4], [9, 1, 8]]])
    result = retrace(
        reward=tensor([[1.9, 2.9], [3.9, 4.9], [5.9, 6.9]]),
        action_value=tensor([[4, 5], [6, 2], [3, 6]]),
        next_value=(probs * next_q).sum(dim=2),
        trace=0.9 * tensor([[math.nan, math.nan], [0.28 / 0.85, 0.04 / 0.86], [0.22 / 0.87, 0.25 / 0.88]]),
        terminated=th.zeros(3, 2),
        truncated=th.zeros(3, 2),
        gamma=tensor([[0.8, 0.9], [0.7, 0.8], [0.6, 0.5]]),
    )
    expected = tensor([[7.41018868, 6.10274942], [8.65704552, 11.76125], [9.836, 10.015]])
    th.testing.assert_close(result, expected, rtol=0, atol=1e-8)


def rollout(seed: int, steps: int = 8, n_envs: int = 3, ends: float = 0.15) -> Arguments:
    """Random steps; V of the states that the steps came from follows them, except behind ends."""
    generator = th.Generator().manual_seed(seed)
    reward, action_value, next_value = th.randn(3, steps, n_envs, generator=generator, dtype=th.float64)
    trace = th.rand(steps, n_envs, generator=generator, dtype=th.float64)
    terminated, truncated = (th.rand(2, steps, n_envs, generator=generator) < ends).double()
    data = {"reward": reward, "action_value": action_value, "next_value": next_value, "trace": trace}
    return {**data, "terminated": terminated, "truncated": truncated}


@given(seed=st.integers(0, 1000), steps=st.integers(1, 9), ends=st.floats(0, 0.5), gamma=st.floats(0, 1))
def test_backward_loop(seed: int, steps: int, ends: float, gamma: float) -> None:
    """The equation step by step from the end."""
    data = rollout(seed, steps, ends=ends)
    reward, q, next_value, trace, terminated, truncated = data.values()
    expected = th.empty_like(reward)
    for env in range(reward.shape[1]):
        carried = None
        for t in reversed(range(steps)):
            value = next_value[t, env] if carried is None or truncated[t, env] else carried
            expected[t, env] = reward[t, env] + (0 if terminated[t, env] else gamma * value)
            state_value = next_value[t - 1, env]
            carried = trace[t, env] * (expected[t, env] - q[t, env]) + state_value
    for given_as in (float, tensor):
        th.testing.assert_close(retrace(**data, gamma=given_as(gamma)), expected, rtol=0, atol=1e-9)


@given(seed=st.integers(0, 1000), gamma=st.floats(0, 1))
def test_limit_cases(seed: int, gamma: float) -> None:
    """With no trace one step; with a whole one and Q = V the n-step return to the end of the data."""
    data = rollout(seed)
    rewards = {name: data[name] for name in ("reward", "next_value", "terminated", "truncated")}
    one_step = retrace(**{**data, "trace": th.zeros_like(data["trace"])}, gamma=gamma)
    th.testing.assert_close(one_step, n_step_returns(**rewards, gamma=gamma, n=1), rtol=0, atol=1e-12)
    value = th.cat([data["next_value"][:1], data["next_value"][:-1]])
    whole = retrace(**{**data, "trace": th.ones_like(value), "action_value": value}, gamma=gamma)
    th.testing.assert_close(whole, monte_carlo_returns(**rewards, gamma=gamma), rtol=0, atol=1e-9)


def test_first_ratio_does_not_count() -> None:
    data = rollout(0)
    other = {**data, "trace": th.cat([th.full((1, 3), 0.123), data["trace"][1:]])}
    assert th.equal(retrace(**data, gamma=0.9), retrace(**other, gamma=0.9))


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
def test_nothing_behind_a_cut_changes_what_is_before_it(flag: str) -> None:
    """Not by a bit, and not if nothing is behind it."""
    for cut in range(20):
        data = rollout(cut, steps=40, ends=0.05)
        data[flag][cut] = 1
        changed = {name: value.clone() for name, value in data.items()}
        for name, value in rollout(1000 + cut, steps=40).items():
            changed[name][cut + 1 :] = value[cut + 1 :]
        short = {name: value[: cut + 1] for name, value in data.items()}
        result = retrace(**data, gamma=0.99)[: cut + 1]
        assert th.equal(result, retrace(**changed, gamma=0.99)[: cut + 1])
        assert th.equal(result, retrace(**short, gamma=0.99))


def test_no_gradient_reaches_the_target() -> None:
    data = {name: value.requires_grad_() for name, value in rollout(0).items()}
    assert not retrace(**data, gamma=0.9).requires_grad


def test_coefficient_is_finite_and_at_most_1() -> None:
    log_ratio = th.tensor([-1e5, -1, 0, 1, 1e5])
    assert retrace_coefficient(log_ratio).tolist() == pytest.approx([0, math.exp(-1), 1, 1, 1])
    assert retrace_coefficient(log_ratio, 4).tolist() == pytest.approx([0, math.exp(-0.25), 1, 1, 1])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_fixed_point_is_the_policys_value(steps: int, share: float) -> None:
    """
    One state, pi = (0.7, 0.3), mu = (0.2, 0.8), rewards (1, 0): Q = (7.3, 6.3), V = 7; mu's would be (2.8, 1.8).

    All sequences of actions are the columns, weighed by the probability under mu of what follows the first one.
    """
    pi, mu, rewards = tensor([0.7, 0.3]), tensor([0.2, 0.8]), tensor([1, 0])
    actions = th.cartesian_prod(*[th.arange(2)] * steps).reshape(-1, steps).t()
    probability, zeros = mu[actions[1:]].prod(dim=0), th.zeros(actions.shape, dtype=th.float64)
    trace, q = share * (pi / mu).clamp(max=1)[actions], th.zeros(2, dtype=th.float64)
    for _ in range(300):
        targets = retrace(rewards[actions], q[actions], (pi * q).sum() + zeros, trace, zeros, zeros, gamma=0.9)[0]
        q = th.zeros_like(q).index_add(0, actions[0], probability * targets)
    th.testing.assert_close(q, tensor([7.3, 6.3]), rtol=0, atol=1e-6)
    assert (pi * q).sum().item() == pytest.approx(7, abs=1e-6)


@pytest.mark.parametrize("transition", [lambda s, a: (s + 1) % 5, lambda s, a: (s + 2 * a - 1) % 5], ids=["ring", "walk"])
def test_fixed_point_on_five_states(transition: Callable[[int, int], int]) -> None:
    """Random policies and rewards; the policy's value by the linear equations."""
    numbers = np.random.default_rng(0)
    pi, mu = (th.from_numpy(numbers.dirichlet([1, 1], size=5)) for _ in range(2))
    rewards, following = (
        th.from_numpy(numbers.normal(size=(5, 2))),
        th.tensor([[transition(s, a) for a in (0, 1)] for s in range(5)]),
    )
    moves = th.nn.functional.one_hot(following, 5).double()  # (S, A, S')
    value = th.linalg.solve(th.eye(5) - 0.9 * (pi[..., None] * moves).sum(dim=1), (pi * rewards).sum(dim=1))
    expected = rewards + 0.9 * value[following]

    starts = th.cartesian_prod(th.arange(5), *[th.arange(2)] * 4)  # a state and the actions of four steps
    actions, states, probability = starts[:, 1:].t(), [starts[:, 0]], th.ones(len(starts), dtype=th.float64)
    for t in range(3):
        states.append(following[states[t], actions[t]])
        probability = probability * mu[states[t + 1], actions[t + 1]]
    state, zeros = th.stack(states), th.zeros(actions.shape, dtype=th.float64)
    trace, q = retrace_coefficient((pi / mu).log())[state, actions], th.zeros(5, 2, dtype=th.float64)
    for _ in range(300):
        next_value = (pi * q).sum(dim=1)[following[state, actions]]
        targets = retrace(rewards[state, actions], q[state, actions], next_value, trace, zeros, zeros, gamma=0.9)[0]
        q = th.zeros_like(q).index_put((state[0], actions[0]), probability * targets, accumulate=True)
    th.testing.assert_close(q, expected, rtol=0, atol=1e-8)


PI, ADVANTAGES, VALUE = tensor([0.5, 0.3, 0.2]), tensor([1, -2, 0.5]), tensor(0.7)


def test_stochastic_duelling_by_hand() -> None:
    """Action 2 with the draws 0 and 1; all pairs of draws; and the expectation over the action too."""
    assert stochastic_duelling(VALUE, ADVANTAGES[2], ADVANTAGES[:2]).item() == pytest.approx(1.7)
    pairs = th.cartesian_prod(th.arange(3), th.arange(3))
    probability = PI[pairs].prod(dim=1)
    values = stochastic_duelling(VALUE, ADVANTAGES[:, None], ADVANTAGES[pairs])  # (A, 9)
    means = (probability * values).sum(dim=1)
    assert means[2].item() == pytest.approx(1.2)
    assert (PI * means).sum().item() == pytest.approx(0.7)
    variance = (probability * (values[0] - means[0]).square()).sum()
    assert variance.item() == pytest.approx(0.875)


def test_stochastic_duelling_of_a_gaussian_policy() -> None:
    """A = -(a - 0.5)^2, V = 2, mean 0.1, standard deviation 0.3: at 0.4 by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    of_draws = th.from_numpy(-((0.1 + 0.3 * nodes - 0.5) ** 2) * weights / weights.sum() * len(nodes))
    assert stochastic_duelling(tensor(2), tensor(-0.01), of_draws).item() == pytest.approx(2.24)


def test_gradients_of_the_continuous_critic() -> None:
    """With both terms of the loss; the draws' advantages are constants here."""
    rho, target, value, advantage = tensor(0.84648172), tensor(1.6), tensor(0.7).requires_grad_(), tensor(0.4).requires_grad_()
    q = stochastic_duelling(value, advantage, tensor([0.5, -0.5]))
    value_target = duelling_value_target(rho, target, q, value)
    assert value_target.item() == pytest.approx(1.12324086) and not value_target.requires_grad
    loss = (target - q).square() / 2 + (value_target - value).square() / 2
    gradients = [gradient.item() for gradient in th.autograd.grad(loss, (advantage, value))]
    assert gradients == pytest.approx([-0.5, -0.92324086])
    assert duelling_value_target(tensor(3), target, q, value).item() == pytest.approx(1.2)
