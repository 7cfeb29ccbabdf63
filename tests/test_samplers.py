"""The search spaces: hundreds of trials are drawn, each must be legal and mean the same in the search and in --trial-id."""

import inspect
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from environments import BOX, RandomEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from models import taken, taking
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_ac_ext.signatures import arguments_of
from sb3_ac_ext.zoo import patch
from sb3_ac_ext.zoo.precedence import drop_contradicted
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec, data_dir
from sb3_ac_ext.zoo.samplers import off_policy
from sb3_ac_ext.zoo.samplers.searched import Searched, searched

# the Zoo's space has batches that are larger than a rollout; SB3 warns of them and takes the whole rollout
pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")

DRAWS = 500
OFF_POLICY = {"learning_starts": 5, "batch_size": 4, "buffer_size": 100}
ON_POLICY = {"n_steps": 6, "batch_size": 6, "n_epochs": 2, "learning_starts": 0, "replay_ratio": 20}
"""What trains soon, so far as an algorithm has it."""
OF_THE_ENVIRONMENT = {"n_timesteps", "n_envs", "normalize", "env_wrapper", "frame_stack"}
"""What the Zoo takes out of a file before it makes the model."""
WITHOUT_HER = {"using_her_replay_buffer": False, "her_kwargs": {}}
HER_KWARGS = {"copy_info_dict": True, "n_sampled_goal": 9}
WITH_HER = {"using_her_replay_buffer": True, "her_kwargs": HER_KWARGS}
OWN_NOISE = {"exploration_noise": {"type": "normal", "start": 0.7, "end": 0.1, "steps": 500}, "warmup": "noise"}
"""What a search leaves alone."""

with_her = [
    spec for spec in ALGORITHMS if issubclass(spec.cls, OffPolicyAlgorithm) and "MultiInputPolicy" in spec.cls.policy_aliases
]
"""Those that HER's observations are for."""
every_search = pytest.mark.parametrize(
    ("spec", "additional_args"),
    [pytest.param(spec, WITHOUT_HER, id=spec.name) for spec in ALGORITHMS]
    + [pytest.param(spec, WITH_HER, id=f"{spec.name}-her") for spec in with_her],
)


