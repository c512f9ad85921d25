"""The house rules a machine can check: import order, the README's tree, file sizes, each op's whole life."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from repository import ROOT

ANYONE = {"errors", "backends", "files", "progress", "pictures", "schemas"}
IMPORTS = {  # room of sra2_fast: the rooms it may import from (docs/architecture.md)
    "errors": set(),
    "backends": {"errors"},
    "files": {"errors"},
    "schemas": {"errors"},
    "progress": set(),
    "pictures": {"errors", "files"},
    "choices": set(),
    "info": {"choices"},
    "reference": set(),
    "ops": {"reference", "kernels"},
    "layers": {"ops"},
    "recipe": set(),
    "models": {"choices", "layers", "ops"},
    "objective": {"models", "ops", "recipe"},
    "aligner": {"layers", "models", "objective", "ops", "recipe"},
    "optim": {"ops"},
    "compat": {"models", "layers", "ops", "recipe"},
    "randomness": set(),
    "data": {"randomness"},
    "vae": {"data"},
    "prepare": {"data", "randomness", "vae"},
    "convert_data": {"data", "randomness"},
    "sampling": {"ops", "models", "layers"},
    "checkpoints": {"layers", "models", "recipe"},
    "train": {
        "checkpoints",
        "data",
        "layers",
        "models",
        "objective",
        "optim",
        "randomness",
        "recipe",
        "sampling",
        "vae",
    },
    "convert": {"checkpoints"},
    "sample": {"checkpoints", "data", "models", "randomness", "sampling", "vae"},
    "cli": {"convert", "convert_data", "info", "prepare", "sample", "train"},
    "__init__": {"aligner", "checkpoints", "models", "objective", "sampling", "optim", "data", "compat", "ops"},
}
OPS = ("layer_norm_modulate", "gated_residual_layer_norm_modulate", "alignment_velocity_loss", "adamw_ema")
MAX_LINES = 400


def tracked(*patterns: str) -> list[str]:
    """Files of the repository, from git: built and cached ones do not count."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listing.stdout.splitlines() if (ROOT / name).exists()]


def imported_rooms(path: str) -> set[str]:
    """The rooms of sra2_fast that a file imports, at the top or inside a function; not to launch itself."""
    parts = path.removesuffix(".py").split("/")
    package = parts[:-1]
    rooms = set()
    tree = ast.parse((ROOT / path).read_text())
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if __name__ == '__main__'")]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("sra2_fast.")}
    return rooms


def test_imports_go_one_way():
    wrong = []
    for path in tracked("sra2_fast/*.py"):
        if path.endswith("/__main__.py"):
            continue
        room = path.split("/")[1].removesuffix(".py")
        assert room in IMPORTS, f"{path}: a new room; say in IMPORTS what it may import"
        for other in imported_rooms(path) - {room} - ANYONE - IMPORTS[room]:
            if other in IMPORTS or other == "kernels":
                wrong.append(f"{path} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_kernels_know_triton_and_torch_only():
    allowed = {"torch", "triton", "sra2_fast", *sys.stdlib_module_names}
    for path in tracked("kernels/*.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots = {str(node.module).split(".")[0]}
            else:
                continue
            assert roots <= allowed, f"{path} imports {roots - allowed}"
        assert imported_rooms(path) <= {"kernels"}, f"{path} imports {imported_rooms(path)}"


def test_the_check_of_imports_can_fail(tmp_path, monkeypatch):
    (tmp_path / "sra2_fast" / "ops").mkdir(parents=True)
    (tmp_path / "sra2_fast" / "ops" / "bad.py").write_text("def f():\n    from ..models import SiT\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert imported_rooms("sra2_fast/ops/bad.py") == {"models"}


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_whole_life(op):
    for path in (
        f"sra2_fast/reference/{op}.py",
        f"sra2_fast/ops/{op}.py",
        f"kernels/{op}.py",
        f"tests/test_{op}.py",
        f"benchmarks/bench_{op}.py",
    ):
        assert (ROOT / path).is_file(), f"{op}: {path} is missing"
    assert list((ROOT / "csrc").glob(f"{op}*")), f"{op}: csrc/{op}* is missing"


def test_files_stay_small():
    files = tracked("*.py", "*.cpp", "*.cu", "*.h", "*.inc", "*.cuh")
    long = {name: count for name in files if (count := len((ROOT / name).read_text().splitlines())) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines; split by concept: {long}"


def readme_tree() -> list[str]:
    """The paths of the README's tree block; a folder ends in /."""
    block = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block, "README.md has no ```text tree"
    paths, parents = [], []
    for line in block[1].splitlines():
        if not line.strip():
            continue
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], name]
        paths.append("".join(parents))
    return paths


def test_the_readme_tree_is_the_disk():
    """Every listed path exists; every file is listed, or lies in a listed folder none of whose files are."""
    listed = readme_tree()
    missing = [path for path in listed if not (ROOT / path).exists()]
    assert not missing, f"README.md lists what is not there: {missing}"
    opened = {path.rsplit("/", 1)[0] + "/" for path in listed if not path.endswith("/") and "/" in path}
    unlisted = []
    for name in tracked():
        folder = name.rsplit("/", 1)[0] + "/" if "/" in name else ""
        if name in listed or name.split("/")[-1] in ("__init__.py", "py.typed") or name.startswith("."):
            continue
        while folder and folder not in listed:
            folder = folder.rstrip("/").rpartition("/")[0] + "/" if folder.count("/") > 1 else ""
        if not folder or folder in opened:
            unlisted.append(name)
    assert not unlisted, f"README.md's tree lacks: {unlisted}"


def test_importing_the_package_imports_nothing_else():
    code = "import sys, sra2_fast; print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    import sra2_fast

    for name in sra2_fast.__all__:
        assert getattr(sra2_fast, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = sra2_fast.nothing
