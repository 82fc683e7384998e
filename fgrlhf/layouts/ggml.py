"""The number types of ggml, llama.cpp's library, and how their blocks become float32.

A quantised tensor is a sequence of blocks. A block holds 32 or 256 numbers of one row: small
integers q, and what scales them. d and m are float16. `s` and `o` are the scale and the offset of
16 or 32 numbers, themselves integers that d and m scale.

    type          numbers  bytes    a number
    Q8_0               32     34    d q            q from -128 to 127
    Q4_0, Q5_0         32  18, 22   d (q - 8), d (q - 16)
    Q4_1, Q5_1         32  20, 24   d q + m        q has 4 or 5 bits
    Q4_K, Q5_K        256 144, 176  (d s) q - (m o)
    Q6_K              256    210    (d s) (q - 32)

Each product and each sum is rounded to float32, in the order written here.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

CHUNK = 1 << 20                             # numbers that are unpacked together


class Kind(NamedTuple):
    """A type of number: its name, the numbers and bytes of a block, and how to unpack blocks.

    unpack: uint8 [N, size] -> float32 [N, count].
    """

    name: str
    count: int
    size: int
    unpack: Callable[[np.ndarray], np.ndarray]


def dequantise(kind: Kind, data: np.ndarray) -> np.ndarray:
    """Returns all numbers of a tensor in float32: uint8 [bytes] -> float32 [count].

    Blocks are unpacked in chunks, so that little memory beyond the result is needed.
    """
    blocks = data.reshape(-1, kind.size)
    result = np.empty(len(blocks) * kind.count, np.float32)
    step = CHUNK // kind.count
    with np.errstate(invalid="ignore"):     # NaN and infinity are refused by whoever asks
        for start in range(0, len(blocks), step):
            part = kind.unpack(blocks[start:start + step]).reshape(-1)
            result[start * kind.count:start * kind.count + len(part)] = part
    return result


# ----- parts of a block ---------------------------------------------------------------------------

def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """Reads the float16 at byte `at` of each block: float32 [N, 1]."""
    return np.ascontiguousarray(blocks[:, at:at + 2]).view("<f2").astype(np.float32)


def _nibbles(part: np.ndarray) -> np.ndarray:
    """Splits bytes [.., n] into their low 4 bits and then their high 4 bits: uint8 [.., 2 n]."""
    return np.concatenate([part & 15, part >> 4], axis=-1)


def _fifth_bits(part: np.ndarray) -> np.ndarray:
    """Turns each of 32 bits into 0 or 16: uint8 [N, 4] -> uint8 [N, 32]."""
    return np.unpackbits(part, axis=1, bitorder="little") << 4


def _six_bits(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpacks 8 scales and 8 offsets of 6 bits from 12 bytes: float32 [N, 8, 1] each.

    The first 4 of each are the low 6 bits of bytes 0-3 and 4-7. The last 4 have their low 4 bits in
    bytes 8-11 (low half: scales, high half: offsets) and their high 2 bits on top of bytes 0-7.
    """
    a, b, c = part[:, :4], part[:, 4:8], part[:, 8:]
    scales = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=1)
    offsets = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=1)
    return scales[:, :, None].astype(np.float32), offsets[:, :, None].astype(np.float32)


# ----- blocks of 32 -------------------------------------------------------------------------------

def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8))


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    q = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (q.view(np.int8) - np.int8(16))


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * q + _half(blocks, 2)


# ----- blocks of 256 ------------------------------------------------------------------------------

def _with_offsets(blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(d s) q - (m o) for q [N, 8, 32], uint8."""
    scales, offsets = _six_bits(blocks[:, 4:16])
    d, m = _half(blocks, 0)[:, :, None], _half(blocks, 2)[:, :, None]
    return d * scales * q - m * offsets


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _with_offsets(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    """Bit k of byte j, of the 32 bytes of high bits, belongs to number j of part k."""
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _with_offsets(blocks, low | high << 4)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """Each half of 128 numbers has 64 bytes of low bits, and 32 bytes that hold 4 high pairs."""
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    high = pairs >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = (low | high << 4).view(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return (_half(blocks, 208) * scales)[:, :, None] * q.reshape(-1, 16, 16)


# ----- the types ----------------------------------------------------------------------------------

def _float32(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks).view("<f4")


def _float16(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0)


def _bfloat16(blocks: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16
    return bits.view(np.float32)


KINDS = {                                   # by the number in a GGUF file
    0: Kind("F32", 1, 4, _float32), 1: Kind("F16", 1, 2, _float16),
    30: Kind("BF16", 1, 2, _bfloat16),
    2: Kind("Q4_0", 32, 18, _q4_0), 3: Kind("Q4_1", 32, 20, _q4_1), 6: Kind("Q5_0", 32, 22, _q5_0),
    7: Kind("Q5_1", 32, 24, _q5_1), 8: Kind("Q8_0", 32, 34, _q8_0),
    12: Kind("Q4_K", 256, 144, _q4_k), 13: Kind("Q5_K", 256, 176, _q5_k),
    14: Kind("Q6_K", 256, 210, _q6_k),
}
OTHERS = {                                  # known, but not read here
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}
