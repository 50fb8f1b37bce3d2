"""NCCL that is not there: gloo over the memory of pretended GPUs, with NCCL's rules. For tests, see pretend_cuda.py.

Refused is what NCCL refuses: tensors on the CPU, tensors that are not contiguous, dtypes that it has no word for, two
ranks of a group on one GPU; by gloo, tensors on the GPU; and, which is a rule of this project alone, messages with
tensors on the GPU: they would stay there on the rank that receives them.
"""

import functools
import os
import weakref

import pretend_cuda
import torch
import torch.distributed as dist

GROUPS = weakref.WeakSet()  # that would be NCCL's
NUM_TENSORS = {"all_reduce": 1, "broadcast": 1, "reduce": 1, "all_to_all_single": 2}  # the first arguments
DTYPES = "float64 float32 float16 bfloat16 int64 int32 int8 uint8 bool".split()
MESSAGES = {"all_gather_object": 1, "send_object_list": 0}  # which argument is sent


def install():
    """Let this process have NCCL. Once, before it joins other ranks."""
    init, new_group, get_backend = dist.init_process_group, dist.new_group, dist.get_backend

    def pretend_init(backend=None, *args, device_id=None, **named):
        init("gloo" if backend == "nccl" else backend, *args, **named)
        if backend == "nccl":
            join(dist.group.WORLD)

    def pretend_new_group(*args, backend=None, **named):
        group = new_group(*args, backend="gloo" if backend == "nccl" else backend, **named)
        if backend == "nccl":
            join(group)
        return group

    def pretend_backend(group=None):
        return "nccl" if is_nccl(group) else get_backend(group)

    dist.init_process_group, dist.new_group, dist.get_backend = pretend_init, pretend_new_group, pretend_backend
    dist.is_nccl_available = lambda: True
    for name in NUM_TENSORS:
        setattr(dist, name, checked_collective(name, getattr(dist, name)))
    for name in MESSAGES:
        setattr(dist, name, checked_message(name, getattr(dist, name)))


def is_nccl(group):
    return (group or dist.group.WORLD) in GROUPS


def join(group):
    """Have the members of a group of NCCL's compare their GPUs, as it does when they first meet."""
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        return
    machine = os.readlink("/proc/self/ns/net")  # which a network namespace may be
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    gpus = [None] * dist.get_world_size(group)
    dist.all_gather_object(gpus, (machine, visible[0].strip()), group=group)  # all members participate
    if len(set(gpus)) < len(gpus):
        raise RuntimeError(f"NCCL: Duplicate GPU detected: rank {dist.get_rank(group)} is on CUDA device {gpus}")
    GROUPS.add(group)


def checked_collective(name, collective):
    @functools.wraps(collective)
    def check_and_call(*args, **named):
        args, kind = list(args), "cuda" if is_nccl(named.get("group")) else "cpu"
        for i, tensor in enumerate(args[: NUM_TENSORS[name]]):
            if tensor.device.type != kind:
                raise RuntimeError(f"No backend type associated with device type {tensor.device.type} ({name})")
            if not tensor.is_contiguous():
                raise ValueError(f"Tensors must be contiguous ({name})")
            if kind == "cuda" and str(tensor.dtype).removeprefix("torch.") not in DTYPES:
                raise TypeError(f"Input tensor data type is not supported for NCCL process group: {tensor.dtype}")
            args[i] = pretend_cuda.host(tensor)
        return collective(*args, **named)

    return check_and_call


def checked_message(name, function):
    @functools.wraps(function)
    def check_and_call(*args, **named):
        if holds_gpu_tensor(args[MESSAGES[name]]):
            raise RuntimeError(f"a message with a tensor on the GPU ({name})")
        return function(*args, **named)

    return check_and_call


def holds_gpu_tensor(value):
    """Whether a tensor on the GPU is in a value, in its attributes, or in lists and dicts of these."""
    if isinstance(value, torch.Tensor):
        return value.is_cuda
    if isinstance(value, dict):
        return any(holds_gpu_tensor(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return any(holds_gpu_tensor(part) for part in value)
    return hasattr(value, "__dict__") and holds_gpu_tensor(vars(value))
