"""What SVPG is told, and the environments that it makes where it gets an id."""

from typing import Annotated, Any, Literal

from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ac_ext.base.declarations import OnPolicyArguments
from sb3_ac_ext.validation import Acts, Needs, PositiveInt

Base = Literal["a2c", "reinforce", "ppo"]
"""Whose objective the particles have."""


class SVPGArguments(OnPolicyArguments):
    """
    What the particles share.

    :param env: environment or its id, of which each particle gets one; a ``VecEnv`` must have a multiple of ``n_particles``
        environments, of which the first ones are the first particle's, and so on
    :param n_steps: steps of each environment in a batch; not with ``base="reinforce"``
    :param ent_coef: weight of the entropy in each particle's objective J, reward units per nat
    :param vf_coef: weight of the value's loss beside the actor's in the norm that ``max_grad_norm`` bounds, and for optimizers
        that are not indifferent to it as Adam is
    :param max_grad_norm: bound on the 2-norm of each particle's step, phi and the value's gradient together; a dict such as
        ``{"particle_0": 1.0}`` bounds some particles only, None none
    :param rollout_episodes: episodes of each particle in a batch, rounded up to a multiple of its environments
    """

    rollout_episodes: Annotated[PositiveInt, Acts.ROLLOUT, Needs("base", "reinforce")]


def one_for_each(env_id: str, n: int) -> DummyVecEnv:
    """
    :param env_id: an environment's id
    :param n: number of particles
    :return: as many of them
    """

    def make() -> Monitor[Any, Any]:
        env: Any = maybe_make_env(env_id, 0)
        return Monitor(env)

    return DummyVecEnv([make] * n)
