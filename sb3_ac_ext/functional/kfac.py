"""
Kronecker-factored curvature (Martens and Grosse 2015, arXiv:1503.05671; convolutions: Grosse and Martens 2016,
arXiv:1602.01407; actor-critic: Wu et al. 2017, arXiv:1708.05144).

A layer has one matrix of parameters ``W`` ``(O, I)``, its bias being the last column, whose input has a last component 1.
Its block of the Fisher matrix is the Kronecker product of an input factor ``A`` ``(I, I)`` and an output factor ``S``
``(O, O)``, in the order of the columns of ``W`` one after another:

    F = A (x) S,  F vec(D) = vec(S D A),  F^-1 vec(G) = vec(S^-1 G A^-1)

N samples; T positions at which the layer is applied, 1 for a linear layer; I inputs, the 1 included; O outputs.
"""

from collections.abc import Sequence

import torch as th
from torch.nn import functional as F


def patches(
    images: th.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> th.Tensor:
    """
    What a convolution sees at each position, in the order of its weights: channel, row, column.

    :param images: ``(N, C, H, W)``
    :param kernel_size: of the convolution, rows and columns
    :param stride: of the convolution
    :param padding: of the convolution, with zeros
    :param dilation: of the convolution
    :return: ``(N, T, C * rows * columns)``
    """
    columns = F.unfold(images, tuple(kernel_size), tuple(dilation), tuple(padding), tuple(stride))
    return columns.transpose(1, 2)


def with_one(inputs: th.Tensor) -> th.Tensor:
    """
    :param inputs: ``(..., I - 1)``
    :return: ``(..., I)`` with the input of the bias, 1, as the last component
    """
    return F.pad(inputs, (0, 1), value=1.0)


def input_factor(inputs: th.Tensor) -> th.Tensor:
    """
    A = 1/N sum_n sum_t a_nt a_nt^T, the sum over positions where S has the mean (Grosse and Martens 2016, theorem 1).

    :param inputs: ``(N, T, I)`` a, the 1 for the bias included if there is one
    :return: ``(I, I)``
    """
    rows = inputs.flatten(0, 1)
    return rows.t() @ rows / len(inputs)


def output_factor(gradients: th.Tensor) -> th.Tensor:
    """
    S = 1/(N T) sum_n sum_t g_nt g_nt^T (Grosse and Martens 2016, theorem 1).

    :param gradients: ``(N, T, O)`` g, the derivative of sample n's own log-likelihood by the layer's output at position t;
        the likelihood is that of an output drawn from the model
    :return: ``(O, O)``
    """
    rows = gradients.flatten(0, 1)
    return rows.t() @ rows / len(rows)


def moving_average(average: th.Tensor | None, value: th.Tensor, decay: float) -> th.Tensor:
    """
    decay * average + (1 - decay) * value, which starts at the first value instead of at 0.

    :param average: so far, changed in place; None at the first value
    :param value: a new value of its shape
    :param decay: in [0, 1)
    :return: the average
    """
    return value if average is None else average.lerp_(value, 1 - decay)


def trace_ratio(a: th.Tensor, s: th.Tensor) -> th.Tensor:
    """
    pi = sqrt((tr A / I) / (tr S / O)), how damping is shared out between the factors (Martens and Grosse 2015, sec. 6.3).

    :param a: ``(I, I)`` input factor
    :param s: ``(O, O)`` output factor
    :return: ``()`` pi; 1 where a trace is 0
    """
    mean_a, mean_s = a.diagonal().mean(), s.diagonal().mean()
    return th.where((mean_a > 0) & (mean_s > 0), mean_a / mean_s, 1.0).sqrt()


def cholesky_inverses(a: th.Tensor, s: th.Tensor, damping: float) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Inverses of A + pi sqrt(lambda) I and S + sqrt(lambda) / pi I, whose product is close to F + lambda I.

    :param a: ``(I, I)`` input factor
    :param s: ``(O, O)`` output factor
    :param damping: lambda, >= 0
    :return: both inverses, and ``()`` whether both matrices were positive definite and the inverses are any good
    """
    pi, root = trace_ratio(a, s), damping**0.5
    inverses, good = [], []
    for factor, share in ((a, pi * root), (s, root / pi)):
        damped = factor + share * th.eye(len(factor), dtype=factor.dtype, device=factor.device)
        lower, info = th.linalg.cholesky_ex(damped)
        inverses.append(th.cholesky_inverse(lower))
        good.append((info == 0) & inverses[-1].isfinite().all())
    return inverses[0], inverses[1], good[0] & good[1]


def eigenbasis(factor: th.Tensor, shift: float = 0.0) -> tuple[th.Tensor, th.Tensor]:
    """
    :param factor: ``(D, D)`` A or S
    :param shift: what is added to its diagonal, >= 0
    :return: ``(D,)`` eigenvalues, those below 0 by rounding as 0, and ``(D, D)`` the eigenvectors in the columns
    :raises torch.linalg.LinAlgError: if the decomposition does not converge
    """
    if shift:
        factor = factor + shift * th.eye(len(factor), dtype=factor.dtype, device=factor.device)
    values, vectors = th.linalg.eigh(factor)
    return values.clamp(min=0), vectors


def precondition(gradient: th.Tensor, a_inverse: th.Tensor, s_inverse: th.Tensor) -> th.Tensor:
    """
    D = S^-1 G A^-1.

    :param gradient: ``(O, I)`` G
    :param a_inverse: ``(I, I)``
    :param s_inverse: ``(O, O)``
    :return: ``(O, I)`` D
    """
    return s_inverse @ gradient @ a_inverse


def precondition_eigen(
    gradient: th.Tensor,
    a_basis: tuple[th.Tensor, th.Tensor],
    s_basis: tuple[th.Tensor, th.Tensor],
    damping: th.Tensor | float,
) -> th.Tensor:
    """
    D = (F + lambda I)^-1 G exactly: U_S [(U_S^T G U_A) / (s_i a_j + lambda)] U_A^T.

    :param gradient: ``(O, I)`` G
    :param a_basis: eigenvalues and eigenvectors of A
    :param s_basis: eigenvalues and eigenvectors of S
    :param damping: lambda, ``()`` or a number, > 0 where F is singular
    :return: ``(O, I)`` D
    """
    (a, u_a), (s, u_s) = a_basis, s_basis
    return u_s @ ((u_s.t() @ gradient @ u_a) / (th.outer(s, a) + damping)) @ u_a.t()


def quadratic_form(step: th.Tensor, a: th.Tensor, s: th.Tensor) -> th.Tensor:
    """
    D^T F D. Half of it is the KL divergence that a step D makes, to second order.

    :param step: ``(O, I)`` D
    :param a: ``(I, I)`` input factor
    :param s: ``(O, O)`` output factor
    :return: ``()``
    """
    return th.dot((s @ step).flatten(), (step @ a).flatten())


def step_size(quadratic: th.Tensor, max_step: th.Tensor | float, max_kl: float) -> th.Tensor:
    """
    eta = min(eta_max, sqrt(2 delta / D^T (F + lambda I) D)), so that the predicted divergence eta^2 / 2 D^T F D is at most
    delta, and less by the damping's share.

    The 2 belongs to this definition of delta; programs that bound eta^2 D^T F D state 2 delta.

    :param quadratic: ``()`` D^T (F + lambda I) D
    :param max_step: eta_max, ``()`` or a number, >= 0
    :param max_kl: delta in nats, > 0
    :return: ``()`` eta
    """
    bound = (2 * max_kl / quadratic.clamp(min=0)).sqrt()
    return th.clamp(bound, max=max_step)


def adapted_step_scale(scale: float, kl: float, target: float) -> float:
    """
    The factor on eta_max of the next step, by the divergence that this one made, as in the authors' program for continuous
    control.

        scale / 1.5 if d > 2 d_targ;  1.5 scale if d < d_targ / 2;  scale otherwise

    :param scale: of the step that was made, > 0
    :param kl: d, mean KL(pi_old || pi), in nats
    :param target: d_targ, in nats, > 0
    :return: the new factor, in [1e-6, 1]
    """
    if kl > 2 * target:
        scale = scale / 1.5
    elif kl < target / 2:
        scale = scale * 1.5
    return min(max(scale, 1e-6), 1.0)
