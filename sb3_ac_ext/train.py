"""``python -m sb3_ac_ext.train``: RL Zoo's training command, for places where the startup hook does not run."""

from rl_zoo3.train import train

from sb3_ac_ext.zoo.patch import register

if __name__ == "__main__":
    register()
    train()
