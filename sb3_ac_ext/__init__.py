"""Actor-critic algorithms for Stable-Baselines3, trained with RL Zoo."""

from sb3_ac_ext.a3c import A3C
from sb3_ac_ext.ac import AC
from sb3_ac_ext.acer import ACER
from sb3_ac_ext.acktr import ACKTR
from sb3_ac_ext.actors.remembering import install as _remember_env_fns
from sb3_ac_ext.d4pg import D4PG
from sb3_ac_ext.ddpgx import DDPGX
from sb3_ac_ext.impala import IMPALA
from sb3_ac_ext.maddpg import MADDPG
from sb3_ac_ext.moved import install as _install_old_names
from sb3_ac_ext.opac import OPAC
from sb3_ac_ext.ppox import PPOX
from sb3_ac_ext.reinforce import Reinforce
from sb3_ac_ext.sacx import SACX
from sb3_ac_ext.svpg import SVPG
from sb3_ac_ext.td3x import TD3X
from sb3_ac_ext.trpox import TRPOX

__version__ = "0.1.0"
__all__ = [
    "A3C",
    "AC",
    "ACER",
    "ACKTR",
    "D4PG",
    "DDPGX",
    "IMPALA",
    "MADDPG",
    "OPAC",
    "PPOX",
    "SACX",
    "SVPG",
    "TD3X",
    "TRPOX",
    "Reinforce",
]

_install_old_names()
_remember_env_fns()

try:
    import _sb3_ac_ext_hook
except ModuleNotFoundError:  # a source tree that is not installed: `python -m sb3_ac_ext.train` registers without the hook
    pass
else:
    _sb3_ac_ext_hook.startup()
