"""What goes first where hyperparameters exclude each other, and that constructors do refuse what the table says."""

from typing import Any

import numpy as np
import pytest
from environments import BOX, RandomEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise

from sb3_ac_ext.base.typing import constructor_keys
from sb3_ac_ext.zoo.precedence import CONTRADICTIONS, drop_contradicted
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec

NOISE = {"type": "normal", "start": 0.5}
LEGAL: dict[str, list[Any]] = {
    "exploration_noise": [None, NOISE],
    "action_noise": [NormalActionNoise(np.zeros(1), np.ones(1))],
    "warmup": ["noise"],
    "n_steps": [3],
    "n_envs": [2],
    "train_freq": [(1, "episode")],
    "target_update_every": [2],
    "target_update_interval": [2],
    "ent_coef": [0.1],
    "rollout": ["steps"],
    "kl_stop": [0.1],
    "target_kl": [0.1],
    "surrogate": ["penalty", "clip"],
    "clip_range": [0.1],
    "kl_target": [0.1],
    "kl_coef": [0.1],
    "kl_stop_scope": ["policy"],
    "clip_range_vf": [None],
    "clip_range_vf_mode": ["max"],
    "critic": ["q", "v"],
    "actor_trace_lambda": [0.5],
    "critic_trace_lambda": [0.5],
    "exploration_std": [0.1],
    "policy_epochs": [2],
    "value_epochs": [2],
    "policy_sample_ratio": [0.5],
    "value_sample_ratio": [0.5],
    "value_stop_mse": [0.1],
}
"""Values that an argument may have by itself, unless it is a switch or a rate."""


def example(condition: Any) -> tuple[str, Any]:
    """A value for which a condition of the table holds."""
    name, holds = condition
    values = LEGAL.get(name, [1e-3] if name.endswith("_learning_rate") else [True, False])
    return name, next(value for value in values if holds(value))


def refused() -> list[Any]:
    """Each pair of the table, with each algorithm that has both arguments."""
    cases = []
    for pair in CONTRADICTIONS:
        values = dict(example(condition) for condition in pair)
        takers = [spec for spec in ALGORITHMS if values.keys() - {"n_envs"} <= constructor_keys(spec.cls)]
        assert takers or values.keys() & {"noise_type", "noise_std"}, values
        cases += [pytest.param(spec, values, id=f"{spec.name}-{'-'.join(values)}") for spec in takers]
    return cases


@pytest.mark.parametrize(("spec", "values"), refused())
def test_constructors_refuse_each_pair(spec: AlgoSpec, values: dict[str, Any]):
    n_envs = values.get("n_envs", 1)
    env = make_vec_env(lambda: TimeLimit(RandomEnv(BOX, spaces.Box(-2, 2, (1,))), 7), n_envs)
    arguments = {name: value for name, value in values.items() if name != "n_envs"}
    if arguments.get("deterministic_policy"):
        arguments.setdefault("critic", "q")  # which it needs as well
    with pytest.raises((ValueError, NotImplementedError)) as error:
        spec.cls("MlpPolicy", env, device="cpu", **arguments)
    assert all(name in str(error.value) for name in values)


FILE, TRIAL, PARAMS = 0, 1, 2


