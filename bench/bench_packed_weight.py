"""The layouts of ``PackedWeight`` on a CPU, at the demo pair's shapes and at larger ones, for one row and for four.

Every repetition takes the next matrix of a ring that is larger than the CPU's caches: in decoding, too, weights come
from memory.
"""

import itertools

import pytest
import torch

from kangaroo_kernels.packed_weight import Layout, PackedWeight

RING_BYTES = 96 << 20
SHAPES = [(576, 192), (704, 192), (192, 352), (2048, 192), (2048, 2048), (4096, 4096)]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.name.lower())
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_packed_weight(benchmark, shape, layout, rows):
    if layout is Layout.FP16 and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("FBGEMM has no kernels for this processor")
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 0.05).half().float()
    x = torch.randn(rows, shape[1], generator=generator)
    wanted = torch.nn.functional.linear(x.double(), weight.double()).float()
    copies = max(1, RING_BYTES // (4 * weight.numel()))
    ring = itertools.cycle([PackedWeight(weight.clone(), layout=layout) for _ in range(copies)])
    assert torch.allclose(next(ring)(x), wanted, atol=1e-4, rtol=1e-4)
    benchmark.group = f"{shape[0]} x {shape[1]}, {rows} row{'s' * (rows > 1)}"
    benchmark(lambda: next(ring)(x))
    bytes_moved = weight.numel() * (2 if layout is Layout.FP16 else 4)
    benchmark.extra_info["gigabytes_per_second"] = bytes_moved / benchmark.stats.stats.median / 1e9
