"""Policy losses against gradients worked out by hand, and their expectations by enumeration and quadrature."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_ac_ext.functional.gaussian import squashed_gaussian
from sb3_ac_ext.functional.importance import importance_ratio
from sb3_ac_ext.functional.losses import td_target
from sb3_ac_ext.functional.policy_gradients import (
    exact_policy_loss,
    leave_one_out,
    policy_value,
    score_function_loss,
    weighted_value_loss,
)


def tensor(values: Any) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


LOGITS, Q, BEHAVIOUR = tensor([[0.2, -0.4, 0.1]]), tensor([[1, 0, 3]]), tensor([0.6, 0.3, 0.1])
PI = LOGITS.softmax(dim=1)
EXACT = (-0.20943202, -0.33861034, 0.54804236)


def ascent(loss: Callable[[th.Tensor], th.Tensor]) -> th.Tensor:
    """Minus the gradient of a loss of the logits."""
    logits = LOGITS.clone().requires_grad_()
    return -th.autograd.grad(loss(logits), logits)[0][0]


def score(actions: list[int], advantage: th.Tensor, ratio: th.Tensor | None = None) -> th.Tensor:
    """The ascent by several actions of one state."""
    return ascent(lambda logits: score_function_loss(logits.log_softmax(dim=1)[:, actions], advantage, ratio))


def check(result: th.Tensor, expected: tuple[float, ...], tolerance: float = 1e-8) -> None:
    th.testing.assert_close(result, tensor(expected), rtol=0, atol=tolerance)


def test_exact_gradient_by_hand() -> None:
    assert policy_value(LOGITS, Q).item() == pytest.approx(1.51387267)
    check(ascent(lambda logits: exact_policy_loss(logits, Q)), EXACT)


def of_behaviour(values: th.Tensor, ratio: th.Tensor | None) -> th.Tensor:
    """The expectation over its actions."""
    gradients = [BEHAVIOUR[a] * score([a], values[:, [a]], None if ratio is None else ratio[:, [a]]) for a in range(3)]
    return th.stack(gradients).sum(dim=0)


def test_importance_sampling_by_hand() -> None:
    ratio = importance_ratio(PI.log(), BEHAVIOUR.log())
    check(ratio[0], (0.67926041, 0.74557204, 3.68772142))
    advantages = Q - policy_value(LOGITS, Q)
    check(of_behaviour(advantages, ratio), EXACT)
    check(of_behaviour(Q, ratio), EXACT)
    bounded = importance_ratio(PI.log(), BEHAVIOUR.log(), largest=1.0)
    check(of_behaviour(advantages, bounded), (-0.04664198, -0.24926927, 0.29591125))
    check(of_behaviour(advantages, None), (-0.05813596, -0.31685591, 0.37499187))
    check(of_behaviour(Q, None), (0.2332, -0.2013, -0.0319), tolerance=6e-5)


def test_two_actions_by_hand() -> None:
    """Actions 2 and 0, without a baseline, with each other's value and with the state's."""
    q = Q[:, [2, 0]]
    check(score([2, 0], q), (-0.31511249, -0.44734322, 0.76245572))
    check(score([2, 0], q - leave_one_out(q)), (-1, 0, 1))
    check(score([2, 0], q - policy_value(LOGITS, Q)), (-0.45506057, -0.10873288, 0.56379345))


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    th.testing.assert_close(leave_one_out(tensor([[1, 2, 6], [0, 4, 4]])), tensor([[4, 3.5, 1.5], [4, 2, 2]]))


@pytest.mark.parametrize("baseline", ["none", "value", "others"])
def test_score_function_is_the_exact_gradient_in_expectation(baseline: str) -> None:
    """Over all triples of actions."""
    total = th.zeros(3, dtype=th.float64)
    for actions in th.cartesian_prod(*[th.arange(3)] * 3).tolist():
        q = Q[:, actions]
        b = {"none": 0.0, "value": policy_value(LOGITS, Q), "others": leave_one_out(q)}[baseline]
        total += PI[0, actions].prod() * score(actions, q - b)
    check(total, EXACT)


def test_gradient_is_in_the_policy_alone() -> None:
    logits, q = LOGITS.clone().requires_grad_(), Q.clone().requires_grad_()
    for loss in (exact_policy_loss(logits, q), score_function_loss(logits.log_softmax(dim=1), q, logits)):
        assert th.autograd.grad(loss, q, retain_graph=True, allow_unused=True) == (None,)
    through_ratio = ascent(lambda logits: score_function_loss(logits.log_softmax(dim=1), Q, logits.exp()))
    check(through_ratio, tuple(ascent(lambda logits: score_function_loss(logits.log_softmax(dim=1), Q, LOGITS.exp()))))


def test_reparametrised_gradients_by_hand() -> None:
    """Q = -(a - 1)^2, mean 0.3, standard deviation 0.5, noise 0.4 and -1.2; by the standard deviation, not its logarithm."""
    noise = tensor([[0.4], [-1.2]])
    for squashed, (by_mean, by_std) in ((False, (1.8, -1.36)), (True, (1.60474464, -1.24886678))):
        mean, std = tensor([[0.3]]).requires_grad_(), tensor([[0.5]]).requires_grad_()
        action = squashed_gaussian(mean, std.log(), noise)[0] if squashed else mean + std * noise
        if squashed:
            check(action[:, 0].detach(), (0.46211716, -0.29131261))
        gradients = th.autograd.grad(-(action - 1).square().mean(), (mean, std))
        assert [gradient.item() for gradient in gradients] == pytest.approx([by_mean, by_std])


def test_score_function_of_a_gaussian_is_the_reparametrised_gradient_in_expectation() -> None:
    """By quadrature: 1.4 by the mean, -1 by the standard deviation."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    noise, share = th.from_numpy(nodes)[None], th.from_numpy(weights / weights.sum() * 20)[None]
    mean, std = tensor(0.3).requires_grad_(), tensor(0.5).requires_grad_()
    action = (mean + std * noise).detach()
    log_prob = th.distributions.Normal(mean, std).log_prob(action)
    loss = score_function_loss(log_prob, -(action - 1).square(), share)
    assert [-g.item() for g in th.autograd.grad(loss, (mean, std))] == pytest.approx([1.4, -1.0])
    loss = (share * (mean + std * noise - 1).square()).mean()
    assert [-g.item() for g in th.autograd.grad(loss, (mean, std))] == pytest.approx([1.4, -1.0])


def test_targets_by_hand() -> None:
    """Reward 1, gamma 0.9: the policy's value of the next state, that of action 2, and none behind a terminated episode."""
    reward, going_on = tensor([[1]]), tensor([[0]])
    assert td_target(reward, going_on, 0.9, policy_value(LOGITS, Q)).item() == pytest.approx(2.36248541)
    assert td_target(reward, going_on, 0.9, Q[:, [2]]).item() == pytest.approx(3.7)
    assert td_target(reward, 1 - going_on, 0.9, Q[:, [2]]).item() == 1


def test_weighted_loss_leads_to_the_policys_value() -> None:
    """The slope at 0.4, all of a behaviour's actions together; and one number by hand."""
    value = tensor([[0.4]]).requires_grad_()
    ratio, share = (PI / BEHAVIOUR).T, 3 * BEHAVIOUR[:, None]
    loss = weighted_value_loss(value, Q.T, ratio * share)
    (slope,) = th.autograd.grad(loss, value)
    assert slope.item() == pytest.approx(0.4 - 1.51387267)
    assert weighted_value_loss(tensor([[2]]), tensor([[5]]), tensor([[0.5]])).item() == pytest.approx(2.25)
