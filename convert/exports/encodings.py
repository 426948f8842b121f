"""The vocabulary file that vLLM's chat parser downloads when it starts, made from the artifact's own tokenizer.json.

openai-harmony looks for `o200k_base.tiktoken` in the folder that TIKTOKEN_ENCODINGS_BASE names, and else on the internet, which a
container may not reach. It is the tokenizer's tokens in rank order; what comes out is used only if it has the published digest.
"""

from __future__ import annotations

import base64
import hashlib

from gptoss_convert.convert.companions import TOKENIZER
from gptoss_convert.convert.exports.artifact import Artifact
from gptoss_convert.convert.tokenizer_files import SYMBOLS
from gptoss_convert.formats.files import parse_json

FILE, VARIABLE = "o200k_base.tiktoken", "TIKTOKEN_ENCODINGS_BASE"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"  # what tiktoken pins for o200k_base
MISSING = (
    "the tokenizer is not the release's, so the vocabulary that vLLM's chat parser wants is not in the package: "
    "the container downloads it when it starts and needs the internet"
)
_BYTES = {symbol: byte for byte, symbol in SYMBOLS.items()}


def o200k_file(artifact: Artifact) -> bytes | None:
    """o200k_base.tiktoken, or None where the artifact's tokenizer is another one."""
    data = artifact.small(TOKENIZER)
    model = parse_json(data, artifact.path / TOKENIZER).get("model") if data else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        return None
    try:
        tokens = sorted((rank, bytes(_BYTES[symbol] for symbol in text)) for text, rank in vocabulary.items())
    except (KeyError, TypeError):
        return None
    text = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in tokens)
    return text if hashlib.sha256(text).hexdigest() == SHA256 else None
