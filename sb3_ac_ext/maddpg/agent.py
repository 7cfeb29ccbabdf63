"""One agent that acts by itself, without the others, their observations or the algorithm."""

import pathlib
from typing import Any, Self

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.spaces.utils import flatten, flatten_space
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn

from sb3_ac_ext.base.checkpoint import atomic_file
from sb3_ac_ext.functional.gumbel import gumbel_noise
from sb3_ac_ext.validation import UnsupportedError


class Agent:
    """
    An agent's actor between its own two spaces.

    :param name: of the agent
    :param observation_space: its own
    :param action_space: its own, a Box or Discrete
    :param net_arch: hidden layers
    :param activation_fn: activation function
    :param network: from flat observations to what becomes actions; None for a new one
    :raises UnsupportedError: for images
    """

    def __init__(
        self,
        name: str,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        net_arch: list[int],
        activation_fn: type[nn.Module],
        network: nn.Sequential | None = None,
    ) -> None:
        if is_image_space(observation_space):
            raise UnsupportedError(f"agent {name!r} must not observe images to act by itself, got {observation_space}")
        self.name = name
        self.observation_space, self.action_space = observation_space, action_space
        self.net_arch, self.activation_fn = net_arch, activation_fn
        if network is None:
            sizes = [flatten_space(space).shape for space in (observation_space, action_space)]
            (inputs,), (outputs,) = sizes  # type: ignore[misc]  # flat spaces have one dimension
            network = nn.Sequential(*create_mlp(inputs, outputs, net_arch, activation_fn))
        self.network = network

    def predict(self, observation: Any, deterministic: bool = False) -> Any:
        """
        :param observation: one of its own observation space, or ``(B, ...)`` of them where that is a Box
        :param deterministic: whether a Discrete action is the most probable one instead of a draw
        :return: action, or B of them, of its own action space
        :raises ValueError: if the observation is not of its space
        """
        flat, single = self._flat(observation)
        parameter = next(self.network.parameters())
        with th.no_grad():
            outputs = self.network(th.as_tensor(flat).to(parameter))
            if isinstance(self.action_space, spaces.Discrete):
                outputs = outputs if deterministic else outputs + gumbel_noise(outputs)
                actions = outputs.argmax(dim=1).cpu().numpy() + self.action_space.start
            else:
                assert isinstance(self.action_space, spaces.Box)
                low, high = self.action_space.low, self.action_space.high
                share = 0.5 * (outputs.tanh().cpu().numpy().reshape(-1, *low.shape) + 1)
                actions = (low + share * (high - low)).astype(low.dtype).clip(low, high)
        if single:
            return np.asarray(actions[0]) if isinstance(self.action_space, spaces.Box) else actions[0]
        return actions

    def _flat(self, observation: Any) -> tuple[np.ndarray, bool]:
        """``(B, D)`` and whether it was a single one."""
        space = self.observation_space
        if isinstance(space, spaces.Box):
            array = np.asarray(observation, np.float32)
            if array.shape in (space.shape, (*array.shape[:1], *space.shape)):
                return array.reshape(-1, int(np.prod(space.shape))), array.shape == space.shape
        elif space.contains(observation):
            return np.asarray(flatten(space, observation), np.float32)[None], True
        raise ValueError(f"the observation of agent {self.name!r} must be of {space}, got {observation!r}")

    def save(self, path: str | pathlib.Path) -> None:
        """
        Write the agent alone; never half a file.

        :param path: the file's name, ".pth" is added where there is no suffix
        """
        names = ("name", "observation_space", "action_space", "net_arch", "activation_fn")
        data = {name: getattr(self, name) for name in names}
        with atomic_file(path, "pth") as file:
            th.save({"data": data, "state_dict": self.network.state_dict()}, file)

    @classmethod
    def load(cls, path: str | pathlib.Path, device: th.device | str = "cpu") -> Self:
        """
        Read what `save` wrote. As all of SB3's files this one is pickled: load only what you trust.

        :param path: the file's name, as given to `save`
        :param device: where the network goes
        :return: the agent
        """
        path = pathlib.Path(path)
        saved = th.load(path if path.suffix else path.with_name(f"{path.name}.pth"), map_location=device, weights_only=False)
        agent = cls(**saved["data"])
        agent.network.load_state_dict(saved["state_dict"])
        agent.network.to(device)
        return agent
