"""Statistics of several tasks that are learned at once, each in some of the environments."""

from collections import Counter, deque

import numpy as np
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from sb3_ac_ext.actors.environments import kinds
from sb3_ac_ext.buffers.segments import Result

LONGEST = 20
"""Letters of a name that SB3's table on the console has room for."""


class Tasks:
    """
    Steps and episodes by tasks.

    :param window: episodes of each that are averaged
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.steps = Counter[str]()
        self.episodes: dict[str, deque[tuple[float, int]]] = {}

    def count(self, result: Result, names: list[str]) -> None:
        """
        :param result: of N environments
        :param names: of the tasks of environments whose infos say none
        """
        for infos in result.infos:
            for name, info in zip(names, infos, strict=True):
                task = str(info.get("task", name))
                self.steps[task] += 1
                if "episode" in info:
                    episodes = self.episodes.setdefault(task, deque(maxlen=self.window))
                    episodes.append((info["episode"]["r"], info["episode"]["l"]))

    def record(self, logger: Logger) -> None:
        """
        Means of return and length, and the share of all steps, if there are several tasks.

        :param logger: gets them
        """
        if len(self.steps) < 2:
            return
        for task, steps in sorted(self.steps.items()):
            values = {"share": steps / self.steps.total()}
            if task in self.episodes:
                values["ep_rew_mean"], values["ep_len_mean"] = np.mean(self.episodes[task], axis=0)
            for name, value in values.items():  # the console refuses names that are the same in what it has room for
                logger.record(f"tasks/{task}/{name}", value, exclude="stdout" if len(task) > LONGEST else None)


def task_names(venv: VecEnv) -> list[str]:
    """
    :param venv: the training environment
    :return: of each environment its id, or its class where it has none, or the class of all of them where nobody knows
    """
    base = venv.unwrapped
    found = [names[-1] for names in kinds(base) if names]
    return found if len(found) == venv.num_envs else [type(base).__name__] * venv.num_envs
