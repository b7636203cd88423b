"""Where a run computes and in which number format: choosing both, computing in them, and describing the machine."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from minipeft.errors import HardwareError

try:
    import resource
except ImportError:  # Windows does not say what a process has used
    resource = None

logger = logging.getLogger(__name__)
# Of a micro-batch's hidden states (B, T, C) on a CPU: about as much as its caches hold.
NUMBERS_PER_MICRO_BATCH = 2**20
# Of products of float32 matrices, as torch names them: "high" and "medium" may round what goes in, for speed.
MATMUL_PRECISIONS = ("highest", "high", "medium")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for, or CUDA where there is one, else the CPU.

    Raises:
        HardwareError: an unknown device, or CUDA asked for and absent.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise HardwareError(f"unknown device {name!r}: use cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise HardwareError("CUDA was asked for, but PyTorch sees no CUDA device here: use --device cpu, or install a "
                            "CUDA build of torch and its driver")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype matrix products run in: "auto" takes bfloat16 where the hardware has it.

    On CUDA without bfloat16, auto is float16 with a loss scaler; on a CPU without bfloat16 instructions, float32.

    Raises:
        HardwareError: an unknown name.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        return torch.bfloat16 if native else torch.float32
    if name not in PRECISIONS:
        raise HardwareError(f"unknown precision {name!r}: use auto, {', '.join(PRECISIONS)}")
    if (name, device.type) == ("fp16", "cpu"):
        logger.warning("float16 is slower than float32 on a CPU, on many CPUs much slower: --precision auto takes what "
                       "is fastest here")
    return PRECISIONS[name]


@contextmanager
def matmul_precision(name: str | None) -> Iterator[None]:
    """Within the block this process's products of float32 matrices are so exact; None leaves them as they are.

    Args:
        name: "highest", torch's default: float32; "high": TensorFloat32 or the like where the hardware has it, 10 bits
            after the point in place of 23; "medium": bfloat16 inside, 7 bits. Products in a lower --precision are not
            concerned.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def computing_in(precision: torch.dtype, device: torch.device) -> torch.autocast:
    """A context in which matrix products run in `precision`; in float32 it changes nothing."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def tokens_per_micro_batch(device: torch.device, n_embd: int) -> int | None:
    """How many tokens training computes at once; None: as many as there are.

    A GPU is fastest with all of a batch. A CPU gains nothing beyond what its caches hold, and needs more memory: a LoRA
    step of GPT-2 124M on 16 texts of 256 tokens, cut into four micro-batches, takes 0.78 of the time and 0.47 of the
    memory in float32. In bfloat16, where each micro-batch casts the weights anew, it takes 1.05 of the time and 0.45 of
    the memory.

    Args:
        n_embd: C, numbers per token.
    """
    return max(1, NUMBERS_PER_MICRO_BATCH // n_embd) if device.type == "cpu" else None


def cast_frozen(model: nn.Module, precision: torch.dtype) -> nn.Module:
    """Keep the frozen weights and biases of linear layers in `precision` only, in place; in float32 nothing changes.

    Autocast casts them anew at every call, to the very same values, and keeps both: half of the memory traffic of
    generation, which reads all weights for each token. What is trained, embeddings and LayerNorms stay as they are, and
    an output head that was tied to the embeddings gets weights of its own.

    Returns:
        The model.
    """
    if precision != torch.float32:
        for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if not parameter.requires_grad:
                    setattr(layer, name, nn.Parameter(parameter.to(precision), requires_grad=False))
    return model


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory is not enough: torch's on a GPU has a class of its own, a CPU's and those
    of a GPU's libraries have none."""
    said = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def out_of_memory(device: torch.device, rows: int, length: int, checkpointing: bool | None = None) -> HardwareError:
    """The error, in one line, of a batch that does not fit into the memory.

    Args:
        rows, length: of what was computed at once: texts, and tokens of the longest.
        checkpointing: in training, whether gradients are checkpointed; None when predicting.
    """
    texts, do = ("text", "does") if rows == 1 else ("texts", "do")
    what = f"{device.type} is out of memory: {rows} {texts} of {length} tokens at once {do} not fit"
    if checkpointing is None:
        more = "" if device.type == "cpu" else ", or --device cpu"
        return HardwareError(f"{what}: use a smaller --max-length or a smaller model{more}")
    return HardwareError(f"{what}, with{'' if checkpointing else 'out'} gradient checkpointing: use a smaller "
                         "--batch-size, with as many times the --gradient-accumulation, a smaller --max-length"
                         f"{'' if checkpointing else ', or --gradient-checkpointing'}")


def machine() -> dict[str, Any]:
    """The machine's description for a results file."""
    description: dict[str, Any] = {
        "system": platform.system(), "processor": _processor(), "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(), "memory_gib": None}
    if hasattr(os, "sysconf"):  # not on Windows
        description["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
    return description


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("minipeft", "torch", "tiktoken", "safetensors", "numpy", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit(*folders: Path) -> str:
    """The commit that made the code in `folders` what it is; "+" where files differ from it, "unknown" without git."""
    def git(*arguments: str) -> str:
        with suppress(OSError):  # git is not installed
            return subprocess.run(["git", *arguments, "--", *folders], cwd=folders[0], capture_output=True,
                                  text=True).stdout.strip()
        return ""

    return (git("log", "-1", "--format=%h") or "unknown") + "+" * bool(git("status", "--porcelain"))


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU; None where no system says it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes(device: torch.device) -> int | None:
    """What this process has in memory now: allocated on the GPU, or resident on a CPU; None where no system says it."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_bytes` begin anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()
