"""Fixed batches for updates that are compared or computed by hand, and the numbers of a network as one tensor."""

from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn


def batches(
    n: int, rows: int = 8, dtype: th.dtype = th.float64, obs_shape: tuple[int, ...] = (4,)
) -> list[ReplayBufferSamples]:
    """Batches with actions of two components; every other one has discounts of its own."""
    generator = th.Generator().manual_seed(7)

    def normal(*shape: int) -> th.Tensor:
        return th.randn(*shape, generator=generator, dtype=dtype)

    return [
        ReplayBufferSamples(
            observations=normal(rows, *obs_shape),
            actions=normal(rows, 2).tanh(),
            next_observations=normal(rows, *obs_shape),
            dones=(normal(rows, 1) > 1).to(dtype),
            rewards=normal(rows, 1),
            discounts=0.98 ** th.randint(1, 4, (rows, 1), generator=generator).to(dtype) if i % 2 else None,
        )
        for i in range(n)
    ]


def feed(model: Any, samples: list[ReplayBufferSamples]) -> None:
    """Let the model's replay buffer return these batches, one after another."""
    queue = iter(samples)
    model.replay_buffer.sample = lambda batch_size, env=None: next(queue)


def flat(module: nn.Module) -> th.Tensor:
    """All parameters and buffers."""
    return th.cat([value.flatten() for value in module.state_dict().values()]).clone()