def draw(
    spec: AlgoSpec,
    additional_args: dict[str, Any],
    number: int,
    storage: Any = None,
    entry: dict[str, Any] | None = None,
    n_timesteps: int = 100_000,
) -> Iterator[tuple[int, dict[str, Any], optuna.Trial]]:
    """
    :return: number of actions, what the sampler made of the trial, the trial
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=storage, study_name="study", sampler=optuna.samplers.RandomSampler(seed=0), direction="maximize"
    )
    for index in range(number):
        trial = study.ask()
        n_actions = 1 + index % 6
        token = searched.set(Searched(entry or {}, n_timesteps))
        sampled = spec.sample(trial, n_actions, 1, dict(additional_args))
        searched.reset(token)
        yield n_actions, sampled, trial
        study.tell(trial, index)


@cache
def many(name: str, her: bool) -> list[tuple[int, dict[str, Any], optuna.Trial]]:
    """What the sampler of a row made of many trials, for every test to read."""
    spec = next(spec for spec in ALGORITHMS if spec.name == name)
    return list(draw(spec, WITH_HER if her else WITHOUT_HER, DRAWS))


def drawn(name: str) -> list[dict[str, Any]]:
    """The same without HER, the arguments alone."""
    return [sampled for _, sampled, _ in many(name, her=False)]


def as_arguments(hyperparams: dict[str, Any], n_actions: int) -> dict[str, Any]:
    """The Zoo's way from a file's noise keys to an object."""
    env = SimpleNamespace(action_space=spaces.Box(-2, 2, (n_actions,)))
    return ExperimentManager._preprocess_action_noise(SimpleNamespace(), dict(hyperparams), {}, env)


def assert_same_noise(in_search: Any, from_file: Any) -> None:
    if in_search is None:
        assert from_file is None or not (np.any(from_file._sigma) or np.any(from_file._mu))
    else:
        assert type(in_search) is type(from_file)
        for name in ("_mu", "_sigma"):
            np.testing.assert_array_equal(getattr(in_search, name), getattr(from_file, name))


@cache
def environment(n_actions: int, her: bool, n_envs: int = 1) -> VecEnv:
    """Of the right size; nothing in it matters."""
    env = BitFlippingEnv(n_actions, continuous=True, max_steps=5) if her else None
    return make_vec_env(lambda: env or TimeLimit(RandomEnv(BOX, spaces.Box(-2, 2, (n_actions,))), 7), n_envs)


def build(spec: AlgoSpec, n_actions: int, her: bool, arguments: dict[str, Any]) -> BaseAlgorithm:
    """A model as the search makes it."""
    if her:
        arguments = {"replay_buffer_class": HerReplayBuffer, **arguments}
    env = environment(n_actions, her, 4 if spec.name in taking("n_particles") else 1)
    return spec.cls("MultiInputPolicy" if her else "MlpPolicy", env, device="cpu", **arguments)


def with_tiny_networks(sampled: dict[str, Any]) -> dict[str, Any]:
    """The same with networks that take no time."""
    return {**sampled, "policy_kwargs": {**sampled["policy_kwargs"], "net_arch": [2, 2]}}


@every_search
def test_every_draw_is_accepted_by_the_constructor(spec: AlgoSpec, additional_args: dict[str, Any]):
    her = additional_args["using_her_replay_buffer"]
    for n_actions, sampled, trial in many(spec.name, her):
        assert set(sampled) <= arguments_of(spec.cls).keys()
        assert set(sampled.get("replay_buffer_kwargs", {})) <= set(inspect.signature(HerReplayBuffer).parameters)
        # of the off-policy ones, which take most of the time, there are few kinds, and of policies that are several
        several = {"n_actors", "n_particles"} & arguments_of(spec.cls).keys()
        with_networks = trial.number < 100 or not (is_off_policy(spec) or several)
        model = build(spec, n_actions, her, {**with_tiny_networks(sampled), "_init_setup_model": with_networks})
        if not with_networks:
            model._check_arguments()


@every_search
def test_some_draws_train(spec: AlgoSpec, additional_args: dict[str, Any]):
    her = additional_args["using_her_replay_buffer"]
    soon = OFF_POLICY if issubclass(spec.cls, OffPolicyAlgorithm) else ON_POLICY
    soon = taken(spec.cls, soon)
    for n_actions, sampled, _ in draw(spec, additional_args, number=3):
        model = build(spec, n_actions, her, {**sampled, **soon})
        model.learn(12)
        assert model._n_updates > 0


@pytest.mark.parametrize("spec", with_her, ids=lambda spec: spec.name)
def test_her_keeps_the_files_arguments_and_the_sampled_ones_win(spec: AlgoSpec):
    for _, sampled, trial in draw(spec, WITH_HER, number=20):
        chosen = {name: trial.params[name] for name in ("n_sampled_goal", "goal_selection_strategy")}
        assert sampled["replay_buffer_kwargs"] == {"copy_info_dict": True, **chosen}


@every_search
def test_stored_trial_means_what_was_sampled(spec: AlgoSpec, additional_args: dict[str, Any]):
    """By way of JSON and of the config that a run saves; the converter works on a copy."""
    for n_actions, sampled, trial in many(spec.name, additional_args["using_her_replay_buffer"]):
        in_storage = json.loads(json.dumps(trial.params))
        converted = spec.convert(in_storage)
        assert in_storage == trial.params
        if trial.number < 20:
            assert yaml.load(yaml.dump(converted), Loader=yaml.UnsafeLoader) == converted
        assert_same_arguments(sampled, as_arguments(converted, n_actions))


def assert_same_arguments(in_search: dict[str, Any], from_file: dict[str, Any]) -> None:
    assert_same_noise(in_search.get("action_noise"), from_file.get("action_noise"))
    for arguments in (in_search, from_file):
        assert arguments.get("action_noise") is None or arguments.get("exploration_noise") is None
    without_noise = [
        {name: value for name, value in arguments.items() if name != "action_noise"} for arguments in (in_search, from_file)
    ]
    assert without_noise[0] == without_noise[1]


@pytest.mark.parametrize(
    ("spec", "backend"),
    [pytest.param(spec, "journal", id=f"{spec.name}-journal") for spec in ALGORITHMS]
    + [pytest.param(spec, "sqlite", id=f"{spec.name}-sqlite") for spec in ALGORITHMS if spec.name in ("td3x", "ppox")],
)
def test_trial_id_builds_the_model_that_the_search_scored(spec: AlgoSpec, backend: str, tmp_path: Path):
    """Through the Zoo's manager, from a study on disk, and once more from the config that the first run saves."""
    path = str(tmp_path / "study.log") if backend == "journal" else f"sqlite:///{tmp_path}/study.db"
    storage = JournalStorage(JournalFileBackend(path)) if backend == "journal" else path
    samples = [sampled for _, sampled, _ in draw(spec, WITHOUT_HER, number=6, storage=storage)]

    for trial_id in range(1, 6):  # the Zoo takes --trial-id 0 for none
        first = manager(spec, tmp_path, config=str(spec.config), storage=path, study_name="study", trial_id=trial_id)
        assert_model_has(samples[trial_id], made_by(first))
        config = yaml.load((Path(first.params_path) / "config.yml").read_text(), Loader=yaml.UnsafeLoader)
        if "activation_fn" in config["policy_kwargs"]:  # a class, which the Zoo writes but does not read again
            continue
        saved = tmp_path / "saved.yml"
        saved.write_text(yaml.dump({"default": dict(config)}))
        assert_model_has(samples[trial_id], made_by(manager(spec, tmp_path, config=str(saved))))


