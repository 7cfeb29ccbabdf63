"""Soft actor-critic: see `sb3_ac_ext.sacx.sacx` for the algorithm."""

from sb3_ac_ext.sacx.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_ac_ext.sacx.sacx import SACX

__all__ = ["SACX", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
