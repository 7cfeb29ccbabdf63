"""TD3X: the critic's update of Algorithm 1; that all is as in SB3's TD3 is in test_off_policy and the contracts."""

import pytest
import torch as th
from batches import SGD, batches, engine_on_and_off, feed, flat
from models import small_model


@engine_on_and_off
def test_critic_update_by_hand(engine: bool) -> None:
    """Target networks, the smaller stream, clipped noise, termination: each is needed to get this loss."""
    smoothing = {"target_policy_noise": 0.4, "target_noise_clip": 0.3, "policy_delay": 2}
    model = small_model("td3x", policy_kwargs=SGD, learning_rate=1.0, gamma=0.9, engine=engine, **smoothing)
    for network in (model.actor, model.critic):  # online and target networks differ
        for parameter in network.parameters():
            parameter.data.add_(0.1)
    batch = batches(1, rows=64)[0]
    feed(model, [batch])

    th.manual_seed(5)
    noise = th.empty(64, 2).normal_(0, 0.4)
    assert noise.abs().max() > 0.3
    action = (model.actor_target.mu(batch.next_observations) + noise.clip(-0.3, 0.3)).clip(-1, 1)
    inputs = th.cat([batch.next_observations, action], dim=1)
    q_a, q_b = model.critic_target.qf0(inputs), model.critic_target.qf1(inputs)
    target = (batch.rewards + 0.9 * (1 - batch.dones) * th.where(q_a < q_b, q_a, q_b)).detach()
    inputs = th.cat([batch.observations, batch.actions], dim=1)
    expected = ((model.critic.qf0(inputs) - target) ** 2 + (model.critic.qf1(inputs) - target) ** 2).mean()
    gradients = th.autograd.grad(expected, list(model.critic.parameters()))

    others = (model.actor, model.actor_target, model.critic_target)
    before, others_before = flat(model.critic), [*map(flat, others)]
    th.manual_seed(5)
    model.train(gradient_steps=1, batch_size=64)
    assert model.logger.name_to_value["train/critic_loss"] == pytest.approx(expected.item(), rel=1e-5)
    step = -th.cat([gradient.flatten() for gradient in gradients])
    th.testing.assert_close(flat(model.critic) - before, step, rtol=1e-4, atol=1e-6)
    assert all(map(th.equal, map(flat, others), others_before))
    assert all(parameter.grad is None for network in others for parameter in network.parameters())
