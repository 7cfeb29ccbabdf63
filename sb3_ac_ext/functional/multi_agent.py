"""What losses over several agents are made of. B is the batch size, N the number of agents, A the size of the joint action."""

import torch as th


def replace_agent_action(mask: th.Tensor, actions: th.Tensor, others: th.Tensor) -> th.Tensor:
    """
    For each agent the joint action in which it alone acts by ``actions``, and the others as they did.

    Agent i's gradient reaches its own columns of ``actions`` and no other (Lowe et al. 2017, arXiv:1706.02275, eq. 6).

    :param mask: ``(N, 1, A)`` whether a column of the joint action is the agent's
    :param actions: ``(B, A)`` joint action of the present policies, with gradient
    :param others: ``(B, A)`` joint action of the replay buffer
    :return: ``(N, B, A)``
    """
    return th.where(mask, actions, others)


def active_mean(values: th.Tensor, active: th.Tensor) -> th.Tensor:
    """
    Each agent's mean over the transitions that it took part in; 0 if there is none.

    :param values: ``(B, N)``
    :param active: ``(B, N)`` 1 where the agent acted, 0 where its episode was over already
    :return: ``(N,)``
    """
    return (values * active).sum(dim=0) / active.sum(dim=0).clamp(min=1)
