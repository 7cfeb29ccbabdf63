"""The worked example of docs/extending.md is an algorithm, and the hooks before a commit are the lint of .ci/run."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch as th
import yaml
from models import environment, small_model
from stable_baselines3 import A2C, TD3
from stable_baselines3.common.utils import polyak_update
from subjects import numbers
from torch.nn import functional as F

from sb3_ac_ext.signatures import arguments_of
from sb3_ac_ext.zoo.registry import AlgoSpec
from sb3_ac_ext.zoo.samplers import off_policy

CHECKOUT = Path(__file__).parent.parent
EXTENDING = (CHECKOUT / "docs" / "extending.md").read_text()
ATOL = 1e-5
"""Between a replay and the function itself, which round differently."""


def block(name: str) -> str:
    """The code of docs/extending.md that is marked by ``<!-- test: name -->``."""
    (code,) = re.findall(rf"<!-- test: {name} -->\n```\w+\n(.*?)```", EXTENDING, re.DOTALL)
    return code


def names_in(name: str, **given: Any) -> SimpleNamespace:
    """What a block of docs/extending.md defines, and what it was given."""
    names = {"__name__": name, **given}
    exec(compile(block(name), "docs/extending.md", "exec"), names)
    return SimpleNamespace(**names)


A2CX: Any = names_in("on-policy").A2CX
TD3BC: Any = names_in("module").TD3BC
SAMPLERS = names_in("sampler", **{**vars(off_policy), "optuna": optuna, "Any": Any})
ROW: AlgoSpec = eval(block("row"), {"AlgoSpec": AlgoSpec, "TD3BC": TD3BC, "off_policy": SAMPLERS})


class ByHand(TD3):
    """SB3's TD3 with the actor's loss of the paper, in the order of SB3's own updates."""

    alpha = 2.5

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        for _ in range(gradient_steps):
            self._n_updates += 1
            assert self.replay_buffer is not None
            batch = self.replay_buffer.sample(batch_size)
            with th.no_grad():
                noise = th.randn_like(batch.actions) * self.target_policy_noise
                noise = noise.clamp(-self.target_noise_clip, self.target_noise_clip)
                next_actions = (self.actor_target(batch.next_observations) + noise).clamp(-1, 1)
                q_a, q_b = self.critic_target(batch.next_observations, next_actions)
                target = batch.rewards + (1 - batch.dones) * self.gamma * th.minimum(q_a, q_b)
            q_a, q_b = self.critic(batch.observations, batch.actions)
            self.critic.optimizer.zero_grad()
            (F.mse_loss(q_a, target) + F.mse_loss(q_b, target)).backward()
            self.critic.optimizer.step()
            if self._n_updates % self.policy_delay:
                continue
            actions = self.actor(batch.observations)
            q = self.critic.q1_forward(batch.observations, actions)
            scale = self.alpha / q.abs().mean().item()
            self.actor.optimizer.zero_grad()
            (((actions - batch.actions) ** 2).mean() - scale * q.mean()).backward()
            self.actor.optimizer.step()
            polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
            polyak_update(self.actor.parameters(), self.actor_target.parameters(), self.tau)


@pytest.mark.parametrize("engine", [True, False])
def test_the_on_policy_example_is_sb3s_a2c(engine: bool) -> None:
    ours, theirs = (small_model(cls, **own).learn(200) for cls, own in ((A2CX, {"engine": engine}), (A2C, {})))
    th.testing.assert_close(ours.policy.state_dict(), theirs.policy.state_dict(), rtol=0, atol=ATOL)
    assert ours.engine_report().get("update", "ordinary") == ("replayed" if engine else "ordinary")


def test_the_example_is_recorded() -> None:
    model = small_model(TD3BC).learn(300)
    assert model._n_updates > 200
    assert model.engine_report() == eval(block("report"))
    assert {"train/critic_loss", "train/actor_loss", "train/critic_grad_norm"} <= model.logger.name_to_value.keys()


