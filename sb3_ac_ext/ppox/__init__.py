"""Proximal policy optimisation: see `sb3_ac_ext.ppox.ppox` for the algorithm."""

from sb3_ac_ext.networks.actor_critic import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_ac_ext.ppox.ppox import PPOX

__all__ = ["PPOX", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
