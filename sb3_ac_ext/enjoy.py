"""``python -m sb3_ac_ext.enjoy``: RL Zoo's command to watch an agent, for places where the startup hook does not run."""

from rl_zoo3.enjoy import enjoy

from sb3_ac_ext.zoo.patch import register

if __name__ == "__main__":
    register()
    enjoy()
