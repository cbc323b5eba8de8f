"""The project as a whole: which way imports point, what is public, what is documented."""

import ast
import tomllib
from pathlib import Path

import duo_jax

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "pallas_kernels": set(),
    "duo_jax": {"pallas_kernels"},
    "duo_train": {"pallas_kernels", "duo_jax"},
    "duo_eval": {"pallas_kernels", "duo_jax", "duo_train"},
}
FOLDERS = {"duo_train": ROOT / "train" / "duo_train", "duo_eval": ROOT / "eval" / "duo_eval"}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            yield node.module.split(".")[0]


def test_imports_point_one_way():
    for package, allowed in MAY_IMPORT.items():
        for path in FOLDERS.get(package, ROOT / package).rglob("*.py"):
            ours = {name for name in _imports(path) if name in MAY_IMPORT} - {package}
            assert ours <= allowed, f"{path} imports {ours - allowed}"


def test_no_torch_and_no_cuda_in_the_default_install():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert not [line for line in required if any(word in line for word in ("torch", "cuda", "triton"))]


def test_everything_public_exists_and_is_documented():
    for name in duo_jax.__all__:
        value = getattr(duo_jax, name)
        assert isinstance(value, dict) or (value.__doc__ or "").strip(), name


def test_the_version_is_the_same_everywhere():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == duo_jax.__version__
