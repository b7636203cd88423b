"""A GPU that is not there: tensors that say they are on cuda:0, hold their values on the CPU, and mix with CPU tensors
as little as on a GPU. It shows where tensors lie, in which number format products run, and what a host waits for; it
shows nothing of kernels, of speed or of memory.

    with PretendedGPU() as gpu:
        x = torch.ones(3, device="cuda")        # x.device is cuda:0, x.values the tensor on the CPU
        x + torch.ones(3)                       # Mixed: the one is on cuda:0, the other on the CPU
        x.sum().item()                          # gpu.waits counts it, with the library's line

It needs `guard.cpp` loaded before torch is imported: see worker.py.
"""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.amp.autocast_mode
import torch.cuda.amp.common
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
LIBRARY = str(Path(__file__).resolve().parents[2] / "minipeft")
aten = torch.ops.aten
COPIES = {aten._to_copy.default: 0, aten.copy_.default: 1}        # op -> which argument is copied from
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
LAYERS = {aten.mm.default, aten.addmm.default}                    # the products of linear layers
# What else takes a single number on the CPU, beside operators that work number by number.
TAKES_A_CPU_NUMBER = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.index_put_.default,
                      aten._index_put_impl_.default, aten.index_put.default}


class Mixed(RuntimeError):
    """An operator was given tensors, or a generator, of two devices."""


class OnGPU(torch.Tensor):
    """A tensor on cuda:0, as far as anybody can tell; `values` has its numbers."""

    @staticmethod
    def __new__(cls, values):
        with torch.inference_mode(values.is_inference()):
            tensor = torch.Tensor._make_wrapper_subclass(
                cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
                layout=values.layout, device=GPU)
        tensor.values = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return PretendedGPU.active.run(op, args, kwargs or {})

    def __tensor_flatten__(self):
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(tensors, _, size, stride):
        return OnGPU(tensors["values"])

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    def __repr__(self, **_):
        return f"OnGPU({self.values!r})"


