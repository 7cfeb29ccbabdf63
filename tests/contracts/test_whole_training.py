"""Trainings of hundreds of replayed updates, in float64, beside SB3's."""

from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.logger import Logger

from sb3_ac_ext import DDPGX, PPOX, SACX, TD3X

pytestmark = pytest.mark.usefixtures("double_precision")
DISCOUNT = 0.984375
"""One that float32, in which batches are stored, has too."""
THREE = {"policy_kwargs": {"net_arch": [16], "n_critics": 3}}


@pytest.mark.parametrize(
    ("ours", "theirs", "kwargs"),
    [
        (TD3X, TD3, {}),
        (DDPGX, DDPG, {}),
        (SACX, SAC, {}),
        *(  # whose single updates are compared elsewhere
            pytest.param(SACX, SAC, kwargs, marks=pytest.mark.slow)
            for kwargs in (THREE, {"use_sde": True, "train_freq": 8, "gradient_steps": 8})
        ),
    ],
    ids=["td3x", "ddpgx", "sacx", "sacx with three critics", "sacx with gsde"],
)
def test_whole_training_is_sb3s(ours: Any, theirs: Any, kwargs: dict[str, Any]) -> None:
    """
    On what the policies themselves experienced; the buffer goes round once.

    Rounding errors of 1e-16 grow, in training as in the environment, but not to 1e-9 by then.
    """
    shared = {"seed": 0, "learning_starts": 100, "batch_size": 16, "buffer_size": 500, "gamma": DISCOUNT}
    shared |= {"policy_kwargs": {"net_arch": [16]}, **kwargs}
    models = []
    for cls in (theirs, ours):
        model = cls("MlpPolicy", "Pendulum-v1", **{**shared, "policy_kwargs": dict(shared["policy_kwargs"])})
        model.set_logger(Logger(None, []))
        model.policy.double()
        if getattr(model, "log_ent_coef", None) is not None:
            model.log_ent_coef.data = model.log_ent_coef.data.double()
        models.append(model.learn(700))
    report = models[1].engine_report()
    assert all(state == "replayed" for name, state in report.items() if name.startswith("update"))
    np.testing.assert_allclose(models[1].replay_buffer.actions, models[0].replay_buffer.actions, rtol=0, atol=1e-6)
    assert_parameters_are(*models, 1e-9)


@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True}, {"target_kl": 1e-3}], ids=["ppox", "with gsde", "with early stops"])
def test_whole_training_on_rollouts_is_sb3s(kwargs: dict[str, Any]) -> None:
    """Advantages are in float32, and theirs are summed in another order."""
    shared = {"seed": 0, "n_steps": 100, "batch_size": 20, "gamma": DISCOUNT, "gae_lambda": DISCOUNT, **kwargs}
    models: list[Any] = []
    for cls in (PPO, PPOX):
        model = cls("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [16]}, **shared)
        model.set_logger(Logger(None, []))
        model.policy.double()
        models.append(model.learn(700))
    assert set(models[1].engine_report().values()) == {"replayed"}
    assert models[1]._n_updates == models[0]._n_updates
    assert (models[1]._n_updates < 70) == ("target_kl" in kwargs)
    assert_parameters_are(*models, 1e-7)


def assert_parameters_are(theirs: Any, ours: Any, atol: float) -> None:
    pairs = zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True)
    assert max(float((own.detach() - expected.detach()).abs().max()) for own, expected in pairs) <= atol
    assert all(parameter.dtype == th.float64 for parameter in ours.policy.parameters())
