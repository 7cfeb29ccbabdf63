"""Search spaces of the algorithms with actors. How many actors there are, and where, is the machine's affair: not searched."""

from typing import Any

import optuna


def sample_impala(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for A2C with shorter segments, and IMPALA's own options.

    :param trial: the trial that chooses
    :param n_actions: size of an action, not used
    :param n_envs: number of environments of each actor, not used
    :param additional_args: not used
    :return: constructor arguments
    """
    suggest_segments(trial)
    trial.suggest_categorical("batch_segments", [1, 2, 4])
    trial.suggest_categorical("replayed_segments", [0, 1, 2])
    trial.suggest_categorical("vtrace_lambda", [0.9, 0.95, 1.0])
    if trial.suggest_categorical("use_rms_prop", [False, True]):
        suggest_rms_prop(trial)
    return convert_impala(trial.params)


def convert_impala(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_impala` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    from rl_zoo3.hyperparams_opt import convert_onpolicy_params

    hyperparams = convert_onpolicy_params({**params, "one_minus_gae_lambda": 0.0})
    del hyperparams["gae_lambda"]  # its place is taken by V-trace's lambda
    return {"rms_prop_eps": 0.01, **hyperparams}


def sample_a3c(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for A2C with shorter segments, and A3C's own options.

    :param trial: the trial that chooses
    :param n_actions: size of an action, not used
    :param n_envs: number of environments of each worker, not used
    :param additional_args: not used
    :return: constructor arguments
    """
    suggest_segments(trial)
    trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.1, log=True)
    suggest_rms_prop(trial)
    return convert_a3c(trial.params)


def convert_a3c(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_a3c` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    from rl_zoo3.hyperparams_opt import convert_onpolicy_params

    return {"use_rms_prop": True, **convert_onpolicy_params(params)}  # the sampled eps is its


def sample_acer(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for A2C, and how much and how far from the average policy ACER learns from older segments.

    :param trial: the trial that chooses
    :param n_actions: size of an action, not used
    :param n_envs: number of environments of each actor, not used
    :param additional_args: not used
    :return: constructor arguments
    """
    suggest_rollouts(trial)
    trial.suggest_categorical("max_grad_norm", [1.0, 10.0, 40.0])
    trial.suggest_categorical("replay_ratio", [1, 2, 4, 8])
    trial.suggest_categorical("trust_region_delta", [0.1, 0.3, 1.0, 2.0])
    trial.suggest_categorical("average_decay", [0.9, 0.99, 0.995])
    if trial.suggest_categorical("use_rms_prop", [False, True]):
        suggest_rms_prop(trial)
    return convert_acer(trial.params)


def convert_acer(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_acer` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    return convert_impala({"rms_prop_eps": 1e-5, **params})


def suggest_segments(trial: optuna.Trial) -> None:
    """What IMPALA and A3C have: `suggest_rollouts`, and how their losses are summed and gradients bounded."""
    suggest_rollouts(trial)
    trial.suggest_categorical("loss_reduction", ["sum", "mean"])
    trial.suggest_categorical("max_grad_norm", [0.5, 1.0, 10.0, 40.0])


def suggest_rollouts(trial: optuna.Trial) -> None:
    """What all have: segments, rates, networks, and the terms of the loss."""
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    trial.suggest_int("n_steps_pow", 2, 6)
    trial.suggest_float("learning_rate", 1e-4, 0.01, log=True)
    trial.suggest_float("ent_coef", 1e-8, 0.1, log=True)
    trial.suggest_categorical("vf_coef", [0.25, 0.5, 1.0])
    trial.suggest_categorical("net_arch", ["small", "medium"])
    trial.suggest_categorical("activation_fn", ["tanh", "relu"])
    trial.set_user_attr("gamma", 1 - one_minus_gamma)


def suggest_rms_prop(trial: optuna.Trial) -> None:
    """What is added to the mean square of the gradient."""
    trial.suggest_float("rms_prop_eps", 1e-5, 0.1, log=True)
