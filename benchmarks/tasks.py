"""What `throughput.py` times: for each task the model that is prepared and the block that is run again and again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, DDPG
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

ENV = "HopperBulletEnv-v0"
SPREAD = "MPESimpleSpread-v3"
ON = ("PPOX", "TRPOX")
OFF = ("TD3X", "DDPGX", "SACX", "MADDPG")
NEAREST = {"AC": A2C, "ACKTR": A2C, "MADDPG": DDPG}
"""What those are compared with of which SB3 has none."""

Block = Callable[[], None]
Prepare = Callable[[Any, dict[str, Any]], Block]


@dataclass(frozen=True)
class Task:
    """Something to time."""

    name: str
    unit: str
    per_block: int
    """Units that one timed block does."""
    prepare: Prepare
    """(class, its arguments) -> what is timed."""
    classes: tuple[str, ...]
    """Names of ours that it is for."""
    env: str = ENV
    """Whose hyperparameters are taken."""
    sde: bool = False
    """Whether it is for algorithms only whose file in the Zoo has gSDE."""
    sb3: bool = True
    """Whether SB3's class can take part."""
    sbx: bool = False
    """Whether SBX's class can take part."""


def reference(cls: Any) -> Any:
    """
    :param cls: one of ours
    :return: SB3's class that does the same or nearly; None if there is none
    """
    theirs = NEAREST.get(cls.__name__, cls.sb3_class)
    return None if theirs in (OffPolicyAlgorithm, OnPolicyAlgorithm) else theirs


class RandomEnv(gym.Env):
    """
    Random observations that cost nothing, episodes of 100 steps, three actions.

    :param observation_space: of any kind
    """

    def __init__(self, observation_space: spaces.Space) -> None:
        self.action_space = spaces.Box(-1, 1, (3,), np.float32)
        self.observation_space = observation_space
        observation_space.seed(0)
        self.observations = [observation_space.sample() for _ in range(100)]
        self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.observations[0], {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.observations[self.t % 100], float(action.sum()), False, self.t == 100, {}


class NormalisedExtractor(BaseFeaturesExtractor):
    """
    A stranger's features extractor: a layer of 64 with layer normalisation.

    :param observation_space: a Box of one dimension
    """

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=64)
        self.net = nn.Sequential(nn.Linear(observation_space.shape[0], 64), nn.LayerNorm(64), nn.ReLU())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.net(observations)


def images() -> gym.Env:
    """Three channels of 84 x 84."""
    return RandomEnv(spaces.Box(0, 255, (3, 84, 84), np.uint8))


def image_and_vector() -> gym.Env:
    """A small image and 15 numbers."""
    image, vector = spaces.Box(0, 255, (3, 36, 36), np.uint8), spaces.Box(-1, 1, (15,), np.float32)
    return RandomEnv(spaces.Dict({"image": image, "vector": vector}))


def policy_for(space: spaces.Space) -> str:
    """
    :param space: of observations
    :return: name of SB3's policy for it
    """
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if len(space.shape or ()) == 3 else "MlpPolicy"


def model_for(
    cls: Any, kwargs: dict[str, Any], n_envs: int = 1, steps: int = 1000, env: str | Callable[[], gym.Env] = ENV
) -> Any:
    """
    :param cls: an algorithm
    :param kwargs: its arguments
    :param n_envs: environments
    :param steps: environment steps already in the buffer, and after which it learns
    :param env: id of the environment, or what makes it
    :return: a model past its warm-up
    """
    import pybullet_envs_gymnasium  # noqa: F401 (registers the environments)
    from stable_baselines3.common.env_util import make_vec_env

    if issubclass(cls, OnPolicyAlgorithm):
        return on_policy_model(cls, {**kwargs, "n_envs": n_envs})
    vec_env = make_vec_env(env, n_envs=n_envs, seed=0)
    if env in (images, image_and_vector):
        kwargs = {**kwargs, "buffer_size": 2000}
    own = {**kwargs, "learning_starts": steps, "seed": 0}
    model = cls(policy_for(vec_env.observation_space), vec_env, **own)
    return model.learn(steps + 8 * n_envs)


def without_sde(kwargs: dict[str, Any], **policy_kwargs: Any) -> dict[str, Any]:
    """
    :param kwargs: arguments of an algorithm
    :param policy_kwargs: what the policy gets besides the layers' sizes, or other sizes
    :return: the same arguments with independent noise, and for the policy nothing else
    """
    plain = {key: value for key, value in kwargs.get("policy_kwargs", {}).items() if key == "net_arch"}
    return {**{key: value for key, value in kwargs.items() if key != "use_sde"}, "policy_kwargs": {**plain, **policy_kwargs}}


def gradient_steps(
    n: int = 20, batch_size: int = 256, env: str | Callable[[], gym.Env] = ENV, **policy_kwargs: Any
) -> Prepare:
    """``train()`` alone, n updates in a row."""

    def prepare(cls: Any, kwargs: dict[str, Any]) -> Block:
        model = model_for(cls, {**without_sde(kwargs, **policy_kwargs), "batch_size": batch_size}, env=env)
        return lambda: model.train(gradient_steps=n, batch_size=batch_size)

    return prepare


