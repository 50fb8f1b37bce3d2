"""A GPU that is not there: device "cuda" on a CPU-only build of torch, its tensors in host memory. For tests.

    PRETEND_GPUS=2 PYTHONPATH=tests/pretend python main.py --world_size 2    # in every process that this starts, too
    pretend_cuda.install(2)                                                  # in this process alone

Pretended tensors have the real dispatch key, `.device` and `.is_cuda`. Refused is what a CUDA build refuses: an
operator with tensors on both devices (but for numbers, indices and bitsandbytes' paged state), NumPy of a tensor on the
GPU, fp16's gradient scaler on bf16 gradients; and by pretend_nccl.py what NCCL refuses. Every operator is that of the
CPU, so a run that is repeated has the same bits.

It cannot show kernels (CUDA's, Triton's, bitsandbytes'), NCCL's transport, asynchrony, memory or speed. What it counts
is where the host would wait for the device:

    COUNTS     operators; waits; synchronize (in waits, too); paged (tensors); "copies to host", "copies to device",
               "bytes to host", "bytes to device"
    WAITS      {(operator, "file.py:line"): waits}, the line being the innermost one outside of the libraries

Waits are: copies between the devices, unless non_blocking and from or to pinned memory; a value that Python asks for
(`item`, `tolist`, `equal`, a mask as an index); `synchronize`. Random numbers are the CPU's. `_foreach` operators count
as one. x86-64 Linux with glibc, and torch 2.13.0 without CUDA: see `why_not`.
"""

import collections
import contextlib
import ctypes
import functools
import logging
import os
import platform
import sys
import threading
import warnings
import weakref

import torch
import torch.utils._device

COUNTS, WAITS = collections.Counter(), collections.Counter()
PINNED = weakref.WeakSet()  # storages that are said to be in pinned memory
LIBRARIES = []  # of operators; they are gone with their Python objects
GPU = torch.device("cuda", 0)  # a rank sees one
MEMORY = 80 * 2**30  # bytes


def why_not():
    """Return why there can be no pretended GPU here, "" where there can."""
    if not torch.__version__.startswith("2.13.0") or torch.version.cuda:
        return "needs a CPU-only build of torch 2.13.0"
    if (sys.platform, platform.machine(), platform.libc_ver()[0]) != ("linux", "x86_64", "glibc"):
        return "needs Linux with glibc on x86-64"
    return ""


# -----------------------------------------------------------------------------
# two tensors over the same memory, one on the host and one on the GPU, by DLPack


class Device(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("number", ctypes.c_int32)]


