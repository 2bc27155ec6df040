"""Run an unmodified megatron-core where there is no CUDA.

megatron-core 0.16.1 has no switch for its device: it asks `torch.cuda` for the current one, allocates with
``device="cuda"``, and its optimizers compare ``Tensor.type()`` with ``"torch.cuda.FloatTensor"``. `install` registers
an import hook that rewrites those expressions in the syntax trees of `megatron.core.*` as they load. torch, and
whatever else the process imports, stay as they are. Where CUDA is, the hook steps aside and nothing is rewritten.

torch is first imported when `megatron.core` is, so installing the hook is cheap.
"""

from __future__ import annotations

import ast
import importlib.machinery
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from types import CodeType, ModuleType
from typing import Any

from slime.errors import TrainerError

PACKAGE = "megatron.core"
STAND_IN = "_cuda_on_cpu"
"""Name under which a rewritten module finds what it believes to be `torch.cuda`."""

_USED_UNDEFINED = {"megatron.core.transformer.moe.moe_utils": "te_general_gemm"}
"""Names 0.16.1 uses although it defines them only where TransformerEngine is installed."""


def install() -> None:
    """Make `megatron.core` importable without CUDA. May be called any number of times, before its first import.

    Raises:
        TrainerError: `megatron.core` was imported before, without the hook, on a machine without CUDA.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if PACKAGE in sys.modules and not _cuda_is_available():
        raise TrainerError(
            "megatron.core was imported before trainer, and there is no CUDA: it would fail at its first device call. "
            "Import trainer first, or run where CUDA is available."
        )
    sys.meta_path.insert(0, _Finder())


def _cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()


def _drop_rng_warning(record: logging.LogRecord) -> bool:
    """Megatron warns when the CPU generator changes under its CUDA one: here the two are one generator."""
    return "CPU RNG state changed" not in record.getMessage()


class _Finder:
    """Finds `megatron.core.*` where it is and gives it a loader that rewrites."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != PACKAGE and not name.startswith(PACKAGE + "."):
            return None
        if _cuda_is_available():
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def path_stats(self, path: str) -> Any:
        """Keep the import system from reading and writing .pyc files: they hold, and must hold, the original."""
        raise OSError

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:  # type: ignore[override]
        tree = ast.fix_missing_locations(_CudaToCpu().visit(ast.parse(data)))
        code: CodeType = compile(tree, os.fspath(path), "exec", dont_inherit=True, optimize=_optimize)
        return code

    def exec_module(self, module: ModuleType) -> None:
        from trainer import cuda_on_cpu

        setattr(module, STAND_IN, cuda_on_cpu)
        if module.__name__ == "megatron.core.tensor_parallel.random":
            logging.getLogger(module.__name__).addFilter(_drop_rng_warning)
        if name := _USED_UNDEFINED.get(module.__name__):
            setattr(module, name, None)
        with warnings.catch_warnings():
            # That Apex and TransformerEngine are missing goes without saying where there is no CUDA.
            warnings.simplefilter("ignore")
            super().exec_module(module)


class _CudaToCpu(ast.NodeTransformer):
    """The rewriting rules. Each one is needed: without it a training step, or expert parallelism, fails on a CPU."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """``torch.cuda`` → the stand-in; ``x.is_cuda``, which asks whether x is on the compute device, → ``True``."""
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name(STAND_IN, ast.Load()), node)
        if node.attr == "is_cuda":
            return ast.copy_location(ast.Constant(True), node)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | list[ast.stmt]:
        """``from torch.cuda import x as y`` → ``y = stand_in.x``."""
        if node.module != "torch.cuda" or node.level != 0:
            return node
        return [
            ast.copy_location(
                ast.Assign(
                    [ast.Name(alias.asname or alias.name, ast.Store())],
                    ast.Attribute(ast.Name(STAND_IN, ast.Load()), alias.name, ast.Load()),
                ),
                node,
            )
            for alias in node.names
        ]

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        """``device="cuda"`` → ``device="cpu"``."""
        self.generic_visit(node)
        if node.arg == "device" and isinstance(node.value, ast.Constant) and node.value.value == "cuda":
            node.value = ast.copy_location(ast.Constant("cpu"), node.value)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """``x.cuda(...)`` → ``x.to("cpu")``; ``torch.device("cuda", ...)`` → ``torch.device("cpu")``."""
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Attribute(attr="cuda") as function):
                function.attr, node.args, node.keywords = "to", [ast.copy_location(ast.Constant("cpu"), node)], []
            case ast.Call(func=ast.Attribute(attr="device"), args=[ast.Constant(value="cuda"), *_]):
                node.args = [ast.copy_location(ast.Constant("cpu"), node)]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        """``"torch.cuda.FloatTensor"`` → ``"torch.FloatTensor"``."""
        if isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            return ast.copy_location(ast.Constant(node.value.replace("torch.cuda.", "torch.")), node)
        return node
