"""Deep deterministic policy gradient: see `sb3_ac_ext.ddpgx.ddpgx` for the algorithm."""

from sb3_ac_ext.ddpgx.ddpgx import DDPGX
from sb3_ac_ext.ddpgx.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["DDPGX", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
