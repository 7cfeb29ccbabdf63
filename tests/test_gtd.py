"""GTD(lambda) against numbers worked out by hand, TD(lambda), enumerated expectations, and a counterexample to TD(0)."""

from typing import Any

import pytest
import torch as th

from sb3_ac_ext.functional.gtd import eligibility_trace, gtd_step
from sb3_ac_ext.functional.returns import gae


def tensor(values: Any) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


def row(*values: float) -> th.Tensor:
    return tensor(values)[None]


FEATURES = [row(1, 0), row(0.5, 1), row(0, 1)]
SCORES = [row(0.5, -0.5), row(-0.2, 0.2)]
REWARDS, RATIOS, DISCOUNTS = (tensor([[1], [2]]), tensor([[0.5], [2]]), tensor([[0], [0.9], [0.9]]))


def two_steps() -> list[tuple[Any, th.Tensor, th.Tensor]]:
    """Of each: the step, v, w after it; lambda 0.4, gamma 0.9, step sizes 0.1 and 0.01."""
    v, w, trace, steps = tensor([0.1, 0.2]), tensor([0.3, -0.2]), row(0, 0), []
    for t in range(2):
        x, following = FEATURES[t : t + 2]
        step = gtd_step(v, w, trace, x, following, REWARDS[t], RATIOS[t], 0.4 * DISCOUNTS[t], DISCOUNTS[t + 1], 0.4)
        v, w, trace = v + 0.1 * step.v[0], w + 0.01 * step.w[0], step.trace
        steps.append((step, v, w))
    return steps


def test_critic_by_hand() -> None:
    expected = [
        (1.125, (0.5, 0), (0.1522, 0.1919), (0.302625, -0.2)),
        (1.90471, (1.36, 2), (0.41124056, 0.57221722), (0.32877249, -0.16141893)),
    ]
    for (step, v, w), (delta, trace, its_v, its_w) in zip(two_steps(), expected, strict=True):
        assert step.delta.item() == pytest.approx(delta)
        for result, by_hand in ((step.trace[0], trace), (v, its_v), (w, its_w)):
            th.testing.assert_close(result, tensor(by_hand), rtol=0, atol=1e-8)


def test_is_not_what_a_transcription_with_x_for_the_next_x_gives() -> None:
    for (_, v, _), wrong in zip(two_steps(), ((0.14815, 0.2), (0.40704341, 0.58056022)), strict=True):
        assert not th.allclose(v, tensor(wrong), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("decays", "trace", "weights"),
    [
        (0.4 * DISCOUNTS, (-0.22, 0.22), (-0.00688931, 0.00688931)),
        (tensor([[0], [0.4]]), (-0.2, 0.2), (-0.0049846, 0.0049846)),
    ],
    ids=["lambda gamma", "lambda alone"],
)
def test_actor_by_hand(decays: th.Tensor, trace: tuple[float, ...], weights: tuple[float, ...]) -> None:
    """As published, and as in the author's program; step size 0.05."""
    e, u = row(0, 0), row(0, 0)
    for t, (step, _, _) in enumerate(two_steps()):
        e = eligibility_trace(e, SCORES[t], RATIOS[t], decays[t])
        u = u + 0.05 * step.delta[:, None] * e
        if t == 0:
            th.testing.assert_close((e, u), (row(0.25, -0.25), row(0.0140625, -0.0140625)), rtol=0, atol=1e-8)
    th.testing.assert_close((e, u), (row(*trace), row(*weights)), rtol=0, atol=1e-8)


def test_traces_of_a_matrix_and_of_each_environment() -> None:
    """An environment's first step forgets what was before."""
    trace, gradient = th.randn(2, 3, 4, 5, generator=th.Generator().manual_seed(0), dtype=th.float64)
    ratio, decay = tensor([0.5, 2, 1]), tensor([0.9, 0, 0.3])
    result = eligibility_trace(trace, gradient, ratio, decay)
    for env in range(3):
        th.testing.assert_close(result[env], ratio[env] * (gradient[env] + decay[env] * trace[env]), rtol=0, atol=0)
    assert th.equal(result[1], 2 * gradient[1])


