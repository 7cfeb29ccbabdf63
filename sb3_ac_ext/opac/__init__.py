"""Off-policy actor-critic: see `sb3_ac_ext.opac.opac` for the algorithm."""

from sb3_ac_ext.opac.opac import OPAC

__all__ = ["OPAC"]
