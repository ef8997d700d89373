"""How tensors lie in memory, as far as a matmul cares."""

from torch import Tensor

_MOST = 256  # bytes; the most that any backend asks about


def adjacent(x: Tensor) -> bool:
    """Whether the rows [..., K] of all batches lie one stride apart, so that they are the rows of one matrix."""
    return all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] or x.shape[i] == 1 for i in range(x.ndim - 2))


def alignment(*tensors: Tensor | None) -> int:
    """Bytes, a power of two, of which every address and every stride between rows or batches is a multiple."""
    least = _MOST
    for tensor in tensors:
        if tensor is not None:
            strides = (tensor.element_size() * each for each in tensor.stride()[:-1])
            least = min([least, *(each & -each for each in (tensor.data_ptr(), *strides) if each)])
    return least


def neighbours(a: Tensor, b: Tensor) -> bool:
    """Whether b follows a in memory, so that both are parts of one tensor, split along its first dimension."""
    together = a.data_ptr() + a.shape[0] * a.stride(0) * a.element_size() == b.data_ptr()
    return together and a.stride() == b.stride() and a.shape[1:] == b.shape[1:] and a.dtype == b.dtype
