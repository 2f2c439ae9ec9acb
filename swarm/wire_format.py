"""How tensors travel, for those who only have to name it: without torch, which takes a second to import. swarm/tensors.py does it."""

from __future__ import annotations

import enum

Buffer = bytes | bytearray | memoryview


class WireFormat(enum.StrEnum):
    """How floating values travel, and what that costs a float32 value: an error in it, and bytes.

    FP32: exact; 4 bytes.
    BF16: a relative error of 2**-8 at most (round to nearest, 8 significant bits), from 2**-126 up; 2 bytes.
    INT8: an error of absmax / 254 at most, absmax being the largest absolute value of its block of 64 consecutive ones
    (and 2**-14 of that for float32's own rounding, and 2**-142 where absmax / 127 is subnormal); 1.0625 bytes.

    With BF16 and INT8 what is larger than 3.38e38 may become infinite, which receivers refuse.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
