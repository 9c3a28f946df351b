"""Kernels behind torch: prepacked weights, `lowbit.linear`, and the op `torch.ops.lowbit.linear`.

The extension takes raw addresses; everything that crosses is checked here first. Numbers (DESIGN section 5):

* ``compute="int8"``: activations are rounded to int8 with one scale a row (a row and group where weights are grouped),
  products are summed exactly in int32. A row that holds a NaN or an infinity gives NaN in all outputs.
* ``compute="exact"``: fp32 activations, fp32 accumulation; NaN and infinities propagate as IEEE 754 says.

Inputs of another float dtype are converted to fp32; the result is always fp32 and carries no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from lowbit import bitpack, pages, tuning
from lowbit.errors import LowbitError
from lowbit.quantize import QuantTensor, check_group, describe

try:
    from lowbit import _C  # after torch: see csrc/cpu/parallel.h
except ImportError as error:
    raise ImportError(
        "lowbit's extension is not built; build it with: pip install -e . (needs a C++17 compiler)"
    ) from error

COMPUTE = ("int8", "exact")
_PLAIN = (torch.Tensor, torch.nn.Parameter)  # subclasses go through the dispatcher
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def isa() -> str:
    """Name of the instruction set in use: "scalar", "neon", "avx2", "avx512" or "amx".

    Raises:
        LowbitError: the environment variable LOWBIT_ISA names one that is unknown or that this machine lacks.
    """
    try:
        return _C.isa()
    except RuntimeError as error:
        raise LowbitError(str(error)) from None


def set_isa(name: str | None) -> None:
    """Force an instruction set for this process, as LOWBIT_ISA does (tests, benchmarks); None undoes it.

    Raises:
        LowbitError: one that is unknown or that this machine lacks.
    """
    try:
        _C.set_isa(name or "")
    except RuntimeError as error:
        raise LowbitError(str(error)) from None


def available_isas() -> list[str]:
    """The instruction sets that LOWBIT_ISA may name on this machine."""
    return _C.available_isas()


def set_threads(count: int | None) -> None:
    """Threads a kernel may use; None: as many as torch uses, at most what the cgroup allows.

    Raises:
        LowbitError: not a positive integer.
    """
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise LowbitError(f"threads must be a positive integer or None, not {count!r}")
    _C.set_max_threads(count or 0)


def get_threads() -> int:
    """Threads a kernel called from this thread may use."""
    return _C.max_threads()


def native_engine(spec: dict, token_budget: int):
    """The extension's engine over checked weights; see :class:`lowbit.native.NativeBackend`."""
    return _C.Engine(spec, token_budget)


def forest_query(nodes: int, tokens: int, parents: int, requests: int, request_nodes: int, targets: int):
    """The extension's view of checked arrays, given by their addresses."""
    return _C.ForestQuery(nodes, tokens, parents, requests, request_nodes, targets)


def word_index(words: Sequence[str], unknown: int):
    """Ids of the words of many texts at once. ``encode(texts)`` splits like ``str.split()`` and returns the ids of all
    words, int32; where each text ends in them, int64 [T]; how many words of each are not among ``words``, int64 [T]."""
    return _C.WordIndex(words, unknown)


