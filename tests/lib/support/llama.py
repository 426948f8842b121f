"""Real llama.cpp, in process, through xllamacpp's server: the judge of every GGUF.

    with load(path) as llama:
        llama.logprobs(ids)      # [T, V]: log P(next token | ids[:t + 1]), every prefix evaluated afresh
        llama.tokenize(text)
        llama.complete(prompt, n)

The log-probabilities are the softmax of the raw logits (no sampler has touched them), single precision. A prefix costs
one evaluation and a reply of V entries: quick for small vocabularies, slow for the release's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import xllamacpp


class Llama:
    """A loaded model. Made by `load`."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.vocab = int(self._get("/v1/models")["data"][0]["meta"]["n_vocab"])
        self._harmless = self.tokenize("a")[0]

    def logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """Float32 [T, V]: the distribution of the next token after each prefix of `ids`, as logarithms."""
        return np.stack([self._after(ids[: end + 1]) for end in range(len(ids))])

    def _after(self, prefix: Sequence[int]) -> np.ndarray:
        reply = self._post(
            "/completion",
            {
                "prompt": [int(i) for i in prefix],
                "n_predict": 1,
                "n_probs": self.vocab,
                "post_sampling_probs": False,
                "samplers": [],
                # The server keeps back the reply for half a character, so the token drawn is always this one. The bias
                # reaches the sampler only: probabilities come from the raw logits.
                "logit_bias": [[self._harmless, 1000.0]],
                "cache_prompt": False,
            },
        )
        entries = reply["completion_probabilities"][0]["top_logprobs"]
        if len(entries) != self.vocab:
            raise AssertionError(f"llama.cpp returned {len(entries)} probabilities for {self.vocab} tokens")
        result = np.full(self.vocab, np.nan, np.float32)
        result[[entry["id"] for entry in entries]] = [entry["logprob"] for entry in entries]
        return result

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids, without an added bos; `special` reads control tokens in the text as such."""
        body = {"content": text, "add_special": False, "parse_special": special}
        return [int(i) for i in self._post("/tokenize", body)["tokens"]]

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._post("/detokenize", {"tokens": [int(i) for i in ids]})["content"])

    def complete(self, prompt: str | Sequence[int], n: int) -> str:
        """The greedy continuation of a text or of token ids, at most `n` tokens."""
        given = prompt if isinstance(prompt, str) else [int(i) for i in prompt]
        return str(self._post("/completion", {"prompt": given, "n_predict": n, "temperature": 0})["content"])

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """The messages as the file's chat template renders them."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def properties(self) -> dict[str, Any]:
        return self._get("/props")

    def _get(self, path: str) -> dict[str, Any]:
        with urlopen(self._address + path, timeout=60) as reply:
            result: dict[str, Any] = json.load(reply)
        return result

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = Request(self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=600) as reply:
                result: dict[str, Any] = json.load(reply)
        except HTTPError as error:
            raise RuntimeError(f"llama.cpp refused {path}: {error.read().decode(errors='replace')}") from error
        return result


@contextmanager
def load(path: Path, ctx: int = 256, kv: Literal["f32", "f16"] = "f32", threads: int = 2) -> Iterator[Llama]:
    """Load a GGUF (of a split one, the first file) on the CPU. A file that llama.cpp rejects raises RuntimeError."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = ctx
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kv.upper()}")
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_extra_bufts = True  # no repacking: the kernels of the file's own types
    params.swa_full = True
    params.fit_params = False
    params.warmup = False
    params.check_tensors = True
    params.verbosity = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    try:
        yield Llama(server.listening_address)
    finally:
        del server
