"""The release's chat template, out of the source package of llama-cpp-python on PyPI, which carries llama.cpp's copy of it.

What is taken is known by its digest, the one pinned for the chat_template.jinja of both releases; the package is streamed until
it comes by, and only the template is kept, under .cache/template.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

PACKAGE = "llama_cpp_python-0.3.36.tar.gz"
INDEX = "https://pypi.org/simple/llama-cpp-python/"
MEMBER = "/models/templates/openai-gpt-oss-120b.jinja"
SHA256 = "a4c9919cbbd4acdd51ccffe22da049264b1b73e59055fa58811a99efbd7c8146"
no_template = f"the release's template could not be fetched: {INDEX} cannot be reached"


def official_template(cache: Path) -> Path | None:
    """The template as a file, fetched if need be; None where PyPI cannot be reached."""
    place = cache / "chat_template.jinja"
    if not place.exists():
        try:
            data = _fetched()
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return None
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f"{os.getpid()}.partial"
        temporary.write_bytes(data)
        temporary.replace(place)
    assert hashlib.sha256(place.read_bytes()).hexdigest() == SHA256
    return place


def _fetched() -> bytes:
    request = urllib.request.Request(INDEX, headers={"Accept": "text/html"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        page = answer.read().decode()
    found = re.search(rf'href="(https://[^"#]*/{re.escape(PACKAGE)})', page)
    assert found is not None, f"{INDEX} no longer names {PACKAGE}"
    with urllib.request.urlopen(found[1], timeout=60) as answer, tarfile.open(fileobj=answer, mode="r|gz") as archive:
        for member in archive:
            if member.name.endswith(MEMBER):
                file = archive.extractfile(member)
                assert file is not None
                return file.read()
    raise AssertionError(f"{PACKAGE} has no {MEMBER}")
