"""Constants of a TensorFlow graph, read from its protobuf bytes without TensorFlow.

A protobuf message is a sequence of fields: a key, (number << 3 | wire type), and a value
(https://protobuf.dev/programming-guides/encoding). Only the fields that lead to a GraphDef's
float32 constants are read; their numbers are those of TensorFlow's graph.proto, node_def.proto,
attr_value.proto, tensor.proto, tensor_shape.proto and types.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

_GRAPH_NODE = 1
_NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE = 1, 2, 5
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_ATTRIBUTE_TENSOR = 8
_TENSOR_DTYPE, _TENSOR_SHAPE, _TENSOR_CONTENT, _TENSOR_FLOATS = 1, 2, 4, 5
_SHAPE_DIMENSION, _DIMENSION_SIZE = 2, 1
_DT_FLOAT = 1
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
# More than any network here has, and far less than a damaged length may give.
_MOST_NUMBERS = 2**26
_FIXED_SIZES = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}


def constants(data: bytes) -> dict[str, np.ndarray]:
    """The float32 constants of a serialised GraphDef by the names of their nodes.

    Arrays whose bytes are all stored are read-only views of `data`.

    Raises:
      ValueError: the bytes are not a GraphDef, or not all of one.
    """
    found = {}
    for number, node in _fields(memoryview(data)):
        if number == _GRAPH_NODE:
            found.update(_constant(_bytes(node)))
    return found


def _constant(node: memoryview) -> dict[str, np.ndarray]:
    """{name: array} of a node that is a float32 constant, {} of any other."""
    name, operation, attributes = "", b"", []
    for number, value in _fields(node):
        if number == _NODE_NAME:
            name = _text(value)
        elif number == _NODE_OP:
            operation = bytes(_bytes(value))
        elif number == _NODE_ATTRIBUTE:
            attributes.append(_bytes(value))
    if operation != b"Const":
        return {}
    for attribute in attributes:
        entry = dict(_fields(attribute))
        if bytes(_bytes(entry.get(_ENTRY_KEY, b""))) != b"value":
            continue
        for number, tensor in _fields(_bytes(entry.get(_ENTRY_VALUE, b""))):
            if number == _ATTRIBUTE_TENSOR:
                array = _tensor(name, _bytes(tensor))
                return {} if array is None else {name: array}
    return {}


def _tensor(name: str, tensor: memoryview) -> np.ndarray | None:
    """A TensorProto's array; None if its type is not float32."""
    dtype, shape, content, floats = 0, (), memoryview(b""), []
    for number, value in _fields(tensor):
        if number == _TENSOR_DTYPE:
            dtype = value
        elif number == _TENSOR_SHAPE:
            shape = _shape(_bytes(value))
        elif number == _TENSOR_CONTENT:
            content = _bytes(value)
        elif number == _TENSOR_FLOATS:  # packed in one field, or each in its own
            floats.append(_bytes(value))
    if dtype != _DT_FLOAT:
        return None
    data = content or b"".join(floats)
    size = math.prod(shape)
    if max(size, *shape, 0) > _MOST_NUMBERS:
        raise ValueError(f"constant {name!r} is of shape {shape}: a damaged file, or a huge model")
    if len(data) % 4:
        raise ValueError(f"constant {name!r} holds {len(data)} bytes, not whole float32 numbers")
    array = np.frombuffer(data, "<f4")
    if not len(content) and 0 < len(array) < size:  # those left out equal the last
        array = np.concatenate([array, np.full(size - len(array), array[-1])])
    if len(array) != size:
        raise ValueError(f"constant {name!r} holds {len(array)} numbers for the shape {shape}")
    return array.reshape(shape)


def _shape(shape: memoryview) -> tuple[int, ...]:
    dimensions = (_bytes(value) for number, value in _fields(shape) if number == _SHAPE_DIMENSION)
    sizes = [dict(_fields(dimension)).get(_DIMENSION_SIZE, 0) for dimension in dimensions]
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError("not a serialised graph: bytes where a size belongs")
    return tuple(sizes)


def _fields(message: memoryview | bytes) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of a message's fields; a value is an integer or bytes."""
    message, at = memoryview(message), 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire_type == _LENGTH:
            size, at = _varint(message, at)
        elif wire_type in _FIXED_SIZES:
            size = _FIXED_SIZES[wire_type]
        else:
            raise ValueError(f"not a serialised graph: a field of wire type {wire_type}")
        if at + size > len(message):
            raise ValueError(
                f"not a serialised graph, or truncated: a field of {size:,} bytes, "
                f"of which {len(message) - at:,} are there"
            )
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("not a serialised graph, or truncated: it ends inside a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("not a serialised graph: a number of more than ten bytes")


def _bytes(value: int | memoryview | bytes) -> memoryview:
    if isinstance(value, int):
        raise ValueError("not a serialised graph: a number where text or a message belongs")
    return memoryview(value)


def _text(value: int | memoryview) -> str:
    try:
        return str(_bytes(value), "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("not a serialised graph: a name that is not text") from error
