"""V-trace against numbers worked out by hand, the paper's definition, its fixed point, and what known mistakes give."""

import math
from typing import Any

import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from sb3_ac_ext.functional.returns import monte_carlo_returns, n_step_returns, reverse_scan
from sb3_ac_ext.functional.vtrace import VTrace, vtrace

Arguments = dict[str, Any]
fractions = st.floats(0, 1)
bars = st.floats(0.05, 3) | st.just(math.inf)
INFINITE = {"rho_bar": math.inf, "c_bar": math.inf, "pg_rho_bar": math.inf}


def tensor(values: Any) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


def column(*values: float) -> th.Tensor:
    return tensor(values)[:, None]


def three_steps(
    rho: tuple[float, ...] = (0.5, 2, 0.8), terminated: int | None = None, truncated: int | None = None, final: float = 0.0
) -> Arguments:
    """Three steps in one environment, the episode ended after the step of this index, by an observation of value ``final``."""
    arguments = {"reward": column(1, 2, 3), "value": column(0.5, 1, 1.5), "next_value": column(1, 1.5, 2), "gamma": 0.9}
    ends = {"terminated": terminated, "truncated": truncated}
    for name, step in ends.items():
        arguments[name] = column(*(float(t == step) for t in range(3)))
        if step is not None:
            arguments["next_value"][step] = final
    return {**arguments, "log_ratio": column(*rho).log()}


def check(result: VTrace, values: tuple[float, ...], advantages: tuple[float, ...], env: int = 0) -> None:
    th.testing.assert_close(result.values[:, env], tensor(values), rtol=0, atol=1e-8)
    th.testing.assert_close(result.advantages[:, env], tensor(advantages), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("steps", "options", "values", "advantages"),
    [
        ({}, {}, (3.3267, 5.726, 4.14), (2.8267, 4.726, 2.64)),
        ({"rho": (1, 1, 1)}, {}, (6.688, 6.32, 4.8), (6.188, 5.32, 3.3)),
        ({"terminated": 1}, {}, (1.65, 2, 4.14), (1.15, 1, 2.64)),
        ({"truncated": 1, "final": 4}, {}, (3.27, 5.6, 4.14), (2.77, 4.6, 2.64)),
        ({"terminated": 2}, {}, (2.7435, 4.43, 2.7), (2.2435, 3.43, 1.2)),
        ({"truncated": 2, "final": 7}, {}, (4.7847, 8.966, 7.74), (4.2847, 7.966, 6.24)),
        ({}, {"rho_bar": math.inf, "pg_rho_bar": math.inf}, (4.3842, 8.076, 4.14), (3.8842, 9.452, 2.64)),
        ({}, INFINITE, (5.4534, 10.452, 4.14), (4.9534, 9.452, 2.64)),
        ({}, {"c_bar": 0.5}, (2.7921, 4.538, 4.14), (2.2921, 4.726, 2.64)),
        ({}, {"vtrace_lambda": 0.5}, (1.99605, 4.538, 4.14), (2.2921, 4.726, 2.64)),
        ({"terminated": 1}, {"vtrace_lambda": 0.5}, (1.425, 2, 4.14), (1.15, 1, 2.64)),
        ({"truncated": 1, "final": 4}, {"vtrace_lambda": 0.5}, (2.235, 5.6, 4.14), (2.77, 4.6, 2.64)),
        ({}, {"vtrace_lambda": 0.0}, (1.2, 3.35, 4.14), (1.7575, 4.726, 2.64)),
    ],
    ids=[
        "base",
        "on the policy",
        "terminated",
        "truncated",
        "terminated at the last step",
        "truncated at the last step",
        "rho_bar and pg_rho_bar infinite",
        "all bars infinite",
        "c_bar 0.5",
        "lambda 0.5",
        "lambda 0.5, terminated",
        "lambda 0.5, truncated",
        "lambda 0",
    ],
)
def test_three_steps_by_hand(
    steps: Arguments, options: Arguments, values: tuple[float, ...], advantages: tuple[float, ...]
) -> None:
    check(vtrace(**three_steps(**steps), **options), values, advantages)


