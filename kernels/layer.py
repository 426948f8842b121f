"""The maths of gpt-oss's layers in torch, each function on plain tensors; on CPU or CUDA, in whatever dtype comes in.

    x ─ rms_norm ─ q, k, v ─ rotate ─ attention (sinks, window) ─ out ─ + ─ rms_norm ─ route ─ experts' swiglu ─ + ─►

Letters: B sequences, T positions, D hidden, H query heads, K key/value heads, h head width, F expert width, E experts,
k experts of a token. Formulas: gpt_oss/torch/model.py (OpenAI) and transformers' modeling_gpt_oss.py. torch is imported by this
module and by what builds on it; nothing that only converts needs it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softmax

from gptoss_convert.kernels.products import by_rows, each

ALPHA = 1.702
SCORES_AT_ONCE = 1 << 22  # of [B, H, queries, keys], four bytes each, a thread: what bounds attention's memory
QUERIES_AT_ONCE = 256


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [..., D] · gain [D] / √(mean x² + eps)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def yarn_frequencies(
    *, theta: float, factor: float, width: int, original: int, beta_fast: float, beta_slow: float, truncate: bool
) -> Tensor:
    """YaRN's angle a position, f32 [h/2]: fast dimensions as trained, slow ones divided by `factor`, a ramp between.

    arXiv 2309.00071 §3.2 in float32, in the order of transformers' _compute_yarn_parameters. truncate rounds the ramp's ends
    to whole dimensions; gpt-oss does not.
    """
    powers = theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)

    def dimension(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolated = 1 - ramp
    return (1.0 / (factor * powers)) * (1 - extrapolated) + (1.0 / powers) * extrapolated


def yarn_magnitude(factor: float) -> float:
    """What cosines and sines are multiplied with: 0.1 ln(factor) + 1."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def rotate(x: Tensor, frequencies: Tensor, magnitude: float) -> Tensor:
    """x [B, T, heads, h], rotated by position · frequency; the pairs are (i, i + h/2)."""
    positions = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)
    angles = positions[:, None] * frequencies.to(x.device)
    cos, sin = ((f * magnitude).to(x.dtype)[:, None, :] for f in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
    """q [B, T, H, h], k and v [B, T, K, h], sinks [H] → [B, T, H · h]. window: positions seen, itself included; None: all.

    A sink is one more score that no value answers to: it takes its share of the softmax.
    """
    batch, length, heads, width = q.shape
    groups = heads // k.shape[2]
    q = q.transpose(1, 2).reshape(batch, k.shape[2], groups, length, width) * width**-0.5
    k, v = k.transpose(1, 2)[:, :, None], v.transpose(1, 2)[:, :, None]
    sink = sinks.reshape(1, k.shape[1], groups, 1, 1)
    out = torch.empty((batch, k.shape[1], groups, length, width), dtype=q.dtype, device=q.device)
    at_once = max(1, min(QUERIES_AT_ONCE, SCORES_AT_ONCE // (batch * heads * length)))

    def run(part: slice) -> None:
        first = 0 if window is None else max(0, part.start - window + 1)
        scores = q[:, :, :, part] @ k[:, :, :, first : part.stop].transpose(-1, -2)
        query = torch.arange(part.start, part.stop, device=q.device)[:, None]
        key = torch.arange(first, part.stop, device=q.device)[None, :]
        hidden = key > query if window is None else (key > query) | (key <= query - window)
        scores = scores.masked_fill(hidden, -math.inf)
        share = softmax(torch.cat((scores, sink.expand(*scores.shape[:-1], 1)), dim=-1), dim=-1)
        out[:, :, :, part] = share[..., :-1] @ v[:, :, :, first : part.stop]

    each(length, at_once, run)
    return out.reshape(batch, heads, length, width).transpose(1, 2).reshape(batch, length, -1)


def route(x: Tensor, weight: Tensor, bias: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """x [N, D], router [E, D], [E] → the experts [N, k] of each token, best first, and their shares [N, k]."""
    scores, experts = torch.topk(by_rows(x, len(weight), lambda part: part @ weight.T + bias), count, dim=-1)
    return experts, softmax(scores, dim=-1)


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """[N, 2F], gate and up alternating, → [N, F]: gate σ(1.702 gate) (up + 1), gate at most `limit`, |up| at most `limit`."""
    gate, up = gate_up[..., 0::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(ALPHA * gate) * (up + 1)


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks uint8 [R, G, 16] and scales uint8 [R, G], release order, → f32 [R, 32 G]; equal to kernels.mxfp4.decode."""
    table = torch.tensor(_E2M1, dtype=torch.float32, device=blocks.device)
    pairs = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), dim=-1)
    bits = torch.where(scales == 0, 0x00400000, scales.int() << 23)  # 2^(scale − 127); 2^-127 itself is subnormal
    return (pairs.flatten(-2) * bits.view(torch.float32)[..., None]).flatten(-2)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
