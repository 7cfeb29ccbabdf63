"""Small models of every algorithm, and of SB3's, for tests that must hold for all of them."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch as th
from environments import BOX, CONTINUOUS, IMAGE, RandomEnv
from gymnasium import spaces
from parallel_environments import Crowd
from stable_baselines3 import DDPG, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_ac_ext.base.typing import constructor_keys
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec

Row = AlgoSpec | str | type[BaseAlgorithm]

SB3: dict[str, type[BaseAlgorithm]] = {"td3x": TD3, "ddpgx": DDPG, "sacx": SAC}
"""What a row equals with its extras at their defaults."""

ON_POLICY = ("ppox", "trpox", "acktr", "reinforce", "ac")
"""Rows that still have layers and optimizers of their own; what plain PyTorch modules promise is not yet promised for them."""


class Pair(Crowd):
    """Two unequal agents: one acts in a Box, the other chooses one of three."""

    def __init__(self) -> None:
        super().__init__(n=2)

    def action_space(self, agent: str) -> spaces.Space:
        return spaces.Discrete(3) if agent == "agent_1" else self.choice


class Features(BaseFeaturesExtractor):
    """Trained features of a vector, with any layers after the first one."""

    def __init__(self, observation_space: spaces.Box, layers: Iterable[Callable[[], nn.Module]] = ()) -> None:
        super().__init__(observation_space, 6)
        inputs = spaces.flatdim(observation_space)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 6), *(make() for make in layers), nn.Tanh())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


def features(*layers: Any, share: bool = False) -> dict[str, Any]:
    """Policy arguments for `Features`."""
    kwargs = {"features_extractor_class": Features, "features_extractor_kwargs": {"layers": layers}}
    return {**kwargs, "share_features_extractor": True} if share else kwargs


@dataclass(frozen=True)
class Variant:
    """What else a policy can be made of."""

    policy: str = "MlpPolicy"
    observations: spaces.Space | None = None
    """None for `BOX`."""
    policy_kwargs: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ("td3x", "ddpgx", "sacx")
    sb3: bool = True
    """Whether SB3 has it."""


def dropout() -> nn.Module:
    return nn.Dropout(0.3)


def layer_norm() -> nn.Module:
    return nn.LayerNorm(6)


def batch_norm() -> nn.Module:
    return nn.BatchNorm1d(6)


class Wary(nn.Module):
    """What it does depends on numbers, so that it cannot be recorded."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return th.relu(x) if x.sum().item() > 0 else 0.5 * x


class Fading(nn.Module):
    """What it does depends on how often it was asked, which a replay would not count."""

    asked = 0

    def forward(self, x: th.Tensor) -> th.Tensor:
        self.asked += 1
        return th.relu(x) / (1 + 0.01 * self.asked)


VARIANTS: dict[str, Variant] = {
    "mlp": Variant(rows=tuple(spec.name for spec in ALGORITHMS)),
    "images": Variant("CnnPolicy", IMAGE),
    "shared images": Variant("CnnPolicy", IMAGE, {"share_features_extractor": True}),
    "dict": Variant("MultiInputPolicy", spaces.Dict({"vector": BOX, "choice": spaces.Discrete(3)})),
    "extractor": Variant(policy_kwargs=features()),
    "shared extractor": Variant(policy_kwargs=features(share=True)),
    "dropout": Variant(policy_kwargs=features(dropout)),
    "layer norm": Variant(policy_kwargs=features(layer_norm)),
    "batch norm": Variant(policy_kwargs=features(batch_norm)),
    "looks at values": Variant(policy_kwargs=features(Wary)),
    "counts": Variant(policy_kwargs=features(Fading)),
    "critic layer norm": Variant(policy_kwargs={"critic_layer_norm": True}, rows=("td3x", "sacx"), sb3=False),
    "one critic": Variant(policy_kwargs={"n_critics": 1}),
    "two critics": Variant(policy_kwargs={"n_critics": 2}, rows=("td3x", "ddpgx", "sacx", "maddpg")),
    "three critics": Variant(policy_kwargs={"n_critics": 3}),
    "gsde": Variant(changes={"use_sde": True}, rows=("sacx",)),
    "fixed alpha": Variant(changes={"ent_coef": 0.2}, rows=("sacx",)),
    "value network": Variant(changes={"value_network": True}, rows=("sacx",), sb3=False),
}

OFF_POLICY_SIZES: dict[str, Any] = {"learning_starts": 10, "batch_size": 8, "buffer_size": 200, "learning_rate": 3e-3}
ON_POLICY_SIZES: dict[str, Any] = {
    "n_steps": 16,
    "batch_size": 8,
    "n_epochs": 2,
    "rollout_episodes": 2,
    "max_rollout_steps": 200,
}
"""So far as an algorithm has them."""

EPS = 1e-2
"""
Of Adam. With SB3's 1e-8 a gradient that is 0 but for rounding moves its parameter by the whole rate, in whatever direction the
rounding has; with this one a rounding error of 1e-8 in a gradient moves it by 1e-6 of the rate.
"""


def rows(*without: str, of: str = "mlp") -> Any:
    """
    Parametrise ``row`` over the registry.

    :param without: names of rows that the test leaves out
    :param of: a variant
    """
    names = [spec.name for spec in ALGORITHMS if spec.name not in without and spec.name in VARIANTS[of].rows]
    return pytest.mark.parametrize("row", names)


def algorithm_class(row: Row) -> Any:
    """The class of a registry row, of its name, or itself."""
    if isinstance(row, str):
        row = next(spec for spec in ALGORITHMS if spec.name == row)
    return row.cls if isinstance(row, AlgoSpec) else row


def environment(row: Row, variant: str = "mlp") -> Any:
    """A small environment for `small_model`."""
    if algorithm_class(row).__name__ == "MADDPG":
        return Pair()
    spaces_of_its_own = copy.deepcopy((VARIANTS[variant].observations or BOX, CONTINUOUS))  # they draw
    return RandomEnv(*spaces_of_its_own)


def small_model(row: Row, variant: str = "mlp", *, env: Any = None, **changes: Any) -> Any:
    """
    :param row: of the registry, its name, or an algorithm's class (SB3's too)
    :param variant: key of `VARIANTS`
    :param env: None for `environment`
    :param changes: constructor arguments in place of the small ones; ``policy_kwargs`` are added to them
    :return: a model with a seed, a silent logger and networks of one small layer
    """
    cls, kind = algorithm_class(row), VARIANTS[variant]
    off_policy = issubclass(cls, OffPolicyAlgorithm)
    sizes = OFF_POLICY_SIZES if off_policy else ON_POLICY_SIZES
    sizes = {name: value for name, value in sizes.items() if name in constructor_keys(cls)}
    own = {"net_arch": [8], **({"optimizer_kwargs": {"eps": EPS}} if off_policy else {})}
    policy_kwargs = {**own, **kind.policy_kwargs, **changes.pop("policy_kwargs", {})}
    arguments = {"seed": 0, "device": "cpu", **sizes, **kind.changes, **changes}
    env = environment(row, variant) if env is None else env
    model = cls(arguments.pop("policy", kind.policy), env, policy_kwargs=policy_kwargs, **arguments)
    model.set_logger(Logger(None, []))
    return model
