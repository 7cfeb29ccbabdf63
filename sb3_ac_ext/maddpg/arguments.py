"""Checks of MADDPG's own arguments."""

from typing import Any

from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_ac_ext.base.arguments import check_float_actions
from sb3_ac_ext.envs.joint_spaces import JointBox
from sb3_ac_ext.maddpg.buffer import JointReplayBuffer
from sb3_ac_ext.maddpg.policies import MlpPolicy
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, UnsupportedError, check_number, check_switch


def check_maddpg_arguments(model: Any) -> None:
    """
    :param model: a `MADDPG` whose arguments and spaces are set
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if one is out of range or contradicts another
    :raises UnsupportedError: if the spaces or a combination of arguments cannot be served
    """
    if not (isinstance(model.policy_class, type) and issubclass(model.policy_class, MlpPolicy)):
        raise ArgumentTypeError(f"policy must be derived from {MlpPolicy.__module__}.MlpPolicy, got {model.policy_class}")
    check_float_actions(model.action_space)
    check_switch("centralised", model.centralised)
    check_number("policy_delay", model.policy_delay, low=1, integer=True)
    for name in ("target_policy_noise", "target_noise_clip", "logit_penalty"):
        check_number(name, getattr(model, name), low=0)
    if model.policy_kwargs.get("centralised", model.centralised) != model.centralised:
        raise ArgumentError(
            f"centralised must be what the policy was made with, {model.policy_kwargs['centralised']}, got {model.centralised}"
        )
    if model.n_steps > 1:
        raise UnsupportedError(f"n_steps must be 1 (agents may end at different steps), got {model.n_steps}")
    if model.replay_buffer_class is not None and not issubclass(model.replay_buffer_class, JointReplayBuffer):
        raise UnsupportedError(
            f"replay_buffer_class must be None or derived from {JointReplayBuffer.__module__}.JointReplayBuffer, which knows "
            f"each agent's rewards, got {model.replay_buffer_class}"
        )
    check_normalisation(model.env)


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
