"""Actor-critic with Kronecker-factored trust regions: see `sb3_ac_ext.acktr.acktr` for the algorithm."""

from stable_baselines3.a2c import CnnPolicy, MlpPolicy, MultiInputPolicy

from sb3_ac_ext.acktr.acktr import ACKTR
from sb3_ac_ext.acktr.blocks import LayerCalls
from sb3_ac_ext.acktr.kfac_optimizer import KFAC

__all__ = ["ACKTR", "KFAC", "CnnPolicy", "LayerCalls", "MlpPolicy", "MultiInputPolicy"]
