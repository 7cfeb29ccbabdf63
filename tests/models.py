"""Small models of every algorithm, and of SB3's, for tests that must hold for all of them."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch as th
from environments import BOX, CONTINUOUS, IMAGE, RandomEnv
from gymnasium import Env, spaces
from parallel_environments import Crowd
from sb3_contrib import TRPO
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn

from sb3_ac_ext import A3C, ACER, ACKTR, D4PG, IMPALA, MADDPG, SVPG
from sb3_ac_ext.buffers.prioritized import PrioritizedDictReplayBuffer, PrioritizedReplayBuffer
from sb3_ac_ext.networks.actor_critic import SeparateCnnPolicy
from sb3_ac_ext.signatures import arguments_of
from sb3_ac_ext.validation import Needs
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec

Row = AlgoSpec | str | type[BaseAlgorithm]


def where(holds: Callable[[Any], bool]) -> tuple[str, ...]:
    """The names of the registry's rows whose class it holds for."""
    return tuple(spec.name for spec in ALGORITHMS if holds(spec.cls))


def taking(*arguments: str) -> tuple[str, ...]:
    """The rows whose constructors take all of these."""
    return where(lambda cls: set(arguments) <= arguments_of(cls).keys())


EVERY = where(lambda _: True)
OFF_POLICY = where(lambda cls: issubclass(cls, OffPolicyAlgorithm))
ON_POLICY = where(lambda cls: issubclass(cls, OnPolicyAlgorithm))
ONE_AGENT = where(lambda cls: not issubclass(cls, MADDPG))
APART = where(lambda cls: cls.policy_aliases.get("CnnPolicy") is SeparateCnnPolicy)
"""Rows whose policy and value may have no layers in common."""
SHARING = tuple(row for row in ONE_AGENT if row not in APART)
CRITICS = where(lambda cls: issubclass(cls, (TD3, SAC)) and not issubclass(cls, D4PG))
"""Rows with any number of critics of one agent."""
SB3: dict[str, type[BaseAlgorithm]] = {
    spec.name: spec.cls.sb3_class
    for spec in ALGORITHMS
    if spec.cls.sb3_class not in (OffPolicyAlgorithm, OnPolicyAlgorithm, TRPO)
}
"""What a row equals with its extras at their defaults. TRPO draws where its conjugate gradients start, ours do not."""
SB3_OFF_POLICY = tuple(row for row in SB3 if row in OFF_POLICY)
SB3_ON_POLICY = tuple(row for row in SB3 if row in ON_POLICY)
BY_ADAM = where(lambda cls: not issubclass(cls, (A3C, ACKTR)))
"""Rows that are trained by what ``policy_kwargs`` ask for, in `small_model`."""
BY_KFAC = where(lambda cls: issubclass(cls, ACKTR))
"""Rows with factors for few layers."""
BY_SEGMENTS = tuple(row for row in taking("n_actors") if row in ON_POLICY)
"""
Rows whose rollouts are segments of actors: each with the same weights from its first step to its last, and seen by callbacks
when it is whole, step after step.
"""
CHOOSING = where(lambda cls: issubclass(cls, OnPolicyAlgorithm) and not issubclass(cls, ACER))
"""
Rows that take any space of actions that SB3's distributions are for, and ask these for densities; ACER computes them with what
the distribution is a function of.
"""
TRAINED_STD = CHOOSING
"""Rows that train the standard deviation of actions in a Box."""
WITH_ALPHA = taking("target_entropy")
"""Rows that learn the entropy's coefficient."""


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


def features(*layers: Any, share: bool | None = None) -> dict[str, Any]:
    """Policy arguments for `Features`, shared or not as the policy has it by default."""
    kwargs = {"features_extractor_class": Features, "features_extractor_kwargs": {"layers": layers}}
    return kwargs if share is None else {**kwargs, "share_features_extractor": share}


@dataclass(frozen=True)
class Variant:
    """What else a policy can be made of."""

    policy: str = "MlpPolicy"
    observations: spaces.Space | None = None
    """None for `BOX`."""
    actions: spaces.Space | None = None
    """None for `CONTINUOUS`."""
    policy_kwargs: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ONE_AGENT
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


def another() -> RandomEnv:
    """Of another actor."""
    return RandomEnv(*copy.deepcopy((BOX, CONTINUOUS)))


