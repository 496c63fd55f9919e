"""Signals: streams of several GPUs wait for each other without a kernel, by the memory operations of CUDA's streams (CUDA 12.0).

torch's barrier of symmetric memory is a kernel of one warp. It holds a multiprocessor until the last rank is there, and an
attention that begins meanwhile, whose kernel takes all of them for its whole duration, ends as late as the part that found no
room: 49 ms in place of 41 (four H200s, ring, 32768 tokens a rank).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_*_VALUE_32
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ, of numbers that may wrap round
_CAN_USE = 122  # CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS: 92 tells of an older interface
_WORD = 4  # bytes


class _Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams: one memory operation of a stream."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("alias", ctypes.c_uint64),
        ("unused", ctypes.c_uint64),
    )


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """Return CUDA's driver where it has memory operations, which all streams take."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuStreamBatchMemOp_v2.argtypes = [
            ctypes.c_void_p,
            ctypes.c_uint,
            ctypes.POINTER(_Operation),
            ctypes.c_uint,
        ]
    except (OSError, AttributeError):
        return None
    return driver


def can_signal(device: torch.device) -> bool:
    """Tell whether streams of a GPU can wait for each other without a kernel; it is the same for all GPUs of a host."""
    driver, found, handle = _driver(), ctypes.c_int(0), ctypes.c_int(0)
    if driver is None or driver.cuDeviceGet(ctypes.byref(handle), device.index):
        return False
    return not driver.cuDeviceGetAttribute(ctypes.byref(found), _CAN_USE, handle) and bool(found.value)


class Signals:
    """A meeting of one stream of each rank, any number of times."""

    def __init__(self, addresses: Sequence[int], rank: int, device: torch.device) -> None:
        """Take memory in which each rank has a word of every rank, 0 so far.

        Args:
            addresses: of the words of each rank, which this GPU can write.
            rank: this one.
        """
        others = [other for other in range(len(addresses)) if other != rank]
        writes = [_Operation(_WRITE, addresses[other] + _WORD * rank) for other in others]
        waits = [_Operation(_WAIT, addresses[rank] + _WORD * other, 0, _AT_LEAST) for other in others]
        self._operations = (_Operation * (2 * len(others)))(*writes, *waits)
        self._device, self._number = device.index, 0

    def meet(self) -> None:
        """Make the current stream wait until those of all ranks have come as far.

        Raises:
            RuntimeError: CUDA refused, with its number.
        """
        self._number = (self._number + 1) % 2**32
        for operation in self._operations:
            operation.value = self._number
        driver, stream = _driver(), torch.cuda.current_stream(self._device)
        assert driver is not None
        error = driver.cuStreamBatchMemOp_v2(stream.cuda_stream, len(self._operations), self._operations, 0)
        if error:
            raise RuntimeError(f"CUDA's cuStreamBatchMemOp failed with error {error}")
