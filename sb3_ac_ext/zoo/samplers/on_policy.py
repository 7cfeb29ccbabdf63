"""Search spaces of the on-policy algorithms."""

from typing import Any

import optuna

from sb3_ac_ext.zoo.samplers.critic import convert_critic, suggest_critic_rate


def sample_ppox(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for PPO and PPOX's own options.

    :param trial: the trial that chooses
    :param n_actions: size of an action, not used
    :param n_envs: number of environments, not used
    :param additional_args: not used
    :return: constructor arguments
    """
    from rl_zoo3.hyperparams_opt import sample_ppo_params

    sample_ppo_params(trial, n_actions, n_envs, additional_args)
    suggest_surrogate(trial)
    suggest_phases(trial)
    return convert_ppox(trial.params)


def convert_ppox(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_ppox` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    from rl_zoo3.hyperparams_opt import convert_onpolicy_params

    hyperparams = {**PPOX_DEFAULTS, **convert_onpolicy_params(params)}
    if hyperparams["surrogate"] == "penalty":
        hyperparams["clip_range"] = 0.2  # its default, for the penalty does not clip
    if hyperparams["clip_range_vf"] is None:
        del hyperparams["clip_range_vf"]  # null in a file stops the Zoo
    if hyperparams["separate_phases"]:
        hyperparams["policy_kwargs"]["share_features_extractor"] = False
        hyperparams["value_learning_rate"] = hyperparams.pop("value_rate_ratio") * hyperparams["learning_rate"]
    return hyperparams


PPOX_DEFAULTS = {
    **dict.fromkeys(("target_kl", "kl_target", "kl_coef", "policy_epochs", "value_epochs", "value_stop_mse")),
    **dict.fromkeys(("policy_sample_ratio", "value_sample_ratio", "policy_learning_rate", "value_learning_rate")),
    "clip_range_vf_mode": "clipped",
    "kl_stop_scope": "both",
}
"""What a file may say beside or against what is sampled."""


def sample_trpox(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for TRPO and TRPOX's own options.

    :param trial: the trial that chooses
    :param n_actions: size of an action, not used
    :param n_envs: number of environments, not used
    :param additional_args: not used
    :return: constructor arguments
    """
    from rl_zoo3.hyperparams_opt import sample_trpo_params

    sample_trpo_params(trial, n_actions, n_envs, additional_args)
    suggest_trust_region(trial)
    return convert_trpox(trial.params)


def convert_trpox(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_trpox` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    from rl_zoo3.hyperparams_opt import convert_onpolicy_params

    hyperparams: dict[str, Any] = convert_onpolicy_params(params)
    return hyperparams


def sample_acktr(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for A2C with shorter rollouts, rates for natural gradients, tanh layers, no clipping, and our options.

    :param trial: the trial that chooses
    :param n_actions: size of an action, not used
    :param n_envs: number of environments, not used
    :param additional_args: not used
    :return: constructor arguments
    """
    trial.suggest_int("n_steps_pow", 3, 10)
    trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.1, log=True)
    trial.suggest_float("learning_rate", 0.01, 1.0, log=True)
    trial.suggest_float("ent_coef", 1e-8, 0.1, log=True)
    trial.suggest_categorical("net_arch", ["small", "medium"])
    trial.suggest_categorical("normalize_advantage", [False, True])
    suggest_natural_gradient(trial)
    return convert_acktr(trial.params)


def convert_acktr(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_acktr` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    from rl_zoo3.hyperparams_opt import convert_onpolicy_params

    hyperparams = convert_onpolicy_params({**params, "activation_fn": "tanh"})
    del hyperparams["policy_kwargs"]["activation_fn"]  # the policy's default, and a class, which no file can hold
    # a file's bounds and rates of the value alone would hide what was sampled
    return {**hyperparams, "value_learning_rate": None, "value_max_kl": None}


def sample_reinforce(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The ranges of the Zoo's A2C where REINFORCE has its arguments, and its own.

    :param trial: the trial that chooses
    :param n_actions: size of an action, not used
    :param n_envs: number of environments, not used
    :param additional_args: not used
    :return: constructor arguments
    """
    suggest_policy_gradient(trial, highest_rate=0.02)
    trial.suggest_int("rollout_episodes_pow", 0, 5)
    trial.suggest_categorical("max_grad_norm", [None, 0.5, 1.0, 10.0])
    trial.suggest_categorical("normalize_advantage", [False, True])
    trial.suggest_categorical("gamma_t_weight", [False, True])
    if trial.suggest_categorical("use_baseline", [False, True]):
        rate_ratio = trial.suggest_float("baseline_rate_ratio", 0.5, 10.0, log=True)
        trial.suggest_categorical("bootstrap_truncated", [False, True])
        trial.set_user_attr("baseline_learning_rate", rate_ratio * trial.params["learning_rate"])
    return convert_reinforce(trial.params)


def convert_reinforce(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_reinforce` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    hyperparams = {"bootstrap_truncated": False, "baseline_learning_rate": None, **convert_policy_gradient(params)}
    hyperparams["rollout_episodes"] = 2 ** hyperparams.pop("rollout_episodes_pow")
    if hyperparams["use_baseline"]:
        hyperparams["baseline_learning_rate"] = hyperparams.pop("baseline_rate_ratio") * hyperparams["learning_rate"]
    return hyperparams


def sample_ac(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The ranges of the Zoo's A2C where AC has its arguments, and its own, for discrete and continuous actions alike.

    :param trial: the trial that chooses
    :param n_actions: size of an action, not used
    :param n_envs: number of environments, not used
    :param additional_args: not used
    :return: constructor arguments
    """
    suggest_policy_gradient(trial, highest_rate=0.002)
    suggest_critic_rate(trial)
    trial.suggest_categorical("gamma_t_weight", [False, True])
    if trial.suggest_categorical("critic", ["v", "q"]) == "v":
        trial.suggest_categorical("actor_trace_lambda", [0.0, 0.5, 0.9])
    trial.suggest_categorical("critic_trace_lambda", [0.0, 0.5, 0.9])
    return convert_ac(trial.params)


def convert_ac(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_ac` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    stochastic = {"deterministic_policy": False, "exploration_std": 0.0, "actor_trace_lambda": 0.0}
    hyperparams = {**stochastic, **convert_policy_gradient(params)}
    convert_critic(hyperparams)
    return hyperparams


def sample_svpg(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for A2C with shorter batches, and how much the particles explore. How many there are, and by which base
    they learn, is the file's affair.

    :param trial: the trial that chooses
    :param n_actions: size of an action, not used
    :param n_envs: number of environments of all particles, not used
    :param additional_args: not used
    :return: constructor arguments
    """
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.1, log=True)
    trial.suggest_int("n_steps_pow", 4, 9)
    trial.suggest_float("learning_rate", 1e-4, 0.01, log=True)
    trial.suggest_float("ent_coef", 1e-8, 0.1, log=True)
    trial.suggest_float("max_grad_norm", 0.3, 2)
    trial.suggest_categorical("net_arch", ["small", "medium"])
    trial.suggest_categorical("activation_fn", ["tanh", "relu"])
    trial.suggest_float("temperature", 0.1, 100.0, log=True)
    if trial.suggest_categorical("annealing", ["none", "exponential", "tanh"]) == "exponential":
        trial.suggest_int("annealing_start", 0, 1000)
        trial.suggest_categorical("annealing_factor", [0.9, 0.99, 0.999])
    trial.set_user_attr("gamma", 1 - one_minus_gamma)
    return convert_svpg(trial.params)


def convert_svpg(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_svpg` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    from rl_zoo3.hyperparams_opt import convert_onpolicy_params

    return {**SVPG_DEFAULTS, **convert_onpolicy_params(params)}


SVPG_DEFAULTS = {
    "annealing_start": 500,
    "annealing_step": 0.02,
    "annealing_factor": 0.99,
    "annealing_slope": 5.0,
    "annealing_power": 1.0,
    "temperature_min": 0.01,
}
"""What a file may say of another annealing than the one that is sampled."""


def suggest_surrogate(trial: optuna.Trial) -> None:
    """Clipping or penalty, where the updates stop, and how far a value may move. KL in nats."""
    if trial.suggest_categorical("surrogate", ["clip", "penalty"]) == "penalty":
        trial.suggest_categorical("kl_target", [0.003, 0.01, 0.03])
    trial.suggest_categorical("kl_stop", [None, 0.01, 0.02, 0.05])
    if trial.suggest_categorical("clip_range_vf", [None, 0.2, 1.0, 10.0]) is not None:
        trial.suggest_categorical("clip_range_vf_mode", ["clipped", "max"])


def suggest_phases(trial: optuna.Trial) -> None:
    """One update for policy and value, or a phase for each, with the value's rate relative to the policy's."""
    if trial.suggest_categorical("separate_phases", [False, True]):
        rate_ratio = trial.suggest_float("value_rate_ratio", 0.5, 10.0, log=True)
        trial.suggest_categorical("kl_stop_scope", ["both", "policy"])
        trial.set_user_attr("value_learning_rate", rate_ratio * trial.params["learning_rate"])


def suggest_trust_region(trial: optuna.Trial) -> None:
    """How the step of TRPO is bounded, computed and accepted, and the entropy bonus."""
    trial.suggest_categorical("kl_direction", ["new_old", "old_new"])
    trial.suggest_categorical("kl_reduction", ["mean", "sum"])
    trial.suggest_categorical("cg_damping", [1e-3, 1e-2, 0.1])
    trial.suggest_categorical("fvp_subsample", [1, 2, 5])
    trial.suggest_categorical("accept_ratio", [None, 0.1, 0.5])
    trial.suggest_categorical("ent_coef", [0.0, 1e-3, 1e-2])


def suggest_natural_gradient(trial: optuna.Trial) -> None:
    """The trust region, the value's weight in it, damping, and how much of the past counts."""
    trial.suggest_float("max_kl", 1e-4, 0.02, log=True)
    trial.suggest_float("vf_fisher_coef", 0.01, 10.0, log=True)
    trial.suggest_float("damping", 1e-3, 0.1, log=True)
    trial.suggest_categorical("stats_decay", [0.9, 0.95, 0.99])
    trial.suggest_categorical("momentum", [0.0, 0.5, 0.9])
    trial.suggest_categorical("kl_target", [None, 0.002, 0.01])


def suggest_policy_gradient(trial: optuna.Trial, highest_rate: float) -> None:
    """What the Zoo searches for A2C besides rollouts and advantages."""
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    trial.suggest_float("learning_rate", 1e-5, highest_rate, log=True)
    trial.suggest_float("ent_coef", 1e-8, 0.1, log=True)
    trial.suggest_categorical("net_arch", ["small", "medium"])
    trial.suggest_categorical("activation_fn", ["tanh", "relu"])
    trial.set_user_attr("gamma", 1 - one_minus_gamma)


def convert_policy_gradient(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: with those of `suggest_policy_gradient`
    :return: a hyperparameter file's values, the others as they are
    """
    from rl_zoo3.hyperparams_opt import convert_onpolicy_params

    hyperparams: dict[str, Any] = convert_onpolicy_params({**params, "one_minus_gae_lambda": 0.0})
    del hyperparams["gae_lambda"]  # which these algorithms do not have
    return hyperparams