NORMALISED = tuple(row for row in ONE_AGENT if row not in BY_KFAC)
OFF_PAC: dict[str, Any] = {"rows": ("opac",), "sb3": False}
SCORE: dict[str, Any] = {"actor_gradient": "score", "baseline": "v"}
LINEAR: dict[str, Any] = {"variant": "degris", "features": "identity", "behaviour": "uniform", "learning_rate": 0.1}
VARIANTS: dict[str, Variant] = {
    "mlp": Variant(rows=EVERY),
    "images": Variant("CnnPolicy", IMAGE),
    "shared images": Variant("CnnPolicy", IMAGE, policy_kwargs={"share_features_extractor": True}, rows=SHARING),
    "dict": Variant("MultiInputPolicy", spaces.Dict({"vector": BOX, "choice": spaces.Discrete(3)})),
    "extractor": Variant(policy_kwargs=features()),
    "shared extractor": Variant(policy_kwargs=features(share=True), rows=SHARING),
    "extractors apart": Variant(policy_kwargs=features(share=False), rows=ON_POLICY),
    "dropout": Variant(policy_kwargs=features(dropout)),
    "layer norm": Variant(policy_kwargs=features(layer_norm), rows=NORMALISED),
    "batch norm": Variant(
        policy_kwargs=features(batch_norm), rows=tuple(row for row in NORMALISED if row not in ("ac", "acer"))
    ),
    "looks at values": Variant(policy_kwargs=features(Wary)),
    "counts": Variant(policy_kwargs=features(Fading)),
    "critic layer norm": Variant(policy_kwargs={"critic_layer_norm": True}, rows=("td3x", "sacx"), sb3=False),
    "one critic": Variant(policy_kwargs={"n_critics": 1}, rows=CRITICS),
    "two critics": Variant(policy_kwargs={"n_critics": 2}, rows=(*CRITICS, "maddpg")),
    "sub-policies": Variant(rows=("maddpg",), changes={"n_sub_policies": 2, "batch_size": 4}, sb3=False),
    "three critics": Variant(policy_kwargs={"n_critics": 3}, rows=CRITICS),
    "gsde": Variant(changes={"use_sde": True}, rows=tuple(row for row in taking("use_sde") if row not in BY_KFAC)),
    "fixed alpha": Variant(changes={"ent_coef": 0.2}, rows=WITH_ALPHA),
    "value network": Variant(changes={"value_network": True}, rows=taking("value_network"), sb3=False),
    "priorities": Variant(changes={"replay_buffer_class": PrioritizedReplayBuffer, "n_steps": 2}, rows=CRITICS, sb3=False),
    "priorities of dicts": Variant(
        *("MultiInputPolicy", spaces.Dict({"vector": BOX, "choice": spaces.Discrete(3)})),
        changes={"replay_buffer_class": PrioritizedDictReplayBuffer, "n_steps": 2},
        rows=("td3x",),
        sb3=False,
    ),
    "no priorities": Variant(changes={"prioritized": False}, rows=taking("prioritized"), sb3=False),
    "mixture": Variant(changes={"distribution": "mixture"}, rows=taking("distribution"), sb3=False),
    "bounded slopes": Variant(
        policy_kwargs={"n_atoms": 11},
        changes={"dqda_clipping": 0.1, "tau": 0.3, "priority": "kl", "v_min": -9, "v_max": 9},
        rows=taking("dqda_clipping"),
        sb3=False,
    ),
    "discrete": Variant(actions=spaces.Discrete(3), rows=(*ON_POLICY, "opac")),
    "weighted": Variant(actions=spaces.Discrete(3), changes={"variant": "is", "behaviour": "epsilon"}, **OFF_PAC),
    "weighted Q": Variant(changes={"variant": "is", "critic_type": "q", "behaviour": "policy_noise"}, **OFF_PAC),
    "score": Variant(changes={"actor_gradient": "score", "n_actor_samples": 3}, **OFF_PAC),
    "sampled choices": Variant(actions=spaces.Discrete(3), changes=SCORE | {"target": "sample"}, **OFF_PAC),
    "linear": Variant(actions=spaces.Discrete(3), changes=LINEAR, **OFF_PAC),
    "several choices": Variant(actions=spaces.MultiDiscrete([3, 2]), rows=CHOOSING),
    "coins": Variant(actions=spaces.MultiBinary(3), rows=CHOOSING),
    "clipped values": Variant(changes={"clip_range_vf": 0.1}, rows=taking("clip_range_vf")),
    "early stops": Variant(changes={"target_kl": 1e-4}, rows=taking("clip_range")),
    "penalty": Variant(changes={"surrogate": "penalty"}, rows=taking("surrogate"), sb3=False),
    "phases": Variant(changes={"separate_phases": True}, rows=taking("separate_phases"), sb3=False),
    "two actors": Variant(changes={"n_actors": 2, "actor_env_fn": another}, rows=BY_SEGMENTS, sb3=False),
    "actors that lag": Variant(
        changes={"n_actors": 2, "actor_env_fn": another, "simulated_lag": 2}, rows=BY_SEGMENTS, sb3=False
    ),
    "steps of PPO": Variant(
        changes={"base": "ppo", "batch_size": 3, "n_epochs": 2, "n_steps": 6}, rows=taking("base"), sb3=False
    ),
    "actions by logits": Variant(
        actions=spaces.Discrete(3), changes={"trust_region_space": "logits"}, rows=taking("trust_region_space"), sb3=False
    ),
    "inferred": Variant(changes={"inferred_policies": True}, rows=("maddpg",), sb3=False),
    "replayed segments": Variant(changes={"replayed_segments": 1}, rows=taking("replayed_segments"), sb3=False),
}

