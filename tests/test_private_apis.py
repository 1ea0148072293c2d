"""Names that PyTorch and accelerate do not promise to keep: a test for each that we use says which
one is gone, before a training finds out."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tinytransformer.runs import is_compile_error


def test_accelerator_state_reset_state():
    "`AcceleratorState._reset_state`, by which a process can train with another precision."
    for precision in ("bf16", "no"):
        AcceleratorState._reset_state()
        assert Accelerator(mixed_precision=precision).mixed_precision == precision


def test_mkldnn_is_mkldnn_bf16_supported():
    "`torch.ops.mkldnn._is_mkldnn_bf16_supported`, which says whether a CPU multiplies in bfloat16."
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)


def test_dynamo_exc():
    "`torch._dynamo.exc`, where the errors of torch.compile are; they are RuntimeErrors."
    exc = pytest.importorskip("torch._dynamo.exc")
    assert issubclass(exc.TorchDynamoException, RuntimeError)
    assert is_compile_error(exc.BackendCompilerFailed(print, ValueError("here"), None))
    assert not is_compile_error(RuntimeError("here"))
