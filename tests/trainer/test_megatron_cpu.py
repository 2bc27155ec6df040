"""megatron-core, unmodified, without CUDA."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.megatron_cpu import _CudaToCpu


def run(code: str, *, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{code}" if path else code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def fake_megatron(tmp_path: Path) -> Path:
    """A package of that name that is quick to import."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("import torch\ndevice = torch.cuda.current_device()\n")
    return tmp_path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("torch.cuda.current_device()", "_cuda_on_cpu.current_device()"),
        ("torch.empty(3, device='cuda')", "torch.empty(3, device='cpu')"),
        ("torch.device('cuda', 1)", "torch.device('cpu')"),
        ("x.cuda(non_blocking=True)", "x.to('cpu')"),
        ("if x.is_cuda: y()", "if True:\n    y()"),
        ("t == 'torch.cuda.BFloat16Tensor'", "t == 'torch.BFloat16Tensor'"),
        (
            "from torch.cuda import _lazy_call as call, Stream",
            "call = _cuda_on_cpu._lazy_call\nStream = _cuda_on_cpu.Stream",
        ),
        ("x.cuda", "x.cuda"),
        ("device = 'cuda'", "device = 'cuda'"),
        ("from .cuda import graphs", "from .cuda import graphs"),
    ],
)
def test_what_is_rewritten(before: str, after: str) -> None:
    """A rule that no longer matches shows only in the one step that needs it."""
    assert ast.unparse(_CudaToCpu().visit(ast.parse(before))) == after


@pytest.mark.stack
def test_megatron_imports_whichever_of_its_modules_comes_first() -> None:
    """A process that takes another way in would fail at its first device call."""
    result = run("import trainer, megatron.core.optimizer.distrib_optimizer; from trainer.model import GPTModel")
    assert result.returncode == 0, result.stderr


def test_torch_itself_stays_as_it_is(fake_megatron: Path) -> None:
    """A patched torch corrupts what other libraries load; and an imported trainer must cost nothing."""
    code = (
        "import trainer; assert 'torch' not in sys.modules\n"
        "import torch; real = torch.cuda\n"
        "import megatron.core; assert str(megatron.core.device) == 'cpu'\n"
        "assert torch.cuda is real and megatron.core.torch is torch and not torch.cuda.is_available()"
    )
    result = run(code, path=fake_megatron)
    assert result.returncode == 0, result.stderr


def test_no_rewritten_bytecode_is_left_behind(fake_megatron: Path) -> None:
    """A cached rewrite would be run by the next process, also by one that has CUDA."""
    assert run("import trainer, megatron.core", path=fake_megatron).returncode == 0
    assert not list(fake_megatron.rglob("*.pyc"))


def test_an_import_that_came_too_early_is_named(fake_megatron: Path) -> None:
    result = run(
        "import types; sys.modules['megatron.core'] = types.ModuleType('megatron.core'); import trainer",
        path=fake_megatron,
    )
    assert "megatron.core was imported before trainer" in result.stderr