OFF_POLICY_SIZES: dict[str, Any] = {"learning_starts": 10, "batch_size": 8, "buffer_size": 200, "learning_rate": 3e-3}
ON_POLICY_SIZES: dict[str, Any] = {
    "n_steps": 6,
    "batch_size": 3,
    "n_epochs": 2,
    "rollout_episodes": 1,
    "max_rollout_steps": 200,
    "learning_rate": 3e-3,
    "cg_max_steps": 4,
    "cold_iterations": 1,
    "inverse_update_interval": 2,
}
"""So far as an algorithm has them."""

EPS = 1e-2
"""
Of Adam. With SB3's 1e-8 a gradient that is 0 but for rounding moves its parameter by the whole rate, in whatever direction the
rounding has; with this one a rounding error of 1e-8 in a gradient moves it by 1e-6 of the rate.
"""


def skip_unless_taken(row: str, actions: spaces.Space) -> None:
    """Skip the test if a row does not take these actions."""
    if row not in CHOOSING and isinstance(actions, spaces.MultiDiscrete | spaces.MultiBinary):
        pytest.skip("takes one choice at a time")


def rows(names: Iterable[str] = EVERY, by_default: Iterable[str] | None = None) -> Any:
    """
    Parametrise ``row``.

    :param names: of rows; all of the registry by default
    :param by_default: those that are not marked slow, for what hardly depends on the row; None for all
    """
    quick = None if by_default is None else set(by_default)
    marks = {name: [] if quick is None or name in quick else [pytest.mark.slow] for name in names}
    return pytest.mark.parametrize("row", [pytest.param(name, marks=of_row) for name, of_row in marks.items()])


def taken(row: Row, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of some arguments that a row has, and takes where the others are at their defaults."""
    known = arguments_of(algorithm_class(row))

    def is_taken(name: str) -> bool:
        needs = known[name].of_kind(Needs) if name in known else []
        return name in known and all(known[one.name].default in one.values for one in needs)

    return {name: value for name, value in arguments.items() if is_taken(name)}


def using(*arguments: str) -> tuple[str, ...]:
    """The rows whose constructors take all of these beside the others' defaults."""
    return tuple(row for row in taking(*arguments) if len(taken(row, dict.fromkeys(arguments))) == len(arguments))


def algorithm_class(row: Row) -> Any:
    """The class of a registry row, of its name, or itself."""
    if isinstance(row, str):
        row = next(spec for spec in ALGORITHMS if spec.name == row)
    return row.cls if isinstance(row, AlgoSpec) else row


def environment(row: Row, variant: str = "mlp") -> Any:
    """A small environment for `small_model`."""
    if algorithm_class(row) is MADDPG:
        return Pair()
    kind = VARIANTS[variant]
    spaces_of_its_own = copy.deepcopy((kind.observations or BOX, kind.actions or CONTINUOUS))  # they draw
    return enough(row, RandomEnv(*spaces_of_its_own))


def enough(row: Row, env: Any, n: int = 2) -> Any:
    """An environment, or for n particles one of each: itself and copies."""
    if not issubclass(algorithm_class(row), SVPG) or not isinstance(env, Env):
        return env
    several = [env, *(copy.deepcopy(env) for _ in range(n - 1))]
    return DummyVecEnv([lambda own=own: own if isinstance(own, Monitor) else Monitor(own) for own in several])


def policies_of(model: Any) -> list[Any]:
    """The policy, or those of all particles."""
    return list(model.policy.particles) if isinstance(model, SVPG) else [model.policy]


def policy_of(model: Any) -> Any:
    """The policy, of particles that of the last one."""
    return policies_of(model)[-1]


def small_model(row: Row, variant: str = "mlp", /, *, env: Any = None, **changes: Any) -> Any:
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
    sizes = taken(cls, sizes)
    sizes |= {"target_update_interval": 2} if issubclass(cls, D4PG) else {}
    sizes |= {"n_actors": 1} if issubclass(cls, A3C) else {"use_rms_prop": False} if issubclass(cls, (IMPALA, ACER)) else {}
    sizes |= {"learning_starts": 6, "buffer_size": 60, "online_update": True} if issubclass(cls, ACER) else {}
    env = environment(row, variant) if env is None else enough(row, env)
    if issubclass(cls, SVPG):
        n = 1 if isinstance(env, VecEnv) and env.num_envs % 2 else 2
        sizes |= {"n_particles": n, "n_steps": sizes["n_steps"] // n}  # so that a rollout has as many steps of all
    own: dict[str, Any] = {"net_arch": [8], "optimizer_kwargs": {"eps": EPS}}
    if {**kind.changes, **changes}.get("variant") == "degris":  # which has no networks
        own = {}
    if issubclass(cls, ACKTR):  # whose rate is the largest step of an optimizer of its own
        del sizes["learning_rate"], own["optimizer_kwargs"]
    own |= {"share_features_extractor": False} if cls.__name__.lower() in APART else {}
    policy_kwargs = {**own, **kind.policy_kwargs, **changes.pop("policy_kwargs", {})}
    arguments = {"seed": 0, "device": "cpu", **sizes, **kind.changes, **changes}
    model = cls(arguments.pop("policy", kind.policy), env, policy_kwargs=policy_kwargs, **arguments)
    model.set_logger(Logger(None, []))
    return model
