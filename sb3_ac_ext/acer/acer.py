"""
Actor-critic with experience replay (ACER; Wang et al. 2017, arXiv:1611.01224).

    collect a segment by mu = pi, keep it with all that mu is a function of; learn from it
    then from n ~ Poisson(replay_ratio) older segments; for each, pi and Q being those of now:
        rho = pi / mu;  Q_ret = Retrace of rewards, Q and V, Q_opc the same with coefficients of 1       (section 3.1)
        g = min(c, rho) (Q_ret - V) grad log pi(a|s) + sum_a [1 - c / rho(a)]_+ pi(a) (Q(a) - V) grad log pi(a|s)
                                                                                                        (section 3.2)
        k = grad KL(average pi || pi);  z = g - max(0, (k . g - delta) / |k|^2) k                       (section 3.3)
        ascend mean z . phi, descend vf_coef mean 1/2 (Q_ret - Q(s, a))^2
        average theta <- decay average theta + (1 - decay) theta
    Box:  Q~(s, a) = V(s) + A(s, a) - 1/n sum_i A(s, u_i), u ~ pi, in the place of Q; Q_opc in the place of Q_ret in g;
        one action a' ~ pi for the sum; 1/2 (min(1, rho) (Q_ret - Q~) + V - V(s))^2 is descended too      (section 5)

Gradients are by phi, the statistics of pi in each state: probabilities, or the mean. Only phi, Q(s, a), Q~ and the last V(s)
carry gradient.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import polyak_update

from sb3_ac_ext.acer.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, behaviour
from sb3_ac_ext.acer.terms import Terms, of_box, of_choices
from sb3_ac_ext.actors.actor import Actor
from sb3_ac_ext.actors.on_policy import OnPolicyActorsMixin
from sb3_ac_ext.actors.replaying import SegmentReplayMixin
from sb3_ac_ext.base.arguments import check_policy_class
from sb3_ac_ext.buffers.segments import Segment, SegmentBatch
from sb3_ac_ext.engine import Network
from sb3_ac_ext.functional.retrace import retrace
from sb3_ac_ext.functional.trust_region import Space, trust_region_projection
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.validation import (
    Acts,
    ArgumentError,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    UnitInterval,
    UnsupportedError,
)

DEFAULTS: dict[str, tuple[Any, Any]] = {"online_update": (True, False), "rho_bar": (10.0, 5.0), "average_decay": (0.99, 0.995)}
"""What None stands for: with Discrete actions, and in a Box."""


class Informant(Actor):
    """An actor that says all that its distributions are functions of."""

    def _sample(self, batch: tuple[Any]) -> dict[str, th.Tensor]:
        with self._lock:
            distribution: Any = self.policy.get_distribution(batch[0])
            actions, known = distribution.get_actions(), behaviour(distribution.distribution)
        chosen = isinstance(self.policy.action_space, spaces.Discrete)
        return {"actions": actions if chosen else actions.reshape(len(actions), -1), **known}


class ACER(SegmentReplayMixin, OnPolicyActorsMixin, OnPolicyAlgorithm):
    """
    Actor-critic that learns from each segment of experience several times, by Retrace, truncated importance weights with bias
    correction, and a trust region around an average policy; for Discrete actions, and for a Box by stochastic duelling
    networks.

    A segment has ``n_steps`` steps of all environments. In a Box the policy is a Gaussian whose standard deviation
    ``action_std`` does not change, so that ``ent_coef`` and ``trust_region_space`` mean nothing there.

    Observations and rewards are replayed as ``VecNormalize`` had them when they were seen.

    Differences from the paper: the trace is cut where an episode is truncated, and bootstrapped from its last observation;
    environments are stepped together, and each replayed segment is drawn for each of them by itself; ratios are bounded to
    e^20 before anything else; rates are constant unless "lin_7e-4" says otherwise.

    Logged: ``train/rho``, mean of rho of the taken actions before any bound; ``train/rho_clip_fraction``, the share of them
    above ``rho_bar``; ``train/average_kl``, mean KL(average pi || pi), in nats; ``train/trust_region_fraction``, the share of
    states where the trust region acts; ``train/policy_lag``. Lags are counted in iterations, whatever updates these have.

    :param n_steps: T, steps of each environment in a segment; the paper has 20 for Discrete actions, 50 for continuous ones
    :param batch_segments: fresh segments per iteration, and replayed ones per update
    :param ent_coef: weight of the entropy, reward units per nat; only with Discrete actions
    :param vf_coef: weight of half the squared error of the action-values
    :param max_grad_norm: bound on the 2-norm of the gradient by all parameters; None does not clip
    :param use_rms_prop: whether RMSProp is the optimizer (decay 0.99, the mean square starts at 1); else the policy's, which
        is Adam. A class in ``policy_kwargs`` comes before that
    :param rms_prop_eps: of RMSProp, inside of the root, in squared units of the gradient
    :param replay_ratio: mean number of updates on replayed segments per iteration; 0 replays none, and stores none
    :param buffer_size: steps that are kept of each environment, the newest ones, rounded up to whole segments; saved by
        ``save_replay_buffer``, or in the zip by ``include=["replay_buffer"]``
    :param learning_starts: steps of each environment that are stored before anything is replayed
    :param online_update: whether each fresh segment is learned from at once, besides being stored; None for Discrete actions
        only, as published
    :param rho_bar: c, bound of the importance ratios; what is cut off is corrected by the critic. None for 10 with Discrete
        actions, 5 in a Box
    :param trust_region_delta: delta, how fast KL(average pi || pi) may grow along the policy's gradient, in each state, in
        reward units: much more than the advantages are is no bound. None for no trust region
    :param average_decay: alpha, share of the average policy that each update leaves; None for 0.99 with Discrete actions,
        0.995 in a Box
    :param trust_region_space: phi of Discrete actions, "probs" as published; by "logits" k is 0 where pi is the average policy
    :param entropy_in_trust_region: whether the entropy's gradient is part of g; else it is added outside
    :param action_std: standard deviation of a Box's actions, in their units; ``log_std_init`` in ``policy_kwargs`` comes
        before that
    :param advantage_samples: n, actions that A is centred by, in a Box
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for gSDE, and actions that are neither Discrete nor a Box
    """

    sb3_class = OnPolicyAlgorithm
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: MlpPolicy
    average_policy: MlpPolicy

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 7e-4,
        n_steps: int = 20,
        batch_segments: Annotated[PositiveInt, Acts.ROLLOUT] = 1,
        gamma: float = 0.99,
        *,
        ent_coef: float = 0.01,
        vf_coef: float = 0.5,
        max_grad_norm: float | dict[str, float] | None = 10.0,
        use_rms_prop: Annotated[bool, Acts.NEVER] = True,
        rms_prop_eps: Annotated[Positive, Acts.NEVER] = 1e-5,
        replay_ratio: NonNegative = 4.0,
        buffer_size: PositiveInt = 5000,
        learning_starts: NonNegativeInt = 1000,
        online_update: bool | None = None,
        rho_bar: Positive | None = None,
        trust_region_delta: NonNegative | None = 1.0,
        average_decay: UnitInterval | None = None,
        trust_region_space: Space = "probs",
        entropy_in_trust_region: bool = True,
        action_std: Annotated[Positive, Acts.NEVER] = 0.3,
        advantage_samples: PositiveInt = 5,
        actors: Literal["inline", "ray"] = "inline",
        n_actors: int = 1,
        simulated_lag: int = 0,
        max_policy_lag: int | None = None,
        ray_address: str | None = None,
        actor_resources: dict[str, float] | None = None,
        actor_env_fn: Callable[..., gym.Env[Any, Any]] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        engine: bool = True,
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            **passed_on(ACER, locals()), gae_lambda=1.0, use_sde=False, sde_sample_freq=-1, _init_setup_model=False
        )
        self.batch_segments = batch_segments
        self.use_rms_prop = use_rms_prop
        self.rms_prop_eps = rms_prop_eps
        self.replay_ratio = replay_ratio
        self.buffer_size = buffer_size
        self.learning_starts = learning_starts
        self.online_update = online_update
        self.rho_bar = rho_bar
        self.trust_region_delta = trust_region_delta
        self.average_decay = average_decay
        self.trust_region_space = trust_region_space
        self.entropy_in_trust_region = entropy_in_trust_region
        self.action_std = action_std
        self.advantage_samples = advantage_samples
        self._iterations = 0
        if _init_setup_model:
            self._setup_model()

    # What it is made of

    @property
    def _actor_class(self) -> type[Actor]:
        return Informant

    def _make_optimizers(self) -> None:
        super()._make_optimizers()
        if not self._chooses and "log_std_init" not in self.policy_kwargs:
            self.policy.log_std.fill_(math.log(self.action_std))
        policy: Any = copy.copy(self.policy)
        policy.optimizer = None
        self.average_policy = copy.deepcopy(policy)
        self.average_policy.set_training_mode(False)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_policy_class(self, MlpPolicy)
        if not isinstance(self.action_space, spaces.Discrete | spaces.Box):
            raise UnsupportedError(
                f"action_space must be Discrete, as Q has a value for each action, or a Box, got {self.action_space}"
            )
        if self.replay_ratio == 0 and not self._value("online_update"):
            raise ArgumentError(
                "replay_ratio must be more than 0 where online_update is False, as it is in a Box if it is None, or nothing "
                f"is learned from, got {self.replay_ratio}"
            )
        if self.learning_starts > self.buffer_size:
            raise ArgumentError(
                f"learning_starts must be at most buffer_size={self.buffer_size}, or nothing is replayed, "
                f"got {self.learning_starts}"
            )
        if self.replay_ratio > 0:
            self._check_fits("buffer_size", self.n_actors * self.buffer_size, "steps of each environment")

    @property
    def _chooses(self) -> bool:
        """Whether actions are Discrete."""
        return isinstance(self.action_space, spaces.Discrete)

    def _value(self, name: str) -> Any:
        """An argument of `DEFAULTS`, or what it is for these actions."""
        given = getattr(self, name)
        return DEFAULTS[name][not self._chooses] if given is None else given

    def _networks(self) -> Mapping[str, Network]:
        return {"policy": self._network("policy", self.policy, self.policy.optimizer, self.average_policy)}

    def _results_per_update(self) -> int:
        return self.batch_segments

    # Updates

    @property
    def _version(self) -> int:
        return self._iterations

    def train(self) -> None:
        """
        An update on the segments that were taken, and some on older ones.

        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        self._iterations += 1
        with self._updates():
            if self._value("online_update"):
                self._learn_from(self._results)
            if self.replay_ratio > 0:
                for segment in self._results:
                    self.replay_buffer.add(segment, self._segments(self.buffer_size))
                if len(self.replay_buffer) >= self._segments(self.learning_starts):
                    for _ in range(np.random.poisson(float(self.replay_ratio))):  # noqa: NPY002  # which SB3 seeds
                        self._learn_from(self.replay_buffer.sample(self.batch_segments))

    def _segments(self, steps: int) -> int:
        """How many have so many steps of each environment."""
        return max(math.ceil(steps / self.n_steps), 1) * self.n_actors

    def _learn_from(self, segments: Sequence[Segment]) -> None:
        outputs = self._run(self._update, self._batch(segments))
        self._n_updates += 1
        self._values_and_targets = outputs["values"], outputs["targets"]

    def _update(self, batch: SegmentBatch) -> dict[str, th.Tensor]:
        terms = self._terms(batch)
        z = terms.gain
        if self.trust_region_delta is not None:
            z = trust_region_projection(terms.gain, terms.kl_gradient, self.trust_region_delta)
        policy_loss = -(z * terms.phi).sum(dim=1).mean()
        entropy_loss = -terms.entropy.mean()
        value_loss = terms.errors.mean()
        loss = policy_loss + self.vf_coef * value_loss
        if not self.entropy_in_trust_region:
            loss = loss + self.ent_coef * entropy_loss
        self._engine.minimise(loss, "policy")
        self._engine.follow("policy", 1 - self._value("average_decay"))
        polyak_update(statistics_of(self.policy), statistics_of(self.average_policy), 1.0)
        return {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy_loss": entropy_loss,
            "rho": terms.rhos.mean(),
            "rho_clip_fraction": (terms.rhos > self._value("rho_bar")).float().mean(),
            "average_kl": terms.kl.mean(),
            "trust_region_fraction": (z != terms.gain).any(dim=1).float().mean(),
            "values": terms.values,
            "targets": terms.targets,
        }

    def _terms(self, batch: SegmentBatch) -> Terms:
        judgement = self.policy.judge(batch.observations)
        with th.no_grad():
            average = self.average_policy.judge(batch.observations).distribution
            last_values = self.policy.predict_values(batch.last_observations).flatten()
            next_values = batch.next_values(judgement.state_values.view_as(batch.rewards), last_values)

        def retraced(action_values: th.Tensor, trace: th.Tensor) -> th.Tensor:
            action_values, trace = (part.view_as(batch.rewards) for part in (action_values, trace))
            ends = batch.terminated, batch.truncated
            return retrace(batch.rewards, action_values, next_values, trace, *ends, self.gamma).flatten()

        mu = {name: values.flatten(0, 1) for name, values in batch.behaviour.items()}
        about, rho_bar = (judgement, average, mu, batch.actions, retraced), self._value("rho_bar")
        if not self._chooses:
            return of_box(self.policy, *about, rho_bar=rho_bar, n=self.advantage_samples)
        ent_coef = self.ent_coef if self.entropy_in_trust_region else 0.0
        return of_choices(*about, rho_bar=rho_bar, space=self.trust_region_space, ent_coef=ent_coef)

    # What is saved

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "average_policy"], tensors

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "average_policy"]


def statistics_of(policy: MlpPolicy) -> list[th.Tensor]:
    """Those of batch normalisation."""
    return [buffer for buffer in policy.buffers() if buffer.is_floating_point()]
