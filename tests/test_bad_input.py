"""Bad input is refused before an environment step is taken, with argument, value and what is legal."""

from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv
from gymnasium import spaces
from models import BY_ADAM, ON_POLICY, ONE_AGENT, algorithm_class, rows, small_model, taking
from parallel_environments import Meadow
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy

from sb3_ac_ext import AC, PPOX, SACX, Reinforce
from sb3_ac_ext.base.schedules import as_schedule
from sb3_ac_ext.validation import LARGEST, NonFiniteError, UnsupportedError


class NoSteps(gym.Wrapper):
    """Fails the test if a step is taken."""

    def step(self, action: Any) -> Any:
        pytest.fail("an environment step was taken")


class NoMeadow(Meadow):
    """Fails the test if a step of several agents is taken."""

    def step(self, actions: Any) -> Any:
        pytest.fail("an environment step was taken")


def env(observation_space: spaces.Space = BOX, action_space: spaces.Space = CONTINUOUS) -> gym.Env:
    return NoSteps(RandomEnv(observation_space, action_space))


# Arguments, by the row of the registry: values that are out of range or contradict each other

Cases = dict[str, list[tuple[dict[str, Any], str]]]

NORMAL = {"type": "normal", "start": 0.5, "end": 0.1, "steps": 100}
ORNSTEIN = {"type": "ornstein-uhlenbeck", "start": 0.2}
PARAMETER_NOISE = {"std": 0.1, "distance": 0.2}
ARCHITECTURE = {"net_arch": [16, 8]}
PENALTY, APART = {"surrogate": "penalty"}, {"separate_phases": True}
DETERMINISTIC = {"critic": "q", "deterministic_policy": True}
ENDLESS = r"max_rollout_steps must be an integer >= 1 for an environment without a time limit.*got None.*TimeLimit"


def noise(**kwargs: Any) -> dict[str, Any]:
    """Arguments with a process for two actions."""
    return {"action_noise": OrnsteinUhlenbeckActionNoise(**{"mean": np.zeros(2), "sigma": np.ones(2), **kwargs})}


def several(names: Iterable[str], value: Any, message: str, **others: Any) -> list[tuple[dict[str, Any], str]]:
    """Cases that differ by the argument alone."""
    return [({name: value, **others}, message.format(name)) for name in names]


