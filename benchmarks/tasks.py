"""What `throughput.py` times: for each task the model that is prepared and the block that is run again and again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from stable_baselines3 import A2C
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

ENV = "HopperBulletEnv-v0"
OWN_KIND = {"AC": "online", "ACKTR": "K-FAC"}
"""Algorithms that are compared with SB3's A2C, and the kind of their tasks."""

Block = Callable[[], None]


@dataclass(frozen=True)
class Task:
    """Something to time."""

    name: str
    unit: str
    per_block: int
    """Units that one timed block does."""
    prepare: Callable[[Any, dict[str, Any]], Block]
    """(class, its arguments) -> what is timed."""
    kind: str = ""
    """"on" or "off" policy algorithms only, both if empty; or one of `OWN_KIND`."""
    sde: bool = False
    """Whether it is for algorithms only whose file in the Zoo has gSDE."""
    sbx: bool = False
    """Whether SBX's class can take part."""

    def applies(self, cls: Any, values: dict[str, Any]) -> bool:
        """
        :param cls: one of ours
        :param values: of its file in the Zoo, see `hyperparameters`
        :return: whether there is something to compare
        """
        if reference(cls) is None:
            return False
        if cls.__name__ in OWN_KIND:
            return self.kind == OWN_KIND[cls.__name__]
        kind = "on" if issubclass(cls, OnPolicyAlgorithm) else "off"
        return self.kind in ("", kind) and ("use_sde" in values or not self.sde)


def reference(cls: Any) -> Any:
    """
    :param cls: one of ours
    :return: SB3's class that does the same; None if there is none
    """
    theirs = A2C if cls.__name__ in OWN_KIND else cls.sb3_class
    return None if theirs in (OffPolicyAlgorithm, OnPolicyAlgorithm) else theirs


def model_for(cls: Any, kwargs: dict[str, Any], n_envs: int = 1, steps: int = 1000) -> Any:
    """
    :param cls: an algorithm
    :param kwargs: its arguments
    :param n_envs: environments
    :param steps: environment steps already in the buffer, and after which it learns
    :return: a model past its warm-up
    """
    import pybullet_envs_gymnasium  # noqa: F401 (registers the environments)
    from stable_baselines3.common.env_util import make_vec_env

    if issubclass(cls, OnPolicyAlgorithm):
        return on_policy_model(cls, {**kwargs, "n_envs": n_envs})
    env = make_vec_env(ENV, n_envs=n_envs, seed=0)
    model = cls("MlpPolicy", env, **{**kwargs, "learning_starts": steps, "seed": 0})
    return model.learn(steps + 8 * n_envs)


