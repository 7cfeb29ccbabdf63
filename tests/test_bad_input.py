"""Bad input is refused before an environment step is taken, with argument, value and what is legal."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, DICT, RandomEnv
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.sac.policies import SACPolicy

from sb3_ac_ext import DDPGX, SACX, TD3X
from sb3_ac_ext.common.schedules import as_schedule
from sb3_ac_ext.common.validation import NonFiniteError

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
            r"action_noise must have the shape .*\(2,\)",
        ),
        (
            {"action_noise": NormalActionNoise(np.zeros(1), np.ones(1))},
            ValueError,
            r"action_noise must have the shape .*\(2,\)",
        ),
        (
            {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(3))},
            ValueError,
            r"action_noise must have the shape",
        ),
        ({"optimize_memory_usage": True}, ValueError, r"optimize_memory_usage.*handle_timeout_termination"),
        ({"optimize_memory_usage": True, "n_steps": 2}, NotImplementedError, r"n_steps must be 1 with optimize_memory_usage"),
        ({"policy_kwargs": {"n_critics": 1}}, ValueError, r"n_critics must be 2.*got 1"),
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
        ({"policy_kwargs": {"n_critics": 2}}, ValueError, r"n_critics must be 1, got 2"),
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
            r"action_noise must have the shape of an action, \(2,\)",
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
        ({"policy_kwargs": {"n_critics": 3}}, ValueError, r"n_critics must be 2.*got 3"),
        ({"policy_delay": 2}, TypeError, r"SACX\(\) got an unexpected argument 'policy_delay'"),
    ],
    ids=str,
)
def test_arguments_of_sacx(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SACX("MlpPolicy", env(), **kwargs).learn(10)


def test_sacx_refuses_policies_without_its_networks() -> None:
    class OtherPolicy(SACPolicy):
        """SB3's networks."""

    with pytest.raises(TypeError, match=r"policy must be derived from sb3_ac_ext.sacx.*MlpPolicy, got .*OtherPolicy"):
        SACX(OtherPolicy, env())
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
def test_non_finite_training_of_sacx_stops(network: str) -> None:
    kwargs = {"policy_kwargs": {"net_arch": [8]}, "learning_starts": 10, "value_network": True}
    model = SACX("MlpPolicy", RandomEnv(BOX, CONTINUOUS), **kwargs).learn(20)
    parts = {"actor": model.actor, "q_a": model.critic.qf0, "q_b": model.critic.qf1, "value": model.policy.value}
    next(parts[network].parameters()).data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"SACX: the parameters of the \w+ became non-finite .* by update 11"):
        model.train(1, 4)


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
