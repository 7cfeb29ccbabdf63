"""Search spaces of the off-policy algorithms."""

from typing import Any

import optuna

from sb3_ac_ext.zoo.samplers.critic import convert_critic, suggest_critic_rate
from sb3_ac_ext.zoo.samplers.searched import searched

SAMPLED_HER_KWARGS = ("n_sampled_goal", "goal_selection_strategy")
FIXED_HER_KWARG = "her_"
"""Before the name of a replay buffer argument that the hyperparameter file fixes, in a stored trial."""


def sample_td3x(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for TD3 and TD3X's own options.

    :param trial: the trial that chooses
    :param n_actions: size of an action
    :param n_envs: number of environments
    :param additional_args: ``using_her_replay_buffer`` and ``her_kwargs``, the file's arguments of that buffer
    :return: constructor arguments
    """
    action_noise = suggest_zoo_td3(trial, n_actions, n_envs, additional_args)
    suggest_updates(trial, additional_args)
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
    :param n_envs: number of environments
    :param additional_args: ``using_her_replay_buffer`` and ``her_kwargs``, the file's arguments of that buffer
    :return: constructor arguments
    """
    action_noise = suggest_zoo_td3(trial, n_actions, n_envs, additional_args)
    suggest_updates(trial, additional_args)
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
    if "exploration_noise" in hyperparams:
        hyperparams["parameter_noise"] = None  # beside the sampled noise it would be a second one
    return hyperparams


def sample_sacx(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for SAC and SACX's own options.

    :param trial: the trial that chooses
    :param n_actions: size of an action
    :param n_envs: number of environments
    :param additional_args: ``using_her_replay_buffer`` and ``her_kwargs``, the file's arguments of that buffer
    :return: constructor arguments
    """
    from rl_zoo3.hyperparams_opt import sample_sac_params

    sample_sac_params(trial, n_actions, n_envs, additional_args)
    suggest_updates(trial, additional_args)
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


def sample_d4pg(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for DDPG, which is that of TD3, and D4PG's own options. The range of values is the file's or automatic.

    :param trial: the trial that chooses
    :param n_actions: size of an action
    :param n_envs: number of environments
    :param additional_args: ``using_her_replay_buffer`` and ``her_kwargs``, the file's arguments of that buffer
    :return: constructor arguments
    """
    action_noise = suggest_zoo_td3(trial, n_actions, n_envs, additional_args)
    suggest_updates(trial, additional_args)
    suggest_critic_rate(trial)
    suggest_distributional(trial)
    if additional_args["using_her_replay_buffer"]:
        keep_her_kwargs(trial, additional_args["her_kwargs"])
    return with_noise(convert_d4pg(trial.params), action_noise)


def convert_d4pg(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: what `sample_d4pg` suggested, as a study stores it
    :return: the same as a hyperparameter file's values
    """
    hyperparams = convert_off_policy(params)
    hyperparams["policy_kwargs"]["n_atoms"] = hyperparams.pop("n_atoms")
    if hyperparams["target_update_interval"] > 1:  # then targets are copies
        hyperparams["tau"] = 1.0
    return {**hyperparams, "distribution": "categorical"}


def sample_maddpg(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The Zoo's space for TD3 and MADDPG's own options, for discrete and continuous actions alike. What depends on who the agents
    are (``centralised``, ``parameter_sharing``) and what they may know (``inferred_policies``) is not searched.

    :param trial: the trial that chooses
    :param n_actions: size of a joint action
    :param n_envs: number of environments
    :param additional_args: not used, there is no HER
    :return: constructor arguments
    """
    action_noise = suggest_zoo_td3(trial, n_actions, n_envs, additional_args)
    suggest_update_ratio(trial)
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
    return {**hyperparams, "inferred_learning_rate": None}  # if a file asks for such policies: the trial's for actors


def suggest_zoo_td3(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> Any:
    """
    The Zoo's space for TD3, with noise that may decay; without noise where the file has noise of ours, which stays.

    :param trial: the trial that chooses
    :param n_actions: size of an action
    :param n_envs: number of environments
    :param additional_args: as for `sample_td3x`
    :return: the Zoo's noise, None for none; for `with_noise`
    """
    from rl_zoo3.hyperparams_opt import sample_sac_params, sample_td3_params

    if any(searched.get().hyperparams.get(name) is not None for name in ("exploration_noise", "parameter_noise")):
        sample_sac_params(trial, n_actions, n_envs, additional_args)  # the same without noise
        return None
    action_noise = sample_td3_params(trial, n_actions, n_envs, additional_args).get("action_noise")
    if action_noise is not None and trial.suggest_categorical("noise_decay", [False, True]):
        n_timesteps = searched.get().n_timesteps
        trial.suggest_float("noise_end_share", 0.0, 1.0)
        trial.suggest_int("noise_decay_steps", max(1, n_timesteps // 10), max(1, n_timesteps))
    return action_noise


def suggest_updates(trial: optuna.Trial, additional_args: dict[str, Any]) -> None:
    """How often is updated, and on the rewards of how many steps where the replay buffer can sum them."""
    suggest_update_ratio(trial)
    entry = searched.get().hyperparams
    other_buffer = entry.get("replay_buffer_class") or entry.get("optimize_memory_usage")
    of_dicts = entry.get("policy", "MlpPolicy") not in ("MlpPolicy", "CnnPolicy")  # or perhaps of them
    if not (other_buffer or of_dicts or additional_args["using_her_replay_buffer"]):
        trial.suggest_categorical("n_steps", [1, 3, 5])


def suggest_update_ratio(trial: optuna.Trial) -> None:
    """Updates per step of an environment; the Zoo's own space has one."""
    trial.suggest_categorical("update_ratio", [0.25, 0.5, 1.0, 2.0])


def suggest_critic(trial: optuna.Trial) -> None:
    """Options of a critic with its own rate: those of `suggest_critic_rate` and layer normalisation."""
    suggest_critic_rate(trial)
    trial.suggest_categorical("critic_layer_norm", [False, True])


def suggest_delayed_smoothed_policy(trial: optuna.Trial) -> None:
    """What TD3 adds to DDPG besides the second critic. Standard deviation and clip are in actions scaled to [-1, 1]."""
    trial.suggest_int("policy_delay", 1, 4)
    trial.suggest_float("target_policy_noise", 0.05, 0.5)
    trial.suggest_float("target_noise_clip", 0.1, 1.0)


def suggest_original_architecture(trial: optuna.Trial) -> None:
    """What the paper's DDPG has beyond SB3's; every network of the Zoo's has the two hidden layers that this needs."""
    trial.suggest_categorical("action_layer", [0, 1])
    trial.suggest_categorical("batch_norm", [False, True])
    trial.suggest_categorical("final_layer_init", [None, 3e-3])
    trial.suggest_categorical("critic_weight_decay", [0.0, 1e-4, 1e-3, 1e-2])


def suggest_soft_policy(trial: optuna.Trial) -> None:
    """What SACX has beyond SB3's SAC: alpha, its rate relative to the actor's where it is learned, V, the exact density."""
    if trial.suggest_categorical("ent_coef", ["auto", "auto_0.1", 0.1, 0.01]) in ("auto", "auto_0.1"):
        trial.suggest_float("ent_coef_rate_ratio", 0.1, 10.0, log=True)
    trial.suggest_categorical("value_network", [False, True])
    trial.suggest_categorical("exact_log_prob", [False, True])


def suggest_distributional(trial: optuna.Trial) -> None:
    """What D4PG adds to DDPG; priorities act where the file names no replay buffer."""
    trial.suggest_categorical("prioritized", [False, True])
    trial.suggest_categorical("n_atoms", [21, 51, 101])
    trial.suggest_categorical("target_update_interval", [1, 100])
    trial.suggest_categorical("dqda_clipping", [None, 1.0])


def suggest_several_agents(trial: optuna.Trial) -> None:
    """What MATD3 adds to MADDPG, and the options of discrete actions. The noise is in actions scaled to [-1, 1]."""
    trial.suggest_categorical("n_critics", [1, 2])
    trial.suggest_int("policy_delay", 1, 4)
    trial.suggest_categorical("target_policy_noise", [0.0, 0.1, 0.2])
    trial.suggest_float("gumbel_temperature", 0.3, 2.0, log=True)
    trial.suggest_categorical("logit_penalty", [0.0, 1e-4, 1e-3, 1e-2])


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
    for convert in (convert_critic, convert_update_ratio, convert_noise, convert_her):
        convert(hyperparams)
    return hyperparams


def convert_update_ratio(hyperparams: dict[str, Any]) -> None:
    """At least one update each time; trials of before the ratio was searched have the Zoo's, one."""
    if "update_ratio" in hyperparams:
        hyperparams["gradient_steps"] = max(1, round(hyperparams.pop("update_ratio") * hyperparams["train_freq"]))


def convert_noise(hyperparams: dict[str, Any]) -> None:
    """
    No noise as noise of std 0, since a file's ``noise_type`` cannot be null; noise that decays as ``exploration_noise``; and
    no other noise beside the sampled.
    """
    if "noise_type" not in hyperparams:
        return
    exploration_noise = None
    if hyperparams["noise_type"] is None:
        hyperparams.update(noise_type="normal", noise_std=0.0)
    if hyperparams.pop("noise_decay", False):
        start = hyperparams.pop("noise_std")
        exploration_noise = {
            "type": hyperparams.pop("noise_type"),
            "start": start,
            "end": start * hyperparams.pop("noise_end_share"),
            "steps": hyperparams.pop("noise_decay_steps"),
        }
    hyperparams.update(exploration_noise=exploration_noise, warmup="uniform")


def convert_her(hyperparams: dict[str, Any]) -> None:
    """Gather the replay buffer's arguments, which the Zoo's converter leaves among the constructor's."""
    names = [name for name in hyperparams if name in SAMPLED_HER_KWARGS or name.startswith(FIXED_HER_KWARG)]
    if names:
        hyperparams["replay_buffer_kwargs"] = {name.removeprefix(FIXED_HER_KWARG): hyperparams.pop(name) for name in names}


def with_noise(hyperparams: dict[str, Any], action_noise: Any) -> dict[str, Any]:
    """
    :param hyperparams: a hyperparameter file's values
    :param action_noise: the noise that its noise keys stand for; None for none, which clears the noise of the file
    :return: constructor arguments; without any noise where none was sampled, so that the file's stays
    """
    if "exploration_noise" not in hyperparams:
        return hyperparams
    arguments = {name: value for name, value in hyperparams.items() if name not in ("noise_type", "noise_std")}
    return {**arguments, "action_noise": action_noise if hyperparams["exploration_noise"] is None else None}
