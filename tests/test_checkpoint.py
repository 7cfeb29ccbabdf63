"""Saving and loading: exact continuation, whole files, SB3's zips and buffers, nothing restored too early."""

import copy
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from stable_baselines3 import DDPG, TD3, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.td3.policies import CnnPolicy, TD3Policy

import sb3_ac_ext.base.off_policy
import sb3_ac_ext.ddpgx.policies
import sb3_ac_ext.td3x
from sb3_ac_ext import DDPGX, PPOX, SACX, TD3X
from sb3_ac_ext.base.checkpoint import atomic_file, random_state, set_random_state
from sb3_ac_ext.base.typing import constructor_keys
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec

SMALL = {"net_arch": [8, 8]}
LENGTH = 5
OFF_POLICY = {"learning_starts": 10, "batch_size": 4, "buffer_size": 100}
ON_POLICY = {"n_steps": LENGTH, "batch_size": LENGTH, "n_epochs": 2, "rollout_episodes": 1, "max_rollout_steps": LENGTH}
"""So far as an algorithm has them; a rollout ends with an episode."""

every_algorithm = pytest.mark.parametrize("spec", ALGORITHMS, ids=lambda spec: spec.name)


def is_off_policy(cls: Any) -> bool:
    return issubclass(cls, OffPolicyAlgorithm)


def make(cls: Any = TD3X, env: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    small = OFF_POLICY if is_off_policy(cls) else ON_POLICY
    own = {name: value for name, value in small.items() if name in constructor_keys(cls)}
    kwargs = {"policy_kwargs": SMALL, "seed": 0, **own, **kwargs}
    kwargs["policy_kwargs"] = {**kwargs["policy_kwargs"]}  # SB3's DDPG writes into it
    return cls(policy, env or scripted(), **kwargs)


def scripted(n_envs: int = 1) -> VecEnv:
    return make_vec_env(lambda: ScriptedEnv(length=LENGTH), n_envs=n_envs)


def state(model: Any) -> dict[str, th.Tensor]:
    """Every number that training changes: networks and optimizers."""
    flat: dict[str, th.Tensor] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                visit(f"{name}.{key}", item)
        elif isinstance(value, th.Tensor):
            flat[name] = value.clone()

    visit("model", model.get_parameters())
    return flat


def assert_same(ours: Any, theirs: Any) -> None:
    th.testing.assert_close(state(ours), state(theirs), rtol=0, atol=0)


def save(model: Any, folder: Path) -> None:
    """The model and, apart from it, its replay buffer."""
    model.save(folder / "model")
    if is_off_policy(type(model)):
        model.save_replay_buffer(folder / "buffer")


def load(cls: Any, folder: Path, **kwargs: Any) -> Any:
    """What `save` saved."""
    loaded = cls.load(folder / "model", **kwargs)
    if is_off_policy(cls):
        loaded.load_replay_buffer(folder / "buffer")
    return loaded


def actions_of(model: Any) -> np.ndarray:
    """What was done, as it is stored."""
    return model.replay_buffer.actions if is_off_policy(type(model)) else model.rollout_buffer.actions


def disturb_random_generators() -> None:
    np.random.seed(999)
    th.manual_seed(999)


EXTRAS = [
    {},
    {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))},
    {
        "exploration_noise": {"type": "normal", "start": 0.5, "end": 0.1, "steps": 60},
        "warmup": "noise",
        "learning_rate": "lin_1e-3",
        "critic_learning_rate": 3e-3,
        "max_grad_norm": {"critic": 0.5},
    },
]

