"""A stand-in for an accelerator without float64, as Apple's GPUs are: `StandIn` gives tensors the
device `mps`, computes on the CPU, and refuses what such a device refuses."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("mps")
WIDE = {torch.float64, torch.complex128}
# what leaves the device: a copy on the CPU, or Python's own numbers
TO_PYTHON = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__int__}
TO_PYTHON |= {torch.Tensor.__float__, torch.Tensor.__index__, torch.equal, torch.Tensor.equal}
# what takes tensors of two devices at once
ANY_DEVICE = {torch.Tensor.copy_, torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class OnDevice(torch.Tensor):
    "A tensor on the device."

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


def call(func, args, kwargs):
    "Compute on the CPU; what comes out is on the device where a tensor that went in was."
    tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    here = any(isinstance(t, OnDevice) for t in tensors)
    if here and func == torch.Tensor.device.__get__:
        return DEVICE
    if func in (torch.device, torch._C._nn._parse_to):
        return func(*args, **kwargs)
    target = wanted_device(func, args, kwargs)
    args, kwargs = tree_map(without_device, (args, kwargs))
    with torch._C.DisableTorchFunctionSubclass():
        if func in (torch.Tensor.cpu, torch.Tensor.to) and target == torch.device("cpu"):
            return func(*args, **kwargs).as_subclass(torch.Tensor).clone()
        if here and func is torch.Tensor.numpy:
            raise TypeError("can't convert a tensor on the device to numpy: use .cpu() first")
        out = func(*args, **kwargs)
        if func in TO_PYTHON or not (here or target == DEVICE):
            return out
        computed = any(isinstance(t, torch.Tensor) for t in tree_iter(out))
        if computed and here and target is None and func not in ANY_DEVICE:
            elsewhere = [t for t in tensors if t.dim() and not isinstance(t, OnDevice)]
            assert not elsewhere, f"{func} of tensors on two devices"
        return tree_map(lambda t: on_device(t, func, tensors), out)


def wanted_device(func, args, kwargs) -> torch.device | None:
    "Where the result is asked to be, if that is said."
    if func is torch.Tensor.cpu:
        return torch.device("cpu")
    given = kwargs.get("device")
    if func is torch.Tensor.to:
        given = given or next((a for a in args[1:] if isinstance(a, str | torch.device)), None)
        others = [a for a in args[1:] if isinstance(a, torch.Tensor)]
        given = given or (others[0].device if others else None)
    return torch.device(given) if given is not None else None


def without_device(value):
    is_place = isinstance(value, str | torch.device)
    return torch.device("cpu") if is_place and value in (DEVICE, "mps") else value


def on_device(value, func, tensors):
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype in WIDE:
        raise TypeError(f"{func}: the device has no float64")
    if (
        isinstance(value, OnDevice)
        or func is not torch.Tensor.to
        and any(value is t for t in tensors)
    ):
        return value  # computed in place
    return value.as_subclass(OnDevice)


class StandIn(TorchFunctionMode):
    "While it is entered, `mps` can be asked for in this thread."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


@contextmanager
def stand_in(monkeypatch) -> Iterator[None]:
    "The device, in this thread and all that it starts."
    run = threading.Thread.run

    def run_with_it(thread):
        with StandIn():
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", run_with_it)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with StandIn():
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