def manager(spec: AlgoSpec, folder: Path, **kwargs: Any) -> ExperimentManager:
    patch.register()
    return ExperimentManager(
        SimpleNamespace(), spec.name, "Pendulum-v1", str(folder), eval_freq=-1, device="cpu", verbose=0, **kwargs
    )


def made_by(manager: ExperimentManager) -> BaseAlgorithm:
    model, _ = manager.setup_experiment()
    model.env.close()
    return model


def assert_model_has(sampled: dict[str, Any], model: BaseAlgorithm) -> None:
    schedules = {"learning_rate", "clip_range", "clip_range_vf"} & sampled.keys()
    for name in sampled.keys() - schedules - {"action_noise", "policy_kwargs", "train_freq"}:
        assert getattr(model, name) == sampled[name], name
    for name in schedules:
        assert getattr(model, name)(1.0) == sampled[name], name
    assert model.policy_kwargs.items() >= sampled["policy_kwargs"].items()
    if "train_freq" in sampled:
        assert model.train_freq.frequency == sampled["train_freq"]
    if "action_noise" in sampled and sampled["exploration_noise"] is None:
        # the study drew for several numbers of actions, with one std for all of them
        std = 0.0 if sampled["action_noise"] is None else sampled["action_noise"]._sigma[0]
        np.testing.assert_array_equal(model.action_noise._sigma, [std])


def entries_of(spec: AlgoSpec) -> list[dict[str, Any]]:
    """
    The different entries of the algorithm's files as the Zoo hands them to the search, one that fixes every rate, and one with
    noise of ours.
    """
    files = [spec.config, *sorted(data_dir("zoo_configs").glob(f"{spec.name}_*.yml"))]
    contents = [values for file in files for values in yaml.safe_load(file.read_text()).values()]
    texts = {yaml.dump({key: value for key, value in values.items() if key not in OF_THE_ENVIRONMENT}) for values in contents}
    entries = [yaml.safe_load(text) for text in sorted(texts)]
    rates = {name for name in arguments_of(spec.cls) if name.endswith("_learning_rate")}
    with_rates = {**entries[0], **dict.fromkeys(rates, 0.123)}
    noise = {**OWN_NOISE, "parameter_noise": {"std": 0.05, "distance": 0.2}}
    noise = {name: value for name, value in noise.items() if name in arguments_of(spec.cls)}
    without_noise = {name: value for name, value in entries[0].items() if name not in ("noise_type", "noise_std")}
    return [*entries, with_rates, *([{**without_noise, **noise}] if noise else [])]


