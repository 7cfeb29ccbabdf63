"""
RLlib's side of ``actors.py --rllib``, run by the interpreter of an environment with ``pip install "ray[rllib]" torch``.

    rllib/bin/python benchmarks/rllib_impala.py '{"n_envs": 16, "n_steps": 50, "n_actors": 2, "marks": [5, 10], "seed": 0}'

Prints one line of JSON: steps sampled and trained on, and the mean return of the last 100 episodes, at each mark in seconds.
The clock starts behind the first update. Settings are those of RLlib's own example for CartPole, in Ray's repository
``rllib/examples/algorithms/impala/cartpole_impala.py``, and the defaults of ``IMPALAConfig``, but for what all who take part
have in common.
"""

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from typing import Any

import ray
from ray.rllib.algorithms.impala import IMPALA, IMPALAConfig
from ray.rllib.connectors.env_to_module.mean_std_filter import MeanStdFilter
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

EXAMPLE = {"grad_clip": 40.0, "grad_clip_by": "global_norm", "lr": 0.0005, "vf_loss_coeff": 0.05, "entropy_coeff": 0.0}
PACKAGES = ("ray", "torch", "gymnasium", "numpy")


def algorithm(n_envs: int, n_steps: int, n_actors: int, seed: int) -> IMPALA:
    """
    :param n_envs: environments of each runner
    :param n_steps: steps of each in a fragment
    :param n_actors: runners
    :param seed: of everything
    :return: built, on the new API stack, with one learner in a process of its own as by default
    """
    config = (
        IMPALAConfig()
        .environment("CartPole-v1")
        .env_runners(
            num_env_runners=n_actors,
            num_envs_per_env_runner=n_envs,
            rollout_fragment_length=n_steps,
            env_to_module_connector=lambda env, spaces, device: MeanStdFilter(),
        )
        .training(train_batch_size_per_learner=n_envs * n_steps, **EXAMPLE)
        .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[64, 64], vf_share_layers=True))
        .reporting(min_time_s_per_iteration=1)  # how often it answers
        .debugging(seed=seed, log_level="ERROR")
    )
    if not config.enable_rl_module_and_learner:
        raise RuntimeError("this RLlib does not use the new API stack by default")
    return config.build_algo()


def state(algo: IMPALA) -> dict[str, Any]:
    """
    :param algo: goes on for a second
    :return: steps sampled, and trained on with one more for each piece of an episode; the mean return
    """
    result = algo.train()
    runners, learners = result.get("env_runners", {}), result.get("learners", {}).get("__all_modules__", {})
    return {
        "steps": int(runners.get("num_env_steps_sampled_lifetime", 0)),
        "trained": int(learners.get("num_env_steps_trained_lifetime", 0)),
        "return": runners.get("episode_return_mean"),
    }


def points(algo: IMPALA, marks: list[float]) -> list[dict[str, Any]]:
    """
    :param algo: built
    :param marks: seconds
    :return: what there is at the first answer behind each mark
    """
    while not (first := state(algo))["trained"]:
        pass
    start, found = time.perf_counter(), list[dict[str, Any]]()
    while len(found) < len(marks):
        now = state(algo)
        seconds = time.perf_counter() - start
        if seconds >= marks[len(found)]:
            found.append({"seconds": seconds, **now, **{name: now[name] - first[name] for name in ("steps", "trained")}})
    return found


def main() -> None:
    """The command line."""
    given = json.loads(sys.argv[1])
    marks = given.pop("marks")
    cpus = max(os.cpu_count() or 1, given["n_actors"] + 2)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    algo = algorithm(**given)
    answer = {"points": points(algo, marks)}
    algo.stop()
    ray.shutdown()
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    print(json.dumps({**answer, "example": EXAMPLE, "versions": versions}), flush=True)


if __name__ == "__main__":
    main()