class Generator(torch.Generator):
    """torch.Generator, which a CPU build refuses to make for a GPU."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        if torch.device(device).type == "cuda":
            PretendedGPU.active.generators[made._cdata] = made  # an operator is given another object, of the same data
        return made


class PretendedGPU(TorchDispatchMode):
    """Within the block there is one GPU.

    Attributes:
        waits: (what, where) -> how often the host waited for the GPU. Where is a line of the library.
        products: number format -> how many products of linear layers ran in it.
        states_asked: how often the GPU's random state was read or set.
    """

    active: PretendedGPU | None = None

    def __init__(self, bf16=True):
        super().__init__()
        self.bf16, self.waits, self.products, self.states_asked = bf16, Counter(), Counter(), 0
        self.generators = {}
        self.random_state = torch.Generator().manual_seed(1).get_state()  # the GPU's own, not that of the CPU

    def __enter__(self):
        self.stack = ExitStack()
        for owner, names in self.replacements().items():
            for name, value in names.items():
                self.stack.enter_context(patch.object(owner, name, value))
        # A module's parameters stay the same objects when the module moves, as they do on the way to a real GPU.
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        self.stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(numbers, device="cuda"): made here, then moved
        self.stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        PretendedGPU.active = self
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        PretendedGPU.active = None
        self.stack.close()

    @contextmanager
    def on_top(self):
        """A mode is off while it answers. Within the block it is on."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def replacements(self):
        """What Python asks about GPUs, answered."""
        def pinned(tensor, *_):
            copy = tensor.clone()
            copy.is_pretended_pinned = True
            return copy

        def get_state(device="cuda"):
            self.states_asked += 1
            return self.random_state.clone()

        def set_state(state, device="cuda"):
            self.states_asked += 1
            self.random_state = state.clone()

        def seed(number):
            self.random_state = torch.Generator().manual_seed(number).get_state()

        return {torch.cuda: {
                    "is_available": lambda: True, "is_bf16_supported": lambda including_emulation=True: self.bf16,
                    "_lazy_init": lambda: None, "device_count": lambda: 1, "current_device": lambda: 0,
                    "get_rng_state": get_state, "set_rng_state": set_state, "manual_seed_all": seed,
                    "manual_seed": seed, "max_memory_allocated": lambda device=None: 0, "empty_cache": lambda: None,
                    "get_device_name": lambda device=None: "a GPU that is not there"},
                torch.cuda.amp.common: {"amp_definitely_not_available": lambda: False},
                torch.Tensor: {"pin_memory": pinned},
                torch: {"Generator": Generator}}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return self.run(op, args, kwargs or {})

    def run(self, op, args, kwargs):
        """Check one operator's arguments, note what it waits for, and compute it on the CPU."""
        if op is torch.ops.prim.device.default:
            return args[0].device
        if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"):
            with self.on_top():  # in inference mode such an operator comes whole, elsewhere as those that it is made of
                return op.decompose(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        here = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU)]
        there = [x for x in leaves if isinstance(x, OnGPU)]
        device = self.device_of_result(op, args, kwargs, there)
        self.check(op, here, there, args)
        self.check_generators(op, leaves, device)
        self.note_waits(op, args, kwargs, there, device)
        if op in LAYERS and there:
            self.products[str(there[0].dtype).removeprefix("torch.")] += 1
        out = self.compute(op, args, kwargs, on_gpu=device == GPU)
        if device == GPU:
            out = tree_map(lambda x: OnGPU(x) if type(x) is torch.Tensor else x, out)
            made_anew = op is aten._to_copy.default or kwargs.get("device") is not None or not there
            return out if made_anew else return_and_correct_aliasing(op, args, kwargs, out)
        return out

    @staticmethod
    def device_of_result(op, args, kwargs, there):
        """Where an operator's result lies."""
        asked = kwargs.get("device")
        if asked is not None:
            return GPU if torch.device(asked).type == "cuda" else torch.device(asked)
        if op is aten.copy_.default:
            return GPU if isinstance(args[0], OnGPU) else CPU
        return GPU if there else CPU

    @staticmethod
    def check(op, here, there, args):
        if not (here and there) or op in COPIES:
            return
        wrong = [x for x in here if x.dim() or not (torch.Tag.pointwise in op.tags or op in TAKES_A_CPU_NUMBER)]
        if op in INDEXING and isinstance(args[0], OnGPU):  # a GPU's tensor may be indexed from the CPU; that waits
            indices = {id(index) for index in args[1] if index is not None}
            wrong = [x for x in wrong if id(x) not in indices]
        if wrong:
            raise Mixed(f"{op}: on cuda:0 {[tuple(x.shape) for x in there]}, on cpu {[tuple(x.shape) for x in wrong]}, "
                        f"at {where()}")

    def check_generators(self, op, leaves, device):
        for generator in leaves:
            if isinstance(generator, torch._C.Generator) and (generator._cdata in self.generators) != (device == GPU):
                raise Mixed(f"{op}: a generator of another device than {device}, at {where()}")

    def note_waits(self, op, args, kwargs, there, device):
        """What the host has to wait for: values that it looks at, and copies that are not left to themselves."""
        if op in COPIES:
            source = args[COPIES[op]]
            blocking = not (args[2] if op is aten.copy_.default and len(args) > 2 else kwargs.get("non_blocking"))
            if isinstance(source, OnGPU) and device == CPU:
                self.note("copy to the host" if blocking else "read before it has come")
            elif not isinstance(source, OnGPU) and device == GPU and blocking:
                self.note("copy from the host")
        elif op in INDEXING and there:
            indices = [index for index in args[1] if index is not None]
            if any(not isinstance(index, OnGPU) for index in indices):
                self.note("index on the host")
            one_number = op is not aten.index.Tensor and args[2].numel() == 1  # becomes a masked_fill
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not one_number:
                self.note("mask as index")
        elif there and {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(op.tags):
            self.note(str(op).removeprefix("aten."))

    def note(self, what):
        self.waits[what, where()] += 1

    def compute(self, op, args, kwargs, on_gpu):
        """The operator on the CPU; what it draws comes from the GPU's generator, where it runs on the GPU."""
        if on_gpu and "device" in kwargs:
            kwargs = {**kwargs, "device": CPU}
        args, kwargs = tree_map(lambda x: x.values if isinstance(x, OnGPU) else x, (args, kwargs))
        if not on_gpu or torch.Tag.nondeterministic_seeded not in op.tags or kwargs.get("generator") is not None:
            out = op(*args, **kwargs)
            # A copy from the one device to the other shares no memory, though here both are one.
            return out.clone() if op is aten._to_copy.default and out is args[0] else out
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self.random_state)
        try:
            return op(*args, **kwargs)
        finally:
            self.random_state = torch.default_generator.get_state()
            torch.default_generator.set_state(before)


def where():
    """The line of the library that an operator was called from."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(LIBRARY)]
    return f"{frames[-1].filename[len(LIBRARY) + 1:]}: {frames[-1].line}" if frames else "backward"
