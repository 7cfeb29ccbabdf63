"""
Every argument of every row acts when it is set on a model that is there, as if the constructor had been given it.

What acts in a new model only is left out, and what changes no number.
"""

import random
from typing import Any

import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, RandomEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from models import EVERY, LINEAR, algorithm_class, small_model
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from subjects import numbers

from sb3_ac_ext.signatures import arguments_of
from sb3_ac_ext.validation import Acts

pytestmark = [
    pytest.mark.filterwarnings("ignore:rollout='episodes' waits for:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size:UserWarning"),
]

ATOL = 1e-5
HALF = 18
"""Steps of half a training: three rollouts, or eight updates."""


def choices() -> RandomEnv:
    return RandomEnv(BOX, spaces.Discrete(3))


OFF_PAC = {**LINEAR, "env": choices}
NOISE = {"type": "normal", "start": 0.5}
PHASES = {"separate_phases": True}
PENALTY = {"surrogate": "penalty"}
EPISODES = {"rollout": "episodes", "n_steps": 20}
EXPLORING = {"annealing_start": 0, "annealing_step": 3.0}
"""So that the temperature falls at once."""
FAR = {"target_kl": 1.0, "cg_max_steps": 2}
"""So that TRPO's line search refuses steps."""
CHOICES: dict[str, Any] = {"env": choices}
INFERRED: dict[str, Any] = {"inferred_policies": True}
CHANGES: dict[str, Any] = {
    "accept_ratio": (0.9, FAR),
    "action_noise": NormalActionNoise(np.zeros(1), np.ones(1)),
    "actor_gradient": "score",
    "actor_learning_rate": 1e-4,
    "actor_trace_gamma": (False, OFF_PAC | {"gamma": 0.5, "trace_lambda": 0.9}),
    "advantage_samples": 2,
    "annealing": "tanh",
    "annealing_factor": (0.1, {"annealing": "exponential", "annealing_start": 0}),
    "annealing_power": (0.1, {"annealing": "tanh"}),
    "annealing_slope": (0.1, {"annealing": "tanh"}),
    "annealing_start": (500, EXPLORING),
    "annealing_step": (0.0, EXPLORING),
    "average_decay": (0.1, {"trust_region_delta": 1e-3}),
    "actor_trace_lambda": 0.5,
    "bandwidth": 0.1,
    "baseline": (None, {"actor_gradient": "score"}),
    "baseline_learning_rate": 1e-4,
    "batch_segments": 2,
    "batch_size": 5,
    "behaviour": "uniform",
    "behaviour_noise": (2.0, {"behaviour": "policy_noise"}),
    "bootstrap_truncated": (True, {"env": lambda: TimeLimit(RandomEnv(BOX, CONTINUOUS), 5)}),
    "cg_damping": 1.0,
    "cg_max_steps": 1,
    "clip_range": 1e-4,
    "clip_range_vf": 1e-3,
    "clip_range_vf_mode": ("max", {"clip_range_vf": 1e-3}),
    "cold_iterations": 5,
    "correction_learning_rate": (0.5, OFF_PAC),
    "critic_learning_rate": 1e-4,
    "critic_trace_lambda": 0.5,
    "critic_weight_decay": 0.5,
    "damping": 1.0,
    "dqda_clipping": 1e-3,
    "drop_unfinished_episodes": (True, {**EPISODES, "n_steps": 10, "rollout_episodes": 2}),
    "ent_coef": 0.5,
    "ent_coef_learning_rate": 1e-4,
    "epsilon": (0.9, {"behaviour": "epsilon"}),
    "ensemble_targets": ("current", {"n_sub_policies": 2, "ensemble_draw": "agent", "batch_size": 4}),
    "entropy_in_trust_region": (False, CHOICES | {"ent_coef": 10.0, "trust_region_delta": 0.0}),
    "exact_log_prob": (True, {"policy_kwargs": {"log_std_init": 2.0}}),
    "exploration_noise": (NOISE | {"end": 0.05, "steps": 30}, {"exploration_noise": NOISE | {"start": 0.1}}),
    "exploration_std": (0.3, {"critic": "q", "deterministic_policy": True}),
    "fvp_subsample": 2,
    "gae_lambda": 0.3,
    "gamma": 0.5,
    "gamma_t_weight": True,
    "gradient_steps": 2,
    "inferred_batch_size": (5, INFERRED),
    "inferred_ent_coef": (0.5, INFERRED),
    "inferred_input": ("probs", INFERRED),
    "inferred_learning_rate": (1e-4, INFERRED),
    "inverse_update_interval": 1,
    "inversion": "cholesky",
    "kernel": False,
    "kl_coef": (50.0, PENALTY),
    "kl_direction": ("old_new", FAR),
    "kl_reduction": "sum",
    "kl_stop": 1e-9,
    "kl_stop_estimator": ("k1", {"kl_stop": 0.0}),
    "kl_stop_every": ("minibatch", {"kl_stop": 0.0}),
    "kl_stop_scope": ("policy", {**PHASES, "kl_stop": 0.0}),
    "kl_target": 1e-6,
    "learning_rate": 1e-4,
    "learning_starts": 24,
    "line_search_max_iter": (1, FAR),
    "line_search_shrinking_factor": (0.3, FAR),
    "logit_penalty": 0.5,
    "max_grad_norm": 1e-3,
    "max_kl": 1e-5,
    "max_rollout_steps": (10, {"rollout_episodes": 2}),
    "momentum": 0.1,
    "n_actor_samples": (4, {"actor_gradient": "score"}),
    "n_critic_updates": 3,
    "n_epochs": 3,
    "n_steps": 9,
    "n_target_samples": (1, {"distribution": "mixture"}),
    "normalize_advantage_over": "buffer",
    "online_update": False,
    "parameter_noise": {"std": 0.3, "distance": 0.5},
    "policy_delay": 3,
    "policy_epochs": (1, PHASES),
    "policy_learning_rate": (1e-4, PHASES),
    "policy_sample_ratio": (0.5, PHASES),
    "prior_precision": 1.0,
    "priority": "kl",
    "q_a_learning_rate": 1e-4,
    "q_b_learning_rate": 1e-4,
    "q_learning_rates": {"q_b": 1e-4},
    "rho_max": (1e-3, {"variant": "is"}),
    "replay_ratio": 0.5,
    "rho_bar": 0.1,
    "rollout": ("episodes", {"n_steps": 20}),
    "rollout_episodes": (2, EPISODES),
    "sde_sample_freq": (2, {"use_sde": True}),
    "stats_decay": 0.5,
    "sub_sampling_factor": 2,
    "surrogate": "penalty",
    "target": ("sample", {"env": choices}),
    "target_entropy": 3.0,
    "target_kl": 1e-6,
    "target_noise_clip": (0.05, {"target_policy_noise": 0.5}),
    "target_policy_noise": 0.8,
    "target_update_every": 3,
    "target_update_interval": (2, {"gradient_steps": 2}),
    "tau": 0.3,
    "temperature": 0.1,
    "temperature_min": (5.0, EXPLORING),
    "trace_lambda": (0.9, OFF_PAC),
    "trust_region_delta": (None, {"trust_region_delta": 0.0}),
    "trust_region_space": ("logits", CHOICES | {"trust_region_delta": 0.0}),
    "train_freq": TrainFreq(3, TrainFrequencyUnit.STEP),
    "use_baseline": False,
    "use_sde_at_warmup": (True, {"use_sde": True}),
    "v_max": 30.0,
    "v_min": -30.0,
    "value_epochs": (1, PHASES),
    "value_max_kl": 1e-6,
    "value_sample_ratio": (0.5, PHASES),
    "value_stop_mse": (1e-9, PHASES),
    "vf_coef": 1e-3,
    "vf_fisher_coef": 100.0,
    "warmup": ("noise", {"exploration_noise": NOISE}),
}
"""Another value of each argument, with the other arguments that it needs to act, if there are some."""
OF_A_ROW: dict[tuple[str, str], Any] = {
    ("d4pg", "target_update_interval"): 3,
    ("ppox", "kl_target"): (1e-6, PENALTY),
    ("ppox", "value_learning_rate"): (1e-4, PHASES),
    ("acer", "buffer_size"): 6,
    ("acer", "ent_coef"): (0.5, CHOICES),
    ("acktr", "value_learning_rate"): 1e-3,
    ("acktr", "kl_target"): (1e-12, {"learning_rate": 1e-2}),
    ("sacx", "value_learning_rate"): (1e-4, {"value_network": True}),
    ("reinforce", "rollout_episodes"): 2,
    ("svpg", "batch_size"): (1, {"base": "ppo", "n_steps": 6}),
    ("svpg", "clip_range"): (1e-4, {"base": "ppo"}),
    ("svpg", "max_rollout_steps"): (10, {"base": "reinforce", "rollout_episodes": 4, "max_rollout_steps": 14}),
    ("svpg", "n_epochs"): (3, {"base": "ppo"}),
    ("svpg", "rollout_episodes"): (2, {"base": "reinforce", "max_rollout_steps": 14}),
}


