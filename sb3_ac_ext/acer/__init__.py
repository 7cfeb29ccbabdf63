"""Actor-critic with experience replay: see `sb3_ac_ext.acer.acer` for the algorithm."""

from sb3_ac_ext.acer.acer import ACER
from sb3_ac_ext.acer.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["ACER", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
