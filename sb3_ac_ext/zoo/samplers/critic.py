"""What is searched for a critic that has its own optimizer."""

from typing import Any

import optuna


def suggest_critic_rate(trial: optuna.Trial) -> None:
    """The critic's rate relative to the actor's, and gradient clipping."""
    rate_ratio = trial.suggest_float("critic_rate_ratio", 0.5, 10.0, log=True)
    trial.suggest_categorical("max_grad_norm", [None, 0.5, 1.0, 10.0])
    # As the Zoo does for gamma: the value itself, for whoever reads the study
    trial.set_user_attr("critic_learning_rate", rate_ratio * trial.params["learning_rate"])


def convert_critic(hyperparams: dict[str, Any]) -> None:
    """The critic's rate from its ratio to ``learning_rate``; a rate that the file gives the actor would hide the latter."""
    if "critic_rate_ratio" in hyperparams:
        hyperparams["critic_learning_rate"] = hyperparams.pop("critic_rate_ratio") * hyperparams["learning_rate"]
        hyperparams["actor_learning_rate"] = None
    if "critic_layer_norm" in hyperparams:
        hyperparams["policy_kwargs"]["critic_layer_norm"] = hyperparams.pop("critic_layer_norm")
