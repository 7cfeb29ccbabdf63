"""What MADDPG has around its updates."""

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_ac_ext.envs.joint_spaces import JointBox
from sb3_ac_ext.maddpg.networks import JointActor, JointCritic
from sb3_ac_ext.maddpg.policies import MlpPolicy
from sb3_ac_ext.validation import UnsupportedError

NETWORKS = ("actor", "critic", "actor_target", "critic_target")


class JointActorCritic(OffPolicyAlgorithm):
    """What SB3's TD3 has around its update: Box actions, no gSDE, the policy's networks as attributes, what is saved."""

    policy: MlpPolicy
    actor: JointActor  # type: ignore[assignment]
    actor_target: JointActor
    critic: JointCritic
    critic_target: JointCritic

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"sde_support": False, "supported_action_spaces": (spaces.Box,), "support_multi_env": True}
        super().__init__(*args, **kwargs)

    def _setup_model(self) -> None:
        super()._setup_model()
        for name in NETWORKS:
            setattr(self, name, getattr(self.policy, name))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *NETWORKS]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], []


def check_normalisation(env: VecEnv | None) -> None:
    """
    :param env: of the model
    :raises UnsupportedError: if it normalises the sum of rewards, which no agent learns from
    """
    normalizer = None if env is None else unwrap_vec_normalize(env)
    if normalizer is not None and normalizer.norm_reward and isinstance(normalizer.action_space, JointBox):
        raise UnsupportedError(
            "VecNormalize must have norm_reward=False with several agents, each of which learns from its own reward (in RL "
            "Zoo: normalize: {norm_obs: true, norm_reward: false}), got norm_reward=True"
        )