def change(row: str, name: str) -> tuple[Any, dict[str, Any]]:
    """Another value of an argument, and what it needs to act."""
    if name == "normalize_advantage":
        return not small_model(row).normalize_advantage, {}
    found = OF_A_ROW[row, name] if (row, name) in OF_A_ROW else CHANGES[name]
    value, needs = found if type(found) is tuple else (found, {})
    return value, {key: given() if callable(given) else given for key, given in needs.items()}


def arguments() -> list[Any]:
    """Of every row, by default a seventh of them, drawn."""
    found = []
    for row in EVERY:
        for name, argument in sorted(arguments_of(algorithm_class(row)).items()):
            if argument.acts in (Acts.NEVER, Acts.LEARN) or name in ("engine", "max_policy_lag"):
                continue  # the latter acts where actors lag, see the tests of these
            default = random.Random(f"{row} {name}").random() < 1 / 7
            found.append(pytest.param(row, name, marks=[] if default else pytest.mark.slow))
    return found


def trained(model: Any, steps: int) -> th.Tensor:
    model.set_random_seed(0)
    return numbers(model.learn(steps))


@pytest.mark.parametrize(("row", "name"), arguments())
def test_setting_is_as_constructing(row: str, name: str) -> None:
    value, needs = change(row, name)
    constructed = trained(small_model(row, engine=False, **{**needs, name: value}), 2 * HALF)
    default = trained(small_model(row, engine=False, **change(row, name)[1]), 2 * HALF)
    late = small_model(row, **change(row, name)[1])
    setattr(late, name, value)
    th.testing.assert_close(trained(late, 2 * HALF), constructed, rtol=0, atol=ATOL)
    assert (constructed - default).abs().max() > 2 * ATOL


@pytest.mark.parametrize(("row", "name"), arguments())
def test_setting_after_a_while_is_as_without_the_engine(row: str, name: str) -> None:
    found = []
    for engine in (True, False):
        value, needs = change(row, name)
        model = small_model(row, engine=engine, **needs)
        trained(model, HALF)
        setattr(model, name, value)
        found.append(numbers(model.learn(2 * HALF, reset_num_timesteps=False)))
    th.testing.assert_close(*found, rtol=0, atol=ATOL)
