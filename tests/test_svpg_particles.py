"""What users do to single particles of SVPG, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from environments import RandomEnv
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ac_ext import SVPG
from sb3_ac_ext.functional import stein
from sb3_ac_ext.svpg.policies import actor_parameters
from sb3_ac_ext.svpg.samples import whose
from sb3_ac_ext.validation import ArgumentError

BOX = spaces.Box(-1, 1, (3,), np.float32)
CONTINUOUS = spaces.Box(-1, 1, (2,), np.float32)


def make(action_space: spaces.Space[Any] = CONTINUOUS, **kwargs: Any) -> SVPG:
    env = DummyVecEnv([lambda: RandomEnv(BOX, action_space)] * 2)
    sizes = {"n_particles": 2, "n_steps": 8, "policy_kwargs": {"net_arch": [4]}, "seed": 0}
    return SVPG("MlpPolicy", env, **{**sizes, **kwargs})


def copies(parameters: list[Any]) -> list[th.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def moved(parameters: list[Any], before: list[th.Tensor]) -> list[bool]:
    return [not th.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True)]


@pytest.mark.parametrize("engine", [True, False])
def test_frozen_layer_of_one_particle_stays_and_all_else_is_trained(engine: bool) -> None:
    model = make(engine=engine).learn(16)
    frozen = model.policy.particles[1].action_net.weight.requires_grad_(False)
    parameters = list(model.policy.parameters())
    before = copies(parameters)
    model.learn(16, reset_num_timesteps=False)
    assert moved(parameters, before) == [parameter is not frozen for parameter in parameters]


@pytest.mark.parametrize("engine", [True, False])
def test_frozen_actors_leave_the_critics_to_be_trained(engine: bool) -> None:
    model = make(engine=engine).learn(16)
    actors = [parameter for own in actor_parameters(model.policy.particles) for parameter in own]
    for parameter in actors:
        parameter.requires_grad_(False)
    parameters = list(model.policy.parameters())
    before = copies(parameters)
    model.learn(16, reset_num_timesteps=False)
    assert moved(parameters, before) == [not any(parameter is one for one in actors) for parameter in parameters]


def test_whole_frozen_particle_attracts_and_repels_the_others() -> None:
    ends = []
    for shift in (0.0, 0.1):
        policy = {"net_arch": [4], "optimizer_class": th.optim.SGD}  # whose steps are as long as phi
        model = make(max_grad_norm=None, policy_kwargs=policy)
        still = model.policy.particles[1]
        with th.no_grad():
            still.action_net.bias.add_(shift)
        for parameter in still.parameters():
            parameter.requires_grad_(False)
        model.learn(16)
        ends.append(model.policy.particles[0].action_net.bias.detach().clone())
    assert not th.equal(*ends)


def test_actors_of_several_sizes_are_named() -> None:
    model = make()
    policy = model.policy.particles[1]
    policy.action_net = th.nn.Sequential(th.nn.Linear(4, 5), th.nn.Linear(5, 2))
    with pytest.raises(ArgumentError, match=r"particle 0 and .* of particle 1"):
        model.learn(16)


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.Box(-1, 1, (), np.float32)], ids=["choice", "number"])
def test_all_together_give_an_array_as_one_does(space: spaces.Space[Any]) -> None:
    model = make(space)
    ensemble: Any = "vote" if isinstance(space, spaces.Discrete) else "mean"
    one, every = model.predict(BOX.sample())[0], model.predict(BOX.sample(), ensemble=ensemble)[0]
    assert (type(every), every.shape, every.dtype) == (np.ndarray, one.shape, one.dtype)


def test_particle_without_a_whole_episode_is_named() -> None:
    kept = np.ones((5, 2), bool)
    kept[:, 1] = False
    with pytest.raises(ValueError, match="episode of particle 1 ended within max_rollout_steps=5 steps"):
        whose(kept, 5, 2, 2)


def test_unknown_rule_is_no_rule() -> None:
    with pytest.raises(ValueError, match="bandwidth must be one of 'offdiag', 'liu', 'author', or a number, got 'median'"):
        stein.phi(th.eye(3), th.ones(3, 3), bandwidth="median")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.001}, "temperature_min must be at most temperature=0.001"),
        ({"kernel": False, "bandwidth": 3.0}, "bandwidth=3.0 needs kernel=True"),
        ({"base": np.array([1, 2])}, "base must be one of"),
    ],
    ids=str,
)
def test_contradictions_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_least_temperature_says_nothing_where_it_does_not_fall() -> None:
    assert make(temperature=0.001, annealing="none").current_temperature() == 0.001


def test_base_that_load_changes_is_the_whole_of_it(tmp_path: Path) -> None:
    make().save(tmp_path / "steps")
    env = make().get_env()
    with pytest.raises(ArgumentError, match="max_rollout_steps must be an integer"):
        SVPG.load(tmp_path / "steps", env=env, base="reinforce")
    model = SVPG.load(tmp_path / "steps", env=env, base="reinforce", max_rollout_steps=40, rollout_episodes=4).learn(1)
    assert model.num_timesteps == 2 * 4 * RandomEnv.length  # whole episodes, four of each particle
    model.save(tmp_path / "episodes")
    model = SVPG.load(tmp_path / "episodes", env=env, base="a2c", n_steps=5, max_rollout_steps=None, rollout_episodes=16)
    assert model.learn(1).num_timesteps == 2 * 5
