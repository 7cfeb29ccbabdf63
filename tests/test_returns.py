"""Returns and advantages against sums written out, and against SB3's rollout buffer."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ac_ext.functional.returns import episode_discounts, gae, monte_carlo_returns, n_step_returns, reverse_scan

Rollout = tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor, th.Tensor]
fractions = st.floats(0, 1)


def column(*values: float) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)[:, None]


def rollout(seed: int, steps: int = 12, n_envs: int = 3, ends: float = 0.2) -> Rollout:
    """Rewards, values, next values that follow them except at the ends, terminated, truncated."""
    generator = th.Generator().manual_seed(seed)

    def normal() -> th.Tensor:
        return th.randn(steps, n_envs, generator=generator, dtype=th.float64)

    reward, value, final = normal(), normal(), normal()
    draw = th.rand(steps, n_envs, generator=generator)
    terminated, truncated = (draw < ends).double(), ((draw >= ends) & (draw < 2 * ends)).double()
    following = th.cat([value[1:], normal()[:1]])
    return reward, value, th.where(terminated + truncated > 0, final, following), terminated, truncated


VECTORS = {
    "no cut": ((0, 0, 0), (0, 0, 0), 1.5, (4.80272, 4.726, 3.3), (5.30272, 5.726, 4.8)),
    "truncated after t = 1": ((0, 0, 0), (0, 1, 0), 4.0, (4.712, 4.6, 3.3), (5.212, 5.6, 4.8)),
    "terminated after t = 1": ((0, 1, 0), (0, 0, 0), 1.5, (2.12, 1.0, 3.3), (2.62, 2.0, 4.8)),
}


@pytest.mark.parametrize("name", VECTORS)
def test_gae_by_hand(name: str) -> None:
    terminated, truncated, middle, advantages, returns = VECTORS[name]
    value, ends = column(0.5, 1, 1.5), (column(*terminated), column(*truncated))
    result = gae(column(1, 2, 3), value, column(1, middle, 2), *ends, gamma=0.9, gae_lambda=0.8)
    th.testing.assert_close(result, column(*advantages), rtol=0, atol=1e-9)
    th.testing.assert_close(result + value, column(*returns), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("terminated", "truncated", "middle", "expected"),
    [((0, 0, 0), (0, 0, 0), 0.0, 6.688), ((0, 1, 0), (0, 0, 0), 0.0, 2.8), ((0, 0, 0), (0, 1, 0), 4.0, 6.04)],
    ids=["full", "terminated", "truncated"],
)
def test_three_steps_by_hand(terminated: tuple[int, ...], truncated: tuple[int, ...], middle: float, expected: float) -> None:
    arguments = column(1, 2, 3), column(0, middle, 2), column(*terminated), column(*truncated)
    assert n_step_returns(*arguments, gamma=0.9, n=3)[0].item() == pytest.approx(expected)
    assert monte_carlo_returns(*arguments, gamma=0.9)[0].item() == pytest.approx(expected)


def brute_force(data: Rollout, gamma: float, n: int) -> th.Tensor:
    """The definition: walk on from every step."""
    reward, _, next_value, terminated, truncated = data
    steps, n_envs = reward.shape
    returns = th.zeros_like(reward)
    for env in range(n_envs):
        for start in range(steps):
            for m in range(n):
                t = start + m
                returns[start, env] += gamma**m * reward[t, env]
                if terminated[t, env]:
                    break
                if truncated[t, env] or t == steps - 1 or m == n - 1:
                    returns[start, env] += gamma ** (m + 1) * next_value[t, env]
                    break
    return returns


@given(seed=st.integers(0, 1000), n=st.integers(1, 15), gamma=fractions, ends=st.floats(0, 0.5))
def test_sums_written_out(seed: int, n: int, gamma: float, ends: float) -> None:
    data = rollout(seed, ends=ends)
    reward, _, next_value, terminated, truncated = data
    result = n_step_returns(reward, next_value, terminated, truncated, gamma, n)
    th.testing.assert_close(result, brute_force(data, gamma, n), rtol=0, atol=1e-9)
    result = monte_carlo_returns(reward, next_value, terminated, truncated, gamma)
    th.testing.assert_close(result, brute_force(data, gamma, n=len(reward)), rtol=0, atol=1e-9)


@given(seed=st.integers(0, 1000), gamma=fractions, gae_lambda=fractions, ends=st.floats(0, 0.5))
def test_gae_is_the_weighted_mean_of_n_step_advantages(seed: int, gamma: float, gae_lambda: float, ends: float) -> None:
    """
    The definition: (1 - lambda) sum of lambda^(n - 1) A^(n), the weight of what lies behind a cut on the cut itself.

    With lambda 1 it is the Monte Carlo return, with 0 the one-step return.
    """
    data = rollout(seed, steps=6, n_envs=2, ends=ends)
    value, steps = data[1], len(data[0])
    for weight_of_longer in (gae_lambda, 0.0, 1.0):
        expected = th.zeros_like(value)
        for n in range(1, steps + 1):
            weight = weight_of_longer ** (n - 1) * (1 - weight_of_longer if n < steps else 1)
            expected += weight * (brute_force(data, gamma, n) - value)
        th.testing.assert_close(gae(*data, gamma, weight_of_longer), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)])
@pytest.mark.parametrize("gamma", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 20, 2048])
def test_equals_sb3s_rollout_buffer(steps: int, gamma: float, dtype: type, tolerance: float) -> None:
    """SB3 adds the value of a truncated episode's last observation to the reward and marks an end."""
    data = [tensor.numpy().astype(dtype) for tensor in rollout(5, steps, n_envs=4, ends=0.05)]
    reward, value, next_value, terminated, truncated = data
    ended, box = terminated + truncated, spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(steps, box, box, gamma=gamma, gae_lambda=0.8, n_envs=4)
    buffer.rewards, buffer.values, buffer.advantages = reward + dtype(gamma) * truncated * next_value, value, 0 * value
    buffer.episode_starts = np.concatenate([np.ones((1, 4), dtype), ended[:-1]])
    buffer.compute_returns_and_advantage(th.from_numpy(next_value[-1]), ended[-1])
    advantages = gae(*map(th.from_numpy, data), gamma, 0.8).numpy()
    assert advantages.dtype == dtype
    np.testing.assert_allclose(advantages, buffer.advantages, rtol=0, atol=tolerance)
    np.testing.assert_allclose(advantages + value, buffer.returns, rtol=0, atol=tolerance)


