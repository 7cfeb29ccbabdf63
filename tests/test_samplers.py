"""The search spaces: hundreds of trials are drawn, each must be legal and mean the same in the search and in --trial-id."""

import inspect
import json
from collections.abc import Iterator
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
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_ac_ext.base.typing import constructor_keys
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec, data_dir

# the Zoo's space has batches that are larger than a rollout; SB3 warns of them and takes the whole rollout
pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")

DRAWS = 300
OFF_POLICY = {"learning_starts": 5, "batch_size": 4, "buffer_size": 100}
ON_POLICY = {"n_steps": 6, "batch_size": 6, "n_epochs": 2}
"""What trains soon, so far as an algorithm has it."""
OF_THE_ENVIRONMENT = {"n_timesteps", "n_envs", "normalize", "env_wrapper", "frame_stack"}
"""What the Zoo takes out of a file before it makes the model."""
WITHOUT_HER = {"using_her_replay_buffer": False, "her_kwargs": {}}
HER_KWARGS = {"copy_info_dict": True, "n_sampled_goal": 9}
WITH_HER = {"using_her_replay_buffer": True, "her_kwargs": HER_KWARGS}

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
    spec: AlgoSpec, additional_args: dict[str, Any], number: int = DRAWS, storage: Any = None
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
        yield n_actions, spec.sample(trial, n_actions, 1, dict(additional_args)), trial
        study.tell(trial, index)


def as_arguments(hyperparams: dict[str, Any], n_actions: int) -> dict[str, Any]:
    """The Zoo's way from a file's noise keys to an object."""
    env = SimpleNamespace(action_space=spaces.Box(-2, 2, (n_actions,)))
    return ExperimentManager._preprocess_action_noise(SimpleNamespace(), dict(hyperparams), {}, env)


def assert_same_noise(in_search: Any, from_file: Any) -> None:
    if in_search is None:
        assert not np.any(from_file._sigma) and not np.any(from_file._mu)
    else:
        assert type(in_search) is type(from_file)
        for name in ("_mu", "_sigma"):
            np.testing.assert_array_equal(getattr(in_search, name), getattr(from_file, name))


def build(spec: AlgoSpec, n_actions: int, her: bool, arguments: dict[str, Any]) -> BaseAlgorithm:
    """A model as the search makes it, on an environment of the right size in which nothing matters."""
    if her:
        env = BitFlippingEnv(n_actions, continuous=True, max_steps=5)
        return spec.cls("MultiInputPolicy", env, device="cpu", **{"replay_buffer_class": HerReplayBuffer, **arguments})
    env = TimeLimit(RandomEnv(BOX, spaces.Box(-2, 2, (n_actions,))), 7)
    return spec.cls("MlpPolicy", env, device="cpu", **arguments)


def with_tiny_networks(sampled: dict[str, Any]) -> dict[str, Any]:
    """The same with networks that take no time."""
    return {**sampled, "policy_kwargs": {**sampled["policy_kwargs"], "net_arch": [2, 2]}}


@every_search
def test_every_draw_is_accepted_by_the_constructor(spec: AlgoSpec, additional_args: dict[str, Any]):
    her = additional_args["using_her_replay_buffer"]
    for n_actions, sampled, _ in draw(spec, additional_args):
        assert set(sampled) <= constructor_keys(spec.cls)
        assert set(sampled.get("replay_buffer_kwargs", {})) <= set(inspect.signature(HerReplayBuffer).parameters)
        build(spec, n_actions, her, with_tiny_networks(sampled))


@every_search
def test_some_draws_train(spec: AlgoSpec, additional_args: dict[str, Any]):
    her = additional_args["using_her_replay_buffer"]
    soon = OFF_POLICY if issubclass(spec.cls, OffPolicyAlgorithm) else ON_POLICY
    soon = {name: value for name, value in soon.items() if name in constructor_keys(spec.cls)}
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
    for n_actions, sampled, trial in draw(spec, additional_args):
        stored = as_arguments(spec.convert(trial.params), n_actions)
        if "action_noise" in sampled:
            assert_same_noise(sampled.pop("action_noise"), stored.pop("action_noise"))
        assert stored == sampled


@every_search
def test_json_changes_nothing(spec: AlgoSpec, additional_args: dict[str, Any]):
    for _, _, trial in draw(spec, additional_args):
        stored = json.loads(json.dumps(trial.params))
        assert spec.convert(stored) == spec.convert(trial.params)
        assert stored == trial.params  # the converter works on a copy


