"""What goes first where hyperparameters exclude each other, and that constructors do refuse what the table says."""

from typing import Any

import pytest
from environments import BOX, RandomEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_util import make_vec_env

from sb3_ac_ext.signatures import arguments_of
from sb3_ac_ext.zoo.precedence import OF_THE_ZOO, UNDECLARED, drop_contradicted
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec

NOISE = {"type": "normal", "start": 0.5}
LEGAL: dict[str, Any] = {
    "exploration_noise": NOISE,
    "n_steps": 3,
    "n_envs": 2,
    "train_freq": (1, "episode"),
    "ent_coef": 0.1,
    "ent_coef_learning_rate": 1e-3,
    "surrogate": "penalty",
    "clip_range": 0.1,
}
"""Values of which the table speaks, unless they are switches."""


def refused() -> list[Any]:
    """Each pair of the table, with each algorithm that has both arguments."""
    cases = []
    for pair in UNDECLARED:
        values = {name: LEGAL.get(name, True) for name, _ in pair}
        if not values.keys() & {"noise_type", "noise_std"}:  # which the Zoo makes an argument of
            assert all(holds(values[name]) for name, holds in pair)
            takers = [spec for spec in ALGORITHMS if values.keys() - {"n_envs"} <= arguments_of(spec.cls).keys()]
            assert takers
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
CLASSES = {spec.name: spec.cls for spec in ALGORITHMS}


@pytest.mark.parametrize(
    ("algo", "file", "given", "dropped"),
    [
        ("td3x", {"noise_type": "normal", "noise_std": 0.1}, {"exploration_noise": NOISE}, {"noise_type", "noise_std"}),
        ("td3x", {"noise_type": "normal", "noise_std": 0.1}, {"exploration_noise": None}, set()),
        ("td3x", {"exploration_noise": NOISE, "warmup": "noise"}, {"exploration_noise": None}, {"warmup"}),
        ("td3x", {"exploration_noise": NOISE, "warmup": "noise"}, {"noise_type": "normal"}, {"exploration_noise", "warmup"}),
        ("td3x", {"exploration_noise": NOISE}, {"noise_type": "normal", "exploration_noise": NOISE}, set()),
        ("td3x", {"exploration_noise": NOISE}, {"noise_type": "normal", "warmup": "noise"}, {"exploration_noise"}),
        ("td3x", {"noise_type": "normal"}, {"warmup": "noise"}, set()),
        ("td3x", {"optimize_memory_usage": True}, {"n_steps": 3}, {"optimize_memory_usage"}),
        ("td3x", {"optimize_memory_usage": True}, {"n_steps": 1}, set()),
        ("td3x", {"train_freq": [1, "episode"], "gradient_steps": -1}, {"n_envs": 4}, {"train_freq"}),
        ("td3x", {"n_envs": 4}, {"train_freq": (1, "episode")}, {"n_envs"}),
        ("sacx", {"target_update_interval": 2}, {"target_update_every": 4}, {"target_update_interval"}),
        ("sacx", {"ent_coef_learning_rate": 1e-4, "ent_coef": "auto"}, {"ent_coef": 0.1}, {"ent_coef_learning_rate"}),
        ("sacx", {"ent_coef": 0.1}, {"ent_coef_learning_rate": 1e-4}, {"ent_coef"}),
        ("sacx", {"ent_coef": "auto_0.1"}, {"ent_coef_learning_rate": 1e-4}, set()),
        ("ppox", {"target_kl": 0.02}, {"kl_stop": 0.01}, {"target_kl"}),
        ("ppox", {"target_kl": 0.02}, {"kl_stop": None}, set()),
        ("ppox", {"clip_range": "lin_0.2"}, {"surrogate": "penalty"}, {"clip_range"}),
        ("ppox", {"clip_range": 0.2}, {"surrogate": "penalty"}, set()),
        ("ppox", {"surrogate": "penalty", "kl_target": 0.01}, {"clip_range": 0.1}, {"surrogate", "kl_target"}),
        ("ppox", {"surrogate": "penalty", "kl_coef": 1.0}, {"surrogate": "clip"}, {"kl_coef"}),
        ("ppox", {"surrogate": "clip"}, {"kl_target": 0.01}, set()),
        (
            "ppox",
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
        ("ac", {"critic": "q"}, {"actor_trace_lambda": 0.9}, {"critic"}),
        ("ac", {"ent_coef": 1e-5}, {"deterministic_policy": True, "critic": "q"}, {"ent_coef"}),
        (
            "ac",
            {"critic": "q", "deterministic_policy": True, "exploration_std": 0.1},
            {"critic": "v"},
            {"deterministic_policy", "exploration_std"},
        ),
        ("reinforce", {"baseline_learning_rate": 1e-3}, {"use_baseline": False}, {"baseline_learning_rate"}),
    ],
    ids=lambda part: part if isinstance(part, str) else "-".join(sorted(part)),
)
def test_what_is_given_goes_before_the_file(algo: str, file: dict[str, Any], given: dict[str, Any], dropped: set[str]):
    hyperparams = {**file, **given}
    assert drop_contradicted(CLASSES[algo], hyperparams, dict.fromkeys(given, PARAMS)).keys() == dropped
    assert hyperparams == {name: value for name, value in {**file, **given}.items() if name not in dropped}


@pytest.mark.parametrize("spec", ALGORITHMS, ids=lambda spec: spec.name)
def test_values_of_the_wrong_type_are_left_to_the_constructor(spec: AlgoSpec):
    wrong: tuple[Any, ...] = ("x", -1, [], {}, object())
    for value in wrong:
        hyperparams = dict.fromkeys(arguments_of(spec.cls).keys() | OF_THE_ZOO, value)
        for name in tuple(hyperparams):
            drop_contradicted(spec.cls, {**hyperparams}, {name: PARAMS})


def test_the_highest_rank_goes_first():
    """So that nothing gives way to what is dropped itself."""
    hyperparams = {"clip_range": 0.1, "surrogate": "penalty", "kl_target": 0.01}
    ranks = {"surrogate": TRIAL, "kl_target": TRIAL, "clip_range": PARAMS}
    assert drop_contradicted(CLASSES["ppox"], hyperparams, ranks) == {"surrogate": "clip_range", "kl_target": "clip_range"}
    hyperparams = {"target_kl": 0.01, "kl_stop": 0.02, "clip_range": 0.1, "surrogate": "penalty"}
    ranks = {"kl_stop": TRIAL, "surrogate": TRIAL, "clip_range": FILE, "target_kl": PARAMS}
    assert drop_contradicted(CLASSES["ppox"], hyperparams, ranks) == {"kl_stop": "target_kl", "clip_range": "surrogate"}
