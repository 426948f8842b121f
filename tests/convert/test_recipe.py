"""Recipes: what fits is read, what does not is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from gptoss_convert.convert.recipe import Recipe, read_recipe_file, schema
from gptoss_convert.convert.sizes import parse_size
from gptoss_convert.errors import BadInput, UsageError

GOOD = """\
out = "made"

[source]
path = "model"          # relative to this file

[text.chat]
file = "chat.jsonl"
tokens = 5000

[text.held-out]
file = "held.txt"

[[output]]
name = "laptop"
to = "gguf"
type = "q3_k_s"
method = "gptq"
calibration = "chat"
compare = {text = "held-out", fail_above = {kld = 0.05}}

[[output]]
name = "server"
to = "int4"

[output.compare]
report = false

[[output.export]]
for = "sagemaker"
"""


def read(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text)
    return read_recipe_file(path)


def test_a_recipe_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    assert found.out == tmp_path / "made"
    assert [o.name for o in found.outputs] == ["laptop", "server"]
    assert [o.file_name for o in found.outputs] == ["laptop.gguf", "server"]
    assert [o.line for o in found.outputs] == [13, 21]
    assert found.texts["chat"].tokens == 5000
    assert found.texts["held-out"].context == 2048
    assert found.outputs[1].table["export"] == [{"for": "sagemaker"}]
    assert found.place("a") == tmp_path / "a"


def test_the_schema_is_a_schema_and_every_property_of_an_option_is_described_or_typed() -> None:
    Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize(
    ("before", "after", "line", "what"),
    [
        ('type = "q3_k_s"', 'typ = "q3_k_s"', 16, "typ"),
        ('to = "int4"', 'to = "int3"', 23, "int3"),
        ("tokens = 5000", 'tokens = "many"', 8, "many"),
        ("tokens = 5000", "tokens = 1", 8, "minimum"),
        ("kld = 0.05", "kldd = 0.05", 19, "kldd"),
        ('[source]\npath = "model"', '[source]\nrepo = "a/b"', 3, "source"),
        ('[[output]]\nname = "server"\n', "[[output]]\n", 21, "name"),
        ('method = "gptq"\n', "", 13, "calibration"),
        ('for = "sagemaker"', 'far = "sagemaker"', 29, "far"),
        ('for = "sagemaker"', 'for = "../../somewhere"', 29, "somewhere"),
        ('for = "sagemaker"', 'for = "sagemaker"\nimage = ""', 30, "image"),
        ('out = "made"', 'outt = "made"', 1, "outt"),
        ("tokens = 5000", "tokens = 5000.0", 8, "5000.0 is not of type 'integer'"),
        ('for = "sagemaker"', 'for = "sagemaker"\ncontext = 4096.0', 30, "4096.0 is not of type 'integer'"),
        ("kld = 0.05", "kld = nan", 19, "nan is not of type 'number'"),
        ("kld = 0.05", "kld = inf", 19, "inf is not of type 'number'"),
        ('name = "server"', 'name = "server\\n"', 22, "does not match"),
        ('path = "model"', 'repo = "a/b"\nrevision = "' + "0" * 40 + '\\n"', 5, "does not match"),
        ('path = "model"', 'path = "m"\nrepo = "a/b"\nrevision = "' + "0" * 40 + '"', 3, "path, repo, revision"),
        ('path = "model"', 'path = "m"\nrepo = "a/b"', 3, "path, repo"),
        ("[text.held-out]", '[text."held out"]', 10, "held out"),
        ('to = "int4"', 'to = "gguf"\nwiden = "ct"', 24, "ct"),
    ],
)
def test_what_does_not_fit_is_named_with_its_line(
    tmp_path: Path, before: str, after: str, line: int, what: str
) -> None:
    assert before in GOOD
    with pytest.raises(BadInput) as error:
        read(tmp_path, GOOD.replace(before, after))
    assert str(error.value.file).endswith(f"recipe.toml, line {line}")
    assert what in f"{error.value.tensor} {error.value.found}"


@pytest.mark.parametrize(
    ("before", "after", "line", "what"),
    [
        ('name = "server"', 'name = "Laptop"', 22, "one name"),
        ('file = "held.txt"', 'file = "held.md"', 11, "not a text"),
        ('name = "server"', 'name = "laptop.gguf"', 22, "one name"),
        ('name = "server"', 'name = "laptop.gguf.certificate.json"', 22, "one name"),
        ('to = "int4"', 'to = "int4"\nsplit_size = "4 apples"', 24, "not a size"),
        ('to = "int4"', 'to = "int4"\nsplit_size = "0"', 24, "not a size"),
        ('calibration = "chat"', 'calibration = "cat"', 18, "no such text"),
        ('text = "held-out", ', 'text = "other", ', 19, "no such text"),
        ('text = "held-out", ', "", 19, "needs a text"),
    ],
)
def test_names_that_lead_nowhere_are_named_with_their_line(
    tmp_path: Path, before: str, after: str, line: int, what: str
) -> None:
    with pytest.raises(UsageError, match=what) as error:
        read(tmp_path, GOOD.replace(before, after))
    assert str(error.value.file).endswith(f"line {line}")


def test_only_line_feeds_are_counted_as_lines(tmp_path: Path) -> None:
    odd = GOOD.replace("# relative to this file", "# \u2028\x85").replace('type = "q3_k_s"', 'typ = "q3_k_s"')
    with pytest.raises(BadInput) as error:
        read(tmp_path, odd)
    assert str(error.value.file).endswith("line 16")


def test_what_a_form_needs_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        read(tmp_path, GOOD.replace('path = "model"', 'repo = "a/b"'))
    assert error.value.expected == "path, or repo and revision"
    with pytest.raises(BadInput) as error:
        read(tmp_path, GOOD.replace('method = "gptq"\n', ""))
    assert error.value.found == "calibration"
    assert "method" in str(error.value.expected)
    with pytest.raises(BadInput) as error:
        read(tmp_path, GOOD.replace('file = "held.txt"', 'path = "held.txt"'))
    assert error.value.expected == "file, tokens, context"


@pytest.mark.parametrize("size", ["4GB", "4GiB", "512MiB", "1.5 TB", "100000"])
def test_sizes_are_those_of_the_command_line(tmp_path: Path, size: str) -> None:
    assert read(tmp_path, GOOD.replace('to = "int4"', f'to = "int4"\nsplit_size = "{size}"'))


@pytest.mark.parametrize(
    ("size", "count"),
    [("4GB", 4 * 10**9), ("4 GiB", 4 << 30), ("512MiB", 512 << 20), ("1.5TB", 15 * 10**11), ("2k", 2000), ("7", 7)],
)
def test_a_size_is_so_many_bytes(size: str, count: int) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize("value", ["[" * 20_000 + "]" * 20_000, "1" * 5000])
def test_what_no_reader_can_hold_is_bad_input(tmp_path: Path, value: str) -> None:
    with pytest.raises(BadInput, match="not TOML"):
        read(tmp_path, f"a = {value}\n{GOOD}")


def test_what_is_no_toml_or_no_text_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not TOML") as error:
        read(tmp_path, GOOD.replace("tokens = 5000", "tokens = "))
    assert "line 8" in str(error.value.found)
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_recipe_file(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(BadInput, match="too large"):
        read_recipe_file(tmp_path / "r.toml")
    with pytest.raises(BadInput, match="cannot open"):
        read_recipe_file(tmp_path / "nowhere.toml")
