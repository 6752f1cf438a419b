"""Arrays in Flower's records: by reference within one machine, as bytes over a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

from fedcl.contracts.fields import shown

FLAT = "flat"


class LiveArray(Array):
    """A Flower array that holds a numpy array and turns it into bytes only when somebody reads ``data``.

    Inside one machine arrays then travel by reference or zero-copy; on a network they serialise as any other does.
    """

    def __init__(self, ndarray: NDArray[Any]) -> None:
        self.__dict__.update(
            dtype=str(ndarray.dtype), shape=tuple(ndarray.shape), stype="numpy.ndarray", _live=ndarray, _is_dirty=True
        )

    @property
    def data(self) -> bytes:
        """Bytes of the array in numpy's own format, without pickle."""
        if "_bytes" not in self.__dict__:
            self.__dict__["_bytes"] = Array.from_numpy_ndarray(self.__dict__["_live"]).data
        return cast(bytes, self.__dict__["_bytes"])

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["_bytes"] = value

    def numpy(self) -> NDArray[Any]:
        """Return a copy, as the base class does: what others do to it stays with them."""
        return cast(NDArray[Any], self.__dict__["_live"].copy())

    def view(self) -> NDArray[Any]:
        """Return the array itself, which may be shared memory: read, never write."""
        return cast(NDArray[Any], self.__dict__["_live"])

    def __reduce__(self) -> tuple[Any, ...]:
        return (_live_array, (self.view(),))


# Flower writes the class's name into a header when it ships an array; the other side knows only "Array". By that name
# pickle would not find the class, and cloudpickle would ship its code: both are given a function instead.
LiveArray.__qualname__ = "Array"


def _live_array(ndarray: NDArray[Any]) -> LiveArray:
    return LiveArray(ndarray)


def vector_record(vector: Tensor, *, live: bool) -> ArrayRecord:
    """Wrap a flat vector as the ``arrays`` record; ``live`` avoids serialising it."""
    return tensors_record({FLAT: vector}, live=live)


def tensors_record(tensors: Mapping[str, Tensor], *, live: bool) -> ArrayRecord:
    """Wrap named tensors as an array record."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        ndarray = tensor.detach().cpu().contiguous().numpy()
        record[name] = LiveArray(ndarray) if live else Array(ndarray)
    return record


def record_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors of a record. They may share read-only memory with it: copy before writing."""
    return {name: read_array(array) for name, array in record.items()}


def read_array(array: Array) -> Tensor:
    """Return the tensor of an array. It may share read-only memory with it: copy before writing.

    Raises
    ------
    ValueError, TypeError
        If the array is not what it says of itself, or not of numbers.
    """
    ndarray = array.view() if isinstance(array, LiveArray) else _decoded(array)
    return torch.from_numpy(ndarray if ndarray.flags.writeable else np.asarray(_Unlocked(ndarray)))


def _decoded(array: Array) -> NDArray[Any]:
    """Return the array that bytes in numpy's own format hold: never a pickle, never more memory than there are bytes.

    Numpy's reader takes the memory that a header asks for before it looks whether as many bytes follow.
    """
    if array.stype != "numpy.ndarray":
        raise ValueError(f"serialised as {shown(array.stype)}, must be 'numpy.ndarray'")
    stream = BytesIO(array.data)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in headers:
        raise ValueError(f"numpy format {version}, must be (1, 0) or (2, 0)")
    shape, in_columns, dtype = headers[version](stream)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"dtype {dtype}, shape {shown(shape)}: no plain array")
    if math.prod(shape) * dtype.itemsize != len(array.data) - stream.tell():
        raise ValueError(f"{len(array.data) - stream.tell()} bytes, shape {shown(shape)} of {dtype} has others")
    values = np.frombuffer(array.data, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if in_columns else "C").copy()


class _Unlocked:
    """Shows a read-only array as writable: torch has no read-only tensors, and warns at each one it is given."""

    def __init__(self, ndarray: NDArray[Any]) -> None:
        self.base = ndarray  # keeps the memory alive
        self.__array_interface__ = {**ndarray.__array_interface__, "data": (ndarray.ctypes.data, False)}
