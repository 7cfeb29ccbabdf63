"""What lets one formula run on tensors and on numpy arrays: the names that both have."""

from typing import Any

import torch as th

Array = Any
"""``torch.Tensor`` or ``numpy.ndarray``; a function takes and returns one kind."""


def namespace(array: Any) -> Any:
    """
    The module whose functions take ``array``, as the Python array API standard has it.

    :param array: a tensor, or an array of a library that follows the standard (numpy from 2.0)
    :return: ``torch``, or the array's own module
    """
    get_namespace = getattr(array, "__array_namespace__", None)
    return th if get_namespace is None else get_namespace()