class DType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class ManagedTensor(ctypes.Structure):
    """DLPack's DLManagedTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("dimensions", ctypes.c_int32),
        ("dtype", DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


ON_HOST, ON_GPU = 1, 2  # DLPack's numbers for the kinds of devices
CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}  # DLPack's numbers for the kinds of dtypes
# torch calls the deleter from any thread, with and without the interpreter's lock, also after the interpreter's end, so
# it cannot be Python. time() of libc writes the time to where its argument points: over `data`, which shows the end
DELETER = ctypes.cast(ctypes.CDLL(None).time, ctypes.c_void_p)
SWEEP_EVERY = 5000  # tensors, or
SWEEP_BYTES = 2**28
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Lent:
    """Memory that torch's tensors use by DLPack, kept until each of them has called its deleter."""

    def __init__(self):
        self.entries, self.lock = [], threading.Lock()
        self.new_entries = self.new_bytes = 0
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))  # tensors may outlive the interpreter

    def add(self, managed, owner, num_bytes):
        with self.lock:
            self.new_entries += 1
            self.new_bytes += num_bytes
            if self.new_entries > max(SWEEP_EVERY, len(self.entries) // 2) or self.new_bytes > SWEEP_BYTES:
                self.entries = [entry for entry in self.entries if entry[0].data == entry[2]]
                self.new_entries = self.new_bytes = 0
            self.entries.append((managed, owner, managed.data))


LENT = Lent()


def dlpack_dtype(dtype):
    bits = 8 * dtype.itemsize
    return DType(CODES[str(dtype).removeprefix("torch.").rstrip("0123456789")], bits, 1)


def tensor_over(address, size, stride, dtype, kind, owner):
    """Return a tensor on the device of this `kind`, over memory that `owner` keeps alive."""
    rank = len(size)
    managed = ManagedTensor(address, Device(kind, 0), rank, dlpack_dtype(dtype), deleter=DELETER)
    managed.shape, managed.strides = (ctypes.c_int64 * rank)(*size), (ctypes.c_int64 * rank)(*stride)
    num_bytes = dtype.itemsize
    for length in size:
        num_bytes *= length
    LENT.add(managed, owner, num_bytes)
    return torch._C._from_dlpack(new_capsule(ctypes.addressof(managed), b"dltensor", None))


def to_other_side(tensor, kind):
    address, storage = torch._C._TensorBase.data_ptr(tensor), tensor.untyped_storage()
    return tensor_over(address, tensor.size(), tensor.stride(), tensor.dtype, kind, storage)


def host(tensor):
    """Return a tensor on the CPU over the memory of one on the pretended GPU."""
    return to_other_side(tensor, ON_HOST) if tensor.is_cuda else tensor


def gpu(tensor):
    """Return a tensor on the pretended GPU over the memory of one on the CPU."""
    return tensor if tensor.is_cuda else to_other_side(tensor, ON_GPU)


# -----------------------------------------------------------------------------
# operators: those of the CPU, for tensors on the GPU

# that take tensors of both devices: copies, and indices on the CPU
TAKE_BOTH = """copy_ _to_copy index.Tensor index_put index_put_ _index_put_impl_ _unsafe_index.Tensor
set_.source_Tensor""".split()
ASK_FOR_A_VALUE = "_local_scalar_dense nonzero is_nonzero equal masked_select unique_dim _unique2 unique_consecutive"
ASK_FOR_A_VALUE = ASK_FOR_A_VALUE.split()
# that torch has a kernel for all devices for, which ends in what a CPU-only build lacks
OF_ALL_DEVICES = "copy_ index.Tensor _to_copy".split()
OF_BITSANDBYTES = """quantize_4bit dequantize_4bit quantize_blockwise dequantize_blockwise gemv_4bit gemm_4bit
optimizer_update_32bit optimizer_update_8bit_blockwise""".split()
UNSCALE = "_amp_foreach_non_finite_check_and_unscale_"


def wait(operator):
    """Count that the host waits for the device, and where."""
    COUNTS["waits"] += 1
    frame = sys._getframe(1)
    while frame.f_back and ("site-packages" in frame.f_code.co_filename or frame.f_globals is globals()):
        frame = frame.f_back
    WAITS[operator, f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"] += 1


def count_copy(to_host, tensor, asynchronous, operator="copy_"):
    where = "to host" if to_host else "to device"
    COUNTS[f"copies {where}"] += 1
    COUNTS[f"bytes {where}"] += tensor.numel() * tensor.element_size()
    if not asynchronous:
        wait(f"{operator} {where}")


def for_each_tensor(function, value):
    """Return `value` with every tensor in it, also in lists, replaced by what `function` returns for it."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(for_each_tensor(function, part) for part in value)
    return value


class Call:
    """One call of an operator: its tensors of the GPU, as they are to the operator of the CPU."""

    def __init__(self, name):
        self.name = name
        self.lowered = []  # (tensor on the GPU, the same on the CPU)
        self.on_host = []  # its other tensors, without numbers

    def lower(self, tensor):
        if tensor.is_cuda:
            # without elements, it may be an output that is to be resized, which borrowed memory cannot be
            lowered = host(tensor) if tensor.numel() else torch.empty(tensor.shape, dtype=tensor.dtype)
            self.lowered.append((tensor, lowered))
            return lowered
        if tensor.dim() and not getattr(tensor, "is_paged", False):
            self.on_host.append(tensor)
        return tensor

    def lift(self, tensor):
        for original, lowered in self.lowered:
            if lowered is tensor:  # an operator in place
                return original
        return gpu(tensor)

    def follow_shapes(self):
        """Let the tensors on the GPU have the shapes that the operator has given to those on the CPU."""
        for original, lowered in self.lowered:
            if original.shape != lowered.shape:
                original.data = gpu(lowered)

    def check(self, args):
        """Raise what a CUDA build raises."""
        if self.lowered and self.on_host and self.name not in TAKE_BOTH:
            shape = tuple(self.on_host[0].shape)
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({self.name}, tensor on the CPU of shape {shape})"
            )
        if self.name == UNSCALE and any(gradient.dtype == torch.bfloat16 for gradient in args[0]):
            raise NotImplementedError(
                "\"_amp_foreach_non_finite_check_and_unscale_cuda\" not implemented for 'BFloat16'"
            )

    def count(self, args, named):
        COUNTS["operators"] += 1
        if self.name == "copy_" and args[0].device != args[1].device:
            non_blocking = args[2] if len(args) > 2 else named.get("non_blocking", False)
            on_host = args[1] if args[0].is_cuda else args[0]
            count_copy(on_host is args[0], args[0], non_blocking and on_host.is_pinned())
        if self.name in ASK_FOR_A_VALUE:
            wait(self.name)
        if self.name == "index.Tensor" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            wait("index by a mask")


def run_on_host(operator, *args, **named):
    """Run an operator on tensors of the GPU as that of the CPU, with torch's signature."""
    name = operator.name().removeprefix("aten::")
    if name == "_to_copy":
        return convert(*args, **named)
    if name.startswith("set_.source_Storage"):
        return set_storage(*args)
    if name == "_foreach_copy_" and args[0][0].device != args[1][0].device:  # CUDA has no kernel for that, either
        return copy_each(*args, **named)
    call = Call(name)
    low = [for_each_tensor(call.lower, value) for value in args]
    for i, argument in enumerate(operator._schema.arguments[: len(low)]):
        if isinstance(low[i], (int, float)) and str(argument.type) == "Tensor":  # a number that torch has unwrapped
            low[i] = torch.tensor(low[i])
    low_named = {key: for_each_tensor(call.lower, value) for key, value in named.items()}
    call.check(args)
    call.count(args, named)
    if named.get("device") is not None:
        low_named["device"] = torch.device("cpu")
    low_named.pop("pin_memory", None)
    if name.startswith("addmm.dtype"):  # the CPU has none
        low[0], out_dtype = low[0], low.pop(3)
        low[1], low[2], operator = low[1].to(out_dtype), low[2].to(out_dtype), torch.addmm
    result = operator(*low, **low_named)
    call.follow_shapes()
    return for_each_tensor(call.lift, result)


def convert(tensor, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    """`tensor.to(...)` of a tensor on the GPU."""
    COUNTS["operators"] += 1
    result = torch.ops.aten._to_copy.default(host(tensor), dtype=dtype, memory_format=memory_format)
    if device is None or device.type == "cuda":
        return gpu(result)
    count_copy(True, result, non_blocking, "to")  # torch takes pinned memory for what is not to block
    if non_blocking:
        PINNED.add(result.untyped_storage())
    return result


def copy_each(targets, sources, non_blocking=False):
    for target, source in zip(targets, sources):
        target.copy_(source, non_blocking)


def set_storage(tensor, storage, offset=0, size=None, stride=(1,)):
    """`tensor.set_(storage)` on the GPU, as torch.load does it."""
    width = tensor.element_size()
    size = (storage.nbytes() // width,) if size is None else size
    tensor.data = tensor_over(storage.data_ptr() + offset * width, size, stride, tensor.dtype, ON_GPU, storage)
    return tensor


def register_operators():
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(run_on_host, "CUDA")
    aten = torch.library.Library("aten", "IMPL")
    names = list(OF_ALL_DEVICES)
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::_foreach_"):  # else one operator per tensor, as for devices that have no kernel
            names.append(name.removeprefix("aten::"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these have kernels
        for name in names:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            aten.impl(name, functools.partial(run_on_host, operator), "CUDA")
    LIBRARIES.extend([everything, aten])


def prepare_bitsandbytes():
    """Let its operators on the GPU be its kernels for the CPU, and its paged state a tensor on the CPU that says so."""
    import bitsandbytes

    library = torch.library.Library("bitsandbytes", "IMPL")
    for name in OF_BITSANDBYTES:
        operator = getattr(torch.ops.bitsandbytes, name).default
        library.impl(name, functools.partial(run_on_host, operator), "CUDA")
    LIBRARIES.append(library)

    def get_paged(*shape, dtype=torch.float32, device=GPU):
        COUNTS["paged"] += 1
        tensor = torch.zeros(*shape, dtype=dtype)
        tensor.is_paged, tensor.page_deviceid = True, device.index
        return tensor

    functional = bitsandbytes.functional
    functional.get_paged = get_paged
    functional.prefetch_tensor = lambda *args, **named: None
    functional.fill = lambda tensor, value, **named: tensor.fill_(value)


# -----------------------------------------------------------------------------
# what a CPU-only build of torch lacks

# places of functions in the table of at::CUDAHooksInterface, torch 2.13
SLOTS = {"isBuilt": 2, "hasPrimaryContext": 4, "hasCUDA": 16, "current_device": 26}
TABLE_LENGTH = 80  # at least as long as that table


def claim_accelerator():
    """Have torch take CUDA for this build's accelerator, without which autograd refuses its tensors.

    The guard, which switches between GPUs, becomes the one that does nothing, which torch puts in place of one that
    counts no devices. Of the CUDA hooks, isBuilt answers what current_device does, -1 without CUDA, which is true;
    hasPrimaryContext what hasCUDA does, which is false.
    """
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    c10 = ctypes.CDLL(os.path.join(folder, "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")  # CPU, CUDA
    answer_zero = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    functions = (ctypes.c_void_p * 64)(*[ctypes.cast(answer_zero, ctypes.c_void_p).value] * 64)
    without_devices = ctypes.c_void_p(ctypes.addressof(functions))  # an object, which begins with its table
    guards[1] = ctypes.addressof(without_devices)
    torch._C._ensureCUDADeviceGuardSet()
    assert guards[1] != ctypes.addressof(without_devices)
    get_hooks = ctypes.CDLL(os.path.join(folder, "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.POINTER(ctypes.c_void_p)
    hooks = get_hooks()
    table = (ctypes.c_void_p * TABLE_LENGTH)()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(table))  # is asked after the interpreter's end, too
    ctypes.memmove(table, hooks[0], ctypes.sizeof(table))
    table[SLOTS["isBuilt"]] = table[SLOTS["current_device"]]
    table[SLOTS["hasPrimaryContext"]] = table[SLOTS["hasCUDA"]]
    hooks[0] = ctypes.addressof(table)
    assert torch.accelerator.current_accelerator().type == "cuda", "see SLOTS"


def number_visible(num_gpus):
    """Return how many GPUs CUDA_VISIBLE_DEVICES leaves: the numbers and names before the first that there is not."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return num_gpus
    found = 0
    for name in visible.split(","):
        name = name.strip()
        if not name.startswith(("GPU-", "MIG-")) and not (name.isdigit() and int(name) < num_gpus):
            break
        found += 1
    return found


class Stream(contextlib.nullcontext):
    """A stream on which everything is done at once."""

    cuda_stream, device = 0, GPU

    def __init__(self, *args, **named):
        super().__init__()

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or Event()

    def query(self):
        return True

    def synchronize(self):
        wait("Stream.synchronize")


class Event:
    """An event that has happened when it is asked for."""

    def __init__(self, *args, **named):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def elapsed_time(self, end):
        return 0.0  # milliseconds

    def synchronize(self):
        wait("Event.synchronize")


class Properties:
    name, total_memory, multi_processor_count, warp_size = "Pretended GPU", MEMORY, 132, 32
    gcnArchName, regs_per_multiprocessor, max_threads_per_multi_processor = "", 65536, 2048

    def __init__(self, bf16):
        self.major, self.minor = (9, 0) if bf16 else (7, 5)


def install(num_gpus=1, bf16=True):
    """Let this process have so many GPUs, of which one that knows no bf16 computes in fp16. Once, before torch.cuda is
    asked for anything."""
    assert not why_not(), why_not()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports optional kernels as missing
    import bitsandbytes  # noqa: F401 (before there is a GPU, for which it has no library)

    patch_torch_cuda(num_gpus, bf16)
    patch_tensors()
    claim_accelerator()
    register_operators()
    prepare_bitsandbytes()


def patch_torch_cuda(num_gpus, bf16):
    cuda, properties, nothing = torch.cuda, Properties(bf16), lambda *args, **named: None

    def synchronize(device=None):
        COUNTS["synchronize"] += 1
        wait("synchronize")

    cuda.is_available = lambda: number_visible(num_gpus) > 0
    cuda.device_count = lambda: number_visible(num_gpus)
    cuda.is_initialized = cuda._is_compiled = lambda: True
    cuda.current_device = torch._C._cuda_getCurrentRawStream = lambda *args: 0
    cuda.synchronize = synchronize
    cuda.get_device_name = lambda device=None: properties.name
    cuda.get_device_capability = lambda device=None: (properties.major, properties.minor)
    cuda.get_device_properties = lambda device=None: properties
    cuda.is_bf16_supported = lambda including_emulation=True: bf16
    cuda.mem_get_info = lambda device=None: (MEMORY, MEMORY)
    cuda.memory_stats = lambda device=None: collections.Counter()
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda device=None: 0)
    for name in ("_lazy_init", "init", "set_device", "empty_cache", "ipc_collect", "reset_peak_memory_stats"):
        setattr(cuda, name, nothing)
    cuda.manual_seed = cuda.manual_seed_all = nothing  # its random numbers are the CPU's
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device="cuda": torch.get_rng_state()
        module.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
        module.get_rng_state_all = lambda: [torch.get_rng_state()]
        module.set_rng_state_all = lambda states: torch.set_rng_state(states[0])
    cuda.Stream, cuda.Event = Stream, Event
    cuda.device = cuda.device_of = cuda.stream = contextlib.nullcontext
    cuda.current_stream = cuda.default_stream = Stream


def patch_tensors():
    """What torch does with tensors beside calling operators."""
    import safetensors.torch

    numpy, tolist, load_file = torch.Tensor.numpy, torch.Tensor.tolist, safetensors.torch.load_file

    def refuse_numpy(self, *args, **named):
        if self.is_cuda:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return numpy(self, *args, **named)

    def counted_tolist(self):
        if self.is_cuda:
            wait("tolist")
        return tolist(host(self.detach()))

    def pin(self, device=None):
        pinned = self.clone()
        PINNED.add(pinned.untyped_storage())
        return pinned

    torch.Tensor.numpy, torch.Tensor.tolist = refuse_numpy, counted_tolist
    torch.Tensor.pin_memory = pin
    torch.Tensor.is_pinned = lambda self, device=None: not self.is_cuda and self.untyped_storage() in PINNED
    torch.Tensor.record_stream = lambda self, stream: None
    torch.utils._device._device_constructors()  # `with torch.device(...)` knows them as they are before
    for owner in (torch, torch.Tensor):
        for name in "empty zeros ones full empty_like zeros_like ones_like full_like tensor empty_strided".split():
            for each in (name, f"new_{name}"):
                if hasattr(owner, each):
                    setattr(owner, each, with_pinned_memory(getattr(owner, each)))
    safetensors.torch.load_file = lambda path, device="cpu": {k: v.to(device) for k, v in load_file(path).items()}
    torch.UntypedStorage.cpu = storage_to_host
    torch.serialization.register_package(1, lambda storage: None, load_storage)


def with_pinned_memory(make):
    """Return a function that makes a tensor as `make` does, and says of pinned memory that it is."""

    @functools.wraps(make)
    def make_and_pin(*args, pin_memory=False, **named):
        tensor = make(*args, **named)
        if pin_memory:
            PINNED.add(tensor.untyped_storage())
        return tensor

    return make_and_pin


def bytes_of(storage):
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def storage_to_host(storage):
    """As torch.save takes a storage from the GPU."""
    contents = host(bytes_of(storage)).clone()
    if storage.device.type == "cuda":
        count_copy(True, contents, asynchronous=False, operator="storage")
    return contents.untyped_storage()


def load_storage(storage, location):
    """As torch.load puts a storage onto the GPU; None if it belongs on the CPU."""
    if not str(location).startswith("cuda"):
        return None
    count_copy(False, bytes_of(storage), asynchronous=False, operator="storage")
    return gpu(bytes_of(storage)).untyped_storage()