OWN_EXTRAS: dict[str, dict[str, Any]] = {
    "maddpg": {
        "exploration_noise": {"type": "ornstein-uhlenbeck", "start": 0.2, "dt": 1.0},
        "policy_delay": 2,
        "target_policy_noise": 0.2,
        "logit_penalty": 0.01,
        "max_grad_norm": 0.5,
        "policy_kwargs": {**SMALL, "n_critics": 2},
    },
    "sacx": {
        "value_network": True,
        "ent_coef": "auto_0.5",
        "ent_coef_learning_rate": 3e-3,
        "exact_log_prob": True,
        "target_update_every": 3,
        "use_sde": True,
        "sde_sample_freq": 2,
    },
    "ddpgx": {
        "exploration_noise": {"type": "ornstein-uhlenbeck", "start": 0.2, "dt": 1.0},
        "parameter_noise": {"std": 0.1, "distance": 0.2, "interval": 3},
        "critic_weight_decay": 0.1,
        "policy_kwargs": {**SMALL, "action_layer": 1, "batch_norm": True, "final_layer_init": 3e-3},
    },
    "reinforce": {
        "baseline_learning_rate": "lin_3e-3",
        "bootstrap_truncated": True,
        "gamma_t_weight": True,
        "normalize_advantage": True,
        "max_grad_norm": {"policy": 0.5},
        "use_sde": True,
    },
    "trpox": {
        "kl_direction": "old_new",
        "kl_reduction": "sum",
        "fvp_subsample": 2,
        "sub_sampling_factor": 2,
        "accept_ratio": 0.1,
        "ent_coef": 0.01,
        "use_sde": True,
        "sde_sample_freq": 2,
    },
    "ac": {
        "actor_trace_lambda": 0.5,
        "critic_trace_lambda": 0.9,
        "gamma_t_weight": True,
        "critic_learning_rate": "lin_3e-3",
        "max_grad_norm": {"critic": 0.5},
        "ent_coef": 0.1,
        "use_sde": True,
        "sde_sample_freq": 2,
    },
    "ppox": {
        "surrogate": "penalty",
        "kl_target": 1e-3,
        "kl_coef": 2.0,
        "kl_stop": 0.05,
        "kl_stop_scope": "policy",
        "separate_phases": True,
        "value_learning_rate": "lin_3e-3",
        "max_grad_norm": {"policy": 0.5},
        "use_sde": True,
        "sde_sample_freq": 2,
    },
}
"""By the algorithm that alone has them."""


def by_own_names(spec: AlgoSpec, kwargs: dict[str, Any]) -> dict[str, Any]:
    """SACX's critic is two networks."""
    if spec.name != "sacx" or "critic_learning_rate" not in kwargs:
        return kwargs
    shared = {name: value for name, value in kwargs.items() if name != "critic_learning_rate"}
    return {**shared, "q_a_learning_rate": 3e-3, "max_grad_norm": {"q_b": 0.5}}


def extras(spec: AlgoSpec) -> list[tuple[str, dict[str, Any] | None]]:
    shared = list(zip(("plain", "ou", "extras"), EXTRAS, strict=True)) if is_off_policy(spec.cls) else [("plain", {})]
    return [*shared, ("own", OWN_EXTRAS.get(spec.name))]


every_algorithm_with_extras = pytest.mark.parametrize(
    ("spec", "kwargs"),
    [
        pytest.param(spec, by_own_names(spec, kwargs), id=f"{spec.name}-{name}")
        for spec in ALGORITHMS
        for name, kwargs in extras(spec)
        if kwargs is not None
    ],
)


@every_algorithm_with_extras
def test_train_after_load_is_the_uninterrupted_train(spec: AlgoSpec, kwargs: dict[str, Any], tmp_path: Path) -> None:
    """Given the saved replay buffer, or the rollout."""
    how = {"gradient_steps": 5, "batch_size": 4} if is_off_policy(spec.cls) else {}
    model = make(spec.cls, **kwargs).learn(21)  # odd: between two delayed actor updates
    rollout = copy.deepcopy(getattr(model, "rollout_buffer", None))
    save(model, tmp_path)
    model.train(**how)

    disturb_random_generators()
    loaded = load(spec.cls, tmp_path)
    if rollout is not None:
        loaded.rollout_buffer = rollout
    loaded.set_logger(Logger(None, []))
    disturb_random_generators()
    loaded.train(**how)
    assert_same(loaded, model)


@pytest.mark.parametrize("cls", [TD3X, DDPGX, SACX], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("policy", "space", "batch_size"), [("MlpPolicy", BOX, 256), ("CnnPolicy", IMAGE, 16)], ids=["mlp", "images"]
)
def test_train_after_load_is_the_uninterrupted_train_with_networks_of_usual_size(
    cls: Any, policy: str, space: spaces.Box, batch_size: int, tmp_path: Path
) -> None:
    """What has been recorded long ago gives the same as what is recorded after the load, and as its first runs."""
    env = RandomEnv(space, CONTINUOUS)
    model = cls(policy, env, seed=0, batch_size=batch_size, learning_starts=20, buffer_size=300).learn(27)
    save(model, tmp_path)
    model.train(7, batch_size)
    disturb_random_generators()
    loaded = load(cls, tmp_path, env=env)
    loaded.set_logger(Logger(None, []))
    loaded.train(7, batch_size)
    assert {how for name, how in loaded.engine_report().items() if "update" in name} == {"replayed"}
    assert_same(loaded, model)


