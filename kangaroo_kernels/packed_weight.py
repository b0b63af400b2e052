"""A weight matrix ``[N, K]`` laid out once for the machine that will read it at every token.

On a GPU it stays ``[N, K]`` row-major. On a CPU one of four layouts is chosen from the matrix alone (so that the same
checkpoint always gives the same bits). Microseconds on two cores of an AMD Zen 4 server, one row and four rows, every
matrix fresh from memory (``bench/results/cpu/packed_weight.json``):

    ==============  ===================  ===================  =========================================
    layout          704 x 192 (1; 4)     4096 x 4096 (1; 4)   used where
    ==============  ===================  ===================  =========================================
    ``FP16``        11; 17               359; 789             every weight is exact in scaled fp16 (FBGEMM)
    ``ONEDNN``      38; 35               999; 1189            fp32, from 64k weights on
    ``TRANSPOSED``  37; 64               2716; 8444           fp32, smaller
    ``ROWS``        67; 93               2837; 6943           everything else (bf16, fp16, GPU)
    ==============  ===================  ===================  =========================================

``bench/bench_packed_weight.py`` measures them again. FBGEMM keeps weights in half the bytes and multiplies in fp32, so
``FP16`` is exact, and gives a row the same bits at any number of rows; a matrix that fp16 cannot hold exactly is never
stored in it. It has no kernel for Arm; there the other layouts serve.

**Scaled fp16.** bf16 has fewer digits than fp16 but a wider range: most of a bf16 checkpoint's matrices hold weights so
small that fp16 would round them. Such a matrix is stored as ``2^s * weight``, its largest weight at fp16's upper end,
and the input is multiplied by ``scale = 2^-s`` before the product. Powers of two change no digit, and what is scaled is
the input and not the output, so every product and every sum is the number that it would be without a scale: the result
has the same bits, and nothing can overflow that would not overflow anyway. An RMSNorm takes the scale along for nothing
(``norm_linear``).
"""

import enum
import math
import warnings
from typing import Any

import torch
from torch import Tensor

ONEDNN_MIN_WEIGHTS = 1 << 16
THREADED_MIN_WEIGHTS = 1 << 20
"""From this many weights on, FBGEMM's threaded entry point repays its 10 us of overhead."""

FP16_EXPONENT = 16
"""Every finite fp16 number is below two to this power."""

MAX_SHIFT = 64
"""A matrix is scaled by 2^-64 to 2^64. Inputs below 2^-62 could lose digits then: float32's full ones end at 2^-126."""


class Layout(enum.Enum):
    """How a ``PackedWeight`` stores its matrix; see the module's table."""

    ROWS = enum.auto()
    TRANSPOSED = enum.auto()
    ONEDNN = enum.auto()
    FP16 = enum.auto()


def exact_in_fp16(weight: Tensor, scale: float = 1.0) -> bool:
    """Whether every element of a float32 ``weight``, divided by ``scale``, survives the way to fp16 and back."""
    if scale == 1.0:
        return bool(torch.equal(weight.half().to(weight.dtype), weight))
    return bool(torch.equal((weight / scale).half().to(weight.dtype).mul_(scale), weight))


def fp16_scale(weight: Tensor) -> float | None:
    """The power of two by which a float32 ``weight`` has to be divided to be exact in fp16; None where there is none.

    It is 1 wherever that suffices. Else the largest weight comes to lie just below fp16's upper end, which leaves the
    most room to the small ones: what does not fit there, fits nowhere.
    """
    if exact_in_fp16(weight):
        return 1.0
    exponent = math.frexp(float(weight.abs().max()))[1]
    shift = exponent - FP16_EXPONENT
    if abs(shift) <= MAX_SHIFT and exact_in_fp16(weight, 2.0**shift):
        return 2.0**shift
    return None


