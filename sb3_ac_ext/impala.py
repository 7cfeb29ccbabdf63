"""
Importance weighted actor-learner architecture (IMPALA; Espeholt et al. 2018, arXiv:1802.01561).

    actors, over and over: take the learner's weights; T steps with this policy mu; send them, with log mu(a|s)
    learner, for each batch of such segments, pi and V being its own now:
        rho = pi(a|s) / mu(a|s)
        v, A = V-trace of rewards, V and rho                                     (section 4.1, eq. 1)
        descend sum -A log pi(a|s) + vf_coef sum 1/2 (v - V(s))^2 - ent_coef sum H[pi(.|s)]     (section 4.2)

A is constant in the loss, with its factor min(pg_rho_bar, rho); v is constant too.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import gymnasium as gym
import torch as th
from stable_baselines3 import A2C
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_ac_ext.actors.on_policy import OnPolicyActorsMixin
from sb3_ac_ext.actors.replaying import SegmentReplayMixin
from sb3_ac_ext.buffers.segments import Segment, SegmentBatch
from sb3_ac_ext.engine import Network
from sb3_ac_ext.functional.surrogates import kl_estimate, reduced, squared_error
from sb3_ac_ext.functional.vtrace import vtrace
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.validation import Acts, ArgumentError, NonNegative, NonNegativeInt, Positive, PositiveInt, UnitInterval


class IMPALA(SegmentReplayMixin, OnPolicyActorsMixin, OnPolicyAlgorithm):
    """
    Actors whose policies may be a few updates old, and a learner that corrects for it by V-trace.

    A segment is what one actor sends at a time: ``n_steps`` steps of each of its environments. An update is made of
    ``batch_segments`` of them, and of ``replayed_segments`` older ones, for which all targets are computed anew.

    Actors in this process without ``simulated_lag`` have the learner's own policy: rho is 1, and this is A2C with lambda 1,
    which is then the simpler choice.

    Differences from the paper: the trace is cut where an episode is truncated, and bootstrapped from its last observation;
    an actor's segment has all of its environments; ratios are bounded to e^20 before anything else. Rewards are not clipped
    and the rate stays, unless wrappers and ``learning_rate="lin_6e-4"`` say so.

    Logged: ``train/rho``, mean of rho before any bound, and ``train/rho_clip_fraction``, the share of those that ``rho_bar``
    cuts; ``train/approx_kl``, mean of rho - 1 - log rho (k3), an estimate of KL(mu || pi) in nats; ``train/policy_lag``, how
    many updates the policy that acted was behind. Losses are sums if ``loss_reduction`` is "sum". If environments have several
    tasks (an info's "task", else the environment's id), for each ``tasks/<task>/ep_rew_mean``, ``ep_len_mean``, and ``share``
    of all steps; those with names of more than 20 letters are left out of the table on the console.

    :param n_steps: T, steps of each environment in a segment, all with the same weights
    :param batch_segments: fresh segments per update
    :param vtrace_lambda: lambda, a factor of the trace's ratios (the paper's remark 2): 0 bootstraps after one step
    :param rho_bar: bound of the ratios that weigh the errors; the larger, the nearer the values are to those of pi, and the
        higher is their variance. 1e9 bounds none, here and below
    :param c_bar: bound of the ratios in the trace, at most ``rho_bar``: how fast values are learned, not which
    :param pg_rho_bar: bound of the ratios of the policy's gradient
    :param vf_coef: weight of half the squared error; SB3's A2C weighs the whole, so that its 0.5 is 1 here
    :param kl_coef: weight of KL(mu || pi), the divergence from the policy that acted, reward units per nat; its estimate is
        log mu(a|s) - log pi(a|s), unbiased, of either sign
    :param loss_reduction: "sum" over all steps (published), or "mean" as with A2C: then rates do not depend on the batch's
        size, and gradients are smaller by its number of steps
    :param max_grad_norm: bound on the 2-norm of the gradient by all parameters; 40 is for sums. None does not clip
    :param use_rms_prop: whether RMSProp is the optimizer, as published (decay 0.99); else the policy's, which is Adam. A class
        in ``policy_kwargs`` comes before that
    :param rms_prop_eps: of RMSProp, inside of the root, in squared units of the gradient
    :param replayed_segments: segments per update from a replay of the last ``replay_size`` ones, each environment's drawn by
        itself, in addition to the fresh ones; as many as those are half of the batch (published)
    :param replay_size: segments that the replay holds, the newest ones; saved by ``save_replay_buffer``, or in the zip by
        ``include=["replay_buffer"]``
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for gSDE, and spaces that A2C cannot take
    """

    sb3_class = OnPolicyAlgorithm
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = A2C.policy_aliases

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 6e-4,
        n_steps: int = 20,
        batch_segments: Annotated[PositiveInt, Acts.ROLLOUT] = 1,
        gamma: float = 0.99,
        *,
        vtrace_lambda: UnitInterval = 1.0,
        rho_bar: Positive = 1.0,
        c_bar: Positive = 1.0,
        pg_rho_bar: Positive = 1.0,
        ent_coef: float = 0.01,
        vf_coef: float = 0.5,
        kl_coef: NonNegative = 0.0,
        loss_reduction: Literal["mean", "sum"] = "sum",
        max_grad_norm: float | dict[str, float] | None = 40.0,
        use_rms_prop: Annotated[bool, Acts.NEVER] = True,
        rms_prop_eps: Annotated[Positive, Acts.NEVER] = 0.01,
        replayed_segments: NonNegativeInt = 0,
        replay_size: PositiveInt = 1000,
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
            **passed_on(IMPALA, locals()), gae_lambda=1.0, use_sde=False, sde_sample_freq=-1, _init_setup_model=False
        )
        self.batch_segments = batch_segments
        self.vtrace_lambda = vtrace_lambda
        self.rho_bar = rho_bar
        self.c_bar = c_bar
        self.pg_rho_bar = pg_rho_bar
        self.kl_coef = kl_coef
        self.loss_reduction = loss_reduction
        self.use_rms_prop = use_rms_prop
        self.rms_prop_eps = rms_prop_eps
        self.replayed_segments = replayed_segments
        self.replay_size = replay_size
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.c_bar > self.rho_bar:
            raise ArgumentError(f"c_bar must be at most rho_bar={self.rho_bar}, got {self.c_bar}")
        if self.replayed_segments:
            self._check_fits("replay_size", self.replay_size * (self.n_steps + 1), "segments")

    def _networks(self) -> Mapping[str, Network]:
        return {"policy": self._network("policy", self.policy, self.policy.optimizer)}

    def _results_per_update(self) -> int:
        return self.batch_segments

    def train(self) -> None:
        """
        One update on the segments that were taken.

        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        with self._updates():
            outputs = self._run(self._update, self._batch([*self._results, *self._replayed()]))
            self._n_updates += 1
            self._values_and_targets = outputs["values"], outputs["targets"]

    def _replayed(self) -> list[Segment]:
        """Segments from the replay, which gets those that were taken."""
        if not self.replayed_segments:
            return []
        for segment in self._results:
            self.replay_buffer.add(segment, self.replay_size)
        return self.replay_buffer.sample(self.replayed_segments)

    def _update(self, batch: SegmentBatch) -> dict[str, th.Tensor]:
        values, log_prob, entropy = (part.view_as(batch.rewards) for part in self._evaluate(batch))  # (T, N)
        with th.no_grad():
            next_values = batch.next_values(values, self.policy.predict_values(batch.last_observations).flatten())
        log_rho = log_prob - batch.behaviour["log_probs"]
        targets = vtrace(
            *(batch.rewards, values, next_values, log_rho, batch.terminated, batch.truncated, self.gamma),
            rho_bar=self.rho_bar,
            c_bar=self.c_bar,
            pg_rho_bar=self.pg_rho_bar,
            vtrace_lambda=self.vtrace_lambda,
        )
        policy_loss = reduced(-targets.advantages * log_prob, self.loss_reduction)
        value_loss = reduced(0.5 * squared_error(values, targets.values), self.loss_reduction)
        entropy_loss = reduced(-entropy, self.loss_reduction)
        kl_loss = reduced(-log_rho, self.loss_reduction)
        loss = policy_loss + self.vf_coef * value_loss + self.ent_coef * entropy_loss + self.kl_coef * kl_loss
        self._engine.minimise(loss, "policy")
        return {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy_loss": entropy_loss,
            "rho": targets.rhos.mean(),
            "rho_clip_fraction": (targets.rhos > self.rho_bar).float().mean(),
            "approx_kl": kl_estimate(targets.rhos.log(), "k3"),
            "values": values,
            "targets": targets.values,
        }