@pytest.mark.parametrize(
    ("vtrace_lambda", "first", "second"),
    [
        (
            1.0,
            ((1.114, 0.12, 2.223375, 0.425), (0.914, -0.28, 1.623375, -0.375)),
            ((0.43805, -0.9525, 0.05, -0.129), (-0.56195, -1.7525, 0.55, -0.429)),
        ),
        (
            0.9,
            ((1.1406, 0.12, 2.2554375, 0.425), (0.914, -0.28, 1.623375, -0.375)),
            ((0.4867755, -1.00475, 0.05, -0.129), (-0.581805, -1.7525, 0.55, -0.429)),
        ),
    ],
)
def test_two_environments_by_hand(vtrace_lambda: float, first: Any, second: Any) -> None:
    """The first one is terminated after t = 1, the second one truncated after t = 2 by an observation of value -1."""
    result = vtrace(
        reward=tensor([[1, 0.5], [0, -1], [2, 1], [-1, 0.25]]),
        value=tensor([[0.2, 1], [0.4, 0.8], [0.6, -0.5], [0.8, 0.3]]),
        next_value=tensor([[0.4, 0.8], [0.6, -0.5], [0.8, -1], [1.5, -0.7]]),
        log_ratio=tensor([[1.5, 0.4], [0.7, 1.2], [0.9, 3], [2, 0.6]]).log(),
        terminated=tensor([[0, 0], [1, 0], [0, 0], [0, 0]]),
        truncated=tensor([[0, 0], [0, 0], [0, 1], [0, 0]]),
        gamma=0.95,
        vtrace_lambda=vtrace_lambda,
    )
    check(result, *first, env=0)
    check(result, *second, env=1)


def test_published_numbers_of_another_program() -> None:
    """RLax's test (Apache 2.0, DeepMind 2019), which has a discount for each step and pg_rho_bar 1 too; its tolerance."""
    behaviour = tensor([[[8.9, 0.7], [5, 1], [0.6, 0.1], [-0.9, -0.1]], [[0.3, -5], [1, -8], [0.3, 1.7], [4.7, 3.3]]])
    learner = tensor([[[0.4, 0.5], [9.2, 8.8], [0.7, 4.4], [7.9, 1.4]], [[1, 0.9], [1, -1], [-4.3, 8.7], [0.8, 0.3]]])
    actions = th.tensor([[0, 1, 0, 0], [1, 0, 0, 1]])[..., None]
    log_ratio = (learner.log_softmax(dim=-1) - behaviour.log_softmax(dim=-1)).gather(-1, actions).squeeze(-1)
    value = tensor([[2.1, 1.1, -3.1, 0], [3.1, 0.1, -1.1, 7.4]]).t()
    result = vtrace(
        reward=tensor([[-1.3, -1.3, 2.3, 42], [1.3, 5.3, -3.3, -5]]).t(),
        value=value,
        next_value=th.cat([value[1:], tensor([[8.4, -1.2]])]),
        log_ratio=log_ratio.t(),
        terminated=th.zeros_like(value),
        truncated=th.zeros_like(value),
        gamma=tensor([[0, 0.89, 0.85, 0.99], [0.88, 1, 0.83, 0.95]]).t(),
    )
    errors = tensor([[-1.6155143, -3.4973226, 1.8670533, 50.316002], [1.4662437, 3.6116405, -8.3327293e-5, -13.54]])
    advantages = tensor([[-1.6155143, -3.4973226, 1.8670534, 50.316002], [1.4662433, 3.6116405, -8.3369283e-5, -13.54]])
    th.testing.assert_close(result.values - value, errors.t(), rtol=1e-3, atol=0)
    th.testing.assert_close(result.advantages, advantages.t(), rtol=1e-3, atol=0)