def choose_layout(weight: Tensor) -> Layout:
    """The layout for ``weight`` ``[N, K]`` on its device; a function of the matrix alone."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return Layout.ROWS
    if "fbgemm" in torch.backends.quantized.supported_engines and fp16_scale(weight) is not None:
        return Layout.FP16
    if torch.backends.mkldnn.is_available() and weight.numel() >= ONEDNN_MIN_WEIGHTS:
        return Layout.ONEDNN
    return Layout.TRANSPOSED


class PackedWeight:
    """``x -> x @ weight.T + bias`` with the weight packed.

    Args:
        weight: ``[N, K]``, any float dtype.
        bias: ``[N]`` or None.
        layout: forces a layout; None lets ``choose_layout`` decide.

    Attributes:
        nbytes: bytes of the matrix as it is stored.
        scale: the power of two by which the stored matrix is to be multiplied; 1 but for the ``FP16`` layout.

    Raises:
        ValueError: the ``FP16`` layout is asked for, and the matrix is not exact in it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, layout: Layout | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.layout = choose_layout(weight) if layout is None else layout
        self.nbytes = weight.numel() * (2 if self.layout is Layout.FP16 else weight.element_size())
        self.threaded = weight.numel() >= THREADED_MIN_WEIGHTS
        self.scale = 1.0
        self._packed: Any
        if self.layout is Layout.FP16:
            self._packed = self._pack_fp16(weight)
        elif self.layout is Layout.ONEDNN:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        elif self.layout is Layout.TRANSPOSED:
            self._packed = weight.t().contiguous()
        else:
            self._packed = weight

    def _pack_fp16(self, weight: Tensor) -> Any:
        scale = fp16_scale(weight)
        if scale is None:
            raise ValueError("the weight is not exact in fp16, whatever it is divided by; use another layout.")
        if scale != 1.0:
            self.scale, weight = scale, weight / scale
        if self.threaded:
            return torch.ops.quantized.linear_prepack_fp16(weight, self.bias)
        self._zero_bias = weight.new_zeros(self.out_features) if self.bias is None else self.bias
        with warnings.catch_warnings():  # PyTorch will remove it; the threaded entry point above would replace it
            warnings.simplefilter("ignore", UserWarning)
            packed = torch.fbgemm_pack_gemm_matrix_fp16(weight)
            row = weight.new_zeros(1, self.in_features)
            torch.fbgemm_linear_fp16_weight_fp32_activation(row, packed, self._zero_bias)
        return packed

    @property
    def rows(self) -> Tensor:
        """The matrix ``[N, K]`` itself, for kernels; only in the ``ROWS`` layout."""
        assert self.layout is Layout.ROWS
        return self._packed  # type: ignore[no-any-return]

    def unpacked(self) -> Tensor:
        """The matrix ``[N, K]`` as it was given, from any layout, for a weight without a bias; it may be a copy."""
        assert self.bias is None
        if self.layout is Layout.ROWS:
            return self.rows
        if self.layout is Layout.TRANSPOSED:
            return self._packed.t()  # type: ignore[no-any-return]
        if self.layout is Layout.ONEDNN:
            return self._packed.to_dense()  # type: ignore[no-any-return]
        if self.threaded:
            return torch.ops.quantized.linear_unpack_fp16(self._packed)[0].mul_(self.scale)  # type: ignore[no-any-return]
        return self(torch.eye(self.in_features, dtype=torch.float32)).t()  # FBGEMM has no way back for small matrices

    def select(self, rows: Tensor) -> "PackedWeight":
        """Some of the rows, ``[R]`` int, packed anew as ``[R, K]``; for a weight without a bias."""
        return PackedWeight(self.unpacked()[rows.long()], layout=Layout.ROWS if self.layout is Layout.ROWS else None)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` ``[M, K]`` to a new ``[M, N]``, same dtype."""
        return self.of_scaled(x if self.scale == 1.0 else x * self.scale)

    def of_scaled(self, x: Tensor) -> Tensor:
        """The same for an ``x`` that has been multiplied by ``scale`` already."""
        if self.layout is Layout.FP16:
            if self.threaded:
                return torch.ops.quantized.linear_dynamic_fp16(x, self._packed)  # type: ignore[no-any-return]
            return torch.fbgemm_linear_fp16_weight_fp32_activation(x, self._packed, self._zero_bias)
        if self.layout is Layout.ONEDNN:
            linear = torch.ops.mkldnn._linear_pointwise
            return linear(x, self._packed, self.bias, "none", [], "")  # type: ignore[no-any-return]
        if self.layout is Layout.TRANSPOSED:
            return torch.mm(x, self._packed) if self.bias is None else torch.addmm(self.bias, x, self._packed)
        return torch.nn.functional.linear(x, self._packed, self.bias)


Weight = Tensor | PackedWeight


def out_features(weight: Weight) -> int:
    """N of a weight ``[N, K]``."""
    return weight.out_features if isinstance(weight, PackedWeight) else weight.shape[0]


def linear(x: Tensor, weight: Weight) -> Tensor:
    """``x`` ``[M, K]`` times ``weight`` ``[N, K]`` (packed or plain), transposed: a new ``[M, N]``."""
    if isinstance(weight, PackedWeight):
        return weight(x)
    return torch.nn.functional.linear(x, weight)
