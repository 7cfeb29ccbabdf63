"""
Several agents: see `sb3_ac_ext.maddpg.maddpg` for the algorithm.

Importing this registers the tasks of mpe2 with Gymnasium, if it is installed; none of them is imported.
"""

from sb3_ac_ext.envs.joint import JointEnv, register_mpe, register_parallel_env
from sb3_ac_ext.envs.joint_spaces import JointBox
from sb3_ac_ext.maddpg.agent import Agent
from sb3_ac_ext.maddpg.maddpg import MADDPG
from sb3_ac_ext.maddpg.policies import MlpPolicy

__all__ = ["MADDPG", "Agent", "JointBox", "JointEnv", "MlpPolicy", "register_parallel_env"]

register_mpe()
