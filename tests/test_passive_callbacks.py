"""Which callbacks are known to leave a model alone."""

from typing import Any

import pytest
from environments import BOX, CONTINUOUS, RandomEnv
from rl_zoo3.callbacks import ParallelTrainCallback, SaveVecNormalizeCallback
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    ProgressBarCallback,
    StopTrainingOnRewardThreshold,
)

from sb3_ac_ext.legacy.participants import is_passive


def evaluation(**kwargs: Any) -> EvalCallback:
    return EvalCallback(RandomEnv(BOX, CONTINUOUS), n_eval_episodes=1, eval_freq=20, verbose=0, warn=False, **kwargs)


@pytest.mark.parametrize(
    ("callback", "passive"),
    [
        (None, True),
        ([], True),
        (evaluation(), True),
        ([evaluation(), CallbackList([ProgressBarCallback(), CheckpointCallback(10, "folder")])], True),
        (evaluation(callback_on_new_best=StopTrainingOnRewardThreshold(1.0)), True),
        (evaluation(callback_on_new_best=SaveVecNormalizeCallback(10, "folder")), True),
        (lambda local, _: True, False),
        ([None, lambda local, _: True], False),
        (type("Own", (EvalCallback,), {"__module__": "own"})(RandomEnv(BOX, CONTINUOUS)), False),
        (ParallelTrainCallback(), False),
    ],
)
def test_which_callbacks_are_passive(callback: Any, passive: bool) -> None:
    assert is_passive(callback) is passive


def test_a_callback_with_a_replaced_method_may_do_anything() -> None:
    callback = evaluation()
    callback._on_step = lambda: True  # type: ignore[method-assign]  # which is the point
    assert not is_passive(callback)
