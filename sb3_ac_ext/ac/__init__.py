"""One-step actor-critic: see `sb3_ac_ext.ac.ac` for the algorithm."""

from sb3_ac_ext.ac.ac import AC

__all__ = ["AC"]
