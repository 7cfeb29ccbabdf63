"""
Distributional critics: return distributions on fixed atoms, and mixtures of Gaussians. B is the batch size, N the number of
atoms, K that of a mixture's components, M that of samples.

The atoms z_1 < ... < z_N lie at equal distances from v_min = z_1 to v_max = z_N.
"""

import math

import torch as th


def projection(probs: th.Tensor, atoms: th.Tensor, reward: th.Tensor, discount: th.Tensor) -> th.Tensor:
    """
    The distribution of r + D Z on the atoms of Z (Bellemare et al. 2017, arXiv:1707.06887, eq. 7).

        m_j = sum_i p_i max(0, 1 - |clip(r + D z_i, v_min, v_max) - z_j| / dz)

    Its mean is r + D E[Z] where nothing is clipped.

    :param probs: ``(B, N)`` p, summing to 1 in each row
    :param atoms: ``(N,)`` z, in reward units; at least 2
    :param reward: ``(B, 1)`` r, or the discounted sum of several, in reward units
    :param discount: ``(B, 1)`` D, gamma to the number of summed rewards; 0 where the episode terminated
    :return: ``(B, N)`` m, summing to 1 in each row; NaN where r or D is
    """
    last = len(atoms) - 1
    position = (reward + discount * atoms - atoms[0]) * (last / (atoms[-1] - atoms[0]))  # in distances between atoms
    position = position.clamp(0, last)
    below = position.floor()
    share = position - below  # of the atom above; 0 on an atom, so that all goes to it
    lower = below.long().clamp(0, last)  # NaN is no atom's number
    masses = th.zeros_like(probs).scatter_add_(1, lower, probs * (1 - share))
    return masses.scatter_add_(1, (lower + 1).clamp(max=last), probs * share)


def cross_entropy(logits: th.Tensor, target: th.Tensor) -> th.Tensor:
    """
    The loss of a critic with atoms (Bellemare et al. 2017, arXiv:1707.06887, algorithm 1).

        H(m, p) = -sum_j m_j log p_j,  p = softmax(logits)

    Where p = m it is the entropy of m, not 0.

    :param logits: ``(B, N)``
    :param target: ``(B, N)`` m, probabilities
    :return: ``(B, 1)`` in nats
    """
    return -(target * logits.log_softmax(dim=1)).sum(dim=1, keepdim=True)


def entropy(probs: th.Tensor) -> th.Tensor:
    """
    What `cross_entropy` cannot fall below; their difference is KL(m || p).

        H(m) = -sum_j m_j log m_j,  0 log 0 = 0

    :param probs: ``(B, N)`` m
    :return: ``(B, 1)`` in nats
    """
    return -th.xlogy(probs, probs).sum(dim=1, keepdim=True)


def expected_value(logits: th.Tensor, atoms: th.Tensor) -> th.Tensor:
    """
    Q = sum_j z_j softmax(logits)_j

    :param logits: ``(B, N)``
    :param atoms: ``(N,)`` z, in reward units
    :return: ``(B, 1)`` in reward units
    """
    return (logits.softmax(dim=1) * atoms).sum(dim=1, keepdim=True)


def mixture_loss(logits: th.Tensor, means: th.Tensor, stds: th.Tensor, samples: th.Tensor) -> th.Tensor:
    """
    Negative log-likelihood of samples of the target, the loss of D4PG's critic with a mixture (Barth-Maron et al. 2018,
    arXiv:1804.08617).

        -mean_m log sum_k w_k N(y_m; mu_k, sigma_k^2),  w = softmax(logits)

    It has no lower bound where all samples are equal, as behind a terminated episode, unless ``stds`` has one.

    :param logits: ``(B, K)`` of the components' weights
    :param means: ``(B, K)`` mu, in reward units
    :param stds: ``(B, K)`` sigma, in reward units, > 0
    :param samples: ``(B, M)`` y, in reward units
    :return: ``(B, 1)`` in nats
    """
    distances = (samples[:, :, None] - means[:, None]) / stds[:, None]  # (B, M, K)
    log_densities = -0.5 * distances.square() - (stds.log() + 0.5 * math.log(2 * math.pi))[:, None]
    return -(logits.log_softmax(dim=1)[:, None] + log_densities).logsumexp(dim=2).mean(dim=1, keepdim=True)


def mixture_mean(logits: th.Tensor, means: th.Tensor) -> th.Tensor:
    """
    Q = sum_k w_k mu_k,  w = softmax(logits)

    :param logits: ``(B, K)`` of the components' weights
    :param means: ``(B, K)`` mu, in reward units
    :return: ``(B, 1)`` in reward units
    """
    return (logits.softmax(dim=1) * means).sum(dim=1, keepdim=True)


def mixture_samples(
    logits: th.Tensor, means: th.Tensor, stds: th.Tensor, choice_noise: th.Tensor, noise: th.Tensor
) -> th.Tensor:
    """
    z_m = mu_k + sigma_k noise_m,  k = argmax_k (logits_k + choice_noise_mk), so component k with probability w_k

    :param logits: ``(B, K)`` of the components' weights
    :param means: ``(B, K)`` mu, in reward units
    :param stds: ``(B, K)`` sigma, in reward units
    :param choice_noise: ``(B, M, K)`` standard Gumbel draws
    :param noise: ``(B, M)`` standard normal draws
    :return: ``(B, M)`` in reward units
    """
    component = (logits[:, None] + choice_noise).argmax(dim=2)  # (B, M)
    return means.gather(1, component) + stds.gather(1, component) * noise


def clipped_to_norm(gradient: th.Tensor, largest: float) -> th.Tensor:
    """
    The gradient of each sample's value by its action, made no longer than a bound (Acme's D4PG, ``dqda_clipping``).

        g / max(1, ||g||_2 / c)

    :param gradient: ``(B, A)`` g = dQ/da, in reward units per unit of the action
    :param largest: c, > 0
    :return: ``(B, A)``
    """
    norm: th.Tensor = th.linalg.vector_norm(gradient, dim=1, keepdim=True)
    return gradient / (norm / largest).clamp(min=1)