@pytest.mark.parametrize(("variant", "policy_delay"), [("mlp", 1), ("one critic", 2), ("images", 2)])
def test_the_engine_does_not_change_the_example(variant: str, policy_delay: int) -> None:
    steps = 25 if variant == "images" else 100
    recorded, plain = (
        small_model(TD3BC, variant, policy_delay=policy_delay, engine=engine).learn(steps) for engine in (True, False)
    )
    assert recorded.engine_report()["update(True)"] == "replayed"
    th.testing.assert_close(numbers(recorded), numbers(plain), rtol=0, atol=ATOL)


@pytest.mark.parametrize("alpha", [0.0, 2.5])
@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_the_example_is_what_the_paper_says(alpha: float, engine: bool) -> None:
    by_hand = small_model(ByHand)
    before = numbers(by_hand)
    by_hand.alpha = alpha
    by_hand.learn(100)
    ours = small_model(TD3BC, alpha=alpha, engine=engine).learn(100)
    th.testing.assert_close(numbers(ours), numbers(by_hand), rtol=0, atol=ATOL)
    assert (numbers(by_hand) - before).abs().max() > 100 * ATOL


def test_the_critics_of_the_example_are_sb3s() -> None:
    """Bit for bit, as long as the actor is not updated."""
    ours = small_model(TD3BC, policy_delay=1000, engine=False).learn(60)
    theirs = small_model(TD3, policy_delay=1000).learn(60)
    assert th.equal(numbers(ours), numbers(theirs))


@pytest.mark.parametrize(("engine", "atol"), [(True, ATOL), (False, 0.0)], ids=["engine on", "engine off"])
def test_the_example_goes_on_from_a_file(engine: bool, atol: float) -> None:
    model = small_model(TD3BC, alpha=1.5, engine=engine).learn(60)
    saved, file = numbers(model), io.BytesIO()
    model.save(file)
    model.train(20, 8)
    file.seek(0)
    loaded = TD3BC.load(file, env=environment(TD3BC), device="cpu")
    loaded.set_logger(model.logger)
    loaded.replay_buffer = model.replay_buffer
    assert loaded.alpha == 1.5
    assert th.equal(numbers(loaded), saved)
    loaded.train(20, 8)
    th.testing.assert_close(numbers(loaded), numbers(model), rtol=0, atol=atol)
    assert loaded.learn(20, reset_num_timesteps=False).num_timesteps == 80


def test_the_example_goes_on_from_a_file_of_sb3s() -> None:
    file = io.BytesIO()
    small_model(TD3).learn(30).save(file)
    file.seek(0)
    model = TD3BC.load(file, env=environment(TD3BC), device="cpu")
    assert model.alpha == 2.5
    assert model.learn(30, reset_num_timesteps=False)._n_updates > 30


def test_wrong_arguments_of_the_example_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha must be a number >= 0, got -1"):
        small_model(TD3BC, alpha=-1)
    with pytest.raises(TypeError, match="alpha"):
        small_model(TD3BC, alpha="2.5")
    with pytest.raises(TypeError, match="did you mean 'alpha'"):
        small_model(TD3BC, alhpa=2.5)


def test_the_examples_row_serves_the_zoo() -> None:
    assert ROW.name == "td3bc"
    arguments = yaml.safe_load(block("hyperparameters"))["default"]
    assert arguments.keys() - {"n_timesteps", "noise_type", "noise_std"} <= arguments_of(TD3BC).keys()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        sampled = ROW.sample(trial, 2, 1, {"using_her_replay_buffer": False, "her_kwargs": {}})
        assert small_model(TD3BC, **{**sampled, "policy_kwargs": {}}).alpha == trial.params["alpha"]
        assert ROW.convert(trial.params)["alpha"] == trial.params["alpha"]


def test_hooks_before_a_commit_are_the_lint_of_the_ci() -> None:
    repositories = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook for repository in repositories for hook in repository["hooks"]]
    lint = re.findall(r'^run "([^"$]+)" \.$', (CHECKOUT / ".ci" / "run").read_text(), re.MULTILINE)
    assert [hook["entry"] for hook in hooks] == lint == ["ruff check", "ruff format --check", "mypy"]
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in hooks)
