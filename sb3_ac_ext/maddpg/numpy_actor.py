"""All agents acting on a CPU without PyTorch's cost per call."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_ac_ext.functional.gumbel import gumbel_noise
from sb3_ac_ext.legacy.fused_mlp import FusedMLP
from sb3_ac_ext.legacy.numpy_actor import METHODS
from sb3_ac_ext.legacy.numpy_layers import NumpyLayers
from sb3_ac_ext.maddpg.networks import JointActor
from sb3_ac_ext.maddpg.policies import MlpPolicy

REPLACEABLE = METHODS | {"outputs", "act"}
"""What may have been replaced on an instance."""


def obstacle(policy: Any) -> str | None:
    """
    :param policy: the policy that would act
    :return: why numpy cannot act for it; None if it can
    """
    if type(policy) is not MlpPolicy:
        return f"the policy is a {type(policy).__name__}"
    actor, space = policy.actor, policy.observation_space
    if type(actor) is not JointActor or type(actor.features_extractor) is not FlattenExtractor:
        return f"the actor is a {type(actor).__name__}"
    if not isinstance(space, spaces.Box) or is_image_space(space):
        return f"observations are {space}"
    for (mlp,) in actor.networks():
        if type(mlp) is not FusedMLP or mlp.obstacle is not None:
            return f"an actor's layers: {getattr(mlp, 'obstacle', type(mlp).__name__)}"
        weight = next(mlp.parameters())
        if weight.device.type != "cpu" or weight.dtype != th.float32:
            return f"the weights are {weight.dtype} on {weight.device}"
    return "a hook or a method of the policy was replaced" if _touched(policy) else None


def _touched(policy: Any) -> bool:
    modules = (policy, policy.actor, policy.actor.mu, policy.actor.features_extractor)
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    return hooked or any(not REPLACEABLE.isdisjoint(vars(module)) for module in modules)


class JointNumpyActor:
    """
    The actors of all agents, evaluated by numpy on one joint observation.

    :param policy: a policy for which there is no `obstacle`
    """

    def __init__(self, policy: MlpPolicy) -> None:
        self.policy = policy
        self._actor = actor = policy.actor
        self._mlps = list(actor.mu)
        layers = [NumpyLayers(mlp) for (mlp,) in actor.networks()]
        self._layers = layers
        of_agents = {agent: network for network, group in zip(layers, actor.groups, strict=True) for agent in group}
        self._agents = [(columns, of_agents[agent]) for agent, columns in enumerate(actor.layout.observations)]
        space: Any = policy.action_space
        self._shape: tuple[int, ...] = policy.observation_space.shape or ()
        # of the range of Box actions; [-1, 1] leaves one-hots as they are
        self._low = np.where(policy.discrete, -1, space.low).astype(space.dtype)
        self._range = np.where(policy.discrete, 2, space.high - space.low).astype(space.dtype)

    def is_current(self) -> bool:
        """Whether nothing has happened since that would ask for another `obstacle` check: new memory, hooks, methods."""
        same = self.policy._modules["actor"] is self._actor and list(self._actor.mu) == self._mlps
        return same and all(layers.is_current() for layers in self._layers) and not _touched(self.policy)

    def __call__(self, observation: Any, deterministic: bool = False) -> np.ndarray | None:
        """
        :param observation: one joint observation, or a batch of one; larger batches are for PyTorch
        :param deterministic: whether a Discrete action is the most probable one; draws come from PyTorch's generator
        :return: joint action or a batch of one, in the environment's range; None if this input is for the ordinary path
        """
        if type(observation) is not np.ndarray:
            return None
        single = observation.shape == self._shape
        if not single and observation.shape != (1, *self._shape):
            return None
        x = observation.astype(np.float32).reshape(1, -1)
        outputs = np.concatenate([layers(x[:, columns]) for columns, layers in self._agents], axis=1)
        for head in self._actor.heads:
            self._act(outputs[:, head.columns], head.agents, head.choices, deterministic)
        actions: np.ndarray = self._low + 0.5 * (outputs.reshape(1, *self._low.shape) + 1) * self._range
        return actions[0] if single else actions

    @staticmethod
    def _act(outputs: np.ndarray, agents: int, choices: int, deterministic: bool) -> None:
        """Turn the outputs of neighbouring agents into their actions, in place."""
        if not choices:
            np.tanh(outputs, out=outputs)
            return
        logits = outputs.reshape(1, agents, choices)
        if not deterministic:
            logits = logits + gumbel_noise(th.empty(logits.shape)).numpy()
        best = logits.argmax(axis=-1)[0]
        outputs[:] = 0
        outputs[0, np.arange(agents) * choices + best] = 1
