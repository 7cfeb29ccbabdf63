"""Bad input is refused before an environment step is taken, with argument, value and what is legal."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.sac.policies import SACPolicy

from sb3_ac_ext import AC, DDPGX, PPOX, SACX, TD3X, TRPOX, Reinforce
from sb3_ac_ext.base.schedules import as_schedule
from sb3_ac_ext.validation import NonFiniteError

NOISE = {"type": "normal", "start": 0.5, "end": 0.1, "steps": 100}


class NoSteps(gym.Wrapper):
    """Fails the test if a step is taken."""

    def step(self, action: Any) -> Any:
        pytest.fail("an environment step was taken")


def env(observation_space: spaces.Space = BOX, action_space: spaces.Space = CONTINUOUS) -> gym.Env:
    return NoSteps(RandomEnv(observation_space, action_space))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"learning_rate": -1e-3}, ValueError, r"learning_rate must be a number >= 0.*got -0.001"),
        ({"learning_rate": float("nan")}, ValueError, r"learning_rate.*nan"),
        ({"learning_rate": "lin"}, ValueError, r"learning_rate.*\"lin_7e-4\".*got 'lin'"),
        ({"learning_rate": "exp_1e-3"}, ValueError, r"learning_rate.*got 'exp_1e-3'"),
        ({"learning_rate": "lin_-1e-3"}, ValueError, r"learning_rate.*-0.001 at the start"),
        ({"learning_rate": [1e-3]}, TypeError, r"learning_rate.*got \[0.001\] of type list"),
        ({"learning_rate": True}, TypeError, r"learning_rate.*got True"),
        ({"actor_learning_rate": -1.0}, ValueError, r"actor_learning_rate must be .*got -1.0"),
        ({"critic_learning_rate": "lin_x"}, ValueError, r"critic_learning_rate must be .*got 'lin_x'"),
        ({"max_grad_norm": 0.0}, ValueError, r"max_grad_norm\['critic'\] must be .*got 0.0"),
        (
            {"max_grad_norm": {"value": 1.0}},
            TypeError,
            r"max_grad_norm got an unexpected key 'value'; legal are actor, critic",
        ),
        ({"max_grad_norm": "big"}, TypeError, r"max_grad_norm.*got 'big'"),
        ({"policy_delay": 0}, ValueError, r"policy_delay must be an integer >= 1, got 0"),
        ({"policy_delay": 1.5}, TypeError, r"policy_delay must be an integer, got 1.5 of type float"),
        ({"target_policy_noise": -0.1}, ValueError, r"target_policy_noise must be a number >= 0, got -0.1"),
        ({"target_noise_clip": -0.1}, ValueError, r"target_noise_clip must be a number >= 0, got -0.1"),
        ({"gamma": 1.5}, ValueError, r"gamma must be a number in \[0, 1\], got 1.5"),
        ({"tau": -0.1}, ValueError, r"tau must be a number in \[0, 1\], got -0.1"),
        ({"tau": "fast"}, TypeError, r"tau must be a number, got 'fast' of type str"),
        ({"batch_size": 0}, ValueError, r"batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 256.0}, TypeError, r"batch_size must be an integer, got 256.0"),
        ({"buffer_size": 0}, ValueError, r"buffer_size must be an integer >= 1, got 0"),
        ({"learning_starts": -1}, ValueError, r"learning_starts must be a number >= 0, got -1"),
        ({"gradient_steps": -2}, ValueError, r"gradient_steps must be an integer >= -1, got -2"),
        ({"n_steps": 0}, ValueError, r"n_steps must be an integer >= 1, got 0"),
        ({"train_freq": 0}, ValueError, r"train_freq must be an integer >= 1, got 0"),
        ({"train_freq": (1, "epoch")}, ValueError, r"unit of train_freq must be one of 'step', 'episode', got 'epoch'"),
        ({"train_freq": (1, 2, 3)}, ValueError, r"train_freq must be .*got \(1, 2, 3\)"),
        ({"warmup": "none"}, ValueError, r"warmup must be one of 'uniform', 'noise', got 'none'"),
        ({"warmup": "noise"}, ValueError, r"warmup='noise' needs exploration_noise"),
        ({"exploration_noise": 0.1}, TypeError, r"exploration_noise must be a dict with the keys type, start.*got 0.1"),
        ({"exploration_noise": {"type": "normal"}}, ValueError, r"exploration_noise lacks start"),
        (
            {"exploration_noise": {"type": "pink", "start": 1}},
            ValueError,
            r"exploration_noise\['type'\] must be one of.*got 'pink'",
        ),
        ({"exploration_noise": {**NOISE, "begin": 1}}, TypeError, r"exploration_noise got an unexpected key 'begin'"),
        (
            {"exploration_noise": {**NOISE, "start": -1}},
            ValueError,
            r"exploration_noise\['start'\] must be a number >= 0, got -1",
        ),
        (
            {"exploration_noise": {**NOISE, "steps": 0}},
            ValueError,
            r"exploration_noise\['steps'\] must be a number >= 1, got 0",
        ),
        ({"exploration_noise": {**NOISE, "dt": 1}}, ValueError, r"exploration_noise\['dt'\] belongs to 'ornstein-uhlenbeck'"),
        ({"exploration_noise": {"type": "normal", "start": 1, "end": 0}}, ValueError, r"needs both end and steps"),
        (
            {"exploration_noise": NOISE, "action_noise": NormalActionNoise(np.zeros(2), np.ones(2))},
            ValueError,
            r"exploration_noise and action_noise \(noise_type in RL Zoo\) exclude each other",
        ),
        ({"action_noise": 0.1}, TypeError, r"action_noise must be an ActionNoise, got 0.1"),
        (
            {"action_noise": NormalActionNoise(np.zeros(3), np.ones(3))},
            ValueError,
            r"action_noise must have the shape of an action, \(2,\), or broadcast to it",
        ),
        (
            {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(3))},
            ValueError,
            r"action_noise must have the shape",
        ),
        ({"optimize_memory_usage": True}, ValueError, r"optimize_memory_usage.*handle_timeout_termination"),
        ({"optimize_memory_usage": True, "n_steps": 2}, NotImplementedError, r"n_steps must be 1 with optimize_memory_usage"),
        ({"policy_kwargs": {"n_critics": 0}}, ValueError, r"n_critics must be an integer >= 1, got 0"),
        ({"policy_kwargs": {"net_arc": [8]}}, TypeError, r"net_arc"),
        ({"polcy_delay": 2}, TypeError, r"TD3X\(\) got an unexpected argument 'polcy_delay'; did you mean 'policy_delay'\?"),
        ({"foo": 2}, TypeError, r"TD3X\(\) got an unexpected argument 'foo'; legal are action_noise, .*, warmup$"),
        ({"replay_buffer_kwargs": {"n_sampled_goals": 2}}, TypeError, r"n_sampled_goals"),
    ],
    ids=str,
)
def test_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TD3X("MlpPolicy", env(), **kwargs).learn(10)


ARCHITECTURE = {"net_arch": [16, 8]}
PARAMETER_NOISE = {"std": 0.1, "distance": 0.2}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"policy_delay": 2}, TypeError, r"DDPGX\(\) got an unexpected argument 'policy_delay'"),
        ({"target_policy_noise": 0.2}, TypeError, r"unexpected argument 'target_policy_noise'"),
        ({"critic_weight_decay": -0.1}, ValueError, r"critic_weight_decay must be a number >= 0, got -0.1"),
        ({"critic_weight_decay": "1e-2"}, TypeError, r"critic_weight_decay must be a number, got '1e-2' of type str"),
        ({"actor_learning_rate": -1.0}, ValueError, r"actor_learning_rate must be .*got -1.0"),
        ({"policy_kwargs": {"n_critics": 0}}, ValueError, r"n_critics must be an integer >= 1, got 0"),
        (
            {"policy_kwargs": {**ARCHITECTURE, "action_layer": 2}},
            ValueError,
            r"action_layer \(of the critic's hidden layers \[16, 8\], from 0\) must be an integer in \[0, 1\], got 2",
        ),
        ({"policy_kwargs": {**ARCHITECTURE, "action_layer": -1}}, ValueError, r"action_layer .* in \[0, 1\], got -1"),
        ({"policy_kwargs": {**ARCHITECTURE, "action_layer": 0.5}}, TypeError, r"action_layer .* an integer, got 0.5"),
        ({"policy_kwargs": {"net_arch": [], "action_layer": 1}}, ValueError, r"action_layer .* in \[0, 0\], got 1"),
        ({"policy_kwargs": {"net_arch": {"pi": [8, 8, 8], "qf": [8]}, "action_layer": 1}}, ValueError, r"\[8\].*got 1"),
        ({"policy_kwargs": {"batch_norm": "yes"}}, TypeError, r"batch_norm must be True or False, got 'yes' of type str"),
        (
            {"policy_kwargs": {"batch_norm": True}, "batch_size": 1},
            ValueError,
            r"batch_size must be an integer >= 2 with batch_norm=True, got 1",
        ),
        ({"policy_kwargs": {"final_layer_init": -1e-3}}, ValueError, r"final_layer_init must be a number >= 0, got -0.001"),
        ({"policy_kwargs": {"critic_layer_norm": True}}, TypeError, r"critic_layer_norm"),
        ({"parameter_noise": 0.1}, TypeError, r"parameter_noise must be a dict with the keys std, distance.*got 0.1"),
        ({"parameter_noise": {"std": 0.1}}, ValueError, r"parameter_noise lacks distance"),
        ({"parameter_noise": {**PARAMETER_NOISE, "target": 1}}, TypeError, r"parameter_noise got an unexpected key 'target'"),
        ({"parameter_noise": {**PARAMETER_NOISE, "std": 0}}, ValueError, r"parameter_noise\['std'\] must be .*got 0"),
        ({"parameter_noise": {**PARAMETER_NOISE, "distance": -1}}, ValueError, r"parameter_noise\['distance'\] .*got -1"),
        ({"parameter_noise": {**PARAMETER_NOISE, "coefficient": 1}}, ValueError, r"\['coefficient'\] .*got 1"),
        ({"parameter_noise": {**PARAMETER_NOISE, "interval": 0}}, ValueError, r"\['interval'\] .* an integer >= 1, got 0"),
        (
            {"exploration_noise": {"type": "ornstein-uhlenbeck", "start": 0.2, "dt": 0}},
            ValueError,
            r"exploration_noise\['dt'\] must be a number >= .*, got 0",
        ),
        (
            {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(3), np.ones(3))},
            ValueError,
            r"action_noise must have the shape of an action, \(2,\), or broadcast to it",
        ),
        (
            {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2), initial_noise=np.zeros(3))},
            ValueError,
            r"action_noise must have the shape of an action, \(2,\), or.*initial_noise of \(3,\)",
        ),
        (
            {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2), dt=0)},
            ValueError,
            r"the dt of action_noise must be a number >= 1e-09, got 0",
        ),
        (
            {"action_noise": VectorizedActionNoise(OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2), dt=-0.01), 1)},
            ValueError,
            r"the dt of action_noise must be a number >= 1e-09, got -0.01",
        ),
        (
            {"exploration_noise": {"type": "ornstein-uhlenbeck", "start": 0.2, "dt": -1}},
            ValueError,
            r"exploration_noise\['dt'\] must be a number >= 1e-09, got -1",
        ),
    ],
    ids=str,
)
def test_arguments_of_ddpgx(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DDPGX("MlpPolicy", env(), **kwargs).learn(10)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        *(
            ({"ent_coef": value}, error, rf"ent_coef must be a number > 0, \"auto\", or \"auto_x\".*got {shown}")
            for value, error, shown in [
                (0, ValueError, "0$"),
                (-0.1, ValueError, "-0.1$"),
                (float("inf"), ValueError, "inf$"),
                ("auto_0", ValueError, "'auto_0'"),
                ("auto_-1", ValueError, "'auto_-1'"),
                ("auto_", ValueError, "'auto_'"),
                ("auto_x", ValueError, "'auto_x'"),
                ("automatic", ValueError, "'automatic'"),
                (None, TypeError, "None of type NoneType"),
                (True, TypeError, "True of type bool"),
                ([0.1], TypeError, r"\[0.1\] of type list"),
            ]
        ),
        *(
            ({"target_entropy": value}, error, rf"target_entropy must be a number .* or \"auto\".*got {shown}")
            for value, error, shown in [
                ("low", ValueError, "'low'"),
                ("auto_1", ValueError, "'auto_1'"),
                (float("nan"), ValueError, "nan$"),
                (float("-inf"), ValueError, "-inf$"),
                (None, TypeError, "None of type NoneType"),
                (False, TypeError, "False of type bool"),
            ]
        ),
        ({"target_update_interval": 0}, ValueError, r"target_update_interval must be an integer >= 1, got 0"),
        ({"target_update_interval": 1.5}, TypeError, r"target_update_interval must be an integer, got 1.5"),
        ({"target_update_every": 0}, ValueError, r"target_update_every must be an integer >= 1, got 0"),
        ({"target_update_every": 2.0}, TypeError, r"target_update_every must be an integer, got 2.0"),
        (
            {"target_update_every": 2, "target_update_interval": 3},
            ValueError,
            r"target_update_interval and target_update_every exclude each other, got 3 and 2",
        ),
        *(
            ({f"{name}_learning_rate": -1.0, "value_network": True}, ValueError, rf"{name}_learning_rate must be .*got -1.0")
            for name in ("actor", "q_a", "q_b", "value", "ent_coef")
        ),
        ({"value_learning_rate": 1e-3}, ValueError, r"value_learning_rate needs value_network=True, got 0.001"),
        (
            {"ent_coef_learning_rate": 1e-3, "ent_coef": 0.1},
            ValueError,
            r"ent_coef_learning_rate needs ent_coef=\"auto\", got 0.001 with 0.1",
        ),
        ({"critic_learning_rate": 1e-3}, TypeError, r"SACX\(\) got an unexpected argument 'critic_learning_rate'"),
        ({"max_grad_norm": {"critic": 1.0}}, TypeError, r"unexpected key 'critic'; legal are actor, ent_coef, q_a, q_b"),
        ({"max_grad_norm": {"value": 1.0}}, TypeError, r"unexpected key 'value'"),
        ({"sde_sample_freq": -2}, ValueError, r"sde_sample_freq must be an integer >= -1, got -2"),
        *(
            ({name: "yes"}, TypeError, rf"{name} must be True or False, got 'yes' of type str")
            for name in ("value_network", "exact_log_prob", "use_sde", "use_sde_at_warmup", "engine")
        ),
        (
            {"policy_kwargs": {"value_network": True}},
            ValueError,
            r"value_network must be what the policy was made with, True, got False",
        ),
        ({"policy_kwargs": {"n_critics": 1.5}}, TypeError, r"n_critics must be an integer, got 1.5"),
        ({"q_learning_rates": {"q_c": 1e-3}}, TypeError, r"q_learning_rates got an unexpected key 'q_c'; legal are q_a, q_b"),
        ({"q_learning_rates": {"q_a": -1.0}}, ValueError, r"q_a_learning_rate must be .*got -1.0"),
        ({"policy_delay": 2}, TypeError, r"SACX\(\) got an unexpected argument 'policy_delay'"),
    ],
    ids=str,
)
def test_arguments_of_sacx(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SACX("MlpPolicy", env(), **kwargs).learn(10)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        *(
            ({name: 0}, ValueError, rf"{name} must be an integer >= 1, got 0")
            for name in (
                *("n_steps", "batch_size", "cg_max_steps", "line_search_max_iter", "sub_sampling_factor", "fvp_subsample"),
            )
        ),
        ({"cg_max_steps": 1.5}, TypeError, r"cg_max_steps must be an integer, got 1.5 of type float"),
        ({"n_critic_updates": -1}, ValueError, r"n_critic_updates must be an integer >= 0, got -1"),
        ({"cg_damping": -0.1}, ValueError, r"cg_damping must be a number >= 0, got -0.1"),
        ({"target_kl": 0.0}, ValueError, r"target_kl must be a number >= 1e-12, got 0.0"),
        ({"target_kl": None}, TypeError, r"target_kl must be a number, got None of type NoneType"),
        *(
            (
                {"line_search_shrinking_factor": value},
                ValueError,
                rf"line_search_shrinking_factor must be a number in \[0.01, 0.99\], got {value}",
            )
            for value in (0.0, 1.0, -0.5)
        ),
        ({"accept_ratio": 1.5}, ValueError, r"accept_ratio must be a number in \[0, 1\], got 1.5"),
        ({"accept_ratio": -0.1}, ValueError, r"accept_ratio must be a number in \[0, 1\], got -0.1"),
        ({"kl_direction": "reverse"}, ValueError, r"kl_direction must be one of 'new_old', 'old_new', got 'reverse'"),
        ({"kl_reduction": "max"}, ValueError, r"kl_reduction must be one of 'mean', 'sum', got 'max'"),
        ({"ent_coef": -0.1}, ValueError, r"ent_coef must be a number >= 0, got -0.1"),
        ({"gae_lambda": 1.1}, ValueError, r"gae_lambda must be a number in \[0, 1\], got 1.1"),
        ({"normalize_advantage": "yes"}, TypeError, r"normalize_advantage must be True or False, got 'yes' of type str"),
        (
            {"n_steps": 1},
            AssertionError,
            r"TRPOX: `n_steps \* n_envs` must be greater than 1. Currently n_steps=1 and n_envs=1",
        ),
        ({"learning_rate": -1e-3}, ValueError, r"learning_rate must be .*got -0.001"),
        ({"value_learning_rate": 1e-3}, TypeError, r"TRPOX\(\) got an unexpected argument 'value_learning_rate'"),
        ({"max_grad_norm": 0.5}, TypeError, r"TRPOX\(\) got an unexpected argument 'max_grad_norm'"),
        ({"fvp_subsampling": 5}, TypeError, r"unexpected argument 'fvp_subsampling'; did you mean 'fvp_subsample'\?"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_arguments_of_trpox(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TRPOX("MlpPolicy", env(), **kwargs).learn(10)


PENALTY, APART = {"surrogate": "penalty"}, {"separate_phases": True}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"batch_size": 1}, ValueError, r"batch_size with normalize_advantage=True must be an integer >= 2, got 1"),
        ({"batch_size": 0, "normalize_advantage": False}, ValueError, r"batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 64.0}, TypeError, r"batch_size .* must be an integer, got 64.0 of type float"),
        ({"n_steps": 0}, ValueError, r"n_steps must be an integer >= 1, got 0"),
        ({"n_steps": "64"}, TypeError, r"n_steps must be an integer, got '64' of type str"),
        ({"n_steps": 1}, AssertionError, r"n_steps \* n_envs. must be greater than 1. Currently n_steps=1 and n_envs=1"),
        ({"n_epochs": 0}, ValueError, r"n_epochs must be an integer >= 1, got 0"),
        ({"learning_rate": -1.0}, ValueError, r"learning_rate must be a number >= 0.*got -1.0"),
        ({"gamma": 1.5}, ValueError, r"gamma must be a number in \[0, 1\], got 1.5"),
        ({"gae_lambda": -0.1}, ValueError, r"gae_lambda must be a number in \[0, 1\], got -0.1"),
        ({"ent_coef": -0.1}, ValueError, r"ent_coef must be a number >= 0, got -0.1"),
        ({"vf_coef": "big"}, TypeError, r"vf_coef must be a number, got 'big'"),
        ({"max_grad_norm": 0}, ValueError, r"max_grad_norm\['policy'\] must be .*got 0"),
        ({"max_grad_norm": {"value": 1.0}}, TypeError, r"max_grad_norm got an unexpected key 'value'; legal are policy$"),
        ({"clip_range": -0.1}, ValueError, r"clip_range must be a number >= 0.*got -0.1"),
        ({"clip_range": "0.2"}, ValueError, r"clip_range must be .*got '0.2'"),
        ({"clip_range": [0.2]}, TypeError, r"clip_range must be .*got \[0.2\] of type list"),
        ({"clip_range_vf": -1}, ValueError, r"clip_range_vf must be a number >= 0.*got -1"),
        ({"clip_range_vf": 0}, ValueError, r"clip_range_vf must be > 0, or None for no clipping, got 0"),
        ({"clip_range_vf_mode": "min"}, ValueError, r"clip_range_vf_mode must be one of 'clipped', 'max', got 'min'"),
        ({"clip_range_vf_mode": "max"}, ValueError, r"clip_range_vf_mode='max' needs clip_range_vf, got None"),
        ({"normalize_advantage_over": "all"}, ValueError, r"normalize_advantage_over must be one of 'minibatch', 'buffer'"),
        ({"target_kl": -0.1}, ValueError, r"target_kl must be a number >= 0.0, got -0.1"),
        ({"kl_stop": -0.01}, ValueError, r"kl_stop must be a number >= 0.0, got -0.01"),
        ({"kl_stop": 0.1, "target_kl": 0.2}, ValueError, r"target_kl and kl_stop exclude each other, got 0.2 and 0.1"),
        ({"kl_stop_estimator": "k2"}, ValueError, r"kl_stop_estimator must be one of 'k1', 'k3', got 'k2'"),
        ({"kl_stop_every": "step"}, ValueError, r"kl_stop_every must be one of 'minibatch', 'epoch', got 'step'"),
        ({"kl_stop_scope": "value"}, ValueError, r"kl_stop_scope must be one of 'both', 'policy', got 'value'"),
        ({"kl_stop_scope": "policy"}, ValueError, r"kl_stop_scope=\"policy\" needs separate_phases=True"),
        ({"surrogate": "kl"}, ValueError, r"surrogate must be one of 'clip', 'penalty', got 'kl'"),
        (
            {"kl_target": 0.01},
            ValueError,
            r"kl_target is an option of surrogate=\"penalty\", got 0.01 with surrogate=\"clip\"",
        ),
        ({"kl_coef": 1.0}, ValueError, r"kl_coef is an option of surrogate=\"penalty\", got 1.0"),
        ({**PENALTY, "kl_target": 0}, ValueError, r"kl_target must be a number >= .*, got 0"),
        ({**PENALTY, "kl_coef": -1}, ValueError, r"kl_coef must be a number >= 0.0, got -1"),
        ({**PENALTY, "clip_range": 0.1}, ValueError, r"clip_range is an option of surrogate=\"clip\", got 0.1"),
        ({**PENALTY, "clip_range": "lin_0.2"}, ValueError, r"clip_range is an option of surrogate=\"clip\", got 'lin_0.2'"),
        *(
            ({name: 1}, ValueError, rf"{name} needs separate_phases=True, got 1 without it")
            for name in (
                *("policy_epochs", "value_epochs", "policy_sample_ratio", "value_sample_ratio"),
                *("policy_learning_rate", "value_learning_rate", "value_stop_mse"),
            )
        ),
        ({**APART, "policy_epochs": 0}, ValueError, r"policy_epochs must be an integer >= 1, got 0"),
        ({**APART, "value_epochs": 1.5}, TypeError, r"value_epochs must be an integer, got 1.5"),
        ({**APART, "policy_sample_ratio": 0}, ValueError, r"policy_sample_ratio must be a number in \[1e-09, 1.0\], got 0"),
        ({**APART, "value_sample_ratio": 1.1}, ValueError, r"value_sample_ratio must be a number in .*, got 1.1"),
        ({**APART, "value_stop_mse": -1}, ValueError, r"value_stop_mse must be a number >= 0.0, got -1"),
        ({**APART, "value_learning_rate": -1}, ValueError, r"value_learning_rate must be .*got -1"),
        ({**APART, "max_grad_norm": {"critic": 1}}, TypeError, r"unexpected key 'critic'; legal are policy, value"),
        ({"rollout": "episode"}, ValueError, r"rollout must be one of 'steps', 'episodes', got 'episode'"),
        ({"rollout_episodes": 0}, ValueError, r"rollout_episodes must be an integer >= 1, got 0"),
        ({"drop_unfinished_episodes": True}, ValueError, r"drop_unfinished_episodes=True needs rollout='episodes'"),
        ({"sde_sample_freq": -2}, ValueError, r"sde_sample_freq must be an integer >= -1, got -2"),
        *(
            ({name: "yes"}, TypeError, rf"{name} must be True or False, got 'yes' of type str")
            for name in ("normalize_advantage", "separate_phases", "drop_unfinished_episodes", "use_sde", "engine")
        ),
        ({"policy_kwargs": {"net_arc": [8]}}, TypeError, r"net_arc"),
        ({"clip_rang": 0.1}, TypeError, r"PPOX\(\) got an unexpected argument 'clip_rang'; did you mean 'clip_range'\?"),
    ],
    ids=str,
)
def test_arguments_of_ppox(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PPOX("MlpPolicy", env(), **kwargs).learn(10)


@pytest.mark.parametrize("batch_size", [10, 100], ids=["does not divide", "exceeds"])
def test_a_batch_that_does_not_fit_the_rollout_is_warned_of(batch_size: int) -> None:
    with pytest.warns(UserWarning, match=rf"mini-batch size of {batch_size}.*`n_steps \* n_envs = 64`"):
        PPOX("MlpPolicy", env(), n_steps=64, batch_size=batch_size)


def test_arguments_of_ppox_are_checked_again_at_load(tmp_path: Any) -> None:
    PPOX("MlpPolicy", env()).save(tmp_path / "model")
    for kwargs, message in (
        ({"batch_size": 1}, r"batch_size .* >= 2, got 1"),
        ({"kl_stop": -1}, r"kl_stop must be .* got -1"),
        ({"kl_coef": 2.0}, r"kl_coef is an option of surrogate"),
        ({"value_epochs": 2}, r"value_epochs needs separate_phases=True"),
    ):
        with pytest.raises(ValueError, match=message):
            PPOX.load(tmp_path / "model", **kwargs)
    # a search and RL Zoo's enjoy replace the clip range of any model, and a rate of 0 is legal
    penalised = PPOX("MlpPolicy", env(), surrogate="penalty", clip_range=ConstantSchedule(0.2))
    penalised.save(tmp_path / "penalised")
    PPOX.load(tmp_path / "penalised", custom_objects={"clip_range": lambda _: 0.0, "learning_rate": 0.0})


@pytest.mark.parametrize("error", [NotImplementedError, AssertionError])
def test_spaces_that_ppox_cannot_take(error: type[Exception]) -> None:
    with pytest.raises(error, match=r"PPOX: .*but Dict\(.*was provided"):
        PPOX("MlpPolicy", env(action_space=DICT))
    with pytest.raises(error, match="only with images"):
        PPOX("CnnPolicy", env())
    with pytest.raises(ValueError, match=r"env must be an environment .* got None"):
        PPOX("MlpPolicy", None)


ENDLESS = r"max_rollout_steps must be an integer >= 1 for an environment without a time limit.*got None.*TimeLimit"


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"max_rollout_steps": None}, ValueError, ENDLESS),
        ({"max_rollout_steps": 0}, ValueError, r"max_rollout_steps must be an integer >= 1, got 0"),
        ({"max_rollout_steps": 5.0}, TypeError, r"max_rollout_steps must be an integer, got 5.0"),
        ({"rollout_episodes": 0}, ValueError, r"rollout_episodes must be an integer >= 1, got 0"),
        ({"rollout_episodes": "all"}, TypeError, r"rollout_episodes must be an integer, got 'all'"),
        *(
            ({name: "yes"}, TypeError, rf"{name} must be True or False, got 'yes' of type str")
            for name in ("use_baseline", "bootstrap_truncated", "gamma_t_weight", "normalize_advantage", "use_sde", "engine")
        ),
        *(
            ({name: value, "use_baseline": False}, ValueError, rf"{name} needs use_baseline=True, got {value} without it")
            for name, value in [
                ("bootstrap_truncated", True),
                ("baseline_learning_rate", 0.1),
                ("baseline_learning_rate", 0.0),
            ]
        ),
        ({"baseline_learning_rate": -1.0}, ValueError, r"baseline_learning_rate must be .*got -1.0"),
        ({"learning_rate": "lin"}, ValueError, r"learning_rate.*got 'lin'"),
        ({"gamma": 1.1}, ValueError, r"gamma must be a number in \[0, 1\], got 1.1"),
        ({"ent_coef": -0.1}, ValueError, r"ent_coef must be a number >= 0, got -0.1"),
        ({"max_grad_norm": 0}, ValueError, r"max_grad_norm\['policy'\] must be .*got 0"),
        ({"max_grad_norm": {"value": 1.0}}, TypeError, r"unexpected key 'value'; legal are baseline, policy"),
        ({"policy_kwargs": {"net_arc": [8]}}, TypeError, r"net_arc"),
        *(
            ({name: value}, TypeError, rf"Reinforce\(\) got an unexpected argument '{name}'")
            for name, value in {"rollout": "steps", "n_steps": 5, "gae_lambda": 0.9, "drop_unfinished_episodes": False}.items()
        ),
    ],
    ids=str,
)
def test_arguments_of_reinforce(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Reinforce("MlpPolicy", env(), **{"max_rollout_steps": 20, **kwargs}).learn(10)


TRACES = {"actor_trace_lambda": 0.5, "critic_trace_lambda": 0.5}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"critic": "V"}, ValueError, r"critic must be one of 'v', 'q', got 'V'"),
        *(
            ({name: "yes"}, TypeError, rf"{name} must be True or False, got 'yes' of type str")
            for name in ("deterministic_policy", "gamma_t_weight", "use_sde", "engine")
        ),
        *(
            ({name: value}, ValueError, rf"{name} must be a number in \[0, 1\], got {value}")
            for name in TRACES
            for value in (-0.1, 1.1)
        ),
        ({"critic_trace_lambda": "long"}, TypeError, r"critic_trace_lambda must be a number, got 'long'"),
        ({"actor_trace_lambda": 0.5, "critic": "q"}, ValueError, r"actor_trace_lambda needs critic=\"v\", got 0.5"),
        ({"deterministic_policy": True}, ValueError, r"deterministic_policy=True needs critic=\"q\".*got 'v'"),
        ({"exploration_std": 0.1}, ValueError, r"exploration_std needs deterministic_policy=True, got 0.1"),
        ({"exploration_std": -0.1}, ValueError, r"exploration_std must be a number >= 0, got -0.1"),
        *(
            (
                {"critic": "q", "deterministic_policy": True, name: value},
                ValueError,
                rf"{name} needs a stochastic policy, got {value}",
            )
            for name, value in {"critic_trace_lambda": 0.5, "ent_coef": 0.1, "use_sde": True}.items()
        ),
        *(
            ({f"{name}_learning_rate": -1.0}, ValueError, rf"{name}_learning_rate must be .*-1.0")
            for name in ("actor", "critic")
        ),
        ({"max_grad_norm": {"policy": 1.0}}, TypeError, r"unexpected key 'policy'; legal are actor, critic"),
        *(
            ({name: value}, TypeError, rf"AC\(\) got an unexpected argument '{name}'")
            for name, value in {"rollout": "episodes", "n_steps": 5, "gae_lambda": 0.9, "vf_coef": 0.5}.items()
        ),
    ],
    ids=str,
)
def test_arguments_of_ac(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AC("MlpPolicy", env(), **kwargs).learn(10)


@pytest.mark.parametrize("error", [NotImplementedError, AssertionError])
@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Discrete(3), r"deterministic_policy=True needs a Box of actions, got Discrete\(3\)"),
        (spaces.Box(-np.inf, np.inf, (2,)), r"finite.*Box\(-inf"),
    ],
    ids=["discrete", "unbounded"],
)
def test_actions_that_a_deterministic_policy_of_ac_cannot_take(space: Any, message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=message):
        AC("MlpPolicy", env(action_space=space), critic="q", deterministic_policy=True)


@pytest.mark.parametrize("cls", [AC, Reinforce])
def test_two_optimizers_need_policies_that_keep_networks_apart(cls: Any) -> None:
    kwargs = {"max_rollout_steps": 20} if cls is Reinforce else {}
    cls(ActorCriticPolicy, env(), **kwargs)
    shared = {"policy_kwargs": {"net_arch": [8], "share_features_extractor": True}}
    with pytest.raises(ValueError, match=rf"{cls.__name__} needs networks of their own .*share_features_extractor=False"):
        cls("CnnPolicy", env(IMAGE), **shared, **kwargs)


def test_critic_of_ac_cannot_change_at_load(tmp_path: Any) -> None:
    AC("MlpPolicy", env(), critic="q").save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"critic and deterministic_policy must be what the policy was made for, got 'v'"):
        AC.load(tmp_path / "model", critic="v")
    with pytest.raises(ValueError, match=r"must be what the policy was made for, got 'q' and True with .*QMlpPolicy"):
        AC.load(tmp_path / "model", deterministic_policy=True)


def test_arguments_of_reinforce_are_checked_again_at_load(tmp_path: Any) -> None:
    Reinforce("MlpPolicy", env(), max_rollout_steps=20).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"bootstrap_truncated needs use_baseline=True"):
        Reinforce.load(tmp_path / "model", use_baseline=False, bootstrap_truncated=True)
    assert Reinforce.load(tmp_path / "model", max_rollout_steps=None).predict(BOX.sample())[0].shape == (2,)
    with pytest.raises(ValueError, match=ENDLESS):
        Reinforce.load(tmp_path / "model", env=env(), max_rollout_steps=None)


def test_sacx_refuses_policies_without_its_networks() -> None:
    class OtherPolicy(SACPolicy):
        """SB3's networks."""

    with pytest.raises(TypeError, match=r"policy must be derived from sb3_ac_ext.sacx.*MlpPolicy, got .*OtherPolicy"):
        SACX(OtherPolicy, env(), value_network=True)
    assert type(SACX(OtherPolicy, env()).policy) is OtherPolicy
    assert type(SACX(SACPolicy, env()).policy) is SACX.policy_aliases["MlpPolicy"]