@every_algorithm_with_extras
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("steps", [1, 6], ids=["in warm-up", "learning"])
def test_learn_after_load_is_the_uninterrupted_learn(
    spec: AlgoSpec, kwargs: dict[str, Any], n_envs: int, steps: int, tmp_path: Path
) -> None:
    """The environment resets to one state and its episode ends at the save, so nothing of it needs to be stored."""
    first, second = steps * LENGTH * n_envs, 4 * LENGTH * n_envs
    model = make(spec.cls, scripted(n_envs), **kwargs).learn(first)
    save(model, tmp_path)
    model.learn(second, reset_num_timesteps=False)

    disturb_random_generators()
    loaded = load(spec.cls, tmp_path, env=scripted(n_envs))
    disturb_random_generators()
    loaded.learn(second, reset_num_timesteps=False)
    assert loaded.num_timesteps == model.num_timesteps == first + second
    assert_same(loaded, model)
    np.testing.assert_array_equal(actions_of(loaded), actions_of(model))


@every_algorithm
def test_saving_does_not_change_the_run(spec: AlgoSpec, tmp_path: Path) -> None:
    models = [make(spec.cls, scripted()) for _ in range(2)]
    for model, saves in zip(models, (False, True), strict=True):
        model.set_random_seed(3)
        model.learn(20)
        if saves:
            model.save(tmp_path / "model")
            assert model._random_state is None
        model.learn(20, reset_num_timesteps=False)
    assert_same(*models)


@every_algorithm
def test_a_loaded_model_saved_again_keeps_its_place(spec: AlgoSpec, tmp_path: Path) -> None:
    model = make(spec.cls).learn(20)
    model.save(tmp_path / "first")
    disturb_random_generators()
    spec.cls.load(tmp_path / "first").save(tmp_path / "second")
    states = [
        json.loads(zipfile.ZipFile(tmp_path / f"{name}.zip").read("data"))["_random_state"] for name in ("first", "second")
    ]
    assert states[0] == states[1]


@every_algorithm
def test_random_states_wait_until_training_goes_on(spec: AlgoSpec, tmp_path: Path) -> None:
    model = make(spec.cls, seed=None).learn(20)
    model.save(tmp_path / "model")
    env = scripted()
    disturb_random_generators()
    expected = np.random.random()
    disturb_random_generators()
    loaded = spec.cls.load(tmp_path / "model", env=env)
    loaded.predict(np.zeros(2, np.float32))
    assert np.random.random() == expected
    first_draws = []
    at_once = {"learning_starts": 0} if is_off_policy(spec.cls) else {}
    for seed in (1, 2):  # a run from zero goes on with the current streams
        loaded = spec.cls.load(tmp_path / "model", env=scripted(), **at_once)
        np.random.seed(seed)
        th.manual_seed(seed)
        loaded.action_noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))
        first_draws.append(actions_of(loaded.learn(1))[0].item())
        assert loaded._random_state is None
    assert first_draws[0] != first_draws[1]


@every_algorithm
def test_a_seed_given_to_load_starts_its_own_stream(spec: AlgoSpec, tmp_path: Path) -> None:
    make(spec.cls).learn(20).save(tmp_path / "model")
    runs = []
    for seed in (7, 7, 8):
        loaded = spec.cls.load(tmp_path / "model", env=scripted(), seed=seed)
        runs.append(actions_of(loaded.learn(30, reset_num_timesteps=False)))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_random_state_is_json_and_round_trips() -> None:
    device = th.device("cpu")
    saved = json.loads(json.dumps(random_state(CONTINUOUS, device)))
    draws = [(np.random.normal(size=3), th.randn(3), CONTINUOUS.sample()) for _ in range(2)]
    set_random_state(saved, CONTINUOUS, device)
    again = np.random.normal(size=3), th.randn(3), CONTINUOUS.sample()
    for first, second, value in zip(*draws, again, strict=True):
        np.testing.assert_array_equal(first, value)
        assert not np.array_equal(second, value)


def test_atomic_file_keeps_the_old_one_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path, "zip") as file:
        file.write(b"half of the ne")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@every_algorithm