def tries(
    words: np.ndarray, ends: np.ndarray, group_ends: np.ndarray, prefixes: np.ndarray, prefix_ends: np.ndarray,
    most_words: int, most_nodes: int, end: int,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """N-best lists to tries, by csrc/tries.h; see :func:`lowbit.forest.tries`, which has checked the arrays."""
    return _C.tries(words, ends, group_ends, prefixes, prefix_ends, most_words, most_nodes, end)


class PackedWeight:
    """A matrix [N, K] in the tile layout of csrc/layout.h, ready for kernels; independent of the codes it came from.

    Attributes:
        tiles: uint8 [blocks, tiles, 128 * bits], blocks = ceil(N / 16), tiles = ceil(K / 64).
        scales: fp16 [blocks, spans, 16]; a span is a group, or a part of it of at most 65,536 inputs.
        table: int8 [2**bits].
        bits, group, span: see above; ``shape``: (N, K).
    """

    __slots__ = ("_native", "bits", "group", "scales", "shape", "span", "table", "tiles")

    def __init__(
        self,
        tiles: torch.Tensor,
        scales: torch.Tensor,
        table: torch.Tensor,
        shape: tuple[int, int],
        bits: int,
        group: int,
        span: int,
    ):
        self.tiles, self.scales, self.table = _aligned(tiles), _aligned(scales), table.contiguous()
        self.shape, self.bits, self.group, self.span = (int(shape[0]), int(shape[1])), bits, group, span
        self._native = _view(self.tiles, self.scales, self.table, *self.shape, bits, span)

    @classmethod
    def from_canonical(
        cls,
        packed_rows: torch.Tensor,
        scale: torch.Tensor,
        table: torch.Tensor,
        bits: int,
        k: int,
        group: int | None = None,
    ) -> PackedWeight:
        """Re-lay canonical packed rows.

        Args:
            packed_rows: uint8 [N, ceil(k * bits / 8)], see :mod:`lowbit.bitpack`; not kept.
            scale: fp16 [N, ceil(k / group)].
            table: int8 [2**bits].
            group: weights a scale along K, a multiple of 64; None for one scale a row.

        Raises:
            LowbitError: a shape, dtype or value that does not fit.
        """
        if bits not in (1, 2, 4, 8):
            raise LowbitError(f"bits must be one of 1, 2, 4, 8, not {bits!r}")
        if not isinstance(k, int) or k <= 0:
            raise LowbitError(f"k must be a positive integer, not {k!r}")
        group = k if group is None or group >= k else group
        if group != k:
            check_group(group)
        _expect("packed_rows", packed_rows, torch.uint8, (None, bitpack.row_bytes(k, bits)))
        n = packed_rows.shape[0]
        _expect("scale", scale, torch.float16, (n, -(-k // group)))
        _expect("table", table, torch.int8, (2**bits,))
        if bits == 8 and not torch.equal(table, torch.arange(-128, 128, dtype=torch.int8)):
            raise LowbitError("an 8-bit table must be level = code - 128")
        packed_rows, scale = packed_rows.contiguous(), scale.contiguous()
        span, blocks = _C.span_of(k, group), -(-n // 16)
        tiles = pages.empty(blocks, -(-k // 64), 128 * bits, dtype=torch.uint8)
        scales = pages.empty(blocks, -(-k // span), 16, dtype=torch.float16)
        _C.prepack_tiles(packed_rows.data_ptr(), n, k, bits, tiles.data_ptr())
        _C.prepack_scales(scale.data_ptr(), n, k, group, span, scales.data_ptr())
        return cls(tiles, scales, table.clone(), (n, k), bits, group, span)

    @classmethod
    def from_quant_tensor(cls, q: QuantTensor) -> PackedWeight:
        rows = bitpack.pack_codes(q.codes, q.bits)  # not q.pack(): ternary files use another packing
        return cls.from_canonical(rows, q.scale, q.table, q.bits, q.shape[1], q.group)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.tiles.nbytes + self.scales.nbytes + self.table.nbytes

    @property
    def lookup(self) -> bool:
        """Whether kernels look levels up, the table not being affine in the code."""
        return self._native.lookup

    def kernel_name(self, rows: int = 1, compute: str = "int8") -> str:
        """What runs for ``rows`` rows, for instance "avx512 4-bit small"."""
        isa()  # the error of a bad LOWBIT_ISA
        name = _C.kernel_name(self.bits, rows, compute == "exact")
        return name + (" lookup" if self.lookup and compute == "int8" else "")

    def dequantize_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids`` (int64, any shape [...]) as fp32 [..., K]: what an embedding needs.

        Raises:
            LowbitError: ids of another dtype, or outside [0, N).
        """
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
            raise LowbitError(f"ids must be an int64 tensor, not {describe(ids)}")
        flat = ids.long().contiguous().view(-1)
        if flat.numel():
            low, high = (int(v) for v in flat.aminmax())
            if low < 0 or high >= self.shape[0]:
                raise LowbitError(f"row {low if low < 0 else high} lies outside a matrix of {self.shape[0]} rows")
        out = torch.empty(flat.numel(), self.shape[1])
        _C.dequantize_rows(self._native, flat.data_ptr(), flat.numel(), out.data_ptr())
        return out.view(*ids.shape, self.shape[1])

    def __deepcopy__(self, memo: dict) -> PackedWeight:
        tiles, scales = pages.copy(self.tiles), pages.copy(self.scales)
        return self.__class__(tiles, scales, self.table.clone(), self.shape, self.bits, self.group, self.span)

    def __reduce__(self):
        return (
            self.__class__,
            # Clones: pickling a tensor writes its whole storage, here a chunk that many share (lowbit.pages).
            (self.tiles.clone(), self.scales.clone(), self.table, self.shape, self.bits, self.group, self.span),
        )

    def __repr__(self) -> str:
        n, k = self.shape
        return f"PackedWeight({n}x{k}, {self.bits} bits, group {self.group}, {self.nbytes} bytes)"


def packed(q: QuantTensor) -> PackedWeight:
    """The prepacked form of ``q``, made once and kept with it (edit ``q`` in place and it goes stale)."""
    weight = q._cache.get("cpu")
    if weight is None:
        weight = q._cache["cpu"] = PackedWeight.from_quant_tensor(q)
    return weight


def linear(
    x: torch.Tensor,
    q: QuantTensor | PackedWeight,
    bias: torch.Tensor | None = None,
    compute: str = "int8",
) -> torch.Tensor:
    """``x @ W.T + bias``: x float [..., K], W [N, K], bias [N] -> fp32 [..., N].

    Raises:
        LowbitError: shapes, dtypes or devices that do not fit, or an unknown ``compute``.
    """
    if not _is_traced():
        try:
            y = _linear(x, q, bias, compute)
        except RuntimeError as error:  # a bad LOWBIT_ISA, found at the first call
            raise LowbitError(str(error)) from None
        if y is not None:
            return y
    weight = q if isinstance(q, PackedWeight) else packed(q)
    if compute not in COMPUTE:
        raise LowbitError(f"compute must be one of {', '.join(COMPUTE)}, not {compute!r}")
    n, k = weight.shape
    exact = compute == "exact"
    if type(x) not in _PLAIN or torch.compiler.is_compiling():
        stored = (weight.tiles, weight.scales, weight.table)
        return torch.ops.lowbit.linear(x, *stored, bias, n, k, weight.bits, weight.span, exact)
    return _run(x, weight._native, n, k, bias, exact)


def _tensor_linear():
    """The usual call as one C function, which returns None for any other: csrc/bindings_linear.cpp. Where an
    older PyTorch lacks what it needs, a call takes 2 us more, and up to 30 when a matrix has displaced Python from the
    caches."""
    functions = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    try:
        return _C.TensorLinear(functions, _PLAIN, PackedWeight).run
    except (ImportError, TypeError):
        return lambda x, q, bias, compute: None


_linear = _tensor_linear()
# A lookup less than torch.compiler.is_compiling, and shorter: export, the difference, has types of tensors of its own.
_is_traced = torch.compiler.is_dynamo_compiling


def _run(x: torch.Tensor, native, n: int, k: int, bias: torch.Tensor | None, exact: bool) -> torch.Tensor:
    """The checked call into the extension. x [..., K] -> fp32 [..., N]."""
    if not x.ndim or x.shape[-1] != k:
        raise LowbitError(f"x {list(x.shape)} does not end in K = {k} of the weight [{n}, {k}]")
    if x.dtype is not torch.float32:
        if x.dtype not in _FLOATS:
            raise LowbitError(f"x must be a float tensor, not {x.dtype}")
        x = x.float()
    if not x.is_cpu:
        raise LowbitError(f"x is on {x.device}; this weight is on the CPU")
    *rows, _ = x.shape
    y, stride = torch.empty((*rows, n), dtype=torch.float32, device="cpu"), k
    if not x.is_contiguous():
        if x.ndim == 2 and x.stride(1) == 1 and x.stride(0) >= k:
            stride = x.stride(0)
        else:
            x = x.contiguous()
    if bias is not None:
        if bias.shape != (n,):
            raise LowbitError(f"bias {list(bias.shape)} does not fit the weight [{n}, {k}]")
        if bias.dtype is not torch.float32 or not bias.is_contiguous():
            bias = bias.float().contiguous()
        if not bias.is_cpu:
            raise LowbitError(f"bias is on {bias.device}; this weight is on the CPU")
    try:
        _C.linear(
            native, x.data_ptr(), math.prod(rows), stride, 0 if bias is None else bias.data_ptr(), y.data_ptr(), exact
        )
    except RuntimeError as error:  # as in linear()
        raise LowbitError(str(error)) from None
    return y


def _view(tiles, scales, table, n: int, k: int, bits: int, span: int):
    """The extension's view of three checked tensors; valid as long as they are."""
    tuning.apply_once(_C)
    if bits not in (1, 2, 4, 8) or n < 0 or k <= 0 or span <= 0 or (span < k and span % 64):
        raise LowbitError(f"no packed weight has {bits} bits, shape [{n}, {k}] and span {span}")
    blocks = -(-n // 16)
    _expect("tiles", tiles, torch.uint8, (blocks, -(-k // 64), 128 * bits))
    _expect("scales", scales, torch.float16, (blocks, -(-k // span), 16))
    _expect("table", table, torch.int8, (2**bits,))
    if tiles.data_ptr() % pages.ALIGN or scales.data_ptr() % pages.ALIGN:
        raise LowbitError("tiles and scales of a packed weight must be 64-byte aligned")
    return _C.Matrix(tiles.data_ptr(), scales.data_ptr(), table.data_ptr(), n, k, bits, span)


def _expect(name: str, t: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    fits = (
        isinstance(t, torch.Tensor)
        and t.dtype == dtype
        and t.device.type == "cpu"
        and t.ndim == len(shape)
        and all(want is None or want == size for want, size in zip(shape, t.shape))
    )
    if not fits:
        wanted = ", ".join("N" if s is None else str(s) for s in shape)
        raise LowbitError(f"{name} must be {dtype} [{wanted}] on the CPU, not {describe(t)}")


def _aligned(t: torch.Tensor) -> torch.Tensor:
    t = t.contiguous()
    return t if t.data_ptr() % pages.ALIGN == 0 else t.clone()


# The same as a torch operator, for torch.compile and export. Library.define/impl rather than custom_op: the latter
# adds 5 to 9 microseconds a call.
_library = torch.library.Library("lowbit", "DEF")
_library.define(
    "linear(Tensor x, Tensor tiles, Tensor scales, Tensor table, Tensor? bias, int n, int k, int bits, int span, "
    "bool exact) -> Tensor"
)


def _linear_cpu(x, tiles, scales, table, bias, n, k, bits, span, exact):
    return _run(x, _view(_aligned(tiles), _aligned(scales), table.contiguous(), n, k, bits, span), n, k, bias, exact)


def _linear_fake(x, tiles, scales, table, bias, n, k, bits, span, exact):
    torch._check(x.shape[-1] == k, lambda: f"x {list(x.shape)} does not end in K = {k} of the weight [{n}, {k}]")
    return x.new_empty((*x.shape[:-1], n), dtype=torch.float32)


_library.impl("linear", _linear_cpu, "CPU")
torch.library.register_fake("lowbit::linear", _linear_fake, lib=_library)
