"""The building holds: who may import whom, and no key of the configuration that nobody reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlctl import schema

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"rlctl": ROOT / "rlctl", "rlctl_train": ROOT / "src" / "rlctl_train", "rlctl_hw": ROOT / "hw" / "rlctl_hw"}
TRAINING = ("torch", "ray", "transformers", "vllm", "sglang", "megatron")
ROOMS = ("engines", "rollout", "sync")


def sources(package: str, under: str = "") -> list[Path]:
    place = PACKAGES[package] / under
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def module_name(file: Path, package: str) -> str:
    parts = file.relative_to(PACKAGES[package].parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, *, top_only: bool = False) -> set[str]:
    """Return the modules a file imports; `from a import b` counts as `a` and `a.b`."""
    tree = ast.parse(file.read_text())
    nodes = _top_level(tree) if top_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _top_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield what runs when a module is imported: everything outside functions and type-checking blocks."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or typing_only:
            continue
        yield node
        todo += list(ast.iter_child_nodes(node))


def touching(names: set[str], *roots: str) -> set[str]:
    return {name for name in names if any(name == root or name.startswith(f"{root}.") for root in roots)}


def offences(files: list[Path], *forbidden: str, top_only: bool = False) -> dict[str, set[str]]:
    found = {str(file.relative_to(ROOT)): touching(imports(file, top_only=top_only), *forbidden) for file in files}
    return {file: names for file, names in found.items() if names}


def test_there_is_code_to_look_at() -> None:
    assert all(len(sources(package)) > 5 for package in PACKAGES)


def test_arrows_point_down() -> None:
    assert offences(sources("rlctl_train"), "rlctl") == {}
    assert offences(sources("rlctl_hw"), "rlctl", "rlctl_train") == {}


def test_the_survey_needs_the_standard_library_only() -> None:
    assert offences(sources("rlctl_hw"), *TRAINING, "numpy", "pydantic", "typer", "rich") == {}


def test_config_never_imports_torch() -> None:
    assert offences(sources("rlctl_train", "config"), *TRAINING, "numpy") == {}
    outside = {
        name
        for file in sources("rlctl_train", "config")
        for name in touching(imports(file), "rlctl_train")
        if not name.startswith("rlctl_train.config")
    }
    assert outside == set()


def test_algorithms_import_torch_their_config_and_their_operations_only() -> None:
    for file in sources("rlctl_train", "algos"):
        own = touching(imports(file), "rlctl_train")
        known = touching(own, "rlctl_train.algos", "rlctl_train.config", "rlctl_train.batch")
        assert own == known, file
        assert not touching(imports(file), "ray", "transformers", "vllm"), file


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_do_not_import_each_other_or_the_controller(room: str) -> None:
    others = [f"rlctl_train.{other}" for other in (*ROOMS, "controller", "workers", "flows") if other != room]
    assert offences(sources("rlctl_train", room), *others) == {}


def test_the_controller_names_no_engine() -> None:
    for part in ("controller", "flows"):
        assert offences(sources("rlctl_train", part), "vllm", "sglang", "megatron", "torch.distributed") == {}


def test_the_front_desk_imports_of_the_workshop_only_config_unless_inside_a_function() -> None:
    for file in sources("rlctl"):
        names = touching(imports(file, top_only=True), "rlctl_train")
        assert names == touching(names, "rlctl_train.config"), file
        assert not touching(imports(file, top_only=True), *TRAINING, "huggingface_hub"), file


def test_only_the_device_file_names_an_accelerator() -> None:
    for file in sources("rlctl_train"):
        if file.name == "device.py":
            continue
        named = {
            ast.unparse(node)
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.cuda", "torch.npu")
        }
        assert named == set(), file


def test_only_render_prints_in_the_front_desk() -> None:
    for file in sources("rlctl"):
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)}
        assert file.name == "render.py" or not calls & {"print", "sys.stdout.write", "sys.stderr.write"}, file


AMBIGUOUS = ("dtype", "method", "path", "shuffle", "train", "type", "val", "weight")
"""Names of keys that tensors, modules and files have too: here the holder must be named like a configuration."""
HOLDERS = {name for key in schema.all_keys() for name in key.split(".")} | {"config", "part"}


def reads() -> set[tuple[str, str]]:
    """Return (holder, attribute) of every attribute read outside the config package, method calls left out."""
    files = [
        file
        for package in PACKAGES
        for file in sources(package)
        if not module_name(file, package).startswith("rlctl_train.config")
    ]
    found: set[tuple[str, str]] = set()
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called:
                found.add((ast.unparse(node.value).rpartition(".")[2].strip("_"), node.attr))
    return found


def test_every_leaf_of_the_configuration_is_read_by_some_code() -> None:
    found = reads()
    read = {name for holder, name in found if name not in AMBIGUOUS or holder in HOLDERS}
    assert [leaf.key for leaf in schema.leaves() if leaf.path[-1] not in read] == []