def without_sde(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same hyperparameters with independent noise and nothing but the layers' sizes for the policy."""
    policy_kwargs = kwargs.get("policy_kwargs", {})
    plain = {"policy_kwargs": {key: value for key, value in policy_kwargs.items() if key == "net_arch"}}
    return {**{key: value for key, value in kwargs.items() if key != "use_sde"}, **plain}


def gradient_steps(net_arch: list[int]) -> Callable[[Any, dict[str, Any]], Block]:
    """Updates in a row."""

    def prepare(cls: Any, kwargs: dict[str, Any]) -> Block:
        model = model_for(cls, {**without_sde(kwargs), "policy_kwargs": {"net_arch": net_arch}})
        return lambda: model.train(gradient_steps=20, batch_size=256)

    return prepare


def learning(n_envs: int) -> Callable[[Any, dict[str, Any]], Block]:
    """Whole ``learn()`` in its learning phase: environment, exploration, replay, updates, logging."""

    def prepare(cls: Any, kwargs: dict[str, Any]) -> Block:
        model = model_for(cls, {**without_sde(kwargs), "train_freq": 1, "gradient_steps": n_envs}, n_envs)
        return lambda: model.learn(160, reset_num_timesteps=False)

    return prepare


def learning_as_the_zoo(cls: Any, kwargs: dict[str, Any]) -> Block:
    """Whole ``learn()`` with everything as in the Zoo's file, gSDE included."""
    model = model_for(cls, kwargs)
    return lambda: model.learn(160, reset_num_timesteps=False)


def predictions(net_arch: list[int]) -> Callable[[Any, dict[str, Any]], Block]:
    """``predict()`` of one observation."""

    def prepare(cls: Any, kwargs: dict[str, Any]) -> Block:
        model = model_for(cls, {**without_sde(kwargs), "policy_kwargs": {"net_arch": net_arch}}, steps=100)
        observation = model.observation_space.sample()

        def block() -> None:
            for _ in range(500):
                model.predict(observation, deterministic=True)

        return block

    return prepare


def rollouts_and_updates(cls: Any, kwargs: dict[str, Any]) -> Block:
    """Whole ``learn()`` of an on-policy algorithm with its class's defaults, one rollout of one environment."""
    model = on_policy_model(cls, {"n_steps": ROLLOUT})
    return lambda: model.learn(ROLLOUT, reset_num_timesteps=False)


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


def on_policy_model(cls: Any, kwargs: dict[str, Any]) -> Any:
    """
    :param cls: an on-policy algorithm
    :param kwargs: its arguments, and ``n_envs`` and ``normalize`` as in the Zoo's files
    :return: a model that has collected and used one rollout
    """
    import pybullet_envs_gymnasium  # noqa: F401 (registers the environments)
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    own = dict(kwargs)
    env = make_vec_env(ENV, n_envs=own.pop("n_envs", 1), seed=0)
    if own.pop("normalize", False):
        env = VecNormalize(env)
    model = cls("MlpPolicy", env, **own, seed=0, device="cpu")
    return model.learn(model.n_envs * model.n_steps)


ROLLOUT = 2048
TASKS = (
    Task("gradient step [400, 300]", "ms", 20, gradient_steps([400, 300]), "off"),
    Task("gradient step [256, 256]", "ms", 20, gradient_steps([256, 256]), "off"),
    Task("learn(), 1 environment", "ms", 160, learning(1), "off", sbx=True),
    Task("learn(), 8 environments", "ms", 160, learning(8), "off", sbx=True),
    Task("learn(), gSDE, every 8 steps", "ms", 160, learning_as_the_zoo, "off", sde=True),
    Task("learn(), rollouts of 2048", "ms", ROLLOUT, rollouts_and_updates, "on", sbx=True),
    Task("train() after it", "ms", 1, updates, "on"),
    Task("learn(), as in the Zoo", "ms", 8192, rollouts_as_the_zoo, "on"),
    Task("learn(), an update a step", "ms", 500, steps_with_updates, "online"),
    Task("an update of 160 samples", "ms", 50, natural_updates, "K-FAC"),
    Task("predict() [64, 64]", "us", 500, predictions([64, 64])),
    Task("predict() [400, 300]", "us", 500, predictions([400, 300])),
)


def hyperparameters(algo: str) -> dict[str, Any]:
    """
    :param algo: the Zoo's name of one of ours
    :return: what its file says of `ENV`, as plain values
    """
    import yaml

    from sb3_ac_ext.zoo.registry import data_dir

    values = yaml.safe_load((data_dir("hyperparams") / f"{algo}.yml").read_text())[ENV]
    return {key: value for key, value in values.items() if key not in ("n_timesteps", "policy", "noise_type")}


def arguments(values: dict[str, Any]) -> dict[str, Any]:
    """
    :param values: what `hyperparameters` returned
    :return: arguments of a constructor: noise as an object, a falling learning rate as the constant that it starts from
    """
    from stable_baselines3.common.noise import NormalActionNoise
    from torch import nn

    kwargs = {key: value for key, value in values.items() if key != "noise_std"}
    for name in {"learning_rate", "clip_range"} & kwargs.keys():
        kwargs[name] = float(str(values[name]).removeprefix("lin_"))
    if isinstance(kwargs.get("policy_kwargs"), str):  # the Zoo evaluates it too
        kwargs["policy_kwargs"] = eval(kwargs["policy_kwargs"], {"nn": nn})
    if "noise_std" in values:
        kwargs["action_noise"] = NormalActionNoise(np.zeros(3), values["noise_std"] * np.ones(3))
    return kwargs
