"""Actor-critic algorithms for Stable-Baselines3, trained with RL Zoo."""

from sb3_ac_ext.ddpgx import DDPGX
from sb3_ac_ext.sacx import SACX
from sb3_ac_ext.td3x import TD3X

__version__ = "0.1.0"
__all__ = ["DDPGX", "SACX", "TD3X"]

try:
    import _sb3_ac_ext_hook
except ModuleNotFoundError:  # a source tree that is not installed: `python -m sb3_ac_ext.train` registers without the hook
    pass
else:
    _sb3_ac_ext_hook.startup()