def learning(
    n_envs: int = 1,
    steps: int = 160,
    batch_size: int | None = None,
    env: str | Callable[[], gym.Env] = ENV,
    **policy_kwargs: Any,
) -> Prepare:
    """Whole ``learn()`` in its learning phase: environment, exploration, replay, updates, logging."""

    def prepare(cls: Any, kwargs: dict[str, Any]) -> Block:
        own = {**without_sde(kwargs, **policy_kwargs), "train_freq": 1, "gradient_steps": n_envs}
        if batch_size is not None:
            own["batch_size"] = batch_size
        model = model_for(cls, own, n_envs, env=env)
        return lambda: model.learn(steps, reset_num_timesteps=False)

    return prepare


def learning_as_the_zoo(cls: Any, kwargs: dict[str, Any]) -> Block:
    """Whole ``learn()`` with everything as in the Zoo's file, gSDE included."""
    model = model_for(cls, kwargs)
    return lambda: model.learn(160, reset_num_timesteps=False)


def agents_learning(cls: Any, kwargs: dict[str, Any]) -> Block:
    """Whole ``learn()`` of several agents as in the Zoo's file: an update after 100 steps."""
    model = model_for(cls, kwargs, env=SPREAD)
    return lambda: model.learn(500, reset_num_timesteps=False)


def constructions(cls: Any, kwargs: dict[str, Any]) -> Block:
    """A model with small networks and default arguments, 20 times."""
    env = gym.make("Pendulum-v1")
    own: dict[str, Any] = {"policy_kwargs": {"net_arch": [16, 16]}, "seed": 0, "device": "cpu"}
    own |= {} if issubclass(cls, OnPolicyAlgorithm) else {"buffer_size": 100}

    def block() -> None:
        for _ in range(20):
            cls("MlpPolicy", env, **own)

    return block


def predictions(net_arch: list[int]) -> Prepare:
    """``predict()`` of one observation."""

    def prepare(cls: Any, kwargs: dict[str, Any]) -> Block:
        model = model_for(cls, without_sde(kwargs, net_arch=net_arch), steps=100)
        observation = model.observation_space.sample()

        def block() -> None:
            for _ in range(500):
                model.predict(observation, deterministic=True)

        return block

    return prepare


def rollouts_and_updates(n_steps: int, env: str | Callable[[], gym.Env] = ENV, **kwargs: Any) -> Prepare:
    """Whole ``learn()`` of an on-policy algorithm with its class's defaults, one rollout of one environment."""

    def prepare(cls: Any, _: dict[str, Any]) -> Block:
        model = on_policy_model(cls, {"n_steps": n_steps, **kwargs}, env)
        return lambda: model.learn(n_steps, reset_num_timesteps=False)

    return prepare


def updates(cls: Any, kwargs: dict[str, Any]) -> Block:
    """The updates alone that follow a rollout, again and again on the same one."""
    model = on_policy_model(cls, {"n_steps": ROLLOUT})
    return lambda: model.train()


def rollouts_as_the_zoo(cls: Any, kwargs: dict[str, Any]) -> Block:
    """Whole ``learn()`` of an on-policy algorithm with everything as in the Zoo's file, one rollout of all environments."""
    model = on_policy_model(cls, kwargs)
    return lambda: model.learn(model.n_envs * model.n_steps, reset_num_timesteps=False)


def steps_with_updates(cls: Any, kwargs: dict[str, Any]) -> Block:
    """Whole ``learn()`` with an update after each step, by Adam with a bound on the gradient."""
    model = on_policy_model(cls, {"max_grad_norm": 0.5, **({"n_steps": 1, "use_rms_prop": False} if cls is A2C else {})})
    return lambda: model.learn(500, reset_num_timesteps=False, log_interval=500 if cls is A2C else 1)


def natural_updates(cls: Any, kwargs: dict[str, Any]) -> Block:
    """Updates of ACKTR against those of A2C on one rollout: 20 steps of 8 environments, [64, 64], both with their defaults."""
    model = on_policy_model(cls, {"n_steps": 20, "n_envs": 8})

    def block() -> None:
        for _ in range(50):
            model.train()

    return block


def short_rollouts(cls: Any, kwargs: dict[str, Any]) -> Block:
    """Whole ``learn()`` of ACKTR or A2C with rollouts of 20 steps of one environment."""
    model = on_policy_model(cls, {"n_steps": 20})
    return lambda: model.learn(500, reset_num_timesteps=False, log_interval=100)


def on_policy_model(cls: Any, kwargs: dict[str, Any], env: str | Callable[[], gym.Env] = ENV) -> Any:
    """
    :param cls: an on-policy algorithm
    :param kwargs: its arguments, and ``n_envs`` and ``normalize`` as in the Zoo's files
    :param env: id of the environment, or what makes it
    :return: a model that has collected and used one rollout
    """
    import pybullet_envs_gymnasium  # noqa: F401 (registers the environments)
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    own = dict(kwargs)
    vec_env = make_vec_env(env, n_envs=own.pop("n_envs", 1), seed=0)
    if own.pop("normalize", False):
        vec_env = VecNormalize(vec_env)
    model = cls(policy_for(vec_env.observation_space), vec_env, **own, seed=0, device="cpu")
    return model.learn(model.n_envs * model.n_steps)