def test_loss_by_hand() -> None:
    """Sums over three steps, baseline cost 0.5, entropy cost 0.01; the actor's and the learner's logits differ."""
    logits = tensor([[0.5, 0], [0, 0.3], [-0.2, 0.4]]).requires_grad_()
    behaviour, actions = tensor([[1, 0], [0.2, 0], [0, 0.9]]), th.tensor([[0], [1], [1]])
    arguments = three_steps()
    value = arguments["value"].clone().requires_grad_()
    log_prob = logits.log_softmax(dim=1).gather(1, actions)
    arguments |= {"value": value, "log_ratio": log_prob - behaviour.log_softmax(dim=1).gather(1, actions)}
    result = vtrace(**arguments)
    check(result, (5.55974884, 6.0472369, 4.49692988), (5.05974884, 5.0472369, 2.99692988))
    th.testing.assert_close(result.rhos, column(0.85144932, 1.27606819, 0.90816057), rtol=0, atol=1e-8)

    policy = -(result.advantages * log_prob).sum()
    baseline = (result.values - value).square().sum() / 2
    negative_entropy = (logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum()
    loss = policy + 0.5 * baseline + 0.01 * negative_entropy
    parts = [part.item() for part in (policy, baseline, negative_entropy, loss)]
    assert parts == pytest.approx([6.50779343, 30.02862367, -1.99496397, 21.50215562], abs=1e-8)
    of_logits, of_value = th.autograd.grad(loss, (logits, value))
    first = column(-1.90908594, 2.14715606, 1.0605705)
    th.testing.assert_close(of_logits, th.cat([first, -first], dim=1), rtol=0, atol=1e-8)
    th.testing.assert_close(of_value, column(-2.52987442, -2.52361845, -1.49846494), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("steps", "values", "advantages"),
    [
        ({"truncated": 1, "final": 4}, (3.3267, 5.726, 4.14), (2.8267, 4.726, 2.64)),
        ({"truncated": 1, "final": 4}, (1.65, 2, 4.14), (1.15, 1, 2.64)),
        ({"truncated": 1, "final": 4}, None, (2.77, 4.726, 2.64)),
        ({}, (4.3842, 5.726, 4.14), None),
        ({}, None, (1.747015, 6.1534, 4.1808)),
        ({"truncated": 1, "final": 4, "options": {"vtrace_lambda": 0.5}}, None, (1.735, 4.6, 2.64)),
    ],
    ids=[
        "truncation ignored",
        "truncation taken for termination",
        "advantage from the next episode's value",
        "trace without its last ratio",
        "advantage from v_t",
        "advantage of another program for lambda below 1",
    ],
)
def test_is_not_what_known_mistakes_give(steps: Arguments, values: Any, advantages: Any) -> None:
    steps = dict(steps)
    result = vtrace(**steps.pop("options", {}), **three_steps(**steps))
    for got, wrong in ((result.values, values), (result.advantages, advantages)):
        assert wrong is None or not th.allclose(got, column(*wrong), rtol=0, atol=1e-3)


def rollout(seed: int, steps: int = 8, n_envs: int = 3, ends: float = 0.15, spread: float = 0.7) -> Arguments:
    """Random steps; values follow each other except behind ends; at some steps both flags are set."""
    generator = th.Generator().manual_seed(seed)
    reward, value, final, noise = th.randn(4, steps, n_envs, generator=generator, dtype=th.float64)
    following = th.cat([value[1:], th.randn(1, n_envs, generator=generator, dtype=th.float64)])
    terminated, truncated = (th.rand(2, steps, n_envs, generator=generator) < ends).double()
    next_value = th.where(terminated + truncated > 0, final, following)
    data = {"reward": reward, "value": value, "next_value": next_value, "log_ratio": spread * noise}
    return {**data, "terminated": terminated, "truncated": truncated}


def definition(data: Arguments, gamma: float, rho_bar: float, c_bar: float, pg_rho_bar: float, weight: float) -> VTrace:
    """The paper's eq. 1 as it stands there, a sum over the steps behind each step."""
    reward, value, next_value, terminated, truncated = (
        data[name] for name in ("reward", "value", "next_value", "terminated", "truncated")
    )
    rhos, (steps, n_envs) = data["log_ratio"].exp(), reward.shape
    values, advantages = value.clone(), th.empty_like(value)
    for env in range(n_envs):
        for start in range(steps):
            factor = 1.0
            for t in range(start, steps):
                target = reward[t, env] + (0 if terminated[t, env] else gamma * next_value[t, env])
                values[start, env] += factor * min(rho_bar, rhos[t, env]) * (target - value[t, env])
                if terminated[t, env] or truncated[t, env]:
                    break
                factor *= gamma * weight * min(c_bar, rhos[t, env])
        for t in range(steps):
            goes_on = t < steps - 1 and not terminated[t, env] and not truncated[t, env]
            following = values[t + 1, env] if goes_on else next_value[t, env]
            target = reward[t, env] + (0 if terminated[t, env] else gamma * following)
            advantages[t, env] = min(pg_rho_bar, rhos[t, env]) * (target - value[t, env])
    return VTrace(values, advantages, rhos)


@given(
    seed=st.integers(0, 1000), steps=st.integers(1, 9), ends=st.floats(0, 0.5), gamma=fractions, rho_bar=bars, c_bar=bars,
    pg_rho_bar=bars, weight=fractions,
)  # fmt: skip
def test_definition(
    seed: int, steps: int, ends: float, gamma: float, rho_bar: float, c_bar: float, pg_rho_bar: float, weight: float
) -> None:
    """With numbers or with tensors of one number."""
    data = rollout(seed, steps, n_envs=2, ends=ends)
    expected = definition(data, gamma, rho_bar, c_bar, pg_rho_bar, weight)
    options = {"gamma": gamma, "rho_bar": rho_bar, "c_bar": c_bar, "pg_rho_bar": pg_rho_bar, "vtrace_lambda": weight}
    for given_as in (float, tensor):
        result = vtrace(**data, **{name: given_as(option) for name, option in options.items()})
        th.testing.assert_close(tuple(result), tuple(expected), rtol=0, atol=1e-9)


@given(seed=st.integers(0, 1000), gamma=fractions, ends=st.floats(0, 0.5))
def test_on_the_policy_values_are_n_step_returns(seed: int, gamma: float, ends: float) -> None:
    """With lambda 1 to the end of the data, with 0 one step; the advantages are A2C's."""
    data = rollout(seed, ends=ends)
    log_ratio = data.pop("log_ratio")
    result = vtrace(**data, log_ratio=0 * log_ratio, gamma=gamma)
    value = data.pop("value")
    returns = monte_carlo_returns(**data, gamma=gamma)
    assert (result.rhos == 1).all()
    th.testing.assert_close(result.values, returns, rtol=0, atol=1e-12)
    th.testing.assert_close(result.advantages, returns - value, rtol=0, atol=1e-12)
    result = vtrace(**data, value=value, log_ratio=0 * log_ratio, gamma=gamma, vtrace_lambda=0.0)
    th.testing.assert_close(result.values, n_step_returns(**data, gamma=gamma, n=1), rtol=0, atol=1e-12)


def test_bars_above_all_ratios_do_nothing() -> None:
    data = rollout(0)
    largest = data["log_ratio"].exp().max().item()
    result = vtrace(**data, gamma=0.9, rho_bar=largest, c_bar=largest, pg_rho_bar=largest)
    assert all(th.equal(a, b) for a, b in zip(result, vtrace(**data, gamma=0.9, **INFINITE), strict=True))


@given(seed=st.integers(0, 1000), factor=st.floats(-4, 4))
def test_everything_scales_with_rewards_and_values(seed: int, factor: float) -> None:
    data = rollout(seed)
    scaled = {name: factor * data[name] for name in ("reward", "value", "next_value")}
    result, of_scaled = vtrace(**data, gamma=0.9), vtrace(**{**data, **scaled}, gamma=0.9)
    th.testing.assert_close(of_scaled.values, factor * result.values, rtol=0, atol=1e-12)
    th.testing.assert_close(of_scaled.advantages, factor * result.advantages, rtol=0, atol=1e-12)


def test_environments_do_not_touch_each_other() -> None:
    data, order = rollout(0, n_envs=5), th.tensor([3, 0, 4, 1, 2])
    result = vtrace(**data, gamma=0.9)
    of_ordered = vtrace(**{name: value[:, order] for name, value in data.items()}, gamma=0.9)
    assert all(th.equal(a[:, order], b) for a, b in zip(result, of_ordered, strict=True))


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
@pytest.mark.parametrize("options", [{}, INFINITE], ids=["bars of 1", "infinite bars"])
@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_nothing_behind_a_cut_changes_what_is_before_it(flag: str, options: Arguments, dtype: th.dtype) -> None:
    """Not by a bit, though the products of ratios behind it overflow, and not if nothing is behind it."""
    for cut in range(20):
        data = {name: value.to(dtype) for name, value in rollout(cut, steps=60, ends=0.05).items()}
        data[flag][cut] = 1
        changed = {name: value.clone() for name, value in data.items()}
        for name, value in rollout(1000 + cut, steps=60, ends=0).items():
            changed[name][cut + 1 :] = 1e3 * value[cut + 1 :]
        short = {name: value[: cut + 1] for name, value in data.items()}
        result = vtrace(**data, gamma=0.99, **options)
        for other in (vtrace(**changed, gamma=0.99, **options), vtrace(**short, gamma=0.99, **options)):
            assert all(th.equal(a[: cut + 1], b[: cut + 1]) for a, b in zip(result, other, strict=True))


def test_no_gradient_reaches_anything() -> None:
    data = {name: value.requires_grad_() for name, value in rollout(0).items()}
    assert not any(part.requires_grad for part in vtrace(**data, gamma=th.tensor(0.9, requires_grad=True)))


@pytest.mark.parametrize(("rho_bar", "expected"), [(0.2, 2.0), (1.0, 4.0), (2.0, 5.71428571), (3.5, 7.0), (math.inf, 7.0)])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("vtrace_lambda", "c_bar"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.1)])
def test_fixed_point(rho_bar: float, expected: float, steps: int, vtrace_lambda: float, c_bar: float) -> None:
    """
    One state, pi = (0.7, 0.3), mu = (0.2, 0.8), rewards (1, 0): the value of the policy proportional to min(rho_bar mu, pi).

    All sequences of actions are the columns, weighed by their probability under mu, so that the updates are expected ones.
    """
    pi, mu, rewards = tensor([0.7, 0.3]), tensor([0.2, 0.8]), tensor([1, 0])
    actions = th.cartesian_prod(*[th.arange(2)] * steps).reshape(-1, steps).t()
    probability, zeros, value = mu[actions].prod(dim=0), th.zeros(actions.shape, dtype=th.float64), th.zeros(())
    log_ratio, options = (pi / mu).log()[actions], {"rho_bar": rho_bar, "c_bar": min(c_bar, rho_bar)}

    def updated(value: th.Tensor) -> th.Tensor:
        values = value + zeros
        result = vtrace(
            rewards[actions], values, values, log_ratio, zeros, zeros, gamma=0.9, vtrace_lambda=vtrace_lambda, **options
        )
        return (probability * result.values[0]).sum()

    for _ in range(1500):
        value = updated(value)
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_bound_of_the_scan_changes_nothing_that_is_finite() -> None:
    delta, decay = th.randn(2, 30, 4, generator=th.Generator().manual_seed(0), dtype=th.float64)
    assert th.equal(reverse_scan(delta, decay), reverse_scan(delta, decay, largest=1e300))
