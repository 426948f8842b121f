"""general.* keys of a GGUF from the model card's front matter, by the `gguf` package's own rules.

The card is somebody's text: only its YAML front matter is read, of bounded size, by the safe loader. A name never comes from
a path, because the same input must give the same bytes wherever it lies.
"""

from __future__ import annotations

from typing import Any

from gptoss_convert.config import ModelConfig
from gptoss_convert.errors import BadInput
from gptoss_convert.formats.gguf import Value, ValueType, array, string, u32

MAX_FRONT_MATTER = 64 << 10
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_LISTS = frozenset(
    {
        "tags", "pipeline_tag", "language", "languages", "base_model", "base_models", "base_model_sources", "dataset",
        "datasets", "dataset_sources",
    }
)  # fmt: skip


def front_matter(card: bytes) -> dict[str, str | list[str]]:
    """The YAML table between the two `---` lines at the top of a card; empty where there is none.

    Every scalar is the text that stands there (`no`, `2024` and `1.0` are no other things), and so are a list's items.
    What is empty, null or of another shape has no place among a GGUF's keys and is left out.
    """
    import yaml

    text = card[:MAX_FRONT_MATTER].decode("utf-8", "replace").replace("\r\n", "\n")
    if not text.startswith("---\n") or "\n---\n" not in text[4:]:
        return {}
    matter = text[4 : text.index("\n---\n", 4)]
    if "&" in matter and "*" in matter:
        return {}  # anchors and aliases have no place in a card and can be nested into something enormous
    try:
        table = yaml.load(matter, yaml.BaseLoader)  # knows texts, lists and tables only, and runs no tag
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadInput("the model card's front matter is not YAML", file="README.md", found=str(error)[:200]) from error
    if not isinstance(table, dict):
        return {}
    plain = {key: _plain(key, value) for key, value in table.items() if isinstance(key, str)}
    return {key: value for key, value in plain.items() if value}


def _plain(key: str, value: object) -> str | list[str] | None:
    if isinstance(value, str):
        if not _is_text(value):
            raise BadInput("a value of the model card's front matter is not Unicode text", file="README.md", found=key)
        return None if value in _NULLS else value
    if not isinstance(value, list):
        return None
    texts = [text for text in (_plain(key, item) for item in value if isinstance(item, str)) if isinstance(text, str)]
    return texts if key in _LISTS else ", ".join(texts)


def card_metadata(
    card: bytes, name: str | None, config: ModelConfig, counts: tuple[int, int, int]
) -> list[tuple[str, Value]]:
    """general.name … general.tags. counts: parameters outside the experts, of one expert a layer, and experts."""
    import gguf

    table = front_matter(card)
    shared, per_expert, experts = counts
    metadata = gguf.Metadata()
    identity = name or config.release
    try:
        metadata = gguf.Metadata.apply_metadata_heuristic(metadata, table, None, None, config.parameters)
        if identity:
            _identify(metadata, identity, config.parameters)
        metadata.name = metadata.name or "gpt-oss"
        if metadata.size_label is None:
            metadata.size_label = gguf.size_label(config.parameters, shared, per_expert, experts)
        writer = gguf.GGUFWriter(path=None, arch="gpt-oss")
        metadata.set_gguf_meta_model(writer)
    except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
        raise BadInput("the model card's front matter is malformed", file="README.md", found=error) from error
    return [(key, _value(key, kept)) for key, kept in writer.kv_data[0].items() if key != "general.architecture"]


def _identify(metadata: Any, identity: str, parameters: int) -> None:
    """What a name such as org/base-tune-20B-v1 tells, where the card does not."""
    import gguf

    title, organization, basename, finetune, version, size = gguf.Metadata.get_model_id_components(identity, parameters)
    metadata.name = gguf.Metadata.id_to_title(title) if title else identity
    metadata.organization = metadata.organization or organization
    metadata.basename = metadata.basename or basename
    metadata.finetune = metadata.finetune or finetune
    metadata.version = metadata.version or version
    metadata.size_label = metadata.size_label or size


def _value(key: str, kept: Any) -> Value:
    if _is_text(kept.value):
        return string(kept.value)
    if isinstance(kept.value, int) and not isinstance(kept.value, bool) and 0 <= kept.value < 1 << 32:
        return u32(kept.value)
    if isinstance(kept.value, list) and all(map(_is_text, kept.value)):
        return array(ValueType.STRING, kept.value)
    raise BadInput("the model card's front matter has a value of an unexpected kind", file="README.md", found=key)


def _is_text(value: object) -> bool:
    """Whether a value is valid Unicode; YAML's escapes can smuggle in half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)
