"""The search spaces of OPAC, one for each variant; which one is the file's to say."""

from typing import Any

import optuna

from sb3_ac_ext.zoo.samplers.critic import suggest_critic_rate
from sb3_ac_ext.zoo.samplers.off_policy import convert_off_policy, keep_her_kwargs, suggest_update_ratio
from sb3_ac_ext.zoo.samplers.searched import searched


def sample_opac(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for SAC without its temperature, and OPAC's own options; rates and traces for the variant "degris".

    :param trial: the trial that chooses
    :param n_actions: size of an action
    :param n_envs: number of environments
    :param additional_args: ``using_her_replay_buffer`` and ``her_kwargs``, the file's arguments of that buffer
    :return: constructor arguments
    """
    variant = searched.get().hyperparams.get("variant", "q")
    if variant == "degris":
        suggest_linear(trial)
    else:
        suggest_deep(trial, n_actions, n_envs, additional_args)
    if variant == "is":
        trial.suggest_categorical("rho_max", [None, 1.0, 5.0, 10.0])
    return convert_opac(trial.params)


def convert_opac(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_opac` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    if "trace_lambda" in params:
        hyperparams = dict(params)
        hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
        return hyperparams
    hyperparams = convert_off_policy(params)
    hyperparams["policy_kwargs"]["n_critics"] = hyperparams.pop("n_critics")
    return {**hyperparams, "correction_learning_rate": None}


def suggest_deep(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> None:
    """Networks, replay, entropy; what acts is the file's."""
    from rl_zoo3.hyperparams_opt import sample_sac_params

    sample_sac_params(trial, n_actions, n_envs, additional_args)
    suggest_update_ratio(trial)
    suggest_critic_rate(trial)
    trial.suggest_float("ent_coef", 1e-4, 0.1, log=True)
    trial.suggest_categorical("n_critics", [1, 2])
    trial.suggest_categorical("target_update_interval", [1, 10])
    if additional_args["using_her_replay_buffer"]:
        keep_her_kwargs(trial, additional_args["her_kwargs"])


def suggest_linear(trial: optuna.Trial) -> None:
    """The rates of Off-PAC and its traces; features are the file's."""
    trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    trial.suggest_float("actor_learning_rate", 1e-4, 1.0, log=True)
    trial.suggest_float("critic_learning_rate", 1e-3, 0.2, log=True)
    trial.suggest_categorical("correction_learning_rate", [0.0, 1e-4, 1e-3])
    trial.suggest_float("trace_lambda", 0.0, 1.0)
