"""How much memory llama.cpp needs for a GGUF: weights, KV cache, buffers for computing. From headers alone.

The KV cache is what `llama_kv_cache_iswa` reserves: keys and values in f16; layers that attend to everything a cell for each
token of context, sliding layers one for each token of the window and of a batch, both in steps of 256 cells. The buffers are
dominated by the logits of a batch and by the attention masks; they differ from backend to backend, so that part is a rule of
thumb.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from gptoss_convert.config import ModelConfig
from gptoss_convert.convert.exports.artifact import Artifact

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)
DEFAULT_CONTEXT = 16384
CARDS = (8, 12, 16)  # GB of 10⁹ bytes
BATCH = 512  # llama-server's --ubatch-size
_STEP = 256
_F16 = 2
_EXPERT = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|down|gate_up)_exps\.")


def kv_cache(config: ModelConfig, context: int) -> int:
    """Bytes of the KV cache of one conversation of `context` tokens."""
    cells = _padded(context)
    sliding = min(cells, _padded(config.sliding_window + BATCH))
    a_cell = 2 * config.kv_rows * _F16
    return a_cell * sum(sliding if slides else cells for slides in config.sliding)


def buffers(config: ModelConfig, context: int) -> int:
    """Bytes for computing, roughly: logits of a batch in f32, a mask of the whole context and one of the window."""
    return BATCH * (4 * config.vocab + 4 * _padded(context)) + (8 << 20)


def _padded(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP


@dataclass(frozen=True)
class Forecast:
    """One artifact's. experts: bytes of the experts of each layer, in order."""

    config: ModelConfig
    weights: int
    experts: tuple[int, ...]

    @classmethod
    def of(cls, artifact: Artifact) -> Forecast:
        """From the tensors that a GGUF lists."""
        layers: dict[int, int] = defaultdict(int)
        for tensor in artifact.source.stored:
            if found := _EXPERT.match(tensor.name):
                layers[int(found[1])] += tensor.nbytes
        weights = sum(tensor.nbytes for tensor in artifact.source.stored)
        return cls(artifact.config, weights, tuple(layers[n] for n in sorted(layers)))

    @property
    def contexts(self) -> list[int]:
        """Contexts to show: those that the model can have."""
        return [n for n in CONTEXTS if n <= self.config.max_positions] or [self.config.max_positions]

    def total(self, context: int) -> int:
        """Everything."""
        return self.weights + kv_cache(self.config, context) + buffers(self.config, context)

    def largest(self, memory: int) -> int | None:
        """The largest context shown whose everything fits, or None."""
        return max((n for n in self.contexts if self.total(n) <= memory), default=None)

    def layers_outside(self, memory: int, context: int) -> int | None:
        """How many layers' experts must stay in main memory (--n-cpu-moe) for the rest to fit; None where none is enough."""
        need = self.total(context)
        for count, size in enumerate((0, *self.experts)):
            need -= size
            if need <= memory:
                return count
        return None