@pytest.mark.parametrize("gtd_lambda", [0.0, 0.6, 1.0])
def test_without_correction_it_is_td_lambda(gtd_lambda: float) -> None:
    """The sum of updates at the same v is that of lambda-returns (Sutton and Barto 2018, section 12.2)."""
    generator, gamma, steps, envs = th.Generator().manual_seed(1), 0.9, 12, 2
    states = th.randn(steps + 1, envs, 4, generator=generator, dtype=th.float64)
    final = th.randn(steps, envs, 4, generator=generator, dtype=th.float64)
    reward, v, w = th.randn(steps, envs, generator=generator, dtype=th.float64), tensor([1, -2, 0.5, 3]), th.zeros(4).double()
    terminated, truncated = (th.rand(2, steps, envs, generator=generator) < 0.15).double()
    ended = terminated + truncated > 0
    following = th.where(ended[..., None], final, states[1:])
    trace, decay, total = th.zeros(envs, 4).double(), th.zeros(envs).double(), th.zeros(envs, 4).double()
    for t in range(steps):
        discount = gamma * (1 - terminated[t])
        ratio = th.ones(envs, dtype=th.float64)
        step = gtd_step(v, w, trace, states[t], following[t], reward[t], ratio, decay, discount, gtd_lambda)
        trace, decay, total = step.trace, th.where(ended[t], 0, gtd_lambda * discount), total + step.v
    advantages = gae(reward, states[:-1] @ v, following @ v, terminated, truncated, gamma, gtd_lambda)
    expected = (advantages[..., None] * states[:-1]).sum(dim=0)
    th.testing.assert_close(total, expected, rtol=0, atol=1e-9)


def test_follows_the_gradient_of_the_projected_error() -> None:
    """
    With lambda 0 and w at rest, v goes by -1/2 the gradient of b . C^-1 b, b = E[rho delta x], C = E[x x^T].

    Each state is there twice, with ratios whose mean is 1, as a behaviour's are.
    """
    generator = th.Generator().manual_seed(2)
    x, following = th.randn(2, 18, 3, generator=generator, dtype=th.float64)
    reward, ratio, discount = th.rand(3, 18, generator=generator, dtype=th.float64)
    x[9:], ratio[9:] = x[:9], 2 - ratio[:9]
    v = tensor([0.3, -1, 2]).requires_grad_()
    error = ((ratio * (reward + discount * (following @ v) - x @ v))[:, None] * x).mean(dim=0)
    w = th.linalg.solve(x.T @ x / 18, error)
    (gradient,) = th.autograd.grad(error @ w, v)
    step = gtd_step(v.detach(), w.detach(), 0 * x, x, following, reward, ratio, 0 * ratio, discount, 0.0)
    th.testing.assert_close(step.w.mean(dim=0), 0 * v, rtol=0, atol=1e-12)
    th.testing.assert_close(step.v.mean(dim=0), -gradient / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("corrected", "expected"), [(False, (9.971, 335.0, 44681)), (True, (6.880, 6.628, 6.628))], ids=["TD(0)", "GTD(0)"]
)
def test_bairds_star(corrected: bool, expected: tuple[float, ...]) -> None:
    """
    Seven states, of which the policy always goes to the last one; the behaviour to each with the same probability.

    All states and moves are the environments, so that the updates are expected ones; the largest weight after 100, 1000, 3000.
    """
    states = th.zeros(7, 8, dtype=th.float64)
    states[:6, :6], states[:6, 7], states[6, 6], states[6, 7] = 2 * th.eye(6), 1, 1, 2
    moves = th.cartesian_prod(th.arange(7), th.arange(7))
    x, following = states[moves[:, 0]], states[moves[:, 1]]
    ratio, zeros = 7 * (moves[:, 1] == 6).double(), th.zeros(49, dtype=th.float64)
    v, w, largest = tensor([1, 1, 1, 1, 1, 1, 10, 1]), th.zeros(8, dtype=th.float64), []
    for update in range(1, 3001):
        step = gtd_step(v, w, th.zeros_like(x), x, following, zeros, ratio, zeros, zeros + 0.99, 0.0)
        v = v + 0.01 * step.v.mean(dim=0)
        w = w + 0.1 * step.w.mean(dim=0) * corrected
        if update in (100, 1000, 3000):
            largest.append(v.abs().max().item())
    assert largest == pytest.approx(expected, rel=2e-4)
