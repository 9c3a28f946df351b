"""The competition: other ways to multiply by the same or an equally large matrix, each with its own oracle.

A peer is made for one matrix and answers `call(x)`, a function to time, and `error(x)`, how far its result is from
fp64. Where a peer cannot do a shape or is not installed, making it raises :class:`Absent` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

GROUP = 128  # of the peers that know no whole-row scales


class Absent(Exception):
    """This peer cannot take part; the text says why."""


def relative_error(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    """max |y - x W^T| / (|x| |w|) in fp64, on at most 512 of the N outputs spread over the matrix. w [N, K]."""
    rows = torch.linspace(0, w.shape[0] - 1, min(512, w.shape[0])).long()
    some = w[rows].double()
    size = x.double().norm(dim=1, keepdim=True) * some.norm(dim=1) + 1e-30
    return float(((y[:, rows].double() - x.double() @ some.T).abs() / size).max())


class Fp32:
    """torch's fp32 linear on the dequantized matrix."""

    tolerance = 2e-5

    def __init__(self, w: torch.Tensor, bits: int):
        self.w = w

    def copies(self, count: int) -> list[Fp32]:
        """This one and others with the same weights elsewhere in memory."""
        return [self, *(type(self)(self.w.clone(), 32) for _ in range(count - 1))]

    @property
    def nbytes(self) -> int:
        return self.w.nbytes

    def call(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        w = self.w
        return lambda: F.linear(x, w)

    def error(self, x: torch.Tensor) -> float:
        return relative_error(self.call(x)(), x, self.w)


class Bf16(Fp32):
    """torch's bf16 linear; activations arrive as bf16."""

    tolerance = 2e-2

    def __init__(self, w: torch.Tensor, bits: int):
        super().__init__(w.bfloat16(), bits)

    def call(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        w, x = self.w, x.bfloat16()
        return lambda: F.linear(x, w)

    def error(self, x: torch.Tensor) -> float:
        return relative_error(self.call(x)(), x.bfloat16(), self.w)


class IntMM:
    """torch._int_mm: int8 matrices that are there already, int32 sums without scales. Less work than ours."""

    tolerance = 1e-9

    def __init__(self, w: torch.Tensor, bits: int):
        self.w = torch.randint(-127, 128, w.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))

    @property
    def nbytes(self) -> int:
        return self.w.nbytes

    def _operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x * (127 / x.abs().max())).round().to(torch.int8), self.w.t()

    def call(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        codes, w = self._operands(x)
        return lambda: torch._int_mm(codes, w)

    def error(self, x: torch.Tensor) -> float:
        codes, _ = self._operands(x)
        return relative_error(self.call(x)(), codes, self.w)


class Int4:
    """torch's int4 weight-only op in bf16, groups of 128."""

    tolerance = 2e-2

    def __init__(self, w: torch.Tensor, bits: int):
        n, k = w.shape
        if k % GROUP or n % 16:
            raise Absent(f"needs K in multiples of {GROUP} and N in multiples of 16")
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
        scale = (torch.rand(n, k // GROUP, generator=torch.Generator().manual_seed(2)) + 0.1).bfloat16()
        self.packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scale_zero = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
        self.w = (codes.float() - 8) * scale.float().repeat_interleave(GROUP, 1)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale_zero.nbytes

    def call(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        x, packed, scale_zero = x.bfloat16(), self.packed, self.scale_zero
        op = torch.ops.aten._weight_int4pack_mm_for_cpu
        return lambda: op(x, packed, GROUP, scale_zero)

    def error(self, x: torch.Tensor) -> float:
        return relative_error(self.call(x)(), x.bfloat16(), self.w)


class OnnxRuntime:
    """ONNX Runtime's MatMulNBits with int8 arithmetic (accuracy_level 4) at our bits, 2 bits standing in for 1."""

    tolerance = 3e-2

    def __init__(self, w: torch.Tensor, bits: int):
        try:
            import onnx
            import onnxruntime
        except ImportError:
            raise Absent("not installed: pip install lowbit[bench]") from None
        n, k = w.shape
        bits, blocks = max(2, bits), -(-k // GROUP)
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        scale = torch.rand(n, blocks, generator=torch.Generator().manual_seed(2)) + 0.1
        self.w = (codes.float() - 2 ** (bits - 1)) * scale.repeat_interleave(GROUP, 1)[:, :k]
        padded = F.pad(codes, (0, blocks * GROUP - k)).view(n, -1, 8 // bits)
        packed = sum(padded[:, :, i] << (i * bits) for i in range(8 // bits)).view(n, blocks, -1)
        self.nbytes = packed.nbytes + scale.nbytes
        helper, fp32 = onnx.helper, onnx.TensorProto.FLOAT
        node = helper.make_node(
            "MatMulNBits", ["x", "codes", "scale"], ["y"], domain="com.microsoft",
            K=k, N=n, bits=bits, block_size=GROUP, accuracy_level=4,
        )  # fmt: skip
        stored = {"codes": packed, "scale": scale.flatten()}
        graph = helper.make_graph(
            [node], "product",
            [helper.make_tensor_value_info("x", fp32, ["m", k])], [helper.make_tensor_value_info("y", fp32, ["m", n])],
            [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in stored.items()],
        )  # fmt: skip
        sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=sets, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        onnxruntime.set_default_logger_severity(4)  # what it cannot do, the exception says
        try:
            self.session: Any = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
            raise Absent(f"version {onnxruntime.__version__} has no {bits}-bit product") from None

    def call(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        run, feed = self.session.run, {"x": x.numpy()}
        return lambda: run(None, feed)

    def error(self, x: torch.Tensor) -> float:
        return relative_error(torch.from_numpy(self.call(x)()[0]), x, self.w)


PEERS = {
    "torch fp32": Fp32,
    "torch bf16": Bf16,
    "torch int_mm": IntMM,
    "torch int4": Int4,
    "ONNX Runtime": OnnxRuntime,
}
# Those that stand beside cold measurements, their copies being cheap to make, and beside variants of our kernels.
CHEAP_PEERS = ("torch fp32", "torch bf16")
