"""The arrows of ../shared/DESIGN.md: who may import whom, and who may look at the machine."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import triflash
from triflash import registry

ROOT = Path(triflash.__file__).parent
MODULES = {
    ".".join(("triflash", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}

# What each module may import of ours, lazily or not. A kernel version may also import itself, and
# the tuning that is its own.
_KERNELS = {
    "triflash.kernels.common", "triflash.tuning", "triflash.target", "triflash.spec",
    "triflash.mods",
}  # fmt: skip
ALLOWED: dict[str, set[str]] = {
    "triflash": {
        "triflash.interface", "triflash.registry", "triflash.mods", "triflash.nn",
        "triflash.packed", "triflash.padding", "triflash.block_mask",
    },
    "triflash.padding": set(),
    "triflash.bert_padding": {"triflash.padding"},
    "triflash.spec": set(),
    "triflash.dropout": set(),
    "triflash.target": set(),
    "triflash.mods": {"triflash.spec", "triflash.dropout"},
    "triflash.tuning": {"triflash.spec", "triflash.target"},
    "triflash.tuning_v3": {"triflash.tuning", "triflash.spec", "triflash.target", "triflash.mods"},
    "triflash.reference": {"triflash.spec", "triflash.mods", "triflash.dropout"},
    "triflash.block_mask": {
        "triflash.spec", "triflash.mods", "triflash.target", "triflash.reference",
        "triflash.kernels.common",
    },
    "triflash.masks": {"triflash.spec", "triflash.mods", "triflash.reference"},
    "triflash.registry": {"triflash.spec", "triflash.target"},
    "triflash.ops": {"triflash.spec", "triflash.target", "triflash.registry", "triflash.sequences"},
    "triflash.interface": {
        "triflash.ops", "triflash.spec", "triflash.target", "triflash.registry", "triflash.mods",
        "triflash.dropout", "triflash.reference",
    },
    "triflash.packed": {
        "triflash.interface", "triflash.ops", "triflash.spec", "triflash.target",
        "triflash.registry", "triflash.mods", "triflash.dropout", "triflash.reference",
    },
    "triflash.sequences": {"triflash.spec"},
    "triflash.nn": {"triflash", "triflash.interface"},
    "triflash.testing": {
        "triflash.interface", "triflash.reference", "triflash.registry", "triflash.spec",
        "triflash.target", "triflash.mods", "triflash.block_mask",
    },
    "triflash.kernels": set(),
    "triflash.kernels.common": set(),
}  # fmt: skip
# The outermost layer may use everything below it.
OUTER = ("triflash.cli", "triflash.__main__", "triflash.examples", "triflash.bench")
MAY_LOOK_AT_THE_MACHINE = ("triflash.target", *OUTER)


def allowed(module: str) -> set[str] | None:
    """Prefixes of ours that `module` may import; None for everything."""
    if _within(module, OUTER):
        return None
    parts = module.split(".")
    if parts[:2] == ["triflash", "kernels"] and len(parts) > 2:
        version = ".".join(parts[:3])
        if version == "triflash.kernels.common":
            return {version}
        return {version, f"triflash.tuning_{parts[2]}", *_KERNELS}
    assert module in ALLOWED, f"{module} is new: say in test_architecture.py what it may import"
    return ALLOWED[module]


def _within(module: str, prefixes) -> bool:
    return any(module == p or module.startswith(p + ".") for p in prefixes)


def imports(path: Path, module: str) -> set[str]:
    """Full names of what a file imports anywhere in it, outside of TYPE_CHECKING blocks."""
    found: set[str] = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if node in skipped:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(n for child in node.body for n in ast.walk(child))
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_arrows(module):
    may = allowed(module)
    ours = {name for name in imports(MODULES[module], module) if _within(name, ["triflash"])}
    if may is not None:
        # Importing from a package's __init__ is importing the package, not everything in it.
        wrong = {
            n
            for n in ours
            if n not in may and not (n != "triflash" and _within(n, may - {"triflash"}))
        }
        assert not wrong, f"{module} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("triflash.kernels.common")])
def test_the_kernels_common_needs_only_triton(module):
    for name in imports(MODULES[module], module):
        top = name.split(".")[0]
        assert (
            top == "triton"
            or top in sys.stdlib_module_names
            or _within(name, ["triflash.kernels.common"])
        ), name


def test_versions_do_not_import_each_other():
    """Said once more, because it is the rule that lets a version be a folder."""
    versions = {m.split(".")[2] for m in MODULES if m.startswith("triflash.kernels.")} - {"common"}
    assert versions
    for version in versions:
        for module, path in MODULES.items():
            if _within(module, [f"triflash.kernels.{version}"]):
                for name in imports(path, module):
                    others = {f"triflash.kernels.{v}" for v in versions - {version}}
                    assert not _within(name, others), f"{module} imports {name}"


def test_the_registry_names_what_exists_and_imports_it_lazily():
    for row in registry.IMPLEMENTATIONS:
        for path in filter(None, (row.forward, row.backward, row.pays)):
            module, function = path.split(":")
            assert module in MODULES
            names = {
                n.name
                for n in ast.parse(MODULES[module].read_text()).body
                if isinstance(n, ast.FunctionDef)
            }
            assert function in names
    code = (
        "import sys, torch, triflash\n"
        "triflash.implementations(); triflash.attention\n"
        "loaded = [m for m in sys.modules if m.startswith('triflash.kernels')]\n"
        "assert not loaded, loaded\n"
        "assert 'triton' not in sys.modules or 'triton' in before, 'triton'\n"
    ).replace(
        "import sys, torch, triflash",
        "import sys, torch\nbefore = set(sys.modules)\nimport triflash",
    )
    _python(code)


LOOKS = {
    "environ", "getenv", "get_device_properties", "get_device_capability", "get_device_name",
    "multi_processor_count", "gcnArchName",
}  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_only_target_looks_at_the_machine(module):
    if _within(module, MAY_LOOK_AT_THE_MACHINE):
        return
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        name = {ast.Attribute: "attr", ast.Name: "id"}.get(type(node))
        if name is not None:
            assert getattr(node, name) not in LOOKS, f"{module} reads {getattr(node, name)}"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module):
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree), f"{module} has no docstring"


def test_importing_is_cheap():
    _python("import sys, triflash\nassert not {'torch', 'triton'} & sys.modules.keys()\n")


def test_everything_but_kernels_works_without_triton():
    """Triton has no wheels for some systems that torch runs on."""
    _python(
        "import sys\n"
        "class Without:\n"
        "    def __init__(self, finder): self.finder = finder\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] != 'triton': return self.finder.find_spec(name, *rest)\n"
        "sys.meta_path[:] = map(Without, sys.meta_path)\n"
        "import torch, triflash\n"
        "q = torch.randn(1, 3, 2, 8, requires_grad=True)\n"
        "triflash.attention(q, q, q, causal=True).sum().backward()\n"
        "assert q.grad is not None\n"
        "try: triflash.attention(q, q, q, implementation='v2')\n"
        "except NotImplementedError as error: assert 'not installed' in str(error), error\n"
        "else: raise SystemExit('v2 ran')\n"
        "from triflash import cli\n"
        "assert cli.main(['info']) == 0\n"
        "assert cli.main('check --device cpu --seq-len 5 --num-heads 1'.split()) == 0\n"
    )


def _python(code: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
