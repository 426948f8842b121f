"""genai_config.json of an ONNX folder as an export carries it: of this very model, and stopping at every end token."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from gptoss_convert.convert.exports.artifact import Artifact
from gptoss_convert.convert.genai_config import genai_config
from gptoss_convert.convert.onnx_layout import Variant
from gptoss_convert.errors import BadInput
from gptoss_convert.formats.files import parse_json

GENAI = "genai_config.json"
SAMPLING = f"Sampling is what `{GENAI}` says: the source's own, or OpenAI's, temperature 1 and nothing cut off."
_FREE = {"eos_token_id", "bos_token_id", "pad_token_id"}  # of "model": what generation stops at is seen to apart
_ENDS = f"{GENAI} was completed: every end token stops generation"


@dataclass(frozen=True)
class Settings:
    """document: the whole file, completed; notes: what was added to it."""

    document: dict[str, Any]
    notes: list[str]

    def text(self) -> bytes:
        """The file."""
        return (json.dumps(self.document, indent=4, ensure_ascii=False) + "\n").encode()


def read_settings(artifact: Artifact, variant: Variant, ends: Collection[int]) -> Settings:
    """The folder's own; BadInput where it is of another model, DigestMismatch where the certificate names another.

    What it says of sampling and of ONNX Runtime's session stays. ends: token ids.
    """
    place = artifact.files[GENAI]
    data = place.read_bytes()
    document = parse_json(data, place)
    model, search = (document.get(part) for part in ("model", "search"))
    if not isinstance(model, dict) or not isinstance(search, dict) or model.get("type") != "gptoss":
        raise BadInput(
            "not a genai_config.json of gpt-oss", file=place, expected='"model" of type gptoss, and "search"',
            remedy="convert again",
        )  # fmt: skip
    own = json.loads(genai_config(artifact.source, variant)[0])["model"]
    wanted, found = _facts(own), _facts(model)
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise BadInput(
                "genai_config.json is not of this model", file=place, tensor=key, found=_shown(found, key),
                expected=_shown(wanted, key), remedy="convert again",
            )  # fmt: skip
    artifact.require_certified(GENAI, data)
    listed = model.get("eos_token_id")
    known = [i for i in (listed if isinstance(listed, list) else [listed]) if type(i) is int]
    missing = [index for index in ends if index not in known]
    if missing:
        model["eos_token_id"] = [*known, *missing]
    return Settings(document, [_ENDS] if missing else [])


def _facts(model: dict[str, Any]) -> dict[str, Any]:
    """What must be as the model is, by key; session_options, for threads and the like, are the user's."""
    decoder = model.get("decoder")
    inner = decoder if isinstance(decoder, dict) else {}
    return {
        **{f"model.{key}": value for key, value in model.items() if key not in {*_FREE, "decoder"}},
        **{f"model.decoder.{key}": value for key, value in inner.items() if key != "session_options"},
    }


def _shown(facts: dict[str, Any], key: str) -> str:
    return json.dumps(facts[key])[:200] if key in facts else "no such key"
