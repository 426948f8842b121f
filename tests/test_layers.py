"""The shape of the code: imports point one way, modules stay small, the wheel holds all of it and nothing else."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
MODULES = {
    f"{package}.{path.stem}".removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / FOLDERS.get(package, package.replace(".", "/"))).glob("*.py"))
}
DATA = ROOT / "gptoss_convert/data"
MAX_LINES = 400

# What each layer may import of the others; `base` is errors, config and the package itself.
MAY_IMPORT = {
    "cli": {"cli", "convert", "formats", "quant", "base"},
    "convert": {"convert", "formats", "quant", "kernels", "base"},
    "formats": {"formats", "base"},
    "quant": {"quant", "kernels", "base"},
    "kernels": {"kernels"},
    "base": {"base"},
}
# Of other people's packages, what each layer is made of (the standard library apart).
OUTSIDE = {
    "cli": {"click", "rich"},
    "convert": {"blake3", "gguf", "huggingface_hub", "jsonschema", "numpy", "tokenizers", "yaml", "requests", "httpx"},
    "formats": {"gguf", "numpy"},
    "quant": {"numpy"},
    "kernels": {"numpy", "numba", "gguf"},  # of gguf the tables of its i-quants
    "base": set(),
}
# What runs the model, an extra: nothing that only converts may need torch.
WITH_TORCH = {
    f"gptoss_convert.{name}"
    for name in (
        "kernels.layer", "kernels.products", "kernels.gptq", "kernels.gptq_lattice", "quant.shrinkage", "convert.forward",
        "convert.moments", "convert.hessians", "convert.calibrate", "convert.calibration", "convert.rounding",
        "convert.rounding_matrix", "convert.compare",
    )
}  # fmt: skip


def layer_of(module: str) -> str:
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in MAY_IMPORT:
        return parts[1]
    return "cli" if module == "gptoss_convert.__main__" else "base"


def imports(path: Path) -> Iterator[str]:
    """Every module that is imported anywhere in a file, in functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    layer = layer_of(module)
    for name in imports(MODULES[module]):
        if name.split(".")[0] == "gptoss_convert":
            assert layer_of(name) in MAY_IMPORT[layer], f"{module} imports {name}"
        elif name.split(".")[0] not in sys.stdlib_module_names:
            allowed = OUTSIDE[layer] | ({"torch"} if module in WITH_TORCH else set())
            assert name.split(".")[0] in allowed, f"{module} imports {name}"


def test_converting_needs_no_torch() -> None:
    modules = "gptoss_convert.cli.convert, gptoss_convert.convert.conversion, gptoss_convert.convert.calibration"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_only_the_command_line_prints() -> None:
    for module, path in MODULES.items():
        if layer_of(module) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert called not in ("print", "exit", "eval", "exec", "compile", "__import__"), f"{module} calls {called}"


def test_no_module_opens_pickles_or_maps_files() -> None:
    for module, path in MODULES.items():
        found = {name.split(".")[0] for name in imports(path)} & {
            "pickle",
            "marshal",
            "shelve",
            "mmap",
            "safetensors",
        }
        assert not found, f"{module} imports {found}"
        if module in WITH_TORCH:
            calls = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
            assert not calls & {"load", "jit", "hub", "from_file"}, f"{module} lets torch read a file"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_long(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", MODULES)
def test_each_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[module].read_text()))


def test_every_python_file_of_the_product_belongs_to_a_package() -> None:
    packaged = set(MODULES.values())
    for folder in {path.parent for path in packaged}:
        found = {path for path in folder.rglob("*.py") if "__pycache__" not in path.parts}
        assert {path for path in found if path.parent != DATA} <= packaged  # what lies there is written, never imported


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "gptoss-convert = gptoss_convert.__main__:main" in archive.read(entry_points).decode()
    suffix = {path: "__init__.py" if path.name == "__init__.py" else path.name for path in MODULES.values()}
    expected = {
        (module if suffix[path] == "__init__.py" else module.rpartition(".")[0]).replace(".", "/") + "/" + suffix[path]
        for module, path in MODULES.items()
    }
    data = {f"gptoss_convert/data/{path.name}" for path in DATA.iterdir() if path.is_file()}
    assert data
    assert found == expected | data | {"gptoss_convert/py.typed"}


def test_no_folder_of_ours_passes_for_somebody_elses_package() -> None:
    # transformers looks for a package called kernels; with the repo's root or tests/ on the path it would find ours.
    for name in ("kernels", "convert", "formats", "quant"):
        found = importlib.util.find_spec(name)
        assert found is None or not str(found.origin or found.submodule_search_locations).startswith(str(ROOT)), found