def test_value_network_cannot_change_at_load(tmp_path: Any) -> None:
    SACX("MlpPolicy", env(), value_network=True).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"value_network must be what the policy was made with, True, got False"):
        SACX.load(tmp_path / "model", value_network=False)


@pytest.mark.parametrize(
    ("make_env", "message"),
    [
        (lambda: env(action_space=spaces.Discrete(3)), r"Box.*Discrete\(3\)"),
        (lambda: env(action_space=spaces.Box(-np.inf, np.inf, (2,))), r"finite.*Box\(-inf"),
        (lambda: env(action_space=spaces.Box(0.0, np.array([0.0, 1.0], np.float32))), r"low < high"),
    ],
    ids=["discrete", "unbounded", "empty range"],
)
@pytest.mark.parametrize("error", [NotImplementedError, AssertionError])
def test_action_spaces(make_env: Callable[[], gym.Env], message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=message):
        TD3X("MlpPolicy", make_env())


@pytest.mark.parametrize("error", [NotImplementedError, AssertionError])
def test_spaces_and_policies_that_do_not_fit(error: type[Exception]) -> None:
    with pytest.raises(error, match="only with images"):
        TD3X("CnnPolicy", env())
    with pytest.raises(error, match=r"n_steps must be 1 for Dict observations.*got 3"):
        TD3X("MultiInputPolicy", env(DICT), n_steps=3)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        TD3X("MlpPolicy", env(DICT))
    with pytest.raises(ValueError, match=r"env must be an environment .* got None"):
        TD3X("MlpPolicy", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MlpPolcy"):
        TD3X("MlpPolcy", env())
    with pytest.raises(ValueError, match="n_envs=2"):
        TD3X("MlpPolicy", make_vec_env(env, n_envs=2), train_freq=(1, "episode"))


def test_checks_leave_the_random_streams_alone() -> None:
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    TD3X("MlpPolicy", env(), action_noise=NormalActionNoise(np.zeros(2), np.ones(2)))
    assert np.random.random() == expected


@pytest.mark.parametrize(("progress", "rate"), [(1.0, 7e-4), (0.5, 3.5e-4), (0.0, 0.0)])
def test_linear_schedule_string(progress: float, rate: float) -> None:
    assert as_schedule("learning_rate", "lin_7e-4")(progress) == pytest.approx(rate)


def model_that_learns(**kwargs: Any) -> TD3X:
    return TD3X("MlpPolicy", RandomEnv(BOX, CONTINUOUS), policy_kwargs={"net_arch": [8]}, learning_starts=10, seed=0, **kwargs)


@pytest.mark.parametrize("network", ["actor", "q_a", "q_b", "value"])
@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_non_finite_training_of_sacx_stops(engine: bool, network: str) -> None:
    kwargs = {"policy_kwargs": {"net_arch": [8]}, "learning_starts": 10, "value_network": True, "engine": engine}
    model = SACX("MlpPolicy", RandomEnv(BOX, CONTINUOUS), **kwargs).learn(20)
    parts = {"actor": model.actor, "q_a": model.critic.qf0, "q_b": model.critic.qf1, "value": model.policy.value}
    next(parts[network].parameters()).data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"SACX: the parameters of the \w+ became non-finite .* by update 11"):
        model.train(1, 4)