def test_save_is_atomic(spec: AlgoSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(spec.cls)
    save(model, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in before} == ({"model.zip", "buffer.pkl"} if is_off_policy(spec.cls) else {"model.zip"})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(th, "save", fail)
    monkeypatch.setattr(sb3_ac_ext.base.off_policy, "save_to_pkl", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "model")
    if is_off_policy(spec.cls):
        with pytest.raises(OSError, match="disk full"):
            model.save_replay_buffer(tmp_path / "buffer")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_names_are_completed_as_sb3_does(tmp_path: Path) -> None:
    model = make()
    (tmp_path / "taken.zip").mkdir()
    with pytest.warns(UserWarning, match="is a folder"):
        model.save(tmp_path / "taken.zip")
    model.save(tmp_path / "new" / "folder" / "model")
    model.save(tmp_path / "model.v1")
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"taken.zip_2", "new/folder/model.zip", "model.v1"}


def test_saves_to_an_open_file(tmp_path: Path) -> None:
    model = make().learn(15)
    with (tmp_path / "model").open("wb") as file:
        model.save(file)
    with (tmp_path / "model").open("rb") as file:
        assert_same(TD3X.load(file), model)


@pytest.mark.parametrize(
    ("cls", "own"),
    [(TD3X, EXTRAS[2]), (DDPGX, {**EXTRAS[2], **OWN_EXTRAS["ddpgx"], "policy_kwargs": SMALL}), (PPOX, OWN_EXTRAS["ppox"])],
    ids=["td3x", "ddpgx", "ppox"],
)
def test_stored_arguments_are_json(cls: Any, own: dict[str, Any], tmp_path: Path) -> None:
    """SB3 pickles some attributes; ours add none."""
    rate = "actor_learning_rate" if is_off_policy(cls) else "policy_learning_rate"
    kwargs = {**own, rate: "lin_1e-4"}
    make(cls, **kwargs).learn(20).save(tmp_path / "ours")
    make(cls.sb3_class).learn(20).save(tmp_path / "theirs")
    pickled = []
    for name in ("ours", "theirs"):
        data = json.loads(zipfile.ZipFile(tmp_path / f"{name}.zip").read("data"))
        pickled.append({key for key, value in data.items() if isinstance(value, dict) and ":serialized:" in value})
    assert pickled[0] <= pickled[1]
    loaded = cls.load(tmp_path / "ours")
    stored = {name: getattr(loaded, name) for name in kwargs.keys() - {"policy_kwargs"}}
    assert stored == {name: kwargs[name] for name in stored}


def test_predicting_needs_no_buffer(tmp_path: Path) -> None:
    """A million images would be 8 GB a time; nothing of that size is asked for."""
    kwargs = {"policy_kwargs": {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}}}
    model = make(env=RandomEnv(IMAGE, CONTINUOUS), policy="CnnPolicy", buffer_size=10**15, **kwargs)
    model.save(tmp_path / "model")
    loaded = TD3X.load(tmp_path / "model")
    assert loaded._replay_buffer is None
    np.testing.assert_array_equal(loaded.predict(IMAGE.low)[0], model.predict(IMAGE.low)[0])
    assert loaded._replay_buffer is None


def test_buffer_is_made_once_at_its_first_use() -> None:
    model = make()
    assert model._replay_buffer is None
    buffer = model.replay_buffer
    assert isinstance(buffer, ReplayBuffer)
    assert model.learn(5).replay_buffer is buffer


def test_her_model_predicts_without_an_environment(tmp_path: Path) -> None:
    env = BitFlippingEnv(n_bits=3, continuous=True)
    make(env=env, policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer).learn(20).save(tmp_path / "her")
    loaded = TD3X.load(tmp_path / "her")
    loaded.predict(env.reset()[0])
    with pytest.raises(ValueError, match="set_env"):
        _ = loaded.replay_buffer


@pytest.mark.parametrize(
    ("env", "policy", "theirs"),
    [(RandomEnv(BOX, CONTINUOUS), "MlpPolicy", TD3Policy), (RandomEnv(IMAGE, CONTINUOUS), "CnnPolicy", CnnPolicy)],
    ids=["mlp", "cnn"],
)
@pytest.mark.parametrize(
    ("cls", "module"), [(TD3X, sb3_ac_ext.td3x), (DDPGX, sb3_ac_ext.ddpgx.policies)], ids=lambda value: value.__name__
)
@pytest.mark.parametrize("critics", [{}, {"n_critics": 1}, {"n_critics": 3}], ids=["", "one critic", "three critics"])
def test_sb3_zip_and_buffer_load_and_train_on(
    critics: dict[str, int], cls: Any, module: Any, env: Any, policy: str, theirs: type, tmp_path: Path
) -> None:
    sb3_model = make(cls.sb3_class, env, policy, policy_kwargs={**SMALL, **critics}).learn(21)
    assert type(sb3_model.policy) is theirs
    sb3_model.save(tmp_path / "sb3")
    sb3_model.save_replay_buffer(tmp_path / "buffer")
    loaded = cls.load(tmp_path / "sb3", env=env)
    assert type(loaded.policy) is getattr(module, policy)
    assert_same(loaded, sb3_model)
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.set_logger(Logger(None, []))
    for model in (sb3_model, loaded):
        np.random.seed(1)
        th.manual_seed(1)
        model.train(gradient_steps=4, batch_size=4)
    th.testing.assert_close(state(loaded), state(sb3_model), rtol=0, atol=1e-6)


