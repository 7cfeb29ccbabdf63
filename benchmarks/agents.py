"""
What MADDPG costs with 2, 4, 8, 16 agents, on MPESimpleSpread-v3 with the settings of ``hyperparams/maddpg.yml``.

    python benchmarks/agents.py                          # 1 and 2 threads
    python benchmarks/agents.py --name agents_agilerl --threads 1 --agents 3 --agilerl agilerl/bin/python

Takes the best of several blocks of gradient steps and of ``learn()`` (an update every 100 steps), with the engine on and off,
with central critics and without. ``--agilerl`` names the interpreter of an environment with AgileRL and mpe2 (``pip install
agilerl peft mpe2``), whose MADDPG then does the same number of environment steps and updates. Writes
``benchmarks/results/<name>.json`` unless another job keeps the machine busy.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BUSY = 0.6
"""Load average above which nothing is recorded."""
SETTINGS: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [64, 64]},
    "learning_rate": 1e-2,
    "gamma": 0.95,
    "tau": 0.01,
    "batch_size": 1024,
    "train_freq": 100,
    "gradient_steps": 1,
    "max_grad_norm": 0.5,
    "logit_penalty": 1e-3,
}
PACKAGES = ("torch", "stable_baselines3", "mpe2", "pettingzoo", "numpy", "sb3_ac_ext")
VARIANTS: dict[str, dict[str, Any]] = {
    "central critics": {},
    "central critics, engine off": {"engine": False},
    "independent": {"centralised": False},
}


def measure(n_agents: int, options: dict[str, Any], blocks: int) -> dict[str, float]:
    """
    :param n_agents: of the task
    :param options: arguments besides `SETTINGS`
    :param blocks: how often each is timed; the best counts
    :return: milliseconds of a gradient step, environment steps per second of ``learn()``
    """
    import gymnasium as gym

    from sb3_ac_ext import MADDPG

    env = gym.make("MPESimpleSpread-v3", N=n_agents)
    model = MADDPG("MlpPolicy", env, seed=0, device="cpu", learning_starts=2000, **SETTINGS, **options)
    model.learn(2100)
    updates, steps = [], []
    for _ in range(blocks):
        started = time.perf_counter()
        model.train(gradient_steps=10, batch_size=SETTINGS["batch_size"])
        updates.append((time.perf_counter() - started) / 10)
        started = time.perf_counter()
        model.learn(1000, reset_num_timesteps=False)
        steps.append((time.perf_counter() - started) / 1000)
    return {"gradient step [ms]": 1e3 * min(updates), "steps per second": 1 / min(steps)}


AGILERL = """
import json, sys, time
import numpy as np, torch
from agilerl.algorithms import MADDPG
from agilerl.components.data import MultiAgentTransition
from agilerl.components.replay_buffer import ReplayBuffer
from agilerl.training.train_multi_agent_off_policy import transition_to_tensordict
from mpe2 import simple_spread_v3

n_agents, threads, blocks = map(int, sys.argv[1:])
torch.set_num_threads(threads)
env = simple_spread_v3.parallel_env(N=n_agents)
names = env.possible_agents
net = {"encoder_config": {"hidden_size": [64]}, "head_config": {"hidden_size": [64]}}
agent = MADDPG(
    observation_spaces=[env.observation_space(a) for a in names], action_spaces=[env.action_space(a) for a in names],
    agent_ids=names, net_config=net, batch_size=1024, lr_actor=1e-2, lr_critic=1e-2, learn_step=100, gamma=0.95, tau=0.01,
    device="cpu",
)
memory = ReplayBuffer(max_size=100000, device="cpu")

def batched(values):
    return {a: np.asarray(values[a])[None] for a in names}

obs, info = env.reset(seed=0)

def play(steps, learn):
    global obs, info
    for step in range(steps):
        action, raw = agent.get_action(obs=batched(obs), infos=info)
        next_obs, reward, terminated, _, info = env.step({a: int(np.ravel(v)[0]) for a, v in action.items()})
        fields = {"obs": obs, "reward": reward, "next_obs": next_obs, "done": terminated}
        row = MultiAgentTransition(action=raw, **{name: batched(values) for name, values in fields.items()})
        row = transition_to_tensordict(row)
        row.batch_size = torch.Size([1])
        memory.add(row)
        obs = next_obs
        if learn and step % 100 == 99:
            agent.learn(memory.sample(1024))
        if not env.agents:
            obs, info = env.reset()

play(2100, False)
best = {"gradient step [ms]": 1e9, "steps per second": 0.0}
for _ in range(blocks):
    started = time.perf_counter()
    for _ in range(10):
        agent.learn(memory.sample(1024))
    best["gradient step [ms]"] = min(best["gradient step [ms]"], 100 * (time.perf_counter() - started))
    started = time.perf_counter()
    play(1000, True)
    best["steps per second"] = max(best["steps per second"], 1000 / (time.perf_counter() - started))
print(json.dumps(best))
"""


def in_a_process(interpreter: str, *arguments: object) -> dict[str, Any]:
    """
    :param interpreter: of the process
    :param arguments: of the interpreter; the last line that it prints is JSON
    :return: what it printed
    """
    threads = {"OMP_NUM_THREADS": str(arguments[-2])}
    done = subprocess.run(
        [interpreter, *map(str, arguments)], check=True, capture_output=True, text=True, env={**os.environ, **threads}
    )
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def main() -> None:
    """The command line; ``--one`` is how the script calls itself, once for each line of the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--name", default="agents", help="of the file in benchmarks/results")
    parser.add_argument("--agents", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--agilerl", help="interpreter of an environment that has AgileRL and mpe2")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        variant, n_agents, threads, blocks = args.one
        import torch

        torch.set_num_threads(int(threads))
        print(json.dumps(measure(int(n_agents), VARIANTS[variant], int(blocks))))
        return
    busy = os.getloadavg()[0]
    rows = []
    for threads in args.threads:
        for n_agents in args.agents:
            sources = {name: (sys.executable, __file__, "--one", name) for name in VARIANTS}
            if args.agilerl:
                sources["AgileRL"] = (args.agilerl, "-c", AGILERL)
            for name, command in sources.items():
                row = in_a_process(*command, n_agents, threads, args.blocks)
                rows.append({"threads": threads, "agents": n_agents, "variant": name, **row})
                print(
                    ", ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in rows[-1].values()),
                    flush=True,
                )
    if busy > BUSY:
        print(f"not recorded: the load average was {busy} at the start")
        return
    result = {
        "settings": SETTINGS,
        "rows": rows,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
