"""Where a codec can hold exact zeros: what the padding of a widened embedding needs, since it enters the residual stream.

A codec stores a scale, or a scale and a minimum, for each run of so many values. A run of zeros comes out as zeros in all of them
(the scale is 0). In a run that other values share, zero must be a level of its own:

    levels are multiples of the scale, 0 among them                    any place
    scale · q − minimum, or a table without 0 (iq4)                    whole runs only
    lattices: no level is 0 and a run's scale never is                 whole super-blocks, whose d is 0

RUN says how many values must be zeros together, aligned, for all codecs that write; 1: any of them.
"""

from __future__ import annotations

RUN = {
    "f32": 1, "f16": 1, "bf16": 1, "mxfp4": 1, "nvfp4": 1, "q8_0": 1, "q6_k": 1, "q5_0": 1, "q4_0": 1, "q3_k": 1, "q2_0": 1,
    "q2_k": 16,
    "q5_k": 32, "q5_1": 32, "q4_k": 32, "q4_1": 32, "iq4_xs": 32, "iq4_nl": 32,
    "iq3_s": 256, "iq3_xxs": 256, "iq2_s": 256, "iq2_xs": 256, "iq2_xxs": 256,
}  # fmt: skip


def holds_zeros(codec: str, first: int) -> bool:
    """Whether rows whose columns are zeros from `first` on come out of the codec with zeros there."""
    return first % RUN[codec] == 0
