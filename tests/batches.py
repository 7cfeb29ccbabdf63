"""What tests of off-policy updates share: fixed batches, the numbers of a network as one tensor, plain steps."""

from typing import Any

import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

SGD: dict[str, Any] = {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {}}
"""Policy arguments: with a rate of 1 a network moves by its gradient."""

engine_on_and_off = pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])


def batches(n: int, rows: int = 8, dtype: th.dtype = th.float32) -> list[ReplayBufferSamples]:
    """For `models.small_model`; every other one has discounts of its own."""
    generator = th.Generator().manual_seed(7)

    def normal(*shape: int) -> th.Tensor:
        return th.randn(*shape, generator=generator, dtype=dtype)

    return [
        ReplayBufferSamples(
            observations=normal(rows, 4),
            actions=normal(rows, 2).tanh(),
            next_observations=normal(rows, 4),
            dones=(normal(rows, 1) > 1).to(dtype),
            rewards=normal(rows, 1),
            discounts=0.98 ** th.randint(1, 4, (rows, 1), generator=generator).to(dtype) if i % 2 else None,
        )
        for i in range(n)
    ]


def feed(model: Any, samples: list[Any]) -> None:
    """Let the model's replay buffer return these batches, one after another."""
    queue = iter(samples)
    model.replay_buffer.sample = lambda batch_size, env=None: next(queue)


def flat(module: nn.Module) -> th.Tensor:
    """All parameters and buffers."""
    return th.cat([value.flatten() for value in module.state_dict().values()]).clone()