@given(seed=st.integers(0, 1000), steps=st.integers(1, 40), ends=fractions)
def test_scan_is_the_loop_from_the_end(seed: int, steps: int, ends: float) -> None:
    generator = th.Generator().manual_seed(seed)
    delta, draw, decay = th.randn(3, steps, 2, generator=generator, dtype=th.float64)
    decay = decay.clamp(-1, 1) * (draw > ends)
    expected, following = th.empty_like(delta), th.zeros(2, dtype=th.float64)
    for t in reversed(range(steps)):
        expected[t] = following = delta[t] + decay[t] * following
    th.testing.assert_close(reverse_scan(delta, decay), expected, rtol=0, atol=1e-12)


def test_nothing_leaks_over_an_end_or_between_environments() -> None:
    delta = th.randn(6, 3, dtype=th.float64, requires_grad=True)
    decay = th.full((6, 3), 0.9, dtype=th.float64)
    decay[2, 1] = 0
    (gradient,) = th.autograd.grad(reverse_scan(delta, decay)[0, 1], delta)
    expected = th.zeros(6, 3, dtype=th.float64)
    expected[:3, 1] = th.tensor([1, 0.9, 0.81])
    th.testing.assert_close(gradient, expected)


@given(seed=st.integers(0, 1000), gamma=fractions)
def test_discounts_count_the_steps_of_each_episode(seed: int, gamma: float) -> None:
    """0^0 is 1."""
    start = (th.rand(30, 2, generator=th.Generator().manual_seed(seed)) < 0.2).double()
    start[0] = 1
    expected, since = th.empty_like(start), th.zeros(2)
    for t in range(30):
        since = th.where(start[t] > 0, 0, since + 1)
        expected[t] = gamma ** since.double()
    th.testing.assert_close(episode_discounts(start, gamma), expected, rtol=1e-12, atol=0)
