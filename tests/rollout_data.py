"""Rollouts of random numbers, in the policy's type, as if a model had collected them."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer, RolloutBufferSamples


class InDouble(RolloutBuffer):
    """SB3's buffer without its cast of actions to float32."""

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> RolloutBufferSamples:
        columns = (self.values, self.log_probs, self.advantages, self.returns)
        rows = (self.observations, self.actions, *(column.reshape(-1) for column in columns))
        return RolloutBufferSamples(*(th.as_tensor(row[batch_inds]) for row in rows))


def rollout(model: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """
    :param model: with a rollout buffer of T steps of N environments
    :param seed: of all numbers
    :return: ``(T, N, ...)`` what the policy does in random states, by the names of the buffer's arrays; values, advantages and
        returns have nothing to do with it
    """
    numbers, buffer = np.random.default_rng(seed), model.rollout_buffer
    first = next(model.policy.parameters()).detach()
    th.manual_seed(seed)
    if model.use_sde:
        model.policy.reset_noise()  # in the policy's type
    rows = buffer.buffer_size * buffer.n_envs
    observations = numbers.normal(size=(rows, *model.observation_space.shape))
    with th.no_grad():
        distribution = model.policy.get_distribution(th.as_tensor(observations).to(first))
        actions = distribution.get_actions()
        log_probs = distribution.log_prob(actions)
    arrays = {"observations": observations, "actions": actions.numpy(), "log_probs": log_probs.numpy()}
    arrays |= {name: numbers.normal(size=rows) for name in ("values", "advantages", "returns")}
    shapes = {"observations": model.observation_space.shape, "actions": (buffer.action_dim,)}
    return {
        name: array.reshape(buffer.buffer_size, buffer.n_envs, *shapes.get(name, ())).astype(first.numpy().dtype)
        for name, array in arrays.items()
    }


def trained(model: Any, arrays: dict[str, np.ndarray] | None = None, seed: int = 0) -> Any:
    """
    :param model: ours or SB3's
    :param arrays: what it has collected; None for its own `rollout`
    :param seed: of numpy's global generator, which chooses minibatches
    :return: the model after the updates on that
    """
    arrays, buffer = rollout(model, seed) if arrays is None else arrays, model.rollout_buffer
    buffer.reset()
    for name, array in arrays.items():
        setattr(buffer, name, array.copy())
    buffer.full, model._rollout_length = True, buffer.buffer_size
    np.random.seed(seed)
    model.train()
    return model