@pytest.mark.parametrize(
    ("file", "given", "dropped"),
    [
        ({"noise_type": "normal", "noise_std": 0.1}, {"exploration_noise": NOISE}, {"noise_type", "noise_std"}),
        ({"noise_type": "normal", "noise_std": 0.1}, {"exploration_noise": None}, set()),
        ({"exploration_noise": NOISE, "warmup": "noise"}, {"exploration_noise": None}, {"warmup"}),
        ({"exploration_noise": NOISE, "warmup": "noise"}, {"noise_type": "normal"}, {"exploration_noise", "warmup"}),
        ({"exploration_noise": NOISE}, {"noise_type": "normal", "exploration_noise": NOISE}, set()),
        ({"exploration_noise": NOISE}, {"noise_type": "normal", "warmup": "noise"}, {"exploration_noise"}),
        ({"noise_type": "normal"}, {"warmup": "noise"}, set()),
        ({"optimize_memory_usage": True}, {"n_steps": 3}, {"optimize_memory_usage"}),
        ({"optimize_memory_usage": True}, {"n_steps": 1}, set()),
        ({"train_freq": [1, "episode"], "gradient_steps": -1}, {"n_envs": 4}, {"train_freq"}),
        ({"n_envs": 4}, {"train_freq": (1, "episode")}, {"n_envs"}),
        ({"target_update_interval": 2}, {"target_update_every": 4}, {"target_update_interval"}),
        ({"ent_coef_learning_rate": 1e-4, "ent_coef": "auto"}, {"ent_coef": 0.1}, {"ent_coef_learning_rate"}),
        ({"ent_coef": 0.1}, {"ent_coef_learning_rate": 1e-4}, {"ent_coef"}),
        ({"ent_coef": "auto_0.1"}, {"ent_coef_learning_rate": 1e-4}, set()),
        ({"target_kl": 0.02}, {"kl_stop": 0.01}, {"target_kl"}),
        ({"target_kl": 0.02}, {"kl_stop": None}, set()),
        ({"clip_range": "lin_0.2"}, {"surrogate": "penalty"}, {"clip_range"}),
        ({"clip_range": 0.2}, {"surrogate": "penalty"}, set()),
        ({"surrogate": "penalty", "kl_target": 0.01}, {"clip_range": 0.1}, {"surrogate", "kl_target"}),
        ({"surrogate": "penalty", "kl_coef": 1.0}, {"surrogate": "clip"}, {"kl_coef"}),
        ({"surrogate": "clip"}, {"kl_target": 0.01}, set()),
        (
            {
                "separate_phases": True,
                "policy_epochs": 80,
                "value_learning_rate": 1e-3,
                "kl_stop_scope": "policy",
                "kl_stop": 0.1,
            },
            {"separate_phases": False},
            {"policy_epochs", "value_learning_rate", "kl_stop_scope"},
        ),
        ({"critic": "q"}, {"actor_trace_lambda": 0.9}, {"critic"}),
        ({"ent_coef": 1e-5}, {"deterministic_policy": True, "critic": "q"}, {"ent_coef"}),
        (
            {"critic": "q", "deterministic_policy": True, "exploration_std": 0.1},
            {"critic": "v"},
            {"deterministic_policy", "exploration_std"},
        ),
        ({"baseline_learning_rate": 1e-3}, {"use_baseline": False}, {"baseline_learning_rate"}),
    ],
    ids=lambda part: "-".join(part),
)
def test_what_is_given_goes_before_the_file(file: dict[str, Any], given: dict[str, Any], dropped: set[str]):
    hyperparams = {**file, **given}
    assert drop_contradicted(hyperparams, dict.fromkeys(given, PARAMS)).keys() == dropped
    assert hyperparams == {name: value for name, value in {**file, **given}.items() if name not in dropped}


def test_the_highest_rank_goes_first():
    """So that nothing gives way to what is dropped itself."""
    hyperparams = {"clip_range": 0.1, "surrogate": "penalty", "kl_target": 0.01}
    ranks = {"surrogate": TRIAL, "kl_target": TRIAL, "clip_range": PARAMS}
    assert drop_contradicted(hyperparams, ranks) == {"surrogate": "clip_range", "kl_target": "clip_range"}
    hyperparams = {"target_kl": 0.01, "kl_stop": 0.02, "clip_range": 0.1, "surrogate": "penalty"}
    ranks = {"kl_stop": TRIAL, "surrogate": TRIAL, "clip_range": FILE, "target_kl": PARAMS}
    assert drop_contradicted(hyperparams, ranks) == {"kl_stop": "target_kl", "clip_range": "surrogate"}
