"""
Off-PAC (Degris, White and Sutton 2012, "Off-Policy Actor-Critic", arXiv:1205.4839, Algorithm 1), linear in features x.

    a ~ b(.|s); take it: r, s';  rho = pi(a|s) / b(a|s)
    delta = r + gamma' v.x' - v.x                                       gamma' = gamma, 0 where the episode terminated
    e   <- rho (x + gamma_t lambda e)                                   gamma_t: the gamma' of the step before, 0 at the start
    v   <- v + a_v [delta e - gamma' (1 - lambda) (w.e) x']             GTD(lambda), w of before the step
    w   <- w + a_w [delta e - (w.x) x]
    e_u <- rho (psi + gamma_t lambda e_u)                               psi = grad log pi(a|s), of softmax(u x)
    u   <- u + a_u delta e_u
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_ac_ext.functional.gtd import eligibility_trace, gtd_step
from sb3_ac_ext.functional.gumbel import gumbel_noise
from sb3_ac_ext.functional.importance import importance_ratio
from sb3_ac_ext.opac.features import FEATURES, Given, Identity, TileCoding, check_features
from sb3_ac_ext.validation import Acts, Needs, PositiveInt, Syntax

Features = Annotated[
    str | Callable[[th.Tensor], Any], Syntax(FEATURES, check_features), Acts.NEVER, Needs("variant", "degris")
]
Traces = dict[str, th.Tensor]
"""``(N, n)`` "critic", ``(N, A, n)`` "actor", and ``(N,)`` "discount", the gamma' of the step before."""


class LinearPolicy(BasePolicy):
    """
    softmax(u x) of Discrete actions, and the critic's weights v and w; all are 0 at the start.

    :param observation_space: Observation space
    :param action_space: a Discrete one
    :param lr_schedule: not used, the algorithm has the rates
    :param features: what the algorithm's argument of this name says
    :param n_tilings: grids of "tile", see `sb3_ac_ext.opac.features.TileCoding`
    :param n_tiles: tiles of each dimension between the bounds
    :param low: bounds of "tile" in place of the observation space's, one for all dimensions or one for each
    :param high: likewise
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        *,
        features: Any = "tile",
        n_tilings: PositiveInt = 10,
        n_tiles: PositiveInt = 10,
        low: float | list[float] | None = None,
        high: float | list[float] | None = None,
    ) -> None:
        super().__init__(observation_space, action_space)
        self.options: dict[str, Any] = {
            "features": features,
            "n_tilings": n_tilings,
            "n_tiles": n_tiles,
            "low": low,
            "high": high,
        }
        if features == "tile":
            self.features: Any = TileCoding(observation_space, n_tilings, n_tiles, low, high)
        else:
            self.features = Identity(observation_space) if features == "identity" else Given(features, observation_space)
        self.u = nn.Parameter(th.zeros(int(action_space.n), self.features.size), requires_grad=False)
        self.v = nn.Parameter(th.zeros(self.features.size), requires_grad=False)
        self.w = nn.Parameter(th.zeros(self.features.size), requires_grad=False)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        logits = self.logits(self.features(observation))
        return (logits if deterministic else logits + gumbel_noise(logits)).argmax(dim=1)

    def logits(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: ``(N, n)`` features
        :return: ``(N, A)``
        """
        return x @ self.u.T

    def log_prob(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: ``(N, ...)``
        :param actions: ``(N, 1)``
        :return: ``(N, 1)`` log pi(a|s)
        """
        return self.logits(self.features(obs)).log_softmax(dim=1).gather(1, actions)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **self.options, "lr_schedule": self._dummy_schedule}


class Step(NamedTuple):
    """A step of N environments."""

    observations: th.Tensor
    """``(N, ...)`` s."""
    actions: th.Tensor
    """``(N, 1)`` a."""
    rewards: th.Tensor
    """``(N,)`` r."""
    next_observations: th.Tensor
    """``(N, ...)`` s', the episode's last one where it was truncated; anything where it terminated."""
    terminated: th.Tensor
    """``(N,)`` 1 where the episode terminated there, 0 elsewhere, truncation included."""
    started: th.Tensor
    """``(N,)`` 1 where the episode began with s, 0 elsewhere."""
    log_probs: th.Tensor
    """``(N, 1)`` log b(a|s)."""


class Settings(NamedTuple):
    """What a step is learned with."""

    gamma: float
    trace_lambda: float
    actor_trace_gamma: bool
    """Whether gamma_t decays the actor's traces too."""
    actor_rate: float
    """a_u; all rates are those of one environment, of several the mean is taken."""
    critic_rate: float
    """a_v."""
    correction_rate: float
    """a_w."""


def traces_of(policy: LinearPolicy, n_envs: int, before: Traces | None) -> Traces:
    """
    :param policy: whose weights they are of
    :param n_envs: N
    :param before: traces, if there are any
    :return: these if they still fit, and zeros otherwise
    """
    shapes = {"critic": (n_envs, *policy.v.shape), "actor": (n_envs, *policy.u.shape), "discount": (n_envs,)}
    if before is not None and {name: tuple(trace.shape) for name, trace in before.items()} == shapes:
        return {name: trace.to(policy.v) for name, trace in before.items()}
    return {name: policy.v.new_zeros(shape) for name, shape in shapes.items()}


@th.no_grad()
def learn(policy: LinearPolicy, traces: Traces, step: Step, settings: Settings) -> th.Tensor:
    """
    Algorithm 1's update from one step.

    :param policy: whose weights change
    :param traces: e, e_u and gamma_t, which change
    :param step: of N environments
    :param settings: discount, trace decay, rates
    :return: ``(N,)`` delta
    """
    x, next_x = policy.features(step.observations), policy.features(step.next_observations)
    logits = policy.logits(x)
    ratio = importance_ratio(logits.log_softmax(dim=1).gather(1, step.actions), step.log_probs).flatten()
    goes_on = 1 - step.started
    gamma_t = goes_on * traces["discount"]
    discount = settings.gamma * (1 - step.terminated)
    decay = gamma_t * settings.trace_lambda
    gtd = gtd_step(
        *(policy.v, policy.w, traces["critic"], x, next_x, step.rewards, ratio),
        decay=decay,
        discount=discount,
        gtd_lambda=settings.trace_lambda,
    )
    chosen = th.zeros_like(logits).scatter_(1, step.actions, 1.0)
    psi = (chosen - logits.softmax(dim=1))[:, :, None] * x[:, None]
    actor_decay = decay if settings.actor_trace_gamma else goes_on * settings.trace_lambda
    actor_trace = eligibility_trace(traces["actor"], psi, ratio, actor_decay)
    policy.v.add_(settings.critic_rate * gtd.v.mean(dim=0))
    policy.w.add_(settings.correction_rate * gtd.w.mean(dim=0))
    policy.u.add_(settings.actor_rate * (gtd.delta[:, None, None] * actor_trace).mean(dim=0))
    traces.update(critic=gtd.trace, actor=actor_trace, discount=discount)
    return gtd.delta
