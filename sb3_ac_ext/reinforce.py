"""
REINFORCE with or without a baseline (Williams 1992; Sutton and Barto 2018, sections 13.3 and 13.4), on batches of episodes.

    collect whole episodes with pi
    G_t   = r_t + gamma r_{t+1} + gamma^2 r_{t+2} + ... to the end of the episode
    A_t   = G_t - b(s_t), or G_t without a baseline
    policy:   ascend mean [gamma^t] A_t log pi(a_t|s_t) + ent_coef mean H[pi(.|s_t)]
    baseline: descend mean (b(s_t) - G_t)^2
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_ac_ext.base.episodes import EpisodesMixin
from sb3_ac_ext.base.schedules import Rate
from sb3_ac_ext.engine import Network
from sb3_ac_ext.functional.returns import episode_discounts
from sb3_ac_ext.functional.surrogates import normalized, squared_error
from sb3_ac_ext.networks.actor_critic import SEPARATE_POLICIES, separate_optimizers
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.validation import Acts, Needs, PositiveInt


class Episodes(NamedTuple):
    """Whole episodes, one step after another."""

    observations: Any
    actions: th.Tensor
    advantages: th.Tensor
    """``(B,)`` G - b(s) with the baseline that it was collected with, in reward units"""
    returns: th.Tensor
    """``(B,)`` G, in reward units"""
    discounts: th.Tensor | None
    """``(B,)`` gamma^t; None where steps are not weighted"""


class Reinforce(EpisodesMixin, OnPolicyAlgorithm):
    """
    REINFORCE, with a learned baseline unless ``use_baseline=False``.

    An update learns from whole episodes only. Of several environments each contributes the same number of them, whichever are
    short: environments that have theirs go on unseen until the last one is done, and then all start anew. So no length of
    episode is favoured, at the price of steps that nothing is learned from.

    A truncated episode's return ends with its last reward, which is too little where more would have followed; with
    ``bootstrap_truncated`` the baseline's value of the last observation stands for the rest.

    Differences from the book: one update for a batch of episodes, by the mean over their steps and with Adam; gamma^t is left
    out by default, as most programs do.

    :param rollout_episodes: episodes in an update, rounded up to a multiple of the number of environments
    :param max_rollout_steps: most steps of each environment in a rollout; what has not ended then is left out, which favours
        short episodes. None for as many as its episodes can have, which needs a time limit
    :param use_baseline: whether there is a baseline b, an estimate of G by the value network
    :param baseline_learning_rate: rate of the baseline instead of ``learning_rate``
    :param bootstrap_truncated: whether truncated episodes end with the baseline's value of their last observation
    :param gamma_t_weight: whether steps are weighted by gamma^t, as the gradient of the discounted return has it
    :param normalize_advantage: whether A gets mean 0 and standard deviation 1 in an update
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction, and without any time limit
    :raises UnsupportedError: for spaces that no policy is there for
    """

    sb3_class = OnPolicyAlgorithm
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = SEPARATE_POLICIES

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 1e-3,
        rollout_episodes: int = 16,
        *,
        gamma: float = 0.99,
        ent_coef: float = 0.0,
        max_grad_norm: float | dict[str, float] | None = None,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        normalize_advantage: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        max_rollout_steps: Annotated[PositiveInt | None, Acts.ROLLOUT] = None,
        use_baseline: bool = True,
        baseline_learning_rate: Annotated[Rate | None, Needs("use_baseline", True)] = None,
        bootstrap_truncated: Annotated[bool, Acts.ROLLOUT, Needs("use_baseline", True)] = False,
        gamma_t_weight: bool = False,
        engine: bool = True,
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            **passed_on(Reinforce, locals()),
            n_steps=1,  # see EpisodesMixin._check_time_limit
            gae_lambda=1.0,  # all rewards to the end of the episode
            vf_coef=0.0,  # the baseline has its own rate
            rollout="episodes",
            drop_unfinished_episodes=True,
            _init_setup_model=False,
        )
        self.normalize_advantage = normalize_advantage
        self.max_rollout_steps = max_rollout_steps
        self.use_baseline = use_baseline
        self.baseline_learning_rate = baseline_learning_rate
        self.bootstrap_truncated = bootstrap_truncated
        self.gamma_t_weight = gamma_t_weight
        if _init_setup_model:
            self._setup_model()

    def _make_optimizers(self) -> None:
        separate_optimizers(self.policy, self.lr_schedule(1), "Reinforce")

    def _networks(self) -> Mapping[str, Network]:
        policy: Any = self.policy
        networks = {"policy": self._network("policy", policy, policy.optimizer)}
        if self.use_baseline:
            rate = self.baseline_learning_rate
            networks["baseline"] = self._network("baseline", policy, policy.value_optimizer, rate=rate)
        return networks

    # Updates

    def train(self) -> None:
        """
        One update on the episodes that were collected.

        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        with self._updates():
            episodes = self._episodes()
            self._run(self._update, episodes)
            self._n_updates += 1
        self.logger.record("train/samples", len(episodes.returns))

    def _episodes(self) -> Episodes:
        """The rollout."""
        samples = self._samples()
        columns = samples.observations, samples.actions, samples.advantages, samples.returns
        if not self.gamma_t_weight:
            return Episodes(*columns, None)
        starts = th.from_numpy(self.rollout_buffer.episode_starts[: self._rollout_length])
        discounts = episode_discounts(starts, self.gamma).T
        kept = slice(None) if self._kept is None else th.from_numpy(self._kept.T)
        return Episodes(*columns, discounts[kept].flatten().to(samples.returns))

    def _update(self, batch: Episodes) -> dict[str, th.Tensor]:
        values, log_prob, entropy = self._evaluate(batch, value=self.use_baseline)
        policy_loss = -(self._weights(batch) * log_prob).mean()
        losses = {"policy_loss": policy_loss, "entropy_loss": -entropy.mean()}
        self._engine.minimise(policy_loss + self.ent_coef * losses["entropy_loss"], "policy")
        if self.use_baseline:
            losses["baseline_loss"] = squared_error(values, batch.returns).mean()
            self._engine.minimise(losses["baseline_loss"], "baseline")
        return losses

    def _weights(self, batch: Episodes) -> th.Tensor:
        """``(B,)`` what log pi(a|s) is weighted with: [gamma^t] A"""
        weights = batch.advantages if self.use_baseline else batch.returns
        if self.normalize_advantage:
            weights = normalized(weights)
        return weights if batch.discounts is None else weights * batch.discounts

    def _record_explained_variance(self) -> None:
        if self.use_baseline:
            super()._record_explained_variance()