def is_off_policy(spec: AlgoSpec) -> bool:
    return issubclass(spec.cls, OffPolicyAlgorithm)


def with_trial(spec: AlgoSpec, entry: dict[str, Any], converted: dict[str, Any]) -> dict[str, Any]:
    """What `--trial-id` makes of a file's entry."""
    hyperparams = {**entry, **converted}
    drop_contradicted(spec.cls, hyperparams, dict.fromkeys(converted, 1))
    return hyperparams


def test_sampled_values_hold_whatever_the_file_says(spec: AlgoSpec):
    """A noise that is constant, a warm-up with noise or a rate of the actor would contradict a trial or make it void."""
    for entry in entries_of(spec):
        her = entry.pop("replay_buffer_class", None) is not None
        additional_args = {"using_her_replay_buffer": her, "her_kwargs": entry.get("replay_buffer_kwargs", {})}
        kept = {
            name: entry[name] for name in ("exploration_noise", "warmup", "parameter_noise") if entry.get(name) is not None
        }
        for n_actions, sampled, trial in draw(spec, additional_args, number=8, entry=entry):
            in_search = {**as_arguments(entry, n_actions), **sampled}
            loaded = as_arguments(with_trial(spec, entry, spec.convert(trial.params)), n_actions)
            for arguments in (in_search, loaded):
                assert kept.items() <= arguments.items()
                del arguments["policy"]
                model = build(spec, n_actions, her, with_tiny_networks(arguments))
                if arguments.get("exploration_noise") is not None:
                    assert model.exploration_noise == arguments["exploration_noise"]
                elif "action_noise" in arguments:
                    assert model.action_noise is arguments["action_noise"]
            assert_same_arguments(in_search, loaded)
            assert 0.123 not in in_search.values()


SWITCH = {False, True}
REACHED: dict[str, dict[str, set[Any]]] = {
    "td3x": {"policy_delay": {1, 2, 3, 4}, "critic_layer_norm": SWITCH, "n_steps": {1, 3, 5}},
    "sacx": {
        "ent_coef": {"auto", "auto_0.1", 0.1, 0.01},
        **dict.fromkeys(["critic_layer_norm", "value_network", "exact_log_prob"], SWITCH),
        "action_noise": {None},  # as in the Zoo's space
        "exploration_noise": {None},
        "n_steps": {1, 3, 5},
    },
    "ddpgx": {
        "action_layer": {0, 1},
        "batch_norm": SWITCH,
        "final_layer_init": {None, 3e-3},
        "critic_weight_decay": {0.0, 1e-4, 1e-3, 1e-2},
        "parameter_noise": {None},  # beside the sampled noise it would be a second one
        "n_steps": {1, 3, 5},
    },
    "d4pg": {
        "n_steps": {1, 3, 5},
        "prioritized": SWITCH,
        "n_atoms": {21, 51, 101},
        "target_update_interval": {1, 100},
        "dqda_clipping": {None, 1.0},
        "distribution": {"categorical"},
    },
    "maddpg": {
        "policy_delay": {1, 2, 3, 4},
        "target_policy_noise": {0.0, 0.1, 0.2},
        "logit_penalty": {0.0, 1e-4, 1e-3, 1e-2},
        "n_critics": {1, 2},
        "n_steps": {None},  # it has one alone
    },
    "trpox": {
        "kl_direction": {"new_old", "old_new"},
        "kl_reduction": {"mean", "sum"},
        "cg_damping": {1e-3, 1e-2, 0.1},
        "fvp_subsample": {1, 2, 5},
        "accept_ratio": {None, 0.1, 0.5},
        "ent_coef": {0.0, 1e-3, 1e-2},
    },
    "ppox": {
        "surrogate": {"clip", "penalty"},
        "kl_stop": {None, 0.01, 0.02, 0.05},
        "kl_stop_scope": {"both", "policy"},
        "separate_phases": SWITCH,
    },
    "reinforce": {
        "rollout_episodes": {1, 2, 4, 8, 16, 32},
        **dict.fromkeys(["use_baseline", "bootstrap_truncated", "gamma_t_weight", "normalize_advantage"], SWITCH),
        "gae_lambda": {None},
    },
    "ac": {"gamma_t_weight": SWITCH},
    "impala": {
        "n_steps": {4, 8, 16, 32, 64},
        "batch_segments": {1, 2, 4},
        "replayed_segments": {0, 1, 2},
        "vtrace_lambda": {0.9, 0.95, 1.0},
        "use_rms_prop": SWITCH,
        "loss_reduction": {"sum", "mean"},
        "max_grad_norm": {0.5, 1.0, 10.0, 40.0},
        "n_actors": {None},  # of the machine
    },
    "a3c": {
        "n_steps": {4, 8, 16, 32, 64},
        "use_rms_prop": {True},
        "loss_reduction": {"sum", "mean"},
        "vf_coef": {0.25, 0.5, 1.0},
        "n_actors": {None},
    },
}
for with_bounds in ("td3x", "sacx", "ddpgx", "d4pg", "maddpg", "reinforce", "ac"):
    REACHED[with_bounds]["max_grad_norm"] = {None, 0.5, 1.0, 10.0}


