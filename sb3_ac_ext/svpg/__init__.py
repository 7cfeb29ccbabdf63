"""Particles that learn the same task and repel each other: see `sb3_ac_ext.svpg.svpg` for the algorithm."""

from sb3_ac_ext.svpg.policies import Particles
from sb3_ac_ext.svpg.svpg import SVPG

__all__ = ["SVPG", "Particles"]