def test_sb3_policy_class_given_to_the_constructor_is_ours() -> None:
    assert type(TD3X(TD3Policy, scripted()).policy) is sb3_ac_ext.td3x.MlpPolicy


@pytest.mark.parametrize("cls", [TD3X, DDPGX])
def test_our_zip_loads_into_sb3(cls: Any, tmp_path: Path) -> None:
    """Back to SB3 with its own policy class: the parameters have the same names."""
    model = make(cls).learn(21)
    fresh = make(cls.sb3_class)
    fresh.set_parameters(model.get_parameters())
    obs = np.ones((3, 2), np.float32)
    np.testing.assert_array_equal(fresh.predict(obs)[0], model.predict(obs)[0])


def test_sb3_zip_goes_on_with_the_options_of_ddpgx(tmp_path: Path) -> None:
    """Its optimizer state has one group of parameters, which weight decay leaves as it is."""
    make(DDPG).learn(21).save(tmp_path / "sb3")
    loaded = DDPGX.load(
        tmp_path / "sb3", env=scripted(), critic_weight_decay=0.1, parameter_noise={"std": 0.1, "distance": 0.2}
    )
    assert (loaded.policy.action_layer, loaded.policy.batch_norm) == (0, False)
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.critic.optimizer.state_dict()["state"][0]["step"] == 31


def test_n_steps_can_change_at_load(tmp_path: Path) -> None:
    for cls in (TD3X, TD3):
        make(cls, n_steps=3).save(tmp_path / "model")
        assert isinstance(TD3X.load(tmp_path / "model", env=scripted()).replay_buffer, NStepReplayBuffer)
        loaded = TD3X.load(tmp_path / "model", env=scripted(), n_steps=1, replay_buffer_kwargs={})
        assert type(loaded.replay_buffer) is ReplayBuffer
        make(cls).save(tmp_path / "model")
        loaded = TD3X.load(tmp_path / "model", env=scripted(), n_steps=4, gamma=0.5)
        assert isinstance(loaded.replay_buffer, NStepReplayBuffer)
        assert (loaded.replay_buffer.n_steps, loaded.replay_buffer.gamma) == (4, 0.5)


def test_buffer_saved_inside_the_zip(tmp_path: Path) -> None:
    for cls in (TD3X, TD3):
        model = make(cls).learn(20)
        model.save(tmp_path / "model", include=["replay_buffer"])
        loaded = TD3X.load(tmp_path / "model")
        np.testing.assert_array_equal(loaded.replay_buffer.actions, model.replay_buffer.actions)


@every_algorithm
def test_load_changes_arguments_and_refuses_unknown_ones(spec: AlgoSpec, tmp_path: Path) -> None:
    make(spec.cls).save(tmp_path / "model")
    loaded = spec.cls.load(tmp_path / "model", env=scripted(), learning_rate=0.0, stats_window_size=7, gamma=0.5)
    assert loaded.lr_schedule(1.0) == 0
    assert loaded.learn(20).ep_info_buffer.maxlen == 7
    assert loaded.gamma == 0.5
    with pytest.raises(TypeError, match=r"load\(\) got an unexpected argument 'gama'; did you mean 'gamma'\?"):
        spec.cls.load(tmp_path / "model", gama=0.5)
    with pytest.raises(ValueError, match=r"gamma must be a number in \[0, 1\], got 2"):
        spec.cls.load(tmp_path / "model", gamma=2)


def test_buffer_of_another_number_of_environments_is_refused(tmp_path: Path) -> None:
    make(env=scripted(2)).save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match=r"n_envs=2.*n_envs=1"):
        make().load_replay_buffer(tmp_path / "buffer")