@pytest.mark.parametrize("name", REACHED)
def test_space_reaches_every_choice(name: str):
    """Arguments and those of the policy; None is for arguments that are not drawn, too."""
    draws = [{**sampled, **sampled["policy_kwargs"]} for sampled in drawn(name)]
    for argument, choices in REACHED[name].items():
        assert {sampled.get(argument) for sampled in draws} == choices, argument


@pytest.mark.parametrize(
    ("name", "argument", "low", "high"),
    [
        ("td3x", "target_policy_noise", 0.05, 0.5),
        ("td3x", "target_noise_clip", 0.1, 1.0),
        ("maddpg", "gumbel_temperature", 0.3, 2.0),
        ("a3c", "gae_lambda", 0.9, 0.9999),
    ],
)
def test_space_reaches_the_ends_of_a_range(name: str, argument: str, low: float, high: float):
    values = [{**sampled, **sampled["policy_kwargs"]}[argument] for sampled in drawn(name)]
    assert low <= min(values) < low + 0.05
    assert high - 0.2 < max(values) <= high


@pytest.mark.parametrize(
    ("name", "rate", "low"),
    [
        *(("td3x", "critic", 0.5), ("sacx", "q_a", 0.5), ("sacx", "ent_coef", 0.1), ("ppox", "value", 0.5)),
        *(("reinforce", "baseline", 0.5), ("ac", "critic", 0.5)),
    ],
)
def test_rates_are_multiples_of_the_shared_one(name: str, rate: str, low: float):
    rates = [(sampled[f"{rate}_learning_rate"], sampled["learning_rate"]) for sampled in drawn(name)]
    ratios = [own / shared for own, shared in rates if own is not None]
    assert low == pytest.approx(min(ratios), rel=0.1)
    assert 10.0 == pytest.approx(max(ratios), rel=0.1)


with_noise = pytest.mark.parametrize("name", ["td3x", "ddpgx", "maddpg"])


