"""What SB3 has no algorithm for: a stochastic actor of choices or Box actions beside critics."""

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import get_parameters_by_name

from sb3_ac_ext.opac.networks import Actor, Critic
from sb3_ac_ext.opac.policies import MlpPolicy

NETWORKS = ("actor", "critic", "critic_target")


class StochasticActorCritic(OffPolicyAlgorithm):
    """What SB3's SAC has around its update, for Box and Discrete actions, without gSDE."""

    policy: Any
    actor: Actor  # type: ignore[assignment]
    critic: Critic
    critic_target: Critic

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"sde_support": False, "supported_action_spaces": (spaces.Box, spaces.Discrete), "support_multi_env": True}
        super().__init__(*args, **kwargs)

    def _setup_model(self) -> None:
        super()._setup_model()
        if isinstance(self.policy, MlpPolicy):
            for name in NETWORKS:
                setattr(self, name, getattr(self.policy, name))
            self.batch_norm_stats = get_parameters_by_name(self.critic, ["running_"])
            self.batch_norm_stats_target = get_parameters_by_name(self.critic_target, ["running_"])

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *NETWORKS, "batch_norm_stats", "batch_norm_stats_target"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        deep = isinstance(self.policy, MlpPolicy)
        return ["policy", "actor.optimizer", "critic.optimizer"] if deep else ["policy"], []