class BreakAfterRollout(BaseCallback):
    """Writes a value into a parameter behind the second rollout."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__()
        self.name, self.value, self.rollouts = name, value, 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.rollouts += 1
        if self.rollouts == 2:
            getattr(self.model.policy, self.name).weight.data[0, 0] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kwargs", "layer", "network"),
    [
        ({}, "action_net", "policy"),
        ({}, "value_net", "policy"),
        ({"engine": False}, "value_net", "policy"),
        (APART, "value_net", "value"),
        ({**APART, "engine": False}, "value_net", "value"),
        (PENALTY, "action_net", "policy"),
    ],
    ids=str,
)
def test_non_finite_training_of_ppox_stops(kwargs: dict[str, Any], layer: str, network: str, value: float) -> None:
    """One optimizer is called the policy's."""
    model = PPOX("MlpPolicy", RandomEnv(BOX, CONTINUOUS), n_steps=8, batch_size=8, n_epochs=1, seed=0, **kwargs)
    done = 2 + 2 * model.separate_phases
    with pytest.raises(NonFiniteError, match=rf"PPOX: the parameters of the {network} became non-finite .* by update {done}"):
        model.learn(100, callback=BreakAfterRollout(layer, value))
    assert model.num_timesteps == 16


def test_a_rate_of_ppox_that_overflows_stops_at_the_update_that_did_it() -> None:
    model = PPOX("MlpPolicy", RandomEnv(BOX, CONTINUOUS), n_steps=8, batch_size=4, n_epochs=5, seed=0, learning_rate=1e30)
    with pytest.raises(NonFiniteError):
        model.learn(100)
    assert model.num_timesteps == 8


class Break(BaseCallback):
    """Writes a value into one parameter of a network at step 20."""

    def __init__(self, network: str, value: float) -> None:
        super().__init__()
        self.network, self.value = network, value

    def _on_step(self) -> bool:
        if self.n_calls == 20:
            next(getattr(self.model, self.network).parameters()).data[0, 0] = self.value
        return True


@pytest.mark.parametrize("network", ["actor", "critic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_training_stops_and_names_the_network(network: str, value: float) -> None:
    model = model_that_learns()
    with pytest.raises(NonFiniteError, match=rf"TD3X: the parameters of the {network} became non-finite .* by update 10"):
        model.learn(100, callback=Break(network, value))
    assert model.num_timesteps == 20
    assert issubclass(NonFiniteError, ValueError)  # what a search prunes on


def test_a_rate_that_overflows_stops_at_the_update_that_did_it(tmp_path: Any) -> None:
    model = model_that_learns(policy_delay=1)
    model.save(tmp_path / "model")
    model.learning_rate = 1e37
    model._setup_lr_schedule()
    with pytest.raises(NonFiniteError, match="by update 1"):
        model.learn(100)
    assert all(bool(th.isfinite(p).all()) for p in TD3X.load(tmp_path / "model").policy.parameters())
