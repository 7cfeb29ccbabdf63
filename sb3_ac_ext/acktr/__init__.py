"""Actor-critic with Kronecker-factored trust regions: see `sb3_ac_ext.acktr.acktr` for the algorithm."""

from sb3_ac_ext.acktr.acktr import ACKTR
from sb3_ac_ext.acktr.kfac_optimizer import KFAC
from sb3_ac_ext.legacy.actor_critic import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["ACKTR", "KFAC", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
