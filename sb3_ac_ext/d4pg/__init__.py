"""Distributional deterministic policy gradients: see `sb3_ac_ext.d4pg.d4pg` for the algorithm."""

from sb3_ac_ext.d4pg.d4pg import D4PG
from sb3_ac_ext.d4pg.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["D4PG", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
