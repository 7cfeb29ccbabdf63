"""The pure losses against values worked out by hand and against their definitions."""

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_ac_ext.functional.losses import ent_coef_loss, smoothed_action, soft_value, squared_error, td_errors, td_target


@pytest.mark.parametrize(
    ("done", "expected"),
    [(0.0, 2.8), (1.0, 1.0)],
    ids=["continuing or truncated", "terminated"],
)
def test_td_target_of_the_smaller_stream(done: float, expected: float) -> None:
    next_q = th.min(th.tensor([[2.0]]), th.tensor([[3.0]]))
    target = td_target(th.tensor([[1.0]]), th.tensor([[done]]), 0.9, next_q)
    th.testing.assert_close(target, th.tensor([[expected]]))


def test_td_target_takes_one_discount_per_row() -> None:
    target = td_target(th.ones(2, 1), th.zeros(2, 1), th.tensor([[0.9], [0.81]]), th.full((2, 1), 10.0))
    th.testing.assert_close(target, th.tensor([[10.0], [9.1]]))


@settings(deadline=None)
@given(
    action=st.floats(-1, 1, width=32),
    noise=st.floats(-5, 5, width=32),
    clip=st.floats(0, 2, width=32),
)
def test_smoothed_action_stays_within_clip_and_box(action: float, noise: float, clip: float) -> None:
    result = smoothed_action(th.tensor(action), th.tensor(noise), clip).item()
    assert -1 <= result <= 1
    assert abs(result - action) <= clip + 1e-6
    expected = max(-1.0, min(1.0, action + max(-clip, min(clip, noise))))
    assert result == pytest.approx(expected, abs=1e-6)


def test_smoothing_noise_is_symmetric() -> None:
    noise = th.randn(20_000, generator=th.Generator().manual_seed(0))
    moved = smoothed_action(th.zeros(20_000), noise, 0.5)
    assert abs(moved.mean().item()) < 3 * 0.5 / 20_000**0.5
    assert moved.min().item() == -0.5
    assert moved.max().item() == 0.5


TARGET = th.tensor([[2.0], [2.0]])
VALUES = [th.tensor([[1.0], [3.0]]), th.tensor([[0.0], [0.0]]), th.tensor([[2.0], [5.0]])]


@pytest.mark.parametrize(("critics", "expected"), [(1, 1.0), (2, 5.0), (3, 9.5)])
def test_squared_error_is_the_sum_over_critics_of_the_means(critics: int, expected: float) -> None:
    assert squared_error(VALUES[:critics], TARGET).item() == expected


def test_squared_error_with_weights() -> None:
    """(0.5 * 1 + 2 * 1) / 2 + (0.5 * 4 + 2 * 4) / 2 + (0.5 * 0 + 2 * 9) / 2"""
    assert squared_error(VALUES, TARGET, th.tensor([[0.5], [2.0]])).item() == 1.25 + 5.0 + 9.0
    assert squared_error(VALUES, TARGET, th.ones(2, 1)).item() == squared_error(VALUES, TARGET).item()


def test_td_errors_are_means_over_critics_without_gradient() -> None:
    values = [value.clone().requires_grad_() for value in VALUES]
    errors = td_errors(values, TARGET)
    th.testing.assert_close(errors, th.tensor([[1.0], [2.0]]))
    assert not errors.requires_grad


@pytest.mark.parametrize(("done", "expected"), [(0.0, 2.89), (1.0, 1.0)], ids=["continuing", "terminated"])
def test_soft_target_of_the_smaller_stream(done: float, expected: float) -> None:
    """The entropy of the next action counts where there is a next action only."""
    value = soft_value(th.min(th.tensor([[2.0]]), th.tensor([[3.0]])), th.tensor([[-0.5]]), 0.2)
    th.testing.assert_close(value, th.tensor([[2.1]]))
    target = td_target(th.tensor([[1.0]]), th.tensor([[done]]), 0.9, value)
    th.testing.assert_close(target, th.tensor([[expected]]))


@pytest.mark.parametrize(("log_prob", "gradient"), [(-0.5, 1.5), (3.0, -2.0)], ids=["too random", "too certain"])
def test_entropy_coefficient_falls_where_the_policy_is_more_random_than_asked(log_prob: float, gradient: float) -> None:
    """Descending a positive gradient lowers alpha: with H = -1, entropies 0.5 and -3."""
    log_ent_coef = th.zeros(1, requires_grad=True)
    ent_coef_loss(log_ent_coef, th.tensor([[log_prob], [log_prob]]), -1.0).backward()
    th.testing.assert_close(log_ent_coef.grad, th.tensor([gradient]))