VALUES: Cases = {
    "td3x": [
        ({"learning_rate": -1e-3}, r"learning_rate must be a number >= 0.*got -0.001"),
        ({"learning_rate": float("nan")}, r"learning_rate.*nan"),
        ({"learning_rate": "lin"}, r"learning_rate.*\"lin_7e-4\".*got 'lin'"),
        ({"learning_rate": "exp_1e-3"}, r"learning_rate.*got 'exp_1e-3'"),
        ({"learning_rate": "lin_-1e-3"}, r"learning_rate.*-0.001 at the start"),
        ({"actor_learning_rate": -1.0}, r"actor_learning_rate must be .*got -1.0"),
        ({"critic_learning_rate": "lin_x"}, r"critic_learning_rate must be .*got 'lin_x'"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm must be .*got 0.0"),
        ({"policy_delay": 0}, r"policy_delay must be an integer >= 1, got 0"),
        ({"target_policy_noise": -0.1}, r"target_policy_noise must be a number >= 0, got -0.1"),
        ({"target_noise_clip": -0.1}, r"target_noise_clip must be a number >= 0, got -0.1"),
        ({"gamma": 1.5}, r"gamma must be a number in \[0, 1\], got 1.5"),
        ({"tau": -0.1}, r"tau must be a number in \[0, 1\], got -0.1"),
        *several(["batch_size", "buffer_size", "n_steps", "train_freq"], 0, r"{} must be an integer >= 1, got 0"),
        *several(["batch_size", "n_steps"], 2**63 - 1, r"{} must be an integer >= 1 whose batch fits into memory, got .*9223"),
        ({"learning_starts": -1}, r"learning_starts must be a number >= 0, got -1"),
        ({"gradient_steps": -2}, r"gradient_steps must be an integer >= -1, got -2"),
        ({"train_freq": (1, "epoch")}, r"unit of train_freq must be one of 'step', 'episode', got 'epoch'"),
        ({"train_freq": (1, 2, 3)}, r"train_freq must be .*got \(1, 2, 3\)"),
        ({"warmup": "none"}, r"warmup must be one of 'uniform', 'noise', got 'none'"),
        ({"warmup": "noise"}, r"warmup='noise' needs exploration_noise"),
        ({"exploration_noise": {"type": "normal"}}, r"exploration_noise lacks start"),
        ({"exploration_noise": {"type": "pink", "start": 1}}, r"exploration_noise\['type'\] must be one of.*got 'pink'"),
        ({"exploration_noise": {**NORMAL, "start": -1}}, r"exploration_noise\['start'\] must be a number >= 0, got -1"),
        ({"exploration_noise": {**NORMAL, "steps": 0}}, r"exploration_noise\['steps'\] must be a number >= 1, got 0"),
        ({"exploration_noise": {**NORMAL, "dt": 1}}, r"exploration_noise\['dt'\] belongs to 'ornstein-uhlenbeck'"),
        (
            {"exploration_noise": {**ORNSTEIN, "dt": -1}},
            r"exploration_noise\['dt'\] must be a number in \[1e-09, 13.3.*, got -1",
        ),
        ({"exploration_noise": {"type": "normal", "start": 1, "end": 0}}, r"needs both end and steps"),
        (
            {"exploration_noise": NORMAL, **noise()},
            r"action_noise and exploration_noise exclude each other, got action_noise=Orn",
        ),
        (noise(mean=np.zeros(3), sigma=np.ones(3)), r"action_noise must have the shape of an action, \(2,\), or broadcast"),
        (noise(sigma=np.ones(3)), r"action_noise must have the shape"),
        (noise(initial_noise=np.zeros(3)), r"action_noise must have the shape of an action.*initial_noise of \(3,\)"),
        (
            {"action_noise": VectorizedActionNoise(noise(mean=np.zeros(3), sigma=np.ones(3))["action_noise"], 1)},
            r"action_noise must have the shape of an action, .*got VecNoise.*mu of \(3,\)",
        ),
        (noise(dt=0), r"the dt of action_noise must be a number >= 1e-09, got 0"),
        ({"action_noise": VectorizedActionNoise(noise(dt=-0.01)["action_noise"], 1)}, r"the dt of action_noise .*got -0.01"),
        ({"optimize_memory_usage": True}, r"optimize_memory_usage.*handle_timeout_termination"),
    ],
    "ddpgx": [
        ({"critic_weight_decay": -0.1}, r"critic_weight_decay must be a number >= 0, got -0.1"),
        (
            {"policy_kwargs": {**ARCHITECTURE, "action_layer": 2}},
            r"action_layer \(of the critic's hidden layers \[16, 8\], from 0\) must be an integer in \[0, 1\], got 2",
        ),
        ({"policy_kwargs": {**ARCHITECTURE, "action_layer": -1}}, r"action_layer'\] must be an integer >= 0, got -1"),
        ({"policy_kwargs": {"net_arch": [], "action_layer": 1}}, r"action_layer .* in \[0, 0\], got 1"),
        ({"policy_kwargs": {"net_arch": {"pi": [8, 8, 8], "qf": [8]}, "action_layer": 1}}, r"\[8\].*got 1"),
        ({"policy_kwargs": {"batch_norm": True}, "batch_size": 1}, r"batch_size must be .* >= 2 with batch_norm=True, got 1"),
        ({"policy_kwargs": {"final_layer_init": -1e-3}}, r"final_layer_init'\] must be a number >= 0 or None, got -0.001"),
        ({"parameter_noise": {"std": 0.1}}, r"parameter_noise lacks distance"),
        ({"parameter_noise": {**PARAMETER_NOISE, "std": 0}}, r"parameter_noise\['std'\] must be .*got 0"),
        ({"parameter_noise": {**PARAMETER_NOISE, "distance": -1}}, r"parameter_noise\['distance'\] .*got -1"),
        ({"parameter_noise": {**PARAMETER_NOISE, "coefficient": 1}}, r"\['coefficient'\] .*got 1"),
        ({"parameter_noise": {**PARAMETER_NOISE, "interval": 0}}, r"\['interval'\] .* an integer >= 1, got 0"),
    ],
    "sacx": [
        *(
            ({"ent_coef": value}, rf"ent_coef must be a number > 0, \"auto\", or \"auto_x\".*got {value!r}")
            for value in (0, -0.1, float("inf"), "auto_0", "auto_-1", "auto_", "auto_x", "automatic")
        ),
        *(
            ({"target_entropy": value}, rf"target_entropy must be a number .* or \"auto\".*got {value!r}")
            for value in ("low", "auto_1", float("nan"), float("-inf"))
        ),
        ({"target_update_interval": 0}, r"target_update_interval must be an integer >= 1, got 0"),
        ({"target_update_every": 0}, r"target_update_every must be an integer >= 1 or None, got 0"),
        (
            {"target_update_every": 2, "target_update_interval": 3},
            r"target_update_interval and target_update_every exclude each other, got target_update_interval=3 and .*=2",
        ),
        *several(
            [f"{name}_learning_rate" for name in ("actor", "q_a", "q_b", "value", "ent_coef")],
            *(-1.0, r"{} must be .*got -1.0"),
            value_network=True,
        ),
        ({"q_learning_rates": {"q_a": -1.0}}, r"q_learning_rates\['q_a'\] must be .*got -1.0"),
        ({"value_learning_rate": 1e-3}, r"value_learning_rate=0.001 needs value_network=True, got value_network=False"),
        (
            {"ent_coef_learning_rate": 1e-3, "ent_coef": 0.1},
            r"ent_coef_learning_rate=0.001 needs ent_coef=\"auto\", got ent_coef=0.1",
        ),
        ({"sde_sample_freq": -2}, r"sde_sample_freq must be an integer >= -1, got -2"),
        (
            {"policy_kwargs": {"value_network": True}},
            r"value_network must be what the policy was made with, True, got False",
        ),
    ],
    "maddpg": [
        ({"centralised": True, "policy_kwargs": {"centralised": False}}, r"centralised must be .* False, got True"),
        ({"policy_delay": 0}, r"policy_delay must be an integer >= 1, got 0"),
        ({"target_policy_noise": -0.1}, r"target_policy_noise must be a number >= 0, got -0.1"),
        ({"logit_penalty": -1}, r"logit_penalty must be a number >= 0, got -1"),
        ({"policy_kwargs": {"n_critics": 0}}, r"n_critics'\] must be an integer >= 1, got 0"),
        ({"policy_kwargs": {"gumbel_temperature": 0}}, r"gumbel_temperature'\] must be a number >= 1e-06, got 0"),
        (
            {"policy_kwargs": {"features_extractor_class": NatureCNN}},
            r"features_extractor_class must be FlattenExtractor, got .*NatureCNN",
        ),
        ({"policy_kwargs": {"parameter_sharing": [["cow", "hen"]]}}, r"agent must be one of 'cow'.*got 'hen'"),
        (
            {"policy_kwargs": {"parameter_sharing": [["cow", "dog"]]}},
            r"one list of parameter_sharing must have spaces of one size and kind, got .*\['cow', 'dog'\].* with cow, dog",
        ),
        ({"policy_kwargs": {"parameter_sharing": [["cow"], ["cow"]]}}, r"each in one list, got \[\['cow'\], \['cow'\]\]"),
    ],
    "trpox": [
        *several(
            ["n_steps", "batch_size", "cg_max_steps", "line_search_max_iter", "sub_sampling_factor", "fvp_subsample"],
            *(0, r"{} must be an integer >= 1, got 0"),
        ),
        ({"n_critic_updates": -1}, r"n_critic_updates must be an integer >= 0, got -1"),
        ({"cg_damping": -0.1}, r"cg_damping must be a number >= 0, got -0.1"),
        ({"target_kl": 0.0}, r"target_kl must be a number >= 1e-12, got 0.0"),
        *(
            ({"line_search_shrinking_factor": value}, rf"_shrinking_factor must be a number in \[0.01, 0.99\], got {value}")
            for value in (0.0, 1.0, -0.5)
        ),
        *(({"accept_ratio": value}, rf"accept_ratio must be a number in \[0, 1\] .*got {value}") for value in (1.5, -0.1)),
        ({"kl_direction": "reverse"}, r"kl_direction must be one of 'new_old', 'old_new', got 'reverse'"),
        ({"kl_reduction": "max"}, r"kl_reduction must be one of 'mean', 'sum', got 'max'"),
    ],
    "ppox": [
        ({"batch_size": 1}, r"batch_size with normalize_advantage=True must be an integer >= 2, got 1"),
        ({"batch_size": 0, "normalize_advantage": False}, r"batch_size must be an integer >= 1, got 0"),
        *several(["n_steps", "n_epochs", "rollout_episodes"], 0, r"{} must be an integer >= 1, got 0"),
        ({"gae_lambda": -0.1}, r"gae_lambda must be a number in \[0, 1\], got -0.1"),
        ({"ent_coef": -0.1}, r"ent_coef must be a number >= 0, got -0.1"),
        ({"max_grad_norm": 0}, r"max_grad_norm must be a number >= 1e-12, .*got 0"),
        ({"clip_range": -0.1}, r"clip_range must be a number >= 0.*got -0.1"),
        ({"clip_range": "0.2"}, r"clip_range must be .*got '0.2'"),
        ({"clip_range_vf": -1}, r"clip_range_vf must be a number >= 0.*got -1"),
        ({"clip_range_vf": 0}, r"clip_range_vf must be > 0, or None for no clipping, got 0"),
        ({"clip_range_vf_mode": "min"}, r"clip_range_vf_mode must be one of 'clipped', 'max', got 'min'"),
        ({"clip_range_vf_mode": "max"}, r"clip_range_vf_mode='max' needs clip_range_vf, got clip_range_vf=None"),
        ({"normalize_advantage_over": "all"}, r"normalize_advantage_over must be one of 'minibatch', 'buffer'"),
        ({"target_kl": -0.1}, r"target_kl must be a number >= 0 or None, got -0.1"),
        ({"kl_stop": -0.01}, r"kl_stop must be a number >= 0 or None, got -0.01"),
        ({"kl_stop": 0.1, "target_kl": 0.2}, r"kl_stop exclude each other, got target_kl=0.2 and kl_stop=0.1"),
        ({"kl_stop_estimator": "k2"}, r"kl_stop_estimator must be one of 'k1', 'k3', got 'k2'"),
        ({"kl_stop_every": "step"}, r"kl_stop_every must be one of 'minibatch', 'epoch', got 'step'"),
        ({"kl_stop_scope": "value"}, r"kl_stop_scope must be one of 'both', 'policy', got 'value'"),
        ({"kl_stop_scope": "policy"}, r"kl_stop_scope='policy' needs separate_phases=True, got separate_phases=False"),
        ({"surrogate": "kl"}, r"surrogate must be one of 'clip', 'penalty', got 'kl'"),
        ({"kl_target": 0.01}, r"kl_target=0.01 needs surrogate='penalty', got surrogate='clip'"),
        ({"kl_coef": 1.0}, r"kl_coef=1.0 needs surrogate='penalty', got surrogate='clip'"),
        ({**PENALTY, "kl_target": 0}, r"kl_target must be a number >= .*, got 0"),
        ({**PENALTY, "kl_coef": -1}, r"kl_coef must be a number >= 0 or None, got -1"),
        ({**PENALTY, "clip_range": 0.1}, r"clip_range=0.1 needs surrogate=\"clip\""),
        ({**PENALTY, "clip_range": "lin_0.2"}, r"clip_range='lin_0.2' needs surrogate=\"clip\""),
        *several(
            [
                *("policy_epochs", "value_epochs", "policy_sample_ratio", "value_sample_ratio"),
                *("policy_learning_rate", "value_learning_rate", "value_stop_mse"),
            ],
            *(1, r"{}=1 needs separate_phases=True, got separate_phases=False"),
        ),
        ({**APART, "policy_epochs": 0}, r"policy_epochs must be an integer >= 1 or None, got 0"),
        ({**APART, "policy_sample_ratio": 0}, r"policy_sample_ratio must be a number in \[1e-09, 1\] or None, got 0"),
        ({**APART, "value_sample_ratio": 1.1}, r"value_sample_ratio must be a number in .*, got 1.1"),
        ({**APART, "value_stop_mse": -1}, r"value_stop_mse must be a number >= 0 or None, got -1"),
        ({**APART, "value_learning_rate": -1}, r"value_learning_rate must be .*got -1"),
        ({"rollout": "episode"}, r"rollout must be one of 'steps', 'episodes', got 'episode'"),
        ({"drop_unfinished_episodes": True}, r"drop_unfinished_episodes=True needs rollout='episodes'"),
        ({"sde_sample_freq": -2}, r"sde_sample_freq must be an integer >= -1, got -2"),
    ],
    "reinforce": [
        ({"max_rollout_steps": None}, ENDLESS),
        ({"max_rollout_steps": 0}, r"max_rollout_steps must be an integer >= 1 or None, got 0"),
        ({"rollout_episodes": 0}, r"rollout_episodes must be an integer >= 1, got 0"),
        ({"bootstrap_truncated": True, "use_baseline": False}, r"bootstrap_truncated=True needs use_baseline=True"),
        *(
            ({"baseline_learning_rate": rate, "use_baseline": False}, rf"_learning_rate={rate} needs use_baseline=True")
            for rate in (0.1, 0.0)
        ),
        ({"baseline_learning_rate": -1.0}, r"baseline_learning_rate must be .*got -1.0"),
    ],
    "ac": [
        ({"critic": "V"}, r"critic must be one of 'v', 'q', got 'V'"),
        *several(["actor_trace_lambda", "critic_trace_lambda"], -0.1, r"{} must be a number in \[0, 1\], got -0.1"),
        *several(["actor_trace_lambda", "critic_trace_lambda"], 1.1, r"{} must be a number in \[0, 1\], got 1.1"),
        ({"actor_trace_lambda": 0.5, "critic": "q"}, r"actor_trace_lambda=0.5 needs critic='v', got critic='q'"),
        ({"deterministic_policy": True}, r"deterministic_policy=True needs critic='q', got critic='v'"),
        ({"exploration_std": 0.1}, r"exploration_std=0.1 needs deterministic_policy=True, got d"),
        ({"exploration_std": -0.1}, r"exploration_std must be a number >= 0, got -0.1"),
        ({**DETERMINISTIC, "critic_trace_lambda": 0.5}, r"critic_trace_lambda=0.5 needs deterministic_policy=F"),
        ({**DETERMINISTIC, "ent_coef": 0.1}, r"ent_coef needs a stochastic policy, got 0.1"),
        ({**DETERMINISTIC, "use_sde": True}, r"use_sde needs a stochastic policy, got True"),
        *several(["actor_learning_rate", "critic_learning_rate"], -1.0, r"{} must be .*-1.0"),
    ],
    "impala": [
        *several(["n_actors", "n_steps", "batch_segments", "replay_size"], 0, r"{} must be an integer >= 1, got 0"),
        *several(["simulated_lag", "max_policy_lag", "replayed_segments"], -1, r"{} must be an integer >= 0.*, got -1"),
        *several(["rho_bar", "c_bar", "pg_rho_bar", "rms_prop_eps"], 0.0, r"{} must be a number >= 1e-12, got 0.0"),
        ({"vtrace_lambda": 1.5}, r"vtrace_lambda must be a number in \[0, 1\], got 1.5"),
        ({"kl_coef": -0.1}, r"kl_coef must be a number >= 0, got -0.1"),
        ({"c_bar": 2.0}, r"c_bar must be at most rho_bar=1.0, got 2.0"),
        ({"simulated_lag": 3, "max_policy_lag": 2}, r"max_policy_lag must be at least simulated_lag=3, .*, got 2"),
        ({"actors": "threads"}, r"actors must be one of 'inline', 'ray', got 'threads'"),
        ({"actors": "ray", "simulated_lag": 1}, r"simulated_lag=1 needs actors='inline', got actors='ray'"),
        *several(["ray_address"], "auto", r"{}='auto' needs actors='ray', got actors='inline'"),
        ({"actor_resources": {"num_cpus": 1}}, r"actor_resources=.* needs actors='ray', got actors='inline'"),
        ({"actor_resources": {"num_cpus": -1}, "actors": "ray"}, r"actor_resources\['num_cpus'\] must be .*got -1"),
        ({"n_actors": 2, "actor_env_fn": int}, r"actor_env_fn must make a gymnasium.Env, got .*int.*, which made 0"),
    ],
}

SWITCHES = {
    "sacx": ("value_network", "exact_log_prob", "use_sde", "use_sde_at_warmup", "engine"),
    "maddpg": ("centralised", "inferred_policies"),
    "trpox": ("normalize_advantage",),
    "ppox": ("normalize_advantage", "separate_phases", "drop_unfinished_episodes", "use_sde", "engine"),
    "reinforce": ("use_baseline", "bootstrap_truncated", "gamma_t_weight", "normalize_advantage", "use_sde", "engine"),
    "ac": ("deterministic_policy", "gamma_t_weight", "use_sde", "engine"),
    "impala": ("use_rms_prop", "engine"),
}
TYPES: Cases = {
    "td3x": [
        ({"learning_rate": [1e-3]}, r"learning_rate.*got \[0.001\] of type list"),
        ({"learning_rate": True}, r"learning_rate.*got True"),
        ({"max_grad_norm": {"value": 1.0}}, r"max_grad_norm got an unexpected key 'value'; legal are actor, critic"),
        ({"max_grad_norm": "big"}, r"max_grad_norm.*got 'big'"),
        ({"policy_delay": 1.5}, r"policy_delay must be an integer >= 1, got 1.5 of type float"),
        ({"tau": "fast"}, r"tau must be a number in \[0, 1\], got 'fast' of type str"),
        ({"batch_size": 256.0}, r"batch_size must be an integer >= 1, got 256.0 of type float"),
        ({"exploration_noise": 0.1}, r"exploration_noise must be a dict with the keys type, start.*got 0.1"),
        ({"exploration_noise": {**NORMAL, "begin": 1}}, r"exploration_noise got an unexpected key 'begin'"),
        ({"action_noise": 0.1}, r"action_noise must be an ActionNoise or None, got 0.1"),
        ({"policy_kwargs": {"net_arc": [8]}}, r"net_arc"),
        ({"polcy_delay": 2}, r"TD3X\(\) got an unexpected argument 'polcy_delay'; did you mean 'policy_delay'\?"),
        ({"foo": 2}, r"TD3X\(\) got an unexpected argument 'foo'; legal are action_noise, .*, warmup$"),
        ({"replay_buffer_kwargs": {"n_sampled_goals": 2}}, r"n_sampled_goals"),
    ],
    "ddpgx": [
        *several(["policy_delay", "target_policy_noise"], 2, r"DDPGX\(\) got an unexpected argument '{}'"),
        ({"critic_weight_decay": "1e-2"}, r"critic_weight_decay must be a number >= 0, got '1e-2' of type str"),
        ({"policy_kwargs": {**ARCHITECTURE, "action_layer": 0.5}}, r"action_layer'\] must be an integer >= 0, got 0.5"),
        ({"policy_kwargs": {"batch_norm": "yes"}}, r"batch_norm'\] must be True or False, got 'yes' of type str"),
        ({"policy_kwargs": {"critic_layer_norm": True}}, r"critic_layer_norm"),
        ({"parameter_noise": 0.1}, r"parameter_noise must be a dict with the keys std, distance.*got 0.1"),
        ({"parameter_noise": {**PARAMETER_NOISE, "target": 1}}, r"parameter_noise got an unexpected key 'target'"),
    ],
    "sacx": [
        *(
            ({"ent_coef": value}, rf"ent_coef must be .*got {shown}")
            for value, shown in (
                (None, "None of type NoneType"),
                (True, "True of type bool"),
                ([0.1], r"\[0.1\] of type list"),
            )
        ),
        *(
            ({"target_entropy": value}, rf"target_entropy must be .*got {value} of type {type(value).__name__}")
            for value in (None, False)
        ),
        *several(["target_update_interval", "target_update_every"], 1.5, r"{} must be an integer >= 1.*, got 1.5"),
        *several(["critic_learning_rate", "policy_delay"], 2, r"SACX\(\) got an unexpected argument '{}'"),
        ({"max_grad_norm": {"critic": 1.0}}, r"unexpected key 'critic'; legal are actor, ent_coef, q_a, q_b"),
        ({"max_grad_norm": {"value": 1.0}}, r"unexpected key 'value'"),
        ({"q_learning_rates": {"q_c": 1e-3}}, r"q_learning_rates got an unexpected key 'q_c'; legal are q_a, q_b"),
        ({"q_b_learning_rate": 1e-3, "policy_kwargs": {"n_critics": 1}}, r"'q_b'; legal are q$"),
    ],
    "maddpg": [
        ({"target_noise_clip": "wide"}, r"target_noise_clip must be a number >= 0, got 'wide'"),
        ({"max_grad_norm": {"agent_0": 1.0}}, r"unexpected key 'agent_0'; legal are actor, critic"),
        ({"policy_kwargs": {"parameter_sharing": "some"}}, r'must be None, "all", or lists of names.*got \'some\''),
        ({"policy_kwargs": {"parameter_sharing": ["cow"]}}, r"or lists of names of agents, got \['cow'\]"),
        ({"central": True}, r"MADDPG\(\) got an unexpected argument 'central'; did you mean 'centralised'\?"),
        ({"sde_support": True}, r"MADDPG\(\) got an unexpected argument 'sde_support'"),
        ({"policy": TD3Policy}, r"policy must be derived from sb3_ac_ext.maddpg.policies.MlpPolicy, got .*TD3Policy"),
    ],
    "trpox": [
        ({"cg_max_steps": 1.5}, r"cg_max_steps must be an integer >= 1, got 1.5 of type float"),
        ({"target_kl": None}, r"target_kl must be a number >= 1e-12, got None of type NoneType"),
        *several(["value_learning_rate", "max_grad_norm"], 0.5, r"TRPOX\(\) got an unexpected argument '{}'"),
        ({"fvp_subsampling": 5}, r"unexpected argument 'fvp_subsampling'; did you mean 'fvp_subsample'\?"),
    ],
    "ppox": [
        ({"batch_size": 64.0}, r"batch_size .* must be an integer >= 2, got 64.0 of type float"),
        ({"n_steps": "64"}, r"n_steps must be an integer >= 1, got '64' of type str"),
        ({"vf_coef": "big"}, r"vf_coef must be a number >= 0, got 'big'"),
        ({"max_grad_norm": {"value": 1.0}}, r"max_grad_norm got an unexpected key 'value'; legal are policy$"),
        ({"clip_range": [0.2]}, r"clip_range must be .*got \[0.2\] of type list"),
        ({**APART, "value_epochs": 1.5}, r"value_epochs must be an integer >= 1 or None, got 1.5"),
        ({**APART, "max_grad_norm": {"critic": 1}}, r"unexpected key 'critic'; legal are policy, value"),
        ({"clip_rang": 0.1}, r"PPOX\(\) got an unexpected argument 'clip_rang'; did you mean 'clip_range'\?"),
    ],
    "reinforce": [
        ({"max_rollout_steps": 5.0}, r"max_rollout_steps must be an integer >= 1 or None, got 5.0"),
        ({"rollout_episodes": "all"}, r"rollout_episodes must be an integer >= 1, got 'all'"),
        ({"max_grad_norm": {"value": 1.0}}, r"unexpected key 'value'; legal are baseline, policy"),
        *several(
            ["rollout", "n_steps", "gae_lambda", "drop_unfinished_episodes"],
            *(1, r"Reinforce\(\) got an unexpected argument '{}'"),
        ),
    ],
    "ac": [
        ({"critic_trace_lambda": "long"}, r"critic_trace_lambda must be a number in \[0, 1\], got 'long'"),
        ({"max_grad_norm": {"policy": 1.0}}, r"unexpected key 'policy'; legal are actor, critic"),
        *several(["rollout", "n_steps", "gae_lambda", "vf_coef"], 1, r"AC\(\) got an unexpected argument '{}'"),
    ],
    "impala": [
        ({"n_actors": 2.0}, r"n_actors must be an integer >= 1, got 2.0 of type float"),
        ({"actor_env_fn": "CartPole-v1"}, r"actor_env_fn must be .*got 'CartPole-v1'"),
        ({"max_grad_norm": {"value": 1.0}}, r"max_grad_norm got an unexpected key 'value'; legal are policy$"),
        *several(["rollout", "gae_lambda", "use_sde", "batch_size"], 1, r"IMPALA\(\) got an unexpected argument '{}'"),
    ],
}
for row, switches in SWITCHES.items():
    TYPES[row] += several(switches, "yes", r"{} must be True or False, got 'yes' of type str")

UNSUPPORTED: Cases = {
    "td3x": [({"optimize_memory_usage": True, "n_steps": 2}, r"n_steps must be 1 with optimize_memory_usage")],
    "maddpg": [
        ({"n_steps": 3}, r"n_steps must be 1 \(agents may end at different steps\), got 3"),
        ({"replay_buffer_class": ReplayBuffer}, r"replay_buffer_class must be None or .*JointReplayBuffer"),
        ({"replay_buffer_class": HerReplayBuffer}, r"got .*HerReplayBuffer"),
    ],
    "trpox": [({"n_steps": 1}, r"TRPOX: `n_steps \* n_envs` must be greater than 1. Currently n_steps=1 and n_envs=1")],
    "impala": [({"policy_kwargs": {"use_sde": True}}, r"policy_kwargs\['use_sde'\] must be False, .*, got True")],
    "ppox": [({"n_steps": 1}, r"`n_steps \* n_envs` must be greater than 1. Currently n_steps=1 and n_envs=1")],
}


@pytest.mark.parametrize(
    ("row", "kwargs", "error", "message"),
    [
        (row, kwargs, error, message)
        for error, table in ((ValueError, VALUES), (TypeError, TYPES), (UnsupportedError, UNSUPPORTED))
        for row, cases in table.items()
        for kwargs, message in cases
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_arguments(row: str, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_model(row, env=NoMeadow() if row == "maddpg" else env(), **kwargs).learn(10)


@pytest.mark.parametrize(
    ("row", "saved", "kwargs", "message"),
    [
        ("ppox", {}, {"batch_size": 1}, r"batch_size .* >= 2, got 1"),
        ("ppox", {}, {"kl_stop": -1}, r"kl_stop must be .* got -1"),
        ("ppox", {}, {"kl_coef": 2.0}, r"kl_coef=2.0 needs surrogate='penalty'"),
        ("ppox", {}, {"value_epochs": 2}, r"value_epochs=2 needs separate_phases=True"),
        (
            "reinforce",
            {},
            {"use_baseline": False, "bootstrap_truncated": True},
            r"bootstrap_truncated=True needs use_baseline=True",
        ),
        ("reinforce", {}, {"env": env(), "max_rollout_steps": None}, ENDLESS),
        (
            "ac",
            {"critic": "q"},
            {"critic": "v"},
            r"critic and deterministic_policy must be what the policy was made for, got 'v'",
        ),
        ("ac", {"critic": "q"}, {"deterministic_policy": True}, r"policy was made for, got 'q' and True with .*QMlpPolicy"),
        ("sacx", {"value_network": True}, {"value_network": False}, r"what the policy was made with, True, got False"),
        ("sacx", {}, {"use_sde": True}, r"use_sde must be what the policy was made with, False, got True"),
        ("maddpg", {"centralised": False}, {"centralised": True}, r"what the policy was made with, False, got True"),
    ],
    ids=str,
)
def test_arguments_at_load(row: str, saved: dict[str, Any], kwargs: dict[str, Any], message: str, tmp_path: Any) -> None:
    small_model(row, **saved).save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        algorithm_class(row).load(tmp_path / "model", **kwargs)


def test_what_is_legal_at_load(tmp_path: Any) -> None:
    """A search and RL Zoo's enjoy replace the clip range of any model, a rate may be 0, and predicting has no rollouts."""
    small_model("ppox", surrogate="penalty", clip_range=ConstantSchedule(0.2)).save(tmp_path / "penalised")
    PPOX.load(tmp_path / "penalised", custom_objects={"clip_range": lambda _: 0.0, "learning_rate": 0.0})
    small_model("reinforce").save(tmp_path / "model")
    assert Reinforce.load(tmp_path / "model", max_rollout_steps=None).predict(BOX.sample())[0].shape == (2,)


@rows(tuple(row for row in BY_ADAM if row in ONE_AGENT))
@pytest.mark.parametrize(("name", "value"), [("differentiable", True), ("eps", np.array(0.005))], ids=str)
def test_optimizers_that_cannot_step_are_refused_before_a_step_of_the_environment(row: str, name: str, value: Any) -> None:
    model = small_model(row, env=env(), policy_kwargs={"optimizer_kwargs": {name: value}})
    with pytest.raises(ValueError, match=rf"\['optimizer_kwargs'\]\['{name}'\] must be .*, got .*{value}"):
        model.learn(1)


@rows(tuple(row for row in BY_ADAM if row in ONE_AGENT))
def test_optimizers_for_cuda_do_not_learn_on_a_cpu(row: str, tmp_path: Any) -> None:
    model = small_model(row, env=env(), policy_kwargs={"optimizer_kwargs": {"capturable": True}})
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", device="cpu")
    assert loaded.predict(BOX.sample())[0].shape == (2,)
    with pytest.raises(ValueError, match=r"\['capturable'\] must be False to learn on a CPU, got True"):
        model.learn(1)


def test_arguments_that_cannot_be_printed_are_shown() -> None:
    with pytest.raises(UnsupportedError, match=r"policy_kwargs=\{'net_arch': \{'actor': <int"):
        small_model("ddpgx", env=env(), policy_kwargs={"net_arch": {"actor": 10**5000}})


@rows(ON_POLICY)
@pytest.mark.parametrize("log_std", [-104.0, 89.0, "small"])
def test_a_std_that_no_action_can_have(row: str, log_std: Any) -> None:
    message = rf"policy_kwargs\['log_std_init'\] must be a number in \[-103, 88\], got {log_std!r}"
    with pytest.raises(ValueError, match=message):
        small_model(row, env=env(), policy_kwargs={"log_std_init": log_std})


@rows(taking("use_sde", "rollout"))
def test_gsde_needs_a_box(row: str) -> None:
    space = spaces.Discrete(3)
    with pytest.raises(ValueError, match=r"use_sde must be False for action_space=Discrete\(3\), got True"):
        small_model(row, env=env(action_space=space), use_sde=True)


@pytest.mark.parametrize("batch_size", [10, 100], ids=["does not divide", "exceeds"])
def test_a_batch_that_does_not_fit_the_rollout_is_warned_of(batch_size: int) -> None:
    with pytest.warns(UserWarning, match=rf"mini-batch size of {batch_size}.*`n_steps \* n_envs = 64`"):
        PPOX("MlpPolicy", env(), n_steps=64, batch_size=batch_size)


# Spaces and policies


UNBOUNDED = spaces.Box(-np.inf, np.inf, (2,))


@pytest.mark.parametrize(
    ("row", "policy", "spaces_of_env", "kwargs", "message"),
    [
        ("td3x", "MlpPolicy", (BOX, spaces.Discrete(3)), {}, r"Box.*Discrete\(3\)"),
        ("td3x", "MlpPolicy", (BOX, UNBOUNDED), {}, r"finite.*Box\(-inf"),
        ("td3x", "MlpPolicy", (BOX, spaces.Box(0.0, np.array([0.0, 1.0], np.float32))), {}, r"low < high"),
        ("td3x", "CnnPolicy", (BOX, CONTINUOUS), {}, r"only with images"),
        ("td3x", "MultiInputPolicy", (DICT, CONTINUOUS), {"n_steps": 3}, r"n_steps must be 1 for Dict observations.*got 3"),
        ("ppox", "MlpPolicy", (BOX, DICT), {}, r"PPOX: .*but Dict\(.*was provided"),
        ("ppox", "CnnPolicy", (BOX, CONTINUOUS), {}, r"only with images"),
        ("ac", "MlpPolicy", (BOX, spaces.Discrete(3)), DETERMINISTIC, r"=True needs a Box of actions, got Discrete\(3\)"),
        ("ac", "MlpPolicy", (BOX, UNBOUNDED), DETERMINISTIC, r"finite.*Box\(-inf"),
    ],
    ids=str,
)
def test_spaces(row: str, policy: str, spaces_of_env: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        small_model(row, policy=policy, env=env(*spaces_of_env), **kwargs)


@pytest.mark.parametrize(
    ("row", "policy", "given", "kwargs", "message"),
    [
        ("td3x", "MlpPolicy", env(DICT), {}, r"MultiInputPolicy"),
        ("td3x", "MlpPolcy", env(), {}, r"MlpPolcy"),
        ("td3x", "MlpPolicy", make_vec_env(env, n_envs=2), {"train_freq": (1, "episode")}, r"n_envs=2"),
        ("ac", "CnnPolicy", env(IMAGE), {}, r"AC needs networks of their own .*share_features_extractor=False"),
        ("reinforce", "CnnPolicy", env(IMAGE), {}, r"Reinforce needs networks of their own"),
    ],
    ids=["dict", "unknown policy", "episodes of two", "ac", "reinforce"],
)
def test_policies_that_do_not_fit(row: str, policy: str, given: Any, kwargs: dict[str, Any], message: str) -> None:
    """Those of two optimizers must keep networks apart."""
    with pytest.raises(ValueError, match=message):
        small_model(row, policy=policy, env=given, policy_kwargs={"share_features_extractor": True}, **kwargs)


@pytest.mark.parametrize("row", ["td3x", "ppox"])
def test_there_must_be_an_environment(row: str) -> None:
    with pytest.raises(ValueError, match=r"env must be an environment .* got None"):
        algorithm_class(row)("MlpPolicy", None)


@pytest.mark.parametrize("cls", [AC, Reinforce])
def test_policies_of_sb3_are_taken(cls: Any) -> None:
    cls(ActorCriticPolicy, env(), **({"max_rollout_steps": 20} if cls is Reinforce else {}))


def test_sacx_refuses_policies_without_its_networks() -> None:
    class OtherPolicy(SACPolicy):
        """SB3's networks."""

    with pytest.raises(TypeError, match=r"policy must be derived from sb3_ac_ext.sacx.*MlpPolicy, got .*OtherPolicy"):
        SACX(OtherPolicy, env(), value_network=True)
    assert type(SACX(OtherPolicy, env()).policy) is OtherPolicy
    assert type(SACX(SACPolicy, env()).policy) is SACX.policy_aliases["MlpPolicy"]


def test_checks_leave_the_random_streams_alone() -> None:
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    small_model("td3x", seed=None, action_noise=NormalActionNoise(np.zeros(2), np.ones(2)))
    assert np.random.random() == expected


@pytest.mark.parametrize(("progress", "rate"), [(1.0, 7e-4), (0.5, 3.5e-4), (0.0, 0.0)])
def test_linear_schedule_string(progress: float, rate: float) -> None:
    assert as_schedule("learning_rate", "lin_7e-4")(progress) == pytest.approx(rate)


# Training that becomes non-finite; off-policy it is in test_off_policy


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
    model = small_model("ppox", n_steps=8, batch_size=8, n_epochs=1, **kwargs)
    with pytest.raises(NonFiniteError, match=rf"PPOX: the parameters of the {network} became non-finite .* by update \d"):
        model.learn(100, callback=BreakAfterRollout(layer, value))
    assert model.num_timesteps == 16


@pytest.mark.parametrize(("row", "rate", "steps"), [("ppox", 1e30, 6), ("td3x", 1e37, 11)])
def test_a_rate_that_overflows_stops_at_the_update_that_did_it(row: str, rate: float, steps: int) -> None:
    """By an error that a search prunes on."""
    model = small_model(row, learning_rate=rate, **({"policy_delay": 1} if row == "td3x" else {}))
    with pytest.raises(ValueError, match="non-finite") as caught:
        model.learn(100)
    assert caught.type is NonFiniteError
    assert model.num_timesteps == steps


@rows(BY_ADAM)
@pytest.mark.parametrize("engine", [False, True])
def test_the_largest_rate_stops_as_others_that_are_too_large(row: str, engine: bool) -> None:
    """A step of it cannot be computed, which PyTorch calls by another error."""
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        small_model(row, learning_rate=LARGEST[float], engine=engine).learn(50)