@every_search
def test_converted_trial_survives_the_saved_config(spec: AlgoSpec, additional_args: dict[str, Any]):
    for _, _, trial in draw(spec, additional_args, number=20):
        converted = spec.convert(trial.params)
        assert yaml.load(yaml.dump(converted), Loader=yaml.UnsafeLoader) == converted


@pytest.mark.parametrize(
    ("spec", "backend"),
    [pytest.param(spec, "journal", id=f"{spec.name}-journal") for spec in ALGORITHMS]
    + [pytest.param(spec, "sqlite", id=f"{spec.name}-sqlite") for spec in ALGORITHMS if spec.name in ("td3x", "ppox")],
)
def test_trial_id_builds_the_model_that_the_search_scored(
    spec: AlgoSpec, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Through the Zoo's manager, from a study on disk, and once more from the config that the first run saves."""
    monkeypatch.setitem(ALGOS, spec.name, spec.cls)
    monkeypatch.setitem(HYPERPARAMS_CONVERTER, spec.name, spec.convert)
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
    if "action_noise" in sampled:
        # the study drew for several numbers of actions, with one std for all of them
        std = 0.0 if sampled["action_noise"] is None else sampled["action_noise"]._sigma[0]
        np.testing.assert_array_equal(model.action_noise._sigma, [std])


def entries_of(spec: AlgoSpec) -> list[dict[str, Any]]:
    """The different entries of the algorithm's files, as the Zoo hands them to the search, and one that fixes every rate."""
    files = [spec.config, *sorted(data_dir("zoo_configs").glob(f"{spec.name}_*.yml"))]
    contents = [values for file in files for values in yaml.safe_load(file.read_text()).values()]
    texts = {yaml.dump({key: value for key, value in values.items() if key not in OF_THE_ENVIRONMENT}) for values in contents}
    entries = [yaml.safe_load(text) for text in sorted(texts)]
    rates = {name for name in constructor_keys(spec.cls) if name.endswith("_learning_rate")}
    return [*entries, {**entries[0], **dict.fromkeys(rates, 0.123)}]


def test_sampled_values_hold_whatever_the_file_says(spec: AlgoSpec):
    """A noise that decays, a warm-up with noise or a rate of the actor would contradict a trial or make it void."""
    for entry in entries_of(spec):
        her = entry.pop("replay_buffer_class", None) is not None
        additional_args = {"using_her_replay_buffer": her, "her_kwargs": entry.get("replay_buffer_kwargs", {})}
        for n_actions, sampled, trial in draw(spec, additional_args, number=8):
            searched = {**as_arguments(entry, n_actions), **sampled}
            loaded = as_arguments({**entry, **spec.convert(trial.params)}, n_actions)
            for arguments in (searched, loaded):
                del arguments["policy"]
                model = build(spec, n_actions, her, with_tiny_networks(arguments))
                assert "action_noise" not in arguments or model.action_noise is arguments["action_noise"]
            if "action_noise" in sampled:
                assert_same_noise(searched.pop("action_noise"), loaded.pop("action_noise"))
            assert searched == loaded
            assert 0.123 not in searched.values()


def test_td3x_space_reaches_every_choice():
    td3x = next(spec for spec in ALGORITHMS if spec.name == "td3x")
    draws = [sampled for _, sampled, _ in draw(td3x, WITHOUT_HER)]
    assert {sampled["policy_delay"] for sampled in draws} == {1, 2, 3, 4}
    assert {sampled["max_grad_norm"] for sampled in draws} == {None, 0.5, 1.0, 10.0}
    assert {sampled["policy_kwargs"]["critic_layer_norm"] for sampled in draws} == {False, True}
    assert {type(sampled["action_noise"]) for sampled in draws} == {
        type(None),
        NormalActionNoise,
        OrnsteinUhlenbeckActionNoise,
    }
    for name, low, high in (("target_policy_noise", 0.05, 0.5), ("target_noise_clip", 0.1, 1.0)):
        values = [sampled[name] for sampled in draws]
        assert low <= min(values) < low + 0.05 and high - 0.05 < max(values) <= high
    ratios = [sampled["critic_learning_rate"] / sampled["learning_rate"] for sampled in draws]
    assert 0.5 == pytest.approx(min(ratios), rel=0.1)
    assert 10.0 == pytest.approx(max(ratios), rel=0.1)


def test_sacx_space_reaches_every_choice():
    sacx = next(spec for spec in ALGORITHMS if spec.name == "sacx")
    draws = [sampled for _, sampled, _ in draw(sacx, WITHOUT_HER)]
    assert {sampled["ent_coef"] for sampled in draws} == {"auto", "auto_0.1", 0.1, 0.01}
    assert {sampled["max_grad_norm"] for sampled in draws} == {None, 0.5, 1.0, 10.0}
    assert {sampled["policy_kwargs"]["critic_layer_norm"] for sampled in draws} == {False, True}
    assert {sampled["value_network"] for sampled in draws} == {sampled["exact_log_prob"] for sampled in draws} == {False, True}
    assert not any("action_noise" in sampled for sampled in draws)  # as in the Zoo's space
    for sampled in draws:
        assert (sampled["ent_coef_learning_rate"] is None) == (sampled["ent_coef"] in (0.1, 0.01))
        assert sampled["q_a_learning_rate"] == sampled["q_b_learning_rate"]
        assert sampled["value_learning_rate"] == (sampled["q_a_learning_rate"] if sampled["value_network"] else None)
    learned = [sampled for sampled in draws if sampled["ent_coef_learning_rate"] is not None]
    for name, samples, low in (("q_a", draws, 0.5), ("ent_coef", learned, 0.1)):
        ratios = [sampled[f"{name}_learning_rate"] / sampled["learning_rate"] for sampled in samples]
        assert low == pytest.approx(min(ratios), rel=0.1)
        assert 10.0 == pytest.approx(max(ratios), rel=0.1)


def test_ddpgx_space_reaches_every_choice():
    ddpgx = next(spec for spec in ALGORITHMS if spec.name == "ddpgx")
    draws = [sampled for _, sampled, _ in draw(ddpgx, WITHOUT_HER)]
    architectures = [sampled["policy_kwargs"] for sampled in draws]
    assert {kwargs["action_layer"] for kwargs in architectures} == {0, 1}
    assert {kwargs["batch_norm"] for kwargs in architectures} == {False, True}
    assert {kwargs["final_layer_init"] for kwargs in architectures} == {None, 3e-3}
    assert {sampled["critic_weight_decay"] for sampled in draws} == {0.0, 1e-4, 1e-3, 1e-2}
    assert {sampled["max_grad_norm"] for sampled in draws} == {None, 0.5, 1.0, 10.0}
    assert {sampled["parameter_noise"] for sampled in draws} == {None}  # beside the sampled noise it would be a second one


def test_maddpg_space_reaches_every_choice():
    maddpg = next(spec for spec in ALGORITHMS if spec.name == "maddpg")
    draws = [sampled for _, sampled, _ in draw(maddpg, WITHOUT_HER)]
    assert {sampled["policy_delay"] for sampled in draws} == {1, 2, 3, 4}
    assert {sampled["target_policy_noise"] for sampled in draws} == {0.0, 0.1, 0.2}
    assert {sampled["logit_penalty"] for sampled in draws} == {0.0, 1e-4, 1e-3, 1e-2}
    assert {sampled["policy_kwargs"]["n_critics"] for sampled in draws} == {1, 2}
    assert {sampled["max_grad_norm"] for sampled in draws} == {None, 0.5, 1.0, 10.0}
    temperatures = [sampled["policy_kwargs"]["gumbel_temperature"] for sampled in draws]
    assert 0.3 <= min(temperatures) < 0.35 and 1.8 < max(temperatures) <= 2.0


def test_trpox_space_reaches_every_choice():
    trpox = next(spec for spec in ALGORITHMS if spec.name == "trpox")
    draws = [sampled for _, sampled, _ in draw(trpox, WITHOUT_HER)]
    assert {sampled["kl_direction"] for sampled in draws} == {"new_old", "old_new"}
    assert {sampled["kl_reduction"] for sampled in draws} == {"mean", "sum"}
    assert {sampled["cg_damping"] for sampled in draws} == {1e-3, 1e-2, 0.1}
    assert {sampled["fvp_subsample"] for sampled in draws} == {1, 2, 5}
    assert {sampled["accept_ratio"] for sampled in draws} == {None, 0.1, 0.5}
    assert {sampled["ent_coef"] for sampled in draws} == {0.0, 1e-3, 1e-2}
    assert {"cg_max_steps", "n_critic_updates", "target_kl", "gae_lambda"} <= draws[0].keys()  # the Zoo's space


def test_ppox_space_reaches_every_choice():
    ppox = next(spec for spec in ALGORITHMS if spec.name == "ppox")
    draws = [sampled for _, sampled, _ in draw(ppox, WITHOUT_HER)]
    assert {sampled["surrogate"] for sampled in draws} == {"clip", "penalty"}
    assert {sampled["kl_stop"] for sampled in draws} == {None, 0.01, 0.02, 0.05}
    assert {sampled["separate_phases"] for sampled in draws} == {False, True}
    assert {(s.get("clip_range_vf"), s["clip_range_vf_mode"]) for s in draws} == {
        (None, "clipped"),
        *((bound, mode) for bound in (0.2, 1.0, 10.0) for mode in ("clipped", "max")),
    }
    for sampled in draws:
        penalty, apart = sampled["surrogate"] == "penalty", sampled["separate_phases"]
        assert sampled["kl_target"] in ((0.003, 0.01, 0.03) if penalty else (None,))
        assert sampled["clip_range"] == 0.2 or not penalty
        assert sampled["kl_stop_scope"] == "both" or apart
        assert (sampled["value_learning_rate"] is not None) == apart
        assert sampled["policy_kwargs"].get("share_features_extractor", True) == (not apart)  # for policies that have one
        assert sampled.get("clip_range_vf", 0.2) is not None  # the Zoo takes no null where it makes schedules
    assert {sampled["kl_stop_scope"] for sampled in draws} == {"both", "policy"}
    assert {sampled["clip_range"] for sampled in draws if sampled["surrogate"] == "clip"} == {0.1, 0.2, 0.3, 0.4}
    ratios = [sampled["value_learning_rate"] / sampled["learning_rate"] for sampled in draws if sampled["separate_phases"]]
    assert 0.5 == pytest.approx(min(ratios), rel=0.1)
    assert 10.0 == pytest.approx(max(ratios), rel=0.1)


def test_reinforce_space_reaches_every_choice():
    reinforce = next(spec for spec in ALGORITHMS if spec.name == "reinforce")
    draws = [sampled for _, sampled, _ in draw(reinforce, WITHOUT_HER)]
    assert {sampled["rollout_episodes"] for sampled in draws} == {1, 2, 4, 8, 16, 32}
    for name in ("use_baseline", "bootstrap_truncated", "gamma_t_weight", "normalize_advantage"):
        assert {sampled[name] for sampled in draws} == {False, True}
    assert {sampled["max_grad_norm"] for sampled in draws} == {None, 0.5, 1.0, 10.0}
    for sampled in draws:
        assert (sampled["baseline_learning_rate"] is None) == (not sampled["use_baseline"])
        assert "gae_lambda" not in sampled
    rates = [(s["baseline_learning_rate"], s["learning_rate"]) for s in draws if s["use_baseline"]]
    ratios = [own / shared for own, shared in rates]
    assert 0.5 == pytest.approx(min(ratios), rel=0.1)
    assert 10.0 == pytest.approx(max(ratios), rel=0.1)


def test_ac_space_reaches_every_choice():
    ac = next(spec for spec in ALGORITHMS if spec.name == "ac")
    draws = [sampled for _, sampled, _ in draw(ac, WITHOUT_HER)]
    assert {(sampled["critic"], sampled["actor_trace_lambda"]) for sampled in draws} == {
        *(("v", value) for value in (0.0, 0.5, 0.9)),
        ("q", 0.0),
    }
    assert {(sampled["critic"], sampled["critic_trace_lambda"]) for sampled in draws} == {
        (critic, value) for critic in "vq" for value in (0.0, 0.5, 0.9)
    }
    assert {sampled["gamma_t_weight"] for sampled in draws} == {False, True}
    assert {sampled["max_grad_norm"] for sampled in draws} == {None, 0.5, 1.0, 10.0}
    ratios = [sampled["critic_learning_rate"] / sampled["learning_rate"] for sampled in draws]
    assert 0.5 == pytest.approx(min(ratios), rel=0.1)
    assert 10.0 == pytest.approx(max(ratios), rel=0.1)


def test_the_critics_rate_is_shown_in_the_study():
    for _, sampled, trial in draw(next(spec for spec in ALGORITHMS if spec.name == "td3x"), WITHOUT_HER, number=20):
        assert trial.user_attrs["critic_learning_rate"] == sampled["critic_learning_rate"]