ROLLOUT = 2048
TD3, PPO, AGENTS = ("TD3X",), ("PPOX",), ("MADDPG",)
EXTRACTOR = {"features_extractor_class": NormalisedExtractor}
TASKS = (
    Task("gradient step [400, 300]", "ms", 20, gradient_steps(net_arch=[400, 300]), OFF),
    Task("gradient step [256, 256]", "ms", 20, gradient_steps(net_arch=[256, 256]), OFF),
    Task("gradient step, images", "ms", 8, gradient_steps(8, 32, images), TD3),
    Task("gradient step, Dict", "ms", 8, gradient_steps(8, 64, image_and_vector), TD3),
    Task("gradient step, own extractor", "ms", 20, gradient_steps(features_extractor_class=NormalisedExtractor), TD3),
    Task("gradient step, three critics", "ms", 20, gradient_steps(n_critics=3), TD3),
    Task(f"gradient step, {SPREAD}", "ms", 20, gradient_steps(20, 1024, SPREAD), AGENTS, env=SPREAD, sb3=False),
    Task("learn(), 1 environment", "ms", 160, learning(), OFF, sbx=True),
    Task("learn(), 8 environments", "ms", 160, learning(n_envs=8), OFF, sbx=True),
    Task("learn(), gSDE, every 8 steps", "ms", 160, learning_as_the_zoo, OFF, sde=True),
    Task("learn(), images", "ms", 16, learning(steps=16, batch_size=32, env=images), TD3),
    Task("learn(), Dict", "ms", 16, learning(steps=16, batch_size=64, env=image_and_vector), TD3),
    Task("learn(), own extractor", "ms", 160, learning(features_extractor_class=NormalisedExtractor), TD3),
    Task("learn(), three critics", "ms", 160, learning(n_critics=3), TD3),
    Task(f"learn(), {SPREAD}", "ms", 500, agents_learning, AGENTS, env=SPREAD, sb3=False),
    Task("learn(), rollouts of 2048", "ms", ROLLOUT, rollouts_and_updates(ROLLOUT), ON, sbx=True),
    Task("learn(), rollouts, images", "ms", 128, rollouts_and_updates(128, images), PPO),
    Task("learn(), rollouts, own extractor", "ms", ROLLOUT, rollouts_and_updates(ROLLOUT, policy_kwargs=EXTRACTOR), PPO),
    Task("learn(), 25 rollouts of 20", "ms", 500, short_rollouts, ("ACKTR",)),
    Task("train() after it", "ms", 1, updates, ON),
    Task("learn(), as in the Zoo", "ms", 8192, rollouts_as_the_zoo, ON),
    Task("learn(), an update a step", "ms", 500, steps_with_updates, ("AC",)),
    Task("an update of 160 samples", "ms", 50, natural_updates, ("ACKTR",)),
    Task("construction", "ms", 20, constructions, ("PPOX", "TRPOX", "TD3X", "DDPGX", "SACX")),
    Task("predict() [64, 64]", "us", 500, predictions([64, 64]), ON + OFF),
    Task("predict() [400, 300]", "us", 500, predictions([400, 300]), ON + OFF),
)


def hyperparameters(algo: str, env: str = ENV) -> dict[str, Any]:
    """
    :param algo: the Zoo's name of one of ours
    :param env: id of an environment
    :return: what the algorithm's file says of it, as plain values
    """
    import yaml

    from sb3_ac_ext.zoo.registry import data_dir

    file = "ddpgx" if (algo, env) == ("maddpg", ENV) else algo  # one agent is DDPG
    values = yaml.safe_load((data_dir("hyperparams") / f"{file}.yml").read_text())[env]
    left_out = {"n_timesteps", "policy", "noise_type"} | (
        {"noise_std"} if env == SPREAD else set()
    )  # it moves Box actions only
    return {key: value for key, value in values.items() if key not in left_out}


def arguments(values: dict[str, Any]) -> dict[str, Any]:
    """
    :param values: what `hyperparameters` returned
    :return: arguments of a constructor: noise as an object, a falling learning rate as the constant that it starts from
    """
    from stable_baselines3.common.noise import NormalActionNoise

    kwargs = {key: value for key, value in values.items() if key != "noise_std"}
    for name in {"learning_rate", "clip_range"} & kwargs.keys():
        kwargs[name] = float(str(values[name]).removeprefix("lin_"))
    if isinstance(kwargs.get("policy_kwargs"), str):  # the Zoo evaluates it too
        kwargs["policy_kwargs"] = eval(kwargs["policy_kwargs"], {"nn": nn})
    if "noise_std" in values:
        kwargs["action_noise"] = NormalActionNoise(np.zeros(3), values["noise_std"] * np.ones(3))
    return kwargs
