"""Saving and loading: exact continuation, whole files, SB3's zips and buffers, nothing restored too early."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from models import EVERY, OFF_POLICY, SB3, SB3_OFF_POLICY, algorithm_class, rows, small_model, taken
from parallel_environments import Crowd
from stable_baselines3 import TD3, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import VecEnv
from subjects import numbers

import sb3_ac_ext.actors.replaying
import sb3_ac_ext.base.off_policy
import sb3_ac_ext.td3x
from sb3_ac_ext import DDPGX, TD3X
from sb3_ac_ext.base.checkpoint import atomic_file, random_state, set_random_state
from sb3_ac_ext.signatures import arguments_of
from sb3_ac_ext.validation import ArgumentError

LENGTH = 5
ROLLOUT = {"n_steps": LENGTH, "batch_size": LENGTH, "max_rollout_steps": LENGTH}
"""So that a rollout ends with an episode."""


def make(row: Any = "td3x", env: Any = None, **changes: Any) -> Any:
    sizes = {} if row in OFF_POLICY else taken(row, ROLLOUT)
    return small_model(row, env=env or scripted(), **{**sizes, **changes})


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
    if hasattr(model, "save_replay_buffer"):
        model.save_replay_buffer(folder / "buffer")


def load(row: str, folder: Path, **kwargs: Any) -> Any:
    """What `save` saved."""
    loaded = algorithm_class(row).load(folder / "model", **kwargs)
    loaded.set_logger(Logger(None, []))
    if hasattr(loaded, "load_replay_buffer"):
        loaded.load_replay_buffer(folder / "buffer")
    return loaded


def actions_of(model: Any) -> np.ndarray:
    """What was done, as it is stored, or the gradient that it gave."""
    if hasattr(model, "_results"):
        last = model._results[-1]
        return last.actions if hasattr(last, "actions") else np.concatenate([one.ravel() for one in last.gradients.values()])
    return (model.replay_buffer if hasattr(model, "replay_buffer") else model.rollout_buffer).actions


def disturb_random_generators() -> None:
    np.random.seed(999)
    th.manual_seed(999)


SHARED_EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ou": {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))},
    "extras": {
        "exploration_noise": {"type": "normal", "start": 0.5, "end": 0.1, "steps": 60},
        "warmup": "noise",
        "learning_rate": "lin_1e-3",
        "actor_learning_rate": 3e-3,
        "max_grad_norm": {"actor": 0.5},
    },
}

OWN_EXTRAS: dict[str, dict[str, Any]] = {
    "maddpg": {
        "exploration_noise": {"type": "ornstein-uhlenbeck", "start": 0.2, "dt": 1.0},
        "policy_delay": 2,
        "target_policy_noise": 0.2,
        "logit_penalty": 0.01,
        "max_grad_norm": 0.5,
        "policy_kwargs": {"n_critics": 2},
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
        "policy_kwargs": {"net_arch": [8, 8], "action_layer": 1, "batch_norm": True, "final_layer_init": 3e-3},
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
    "impala": {"n_actors": 2, "simulated_lag": 2, "replayed_segments": 1, "use_rms_prop": True},
    "acer": {"n_actors": 2, "simulated_lag": 2, "trust_region_delta": 0.1, "advantage_samples": 2},
    "a3c": {"n_actors": 2, "simulated_lag": 2, "use_rms_prop": False},
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


def with_extras() -> list[Any]:
    found = []
    for row in EVERY:
        shared = SHARED_EXTRAS if row in OFF_POLICY else {"plain": {}}
        own = {"own": OWN_EXTRAS[row]} if row in OWN_EXTRAS else {}
        found += [pytest.param(row, kwargs, id=f"{row}-{name}") for name, kwargs in {**shared, **own}.items()]
    return found


@rows(SB3_OFF_POLICY)
@pytest.mark.parametrize(
    ("policy", "space", "batch_size"), [("MlpPolicy", BOX, 256), ("CnnPolicy", IMAGE, 16)], ids=["mlp", "images"]
)
def test_train_after_load_is_the_uninterrupted_train_with_networks_of_usual_size(
    row: str, policy: str, space: spaces.Box, batch_size: int, tmp_path: Path
) -> None:
    """What has been recorded long ago gives the same as what is recorded after the load, and as its first runs."""
    env = RandomEnv(space, CONTINUOUS)
    cls = algorithm_class(row)
    model = cls(policy, env, seed=0, batch_size=batch_size, learning_starts=20, buffer_size=300).learn(27)
    save(model, tmp_path)
    model.train(7, batch_size)
    disturb_random_generators()
    loaded = load(row, tmp_path, env=env)
    loaded.train(7, batch_size)
    assert {how for name, how in loaded.engine_report().items() if "update" in name} == {"replayed"}
    assert_same(loaded, model)


@pytest.mark.parametrize(("row", "kwargs"), with_extras())
@pytest.mark.parametrize(("n_envs", "steps"), [(1, 1), (2, 6)], ids=["in warm-up", "learning"])
def test_learn_after_load_is_the_uninterrupted_learn(
    row: str, kwargs: dict[str, Any], n_envs: int, steps: int, tmp_path: Path
) -> None:
    """
    The environment resets to one state and its episode ends at the save, so nothing of it needs to be stored.

    Off-policy the save is between two delayed updates of the actor.
    """
    first, second = steps * LENGTH * n_envs, 4 * LENGTH * n_envs
    model = make(row, scripted(n_envs), **kwargs).learn(first)
    assert row not in OFF_POLICY or model._n_updates in (0, 25)
    save(model, tmp_path)
    model.learn(second, reset_num_timesteps=False)

    disturb_random_generators()
    loaded = load(row, tmp_path, env=scripted(n_envs))
    disturb_random_generators()
    loaded.learn(second, reset_num_timesteps=False)
    assert loaded.num_timesteps == model.num_timesteps == first + second
    assert_same(loaded, model)
    np.testing.assert_array_equal(actions_of(loaded), actions_of(model))


@rows()
def test_saving_does_not_change_the_run(row: str, tmp_path: Path) -> None:
    models = [make(row) for _ in range(2)]
    for model, saves in zip(models, (False, True), strict=True):
        model.set_random_seed(3)
        model.learn(20)
        if saves:
            model.save(tmp_path / "model")
            assert model._random_state is None
        model.learn(20, reset_num_timesteps=False)
    assert_same(*models)


def data_of(file: Path) -> dict[str, Any]:
    """What a file has as JSON."""
    return json.loads(zipfile.ZipFile(file).read("data"))


@rows()
def test_a_loaded_model_saved_again_keeps_its_place(row: str, tmp_path: Path) -> None:
    make(row).learn(20).save(tmp_path / "first.zip")
    disturb_random_generators()
    algorithm_class(row).load(tmp_path / "first.zip").save(tmp_path / "second.zip")
    first, second = (data_of(tmp_path / name)["_random_state"] for name in ("first.zip", "second.zip"))
    assert first == second


@rows()
def test_random_states_wait_until_training_goes_on(row: str, tmp_path: Path) -> None:
    cls = algorithm_class(row)
    make(row, seed=None).learn(20).save(tmp_path / "model")
    env = scripted()
    disturb_random_generators()
    expected = np.random.random()
    disturb_random_generators()
    loaded = cls.load(tmp_path / "model", env=env)
    loaded.predict(np.zeros(2, np.float32))
    assert np.random.random() == expected
    first_draws = []
    at_once = {"learning_starts": 0} if row in OFF_POLICY else {}
    for seed in (1, 2):  # a run from zero goes on with the current streams
        loaded = cls.load(tmp_path / "model", env=scripted(), **at_once)
        np.random.seed(seed)
        th.manual_seed(seed)
        loaded.action_noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))
        first_draws.append(actions_of(loaded.learn(1))[0].item())
        assert loaded._random_state is None
    assert first_draws[0] != first_draws[1]


@rows()
def test_a_seed_given_to_load_starts_its_own_stream(row: str, tmp_path: Path) -> None:
    make(row).learn(20).save(tmp_path / "model")
    runs = []
    for seed in (7, 7, 8):
        loaded = algorithm_class(row).load(tmp_path / "model", env=scripted(), seed=seed)
        runs.append(actions_of(loaded.learn(20, reset_num_timesteps=False)))
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


@rows()
def test_save_is_atomic(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(row)
    save(model, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    memory = {"buffer.pkl"} if hasattr(model, "save_replay_buffer") else set()
    assert {path.name for path in before} == {"model.zip"} | memory

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(th, "save", fail)
    for module in (sb3_ac_ext.base.off_policy, sb3_ac_ext.actors.replaying):
        monkeypatch.setattr(module, "save_to_pkl", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "model")
    if memory:
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


@pytest.mark.parametrize("row", ["td3x", "ddpgx", "sacx", "ppox"])
def test_stored_arguments_are_json(row: str, tmp_path: Path) -> None:
    """SB3 pickles some attributes; ours add none."""
    rates = {name: "lin_1e-4" for name in arguments_of(algorithm_class(row)) if name.endswith("_learning_rate")}
    shared = SHARED_EXTRAS["extras"] if row in OFF_POLICY else {}
    kwargs = {**shared, **OWN_EXTRAS.get(row, {}), **rates}
    kwargs.pop("policy_kwargs", None)
    make(row, **kwargs).learn(20).save(tmp_path / "ours.zip")
    make(SB3[row]).learn(20).save(tmp_path / "theirs.zip")
    ours, theirs = (
        {key for key, value in data_of(tmp_path / name).items() if isinstance(value, dict) and ":serialized:" in value}
        for name in ("ours.zip", "theirs.zip")
    )
    assert ours <= theirs
    loaded = algorithm_class(row).load(tmp_path / "ours.zip")
    assert {name: getattr(loaded, name) for name in kwargs} == kwargs


@pytest.mark.parametrize(
    ("row", "policy_kwargs", "changes"),
    [
        ("td3x", {"critic_layer_norm": True}, {}),
        ("ddpgx", OWN_EXTRAS["ddpgx"]["policy_kwargs"], {}),
        ("sacx", {"critic_layer_norm": True}, {"value_network": True}),
        ("maddpg", {"parameter_sharing": [["agent_0", "agent_1"]], "gumbel_temperature": 0.5}, {"centralised": False}),
    ],
)
def test_policies_save_and_load_by_themselves(
    row: str, policy_kwargs: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    policy = small_model(row, env=Crowd(3) if row == "maddpg" else None, policy_kwargs=policy_kwargs, **changes).policy
    policy.save(tmp_path / "policy.pth")
    loaded = type(policy).load(tmp_path / "policy.pth")
    th.testing.assert_close(loaded.state_dict(), policy.state_dict(), rtol=0, atol=0)
    assert str(loaded) == str(policy)
    for name in {*policy_kwargs, *changes}:
        assert getattr(loaded, name) == getattr(policy, name), name


def test_predicting_needs_no_buffer(tmp_path: Path) -> None:
    """A million images would be 8 GB a time; nothing of that size is asked for."""
    model = small_model("td3x", "images", buffer_size=10**15)
    model.save(tmp_path / "model")
    loaded = TD3X.load(tmp_path / "model")
    assert loaded._replay_buffer is None
    np.testing.assert_array_equal(loaded.predict(IMAGE.low)[0], model.predict(IMAGE.low)[0])
    assert loaded._replay_buffer is None


def test_her_model_predicts_without_an_environment(tmp_path: Path) -> None:
    env = BitFlippingEnv(n_bits=3, continuous=True)
    make(env=env, policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer).learn(20).save(tmp_path / "her")
    loaded = TD3X.load(tmp_path / "her")
    loaded.predict(env.reset()[0])
    with pytest.raises(ValueError, match="set_env"):
        _ = loaded.replay_buffer


@pytest.mark.parametrize(
    ("row", "variant"),
    [
        *((row, variant) for row in SB3_OFF_POLICY for variant in ("mlp", "images", "shared images")),
        *(("sacx", "gsde"), ("sacx", "fixed alpha")),
    ],
)
def test_sb3_zip_and_buffer_load_and_train_on(row: str, variant: str, tmp_path: Path) -> None:
    """With our policy of the same name; SB3's optimizers may have been for other parts of it."""
    theirs = small_model(SB3[row], variant).learn(21)
    save(theirs, tmp_path)
    loaded = load(row, tmp_path, env=theirs.env)
    name = "CnnPolicy" if "images" in variant else "MlpPolicy"
    assert type(theirs.policy) is SB3[row].policy_aliases[name]
    assert type(loaded.policy) is algorithm_class(row).policy_aliases[name]
    for model in (theirs, loaded):
        np.random.seed(1)
        th.manual_seed(1)
        model.train(gradient_steps=4, batch_size=4)
    th.testing.assert_close(numbers(loaded), numbers(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("row", ["td3x", "ddpgx"])
def test_our_parameters_load_into_sb3(row: str) -> None:
    """They have the same names."""
    model, fresh = make(row).learn(21), make(SB3[row])
    fresh.set_parameters(model.get_parameters())
    obs = np.ones((3, 2), np.float32)
    np.testing.assert_array_equal(fresh.predict(obs)[0], model.predict(obs)[0])


def test_sb3_zip_goes_on_with_the_options_of_ddpgx(tmp_path: Path) -> None:
    """Its optimizer state has one group of parameters, which weight decay leaves as it is."""
    make(SB3["ddpgx"]).learn(21).save(tmp_path / "sb3")
    loaded = DDPGX.load(
        tmp_path / "sb3", env=scripted(), critic_weight_decay=0.1, parameter_noise={"std": 0.1, "distance": 0.2}
    )
    assert (loaded.policy.action_layer, loaded.policy.batch_norm) == (0, False)
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.critic.optimizer.state_dict()["state"][0]["step"] == 31


def test_n_steps_can_change_at_load(tmp_path: Path) -> None:
    for cls in ("td3x", TD3):
        make(cls, n_steps=3).save(tmp_path / "model")
        assert isinstance(TD3X.load(tmp_path / "model", env=scripted()).replay_buffer, NStepReplayBuffer)
        loaded = TD3X.load(tmp_path / "model", env=scripted(), n_steps=1, replay_buffer_kwargs={})
        assert type(loaded.replay_buffer) is ReplayBuffer
        make(cls).save(tmp_path / "model")
        loaded = TD3X.load(tmp_path / "model", env=scripted(), n_steps=4, gamma=0.5)
        assert isinstance(loaded.replay_buffer, NStepReplayBuffer)
        assert (loaded.replay_buffer.n_steps, loaded.replay_buffer.gamma) == (4, 0.5)


def test_buffer_saved_inside_the_zip(tmp_path: Path) -> None:
    for cls in ("td3x", TD3):
        model = make(cls).learn(20)
        model.save(tmp_path / "model", include=["replay_buffer"])
        loaded = TD3X.load(tmp_path / "model")
        np.testing.assert_array_equal(loaded.replay_buffer.actions, model.replay_buffer.actions)


@rows()
def test_load_changes_arguments_and_refuses_unknown_ones(row: str, tmp_path: Path) -> None:
    cls = algorithm_class(row)
    make(row).save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", env=scripted(), learning_rate=0.0, stats_window_size=7, gamma=0.5)
    assert loaded.lr_schedule(1.0) == 0
    assert loaded.learn(20).ep_info_buffer.maxlen == 7
    assert loaded.gamma == 0.5
    with pytest.raises(TypeError, match=r"load\(\) got an unexpected argument 'gama'; did you mean 'gamma'\?"):
        cls.load(tmp_path / "model", gama=0.5)
    with pytest.raises(ValueError, match=r"gamma must be a number in \[0, 1\], got 2"):
        cls.load(tmp_path / "model", gamma=2)
    with pytest.raises(ValueError, match=r"device must be .*got 'gpu'"):
        cls.load(tmp_path / "model", device="gpu")


def test_load_names_what_does_not_go_with_the_file(tmp_path: Path) -> None:
    small_model("ac").save(tmp_path / "model")
    with pytest.raises(ArgumentError, match=r"(?s)does not go with use_sde=True: .*log_std"):
        algorithm_class("ac").load(tmp_path / "model", use_sde=True)
    with pytest.raises(ArgumentError, match=r"does not go with policy_kwargs=.*: The specified policy kwargs do not equal"):
        algorithm_class("ac").load(tmp_path / "model", policy_kwargs={"net_arch": [9]})
    with pytest.raises(FileNotFoundError):
        algorithm_class("ac").load(tmp_path / "another", gamma=0.5)


def test_buffer_of_another_number_of_environments_is_refused(tmp_path: Path) -> None:
    make(env=scripted(2)).save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match=r"n_envs=2.*n_envs=1"):
        make().load_replay_buffer(tmp_path / "buffer")
