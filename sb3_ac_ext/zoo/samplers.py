"""
Search spaces: from an Optuna trial to constructor arguments, and from a stored trial back to a hyperparameter file's values.

A study stores what was *suggested*, not what the model got. So each sampler only suggests, and its result is what the
algorithm's converter makes of the suggestions: the search and `--trial-id` cannot disagree. Only the noise has two forms,
an object in the search and ``noise_type`` and ``noise_std`` in a file.

Whatever is sampled here replaces the environment's entry in the hyperparameter file; an option that would contradict it
or make it void is set back to its default at the same time.

``rl_zoo3`` is imported inside the functions: it may be the one that is importing this package.
"""

from typing import Any

import optuna

SAMPLED_HER_KWARGS = ("n_sampled_goal", "goal_selection_strategy")
FIXED_HER_KWARG = "her_"
"""Before the name of a replay buffer argument that the hyperparameter file fixes, in a stored trial."""


def sample_td3x(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for TD3 and TD3X's own options.

    :param trial: the trial that chooses
    :param n_actions: size of an action
    :param n_envs: number of environments; the update-to-data ratio is that of the Zoo's TD3
    :param additional_args: ``using_her_replay_buffer`` and ``her_kwargs``, the file's arguments of that buffer
    :return: constructor arguments
    """
    from rl_zoo3.hyperparams_opt import sample_td3_params

    action_noise = sample_td3_params(trial, n_actions, n_envs, additional_args).get("action_noise")
    suggest_critic(trial)
    suggest_delayed_smoothed_policy(trial)
    if additional_args["using_her_replay_buffer"]:
        keep_her_kwargs(trial, additional_args["her_kwargs"])
    return with_noise(convert_td3x(trial.params), action_noise)


def convert_td3x(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_td3x` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    return convert_off_policy(params)


def sample_ddpgx(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for DDPG, which is that of TD3, and DDPGX's own options.

    :param trial: the trial that chooses
    :param n_actions: size of an action
    :param n_envs: number of environments; the update-to-data ratio is that of the Zoo's DDPG
    :param additional_args: ``using_her_replay_buffer`` and ``her_kwargs``, the file's arguments of that buffer
    :return: constructor arguments
    """
    from rl_zoo3.hyperparams_opt import sample_td3_params

    action_noise = sample_td3_params(trial, n_actions, n_envs, additional_args).get("action_noise")
    suggest_critic_rate(trial)
    suggest_original_architecture(trial)
    if additional_args["using_her_replay_buffer"]:
        keep_her_kwargs(trial, additional_args["her_kwargs"])
    return with_noise(convert_ddpgx(trial.params), action_noise)


def convert_ddpgx(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_ddpgx` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    hyperparams = convert_off_policy(params)
    for name in ("action_layer", "batch_norm", "final_layer_init"):
        hyperparams["policy_kwargs"][name] = hyperparams.pop(name)
    return {**hyperparams, "parameter_noise": None}


def sample_sacx(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for SAC and SACX's own options.

    :param trial: the trial that chooses
    :param n_actions: size of an action
    :param n_envs: number of environments; the update-to-data ratio is that of the Zoo's SAC
    :param additional_args: ``using_her_replay_buffer`` and ``her_kwargs``, the file's arguments of that buffer
    :return: constructor arguments
    """
    from rl_zoo3.hyperparams_opt import sample_sac_params

    sample_sac_params(trial, n_actions, n_envs, additional_args)
    suggest_critic(trial)
    suggest_soft_policy(trial)
    if additional_args["using_her_replay_buffer"]:
        keep_her_kwargs(trial, additional_args["her_kwargs"])
    return convert_sacx(trial.params)


def convert_sacx(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_sacx` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    hyperparams = convert_off_policy(params)
    rate = hyperparams.pop("critic_learning_rate")
    ent_coef_ratio = hyperparams.pop("ent_coef_rate_ratio", None)
    hyperparams.update(
        q_a_learning_rate=rate,
        q_b_learning_rate=rate,
        value_learning_rate=rate if hyperparams["value_network"] else None,
        ent_coef_learning_rate=None if ent_coef_ratio is None else ent_coef_ratio * hyperparams["learning_rate"],
    )
    return hyperparams


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


def suggest_trust_region(trial: optuna.Trial) -> None:
    """How the step of TRPO is bounded, computed and accepted, and the entropy bonus."""
    trial.suggest_categorical("kl_direction", ["new_old", "old_new"])
    trial.suggest_categorical("kl_reduction", ["mean", "sum"])
    trial.suggest_categorical("cg_damping", [1e-3, 1e-2, 0.1])
    trial.suggest_categorical("fvp_subsample", [1, 2, 5])
    trial.suggest_categorical("accept_ratio", [None, 0.1, 0.5])
    trial.suggest_categorical("ent_coef", [0.0, 1e-3, 1e-2])


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


def sample_maddpg(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for TD3 and MADDPG's own options, for discrete and continuous actions alike. What depends on who the agents
    are (``centralised``, ``parameter_sharing``) is not searched.

    :param trial: the trial that chooses
    :param n_actions: size of a joint action
    :param n_envs: number of environments; the update-to-data ratio is that of the Zoo's TD3
    :param additional_args: not used, there is no HER
    :return: constructor arguments
    """
    from rl_zoo3.hyperparams_opt import sample_td3_params

    action_noise = sample_td3_params(trial, n_actions, n_envs, additional_args).get("action_noise")
    suggest_critic_rate(trial)
    suggest_several_agents(trial)
    return with_noise(convert_maddpg(trial.params), action_noise)


def convert_maddpg(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_maddpg` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    hyperparams = convert_off_policy(params)
    for name in ("n_critics", "gumbel_temperature"):
        hyperparams["policy_kwargs"][name] = hyperparams.pop(name)
    return hyperparams


def suggest_several_agents(trial: optuna.Trial) -> None:
    """What MATD3 adds to MADDPG, and the options of discrete actions. The noise is in actions scaled to [-1, 1]."""
    trial.suggest_categorical("n_critics", [1, 2])
    trial.suggest_int("policy_delay", 1, 4)
    trial.suggest_categorical("target_policy_noise", [0.0, 0.1, 0.2])
    trial.suggest_float("gumbel_temperature", 0.3, 2.0, log=True)
    trial.suggest_categorical("logit_penalty", [0.0, 1e-4, 1e-3, 1e-2])


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


def suggest_natural_gradient(trial: optuna.Trial) -> None:
    """The trust region, the value's weight in it, damping, and how much of the past counts."""
    trial.suggest_float("max_kl", 1e-4, 0.02, log=True)
    trial.suggest_float("vf_fisher_coef", 0.01, 10.0, log=True)
    trial.suggest_float("damping", 1e-3, 0.1, log=True)
    trial.suggest_categorical("stats_decay", [0.9, 0.95, 0.99])
    trial.suggest_categorical("momentum", [0.0, 0.5, 0.9])
    trial.suggest_categorical("kl_target", [None, 0.002, 0.01])


def suggest_soft_policy(trial: optuna.Trial) -> None:
    """What SACX has beyond SB3's SAC: alpha, its rate relative to the actor's where it is learned, V, the exact density."""
    if trial.suggest_categorical("ent_coef", ["auto", "auto_0.1", 0.1, 0.01]) in ("auto", "auto_0.1"):
        trial.suggest_float("ent_coef_rate_ratio", 0.1, 10.0, log=True)
    trial.suggest_categorical("value_network", [False, True])
    trial.suggest_categorical("exact_log_prob", [False, True])


def suggest_original_architecture(trial: optuna.Trial) -> None:
    """What the paper's DDPG has beyond SB3's; every network of the Zoo's has the two hidden layers that this needs."""
    trial.suggest_categorical("action_layer", [0, 1])
    trial.suggest_categorical("batch_norm", [False, True])
    trial.suggest_categorical("final_layer_init", [None, 3e-3])
    trial.suggest_categorical("critic_weight_decay", [0.0, 1e-4, 1e-3, 1e-2])


def suggest_critic(trial: optuna.Trial) -> None:
    """Options of a critic with its own rate: those of `suggest_critic_rate` and layer normalisation."""
    suggest_critic_rate(trial)
    trial.suggest_categorical("critic_layer_norm", [False, True])


def suggest_critic_rate(trial: optuna.Trial) -> None:
    """The critic's rate relative to the actor's, and gradient clipping."""
    rate_ratio = trial.suggest_float("critic_rate_ratio", 0.5, 10.0, log=True)
    trial.suggest_categorical("max_grad_norm", [None, 0.5, 1.0, 10.0])
    # As the Zoo does for gamma: the value itself, for whoever reads the study
    trial.set_user_attr("critic_learning_rate", rate_ratio * trial.params["learning_rate"])


def suggest_delayed_smoothed_policy(trial: optuna.Trial) -> None:
    """What TD3 adds to DDPG besides the second critic. Standard deviation and clip are in actions scaled to [-1, 1]."""
    trial.suggest_int("policy_delay", 1, 4)
    trial.suggest_float("target_policy_noise", 0.05, 0.5)
    trial.suggest_float("target_noise_clip", 0.1, 1.0)


def keep_her_kwargs(trial: optuna.Trial, her_kwargs: dict[str, Any]) -> None:
    """
    Store the replay buffer arguments that the file fixes as parameters with one choice.

    The Zoo replaces the whole ``replay_buffer_kwargs`` with those of the trial, so a trial that kept only the sampled
    ones would train with other arguments than it was scored with.
    """
    for name, value in her_kwargs.items():
        if name not in SAMPLED_HER_KWARGS:
            trial.suggest_categorical(FIXED_HER_KWARG + name, [value])


def convert_off_policy(params: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's conversion (gamma, batch size, network sizes, updates), then ours.

    :param params: a stored trial of any off-policy algorithm
    :return: a hyperparameter file's values
    """
    from rl_zoo3.hyperparams_opt import convert_offpolicy_params

    hyperparams = convert_offpolicy_params(params)
    for convert in (convert_critic, convert_noise, convert_her):
        convert(hyperparams)
    return hyperparams


def convert_critic(hyperparams: dict[str, Any]) -> None:
    """The critic's rate from its ratio to ``learning_rate``; a rate that the file gives the actor would hide the latter."""
    if "critic_rate_ratio" in hyperparams:
        hyperparams["critic_learning_rate"] = hyperparams.pop("critic_rate_ratio") * hyperparams["learning_rate"]
        hyperparams["actor_learning_rate"] = None
    if "critic_layer_norm" in hyperparams:
        hyperparams["policy_kwargs"]["critic_layer_norm"] = hyperparams.pop("critic_layer_norm")


def convert_noise(hyperparams: dict[str, Any]) -> None:
    """No noise as noise of std 0, since a file's ``noise_type`` cannot be null; and no other noise beside the sampled."""
    if "noise_type" in hyperparams:
        if hyperparams["noise_type"] is None:
            hyperparams.update(noise_type="normal", noise_std=0.0)
        hyperparams.update(exploration_noise=None, warmup="uniform")


def convert_her(hyperparams: dict[str, Any]) -> None:
    """Gather the replay buffer's arguments, which the Zoo's converter leaves among the constructor's."""
    names = [name for name in hyperparams if name in SAMPLED_HER_KWARGS or name.startswith(FIXED_HER_KWARG)]
    if names:
        hyperparams["replay_buffer_kwargs"] = {name.removeprefix(FIXED_HER_KWARG): hyperparams.pop(name) for name in names}


def with_noise(hyperparams: dict[str, Any], action_noise: Any) -> dict[str, Any]:
    """
    :param hyperparams: a hyperparameter file's values
    :param action_noise: the noise that its noise keys stand for; None for none, which clears the noise of the file
    :return: constructor arguments
    """
    arguments = {name: value for name, value in hyperparams.items() if name not in ("noise_type", "noise_std")}
    return {**arguments, "action_noise": action_noise}
