"""What calibration, GPTQ and comparison hold in memory at most: a forecast from the model's widths, made without torch.

    stores      the residual stream and the experts' inputs, f32 [N, D] each, up to SPILL_BYTES; beyond that on disk
    attention   a layer's dense tensors, the activations of one span of tokens, SCORES_AT_ONCE scores a thread
    experts     the dense tensors still, one expert's two matrices, the activations of TOKENS_AT_ONCE tokens
    hessians    with GPTQ or `calibrate --hessians`: MANY_HESSIANS of the widest input in float32, and what a factorisation holds
                in float64
    head        HEAD_BYTES of logits, as much of the head

The largest of attention, experts and head is held at a time. A test measures true layers against it.
"""

from __future__ import annotations

from gptoss_convert.config import ModelConfig

SPILL_BYTES = 512 << 20
TOKENS_AT_ONCE = 2048
HEAD_BYTES = 512 << 20
SCORES_AT_ONCE = 1 << 22  # of [B, H, queries, keys], four bytes each, for every thread
MOST_THREADS = 16
EMBEDDING_ROWS = 8192  # read at a time
BASE_BYTES = 720 << 20  # python, numpy, numba and torch, and what freed memory the allocator keeps
MANY_HESSIANS, FACTORS = 10, 7
TEMPORARIES = 4  # copies of one array that an expression holds beside its result


def walk_bytes(
    config: ModelConfig, tokens: int, context: int, *, hessians: bool = False, gptq: bool = False, sides: int = 1
) -> int:
    """Bytes at most for this many tokens in sequences of at most `context`. sides: 2 for `compare`."""
    c, span = config, max(TOKENS_AT_ONCE, min(context, tokens))
    q, kv = c.q_rows, c.kv_rows
    stores = 2 * min(4 * tokens * c.hidden, SPILL_BYTES) + tokens * (8 + 16 * c.experts_per_token)
    dense = 4 * (c.hidden * (2 * q + 2 * kv + c.experts) + c.experts * (2 * c.intermediate + c.hidden))
    attention = (
        4 * span * (TEMPORARIES * c.hidden + 3 * (q + 2 * kv) + 2 * q)
        + 5 * 4 * SCORES_AT_ONCE * MOST_THREADS
        + 6 * c.hidden * q
    )
    matrices = 4 * c.hidden * c.intermediate * (3 + 2)
    experts = matrices + 4 * TOKENS_AT_ONCE * (TEMPORARIES * c.hidden + 8 * c.intermediate)
    if hessians or gptq:
        widest = max(q, c.hidden, c.intermediate)
        experts += 4 * MANY_HESSIANS * widest**2
    if gptq:
        experts += 8 * FACTORS * widest**2 + 3 * matrices
    head = HEAD_BYTES * (1 + sides) + HEAD_BYTES * 2
    return BASE_BYTES + sides * (stores + dense) + max(attention, experts, head)
