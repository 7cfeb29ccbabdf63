"""Plain PyTorch, recorded once and replayed; it knows no algorithm. See `Engine`."""

from sb3_ac_ext.engine.engine import Engine
from sb3_ac_ext.engine.kinds import Outputs
from sb3_ac_ext.engine.network import Network

__all__ = ["Engine", "Network", "Outputs"]