@with_noise
def test_noise_is_none_constant_or_decaying(name: str):
    spec = next(spec for spec in ALGORITHMS if spec.name == name)
    kinds, steps = set(), []
    for _, sampled, trial in draw(spec, WITHOUT_HER, 100, n_timesteps=600):
        decaying = sampled["exploration_noise"]
        kinds.add((type(sampled["action_noise"]), decaying and decaying["type"]))
        if decaying:
            assert 0 <= decaying["end"] <= decaying["start"] == trial.params["noise_std"]
            steps.append(decaying["steps"])
    assert kinds == {
        (type(None), None),
        *((NormalActionNoise, None), (OrnsteinUhlenbeckActionNoise, None)),
        *((type(None), "normal"), (type(None), "ornstein-uhlenbeck")),
    }
    assert 60 <= min(steps) < 120 and 500 < max(steps) <= 600  # shares of the training


@pytest.mark.parametrize(
    "entry",
    [
        {"policy": "MultiInputPolicy"},
        {"policy": "a.policy.of.ones.own"},
        {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
        {"replay_buffer_class": HerReplayBuffer},
    ],
    ids=str,
)
def test_steps_are_summed_by_the_buffer_that_can(entry: dict[str, Any]):
    for spec in with_her:
        for _, sampled, _ in draw(spec, WITHOUT_HER, 10, entry=entry):
            assert "n_steps" not in sampled
        assert not any("n_steps" in sampled for _, sampled, _ in many(spec.name, her=True))


def test_updates_are_in_proportion_to_steps():
    ratios = set()
    for spec in filter(is_off_policy, ALGORITHMS):
        for _, sampled, trial in many(spec.name, her=False):
            ratio = trial.params["update_ratio"]
            ratios.add(ratio)
            assert abs(sampled["gradient_steps"] - ratio * sampled["train_freq"]) <= (
                0.5 if sampled["gradient_steps"] > 1 else 1
            )
    assert ratios == {0.25, 0.5, 1.0, 2.0}


OLD_TRIAL = {
    **{"one_minus_gamma": 0.25, "batch_size_pow": 5, "learning_rate": 0.5, "train_freq": 4, "tau": 0.5, "net_arch": "small"},
    **{"critic_rate_ratio": 2.0, "max_grad_norm": None, "noise_type": "normal", "noise_std": 0.125},
}
"""What searches stored before they chose between constant and decaying noise, several steps, and ratios of updates."""
ITS_VALUES = {
    **{"gamma": 0.75, "batch_size": 32, "learning_rate": 0.5, "train_freq": 4, "gradient_steps": 4, "tau": 0.5},
    **{"critic_learning_rate": 1.0, "actor_learning_rate": None, "max_grad_norm": None},
    **{"noise_type": "normal", "noise_std": 0.125, "exploration_noise": None, "warmup": "uniform"},
    "policy_kwargs": {"net_arch": [64, 64]},
}


@pytest.mark.parametrize(
    ("convert", "params", "policy_kwargs", "values"),
    [
        (
            off_policy.convert_td3x,
            {"critic_layer_norm": True, "policy_delay": 3},
            {"critic_layer_norm": True},
            {"policy_delay": 3},
        ),
        (
            off_policy.convert_ddpgx,
            {"action_layer": 1, "batch_norm": False, "final_layer_init": None, "critic_weight_decay": 0.0},
            {"action_layer": 1, "batch_norm": False, "final_layer_init": None},
            {"critic_weight_decay": 0.0, "parameter_noise": None},
        ),
        (
            off_policy.convert_maddpg,
            {"n_critics": 2, "gumbel_temperature": 0.5, "logit_penalty": 0.0},
            {"n_critics": 2, "gumbel_temperature": 0.5},
            {"logit_penalty": 0.0, "inferred_learning_rate": None},
        ),
    ],
    ids=["td3x", "ddpgx", "maddpg"],
)
def test_trials_of_before_mean_what_they_meant(
    convert: Callable[..., dict[str, Any]], params: dict[str, Any], policy_kwargs: dict[str, Any], values: dict[str, Any]
):
    expected = {**ITS_VALUES, **values, "policy_kwargs": {"net_arch": [64, 64], **policy_kwargs}}
    assert convert({**OLD_TRIAL, **params}) == expected
    quiet = {**expected, "noise_type": "normal", "noise_std": 0.0}
    assert convert({**OLD_TRIAL, **params, "noise_type": None}) == quiet


def test_a_search_keeps_the_files_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two trials at once, each in a thread of its own; then one of them from the study."""
    spec = next(spec for spec in ALGORITHMS if spec.name == "td3x")
    config, storage = tmp_path / "own.yml", str(tmp_path / "study.log")
    own = {"n_timesteps": 60, "policy": "MlpPolicy", "learning_starts": 20, "buffer_size": 100, **OWN_NOISE}
    config.write_text(yaml.dump({"default": own}))
    study = {"config": str(config), "storage": storage, "study_name": "study"}
    models = []

    def recorded(**kwargs: Any) -> BaseAlgorithm:
        models.append(spec.cls(**kwargs))
        return models[-1]

    monkeypatch.setitem(ALGOS, spec.name, recorded)
    several = {"n_trials": 2, "n_jobs": 2, "sampler": "random", "n_eval_episodes": 1, "no_optim_plots": True}
    search = manager(spec, tmp_path, optimize_hyperparameters=True, **several, **study)
    assert search.setup_experiment() is None
    search.hyperparameters_optimization()
    made_by(manager(spec, tmp_path, trial_id=1, **study))
    assert len(models) == 3
    for model in models:
        assert {name: getattr(model, name) for name in OWN_NOISE} == OWN_NOISE


def test_what_sacx_draws_goes_together():
    for sampled in drawn("sacx"):
        assert (sampled["ent_coef_learning_rate"] is None) == (sampled["ent_coef"] in (0.1, 0.01))
        assert sampled["q_a_learning_rate"] == sampled["q_b_learning_rate"]
        assert sampled["value_learning_rate"] == (sampled["q_a_learning_rate"] if sampled["value_network"] else None)


def test_what_ppox_draws_goes_together():
    draws = drawn("ppox")
    assert {(s.get("clip_range_vf"), s["clip_range_vf_mode"]) for s in draws} == {
        (None, "clipped"),
        *((bound, mode) for bound in (0.2, 1.0, 10.0) for mode in ("clipped", "max")),
    }
    assert {sampled["clip_range"] for sampled in draws if sampled["surrogate"] == "clip"} == {0.1, 0.2, 0.3, 0.4}
    for sampled in draws:
        penalty, apart = sampled["surrogate"] == "penalty", sampled["separate_phases"]
        assert sampled["kl_target"] in ((0.003, 0.01, 0.03) if penalty else (None,))
        assert sampled["clip_range"] == 0.2 or not penalty
        assert sampled["kl_stop_scope"] == "both" or apart
        assert (sampled["value_learning_rate"] is not None) == apart
        assert sampled["policy_kwargs"].get("share_features_extractor", True) == (not apart)  # for policies that have one
        assert sampled.get("clip_range_vf", 0.2) is not None  # the Zoo takes no null where it makes schedules


def test_what_others_draw_goes_together():
    for sampled in drawn("impala"):
        assert sampled["rms_prop_eps"] == 0.01 or sampled["use_rms_prop"]
    for sampled in drawn("reinforce"):
        assert (sampled["baseline_learning_rate"] is None) == (not sampled["use_baseline"])
    lambdas = {(s["critic"], s["actor_trace_lambda"], s["critic_trace_lambda"]) for s in drawn("ac")}
    values = (0.0, 0.5, 0.9)
    assert lambdas == {(critic, a, c) for critic in "vq" for a in (values if critic == "v" else (0.0,)) for c in values}
    assert {"cg_max_steps", "n_critic_updates", "target_kl", "gae_lambda"} <= drawn("trpox")[0].keys()  # the Zoo's space


def test_the_critics_rate_is_shown_in_the_study():
    for _, sampled, trial in draw(next(spec for spec in ALGORITHMS if spec.name == "td3x"), WITHOUT_HER, number=20):
        assert trial.user_attrs["critic_learning_rate"] == sampled["critic_learning_rate"]
