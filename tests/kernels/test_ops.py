"""The operations as ``torch.ops.kangaroo.*``: PyTorch's own checks, whole graphs, the plain functions' results."""

from types import SimpleNamespace

import pytest
import torch
from pretended_gpus import pretended_gpus
from torch import Tensor

from kangaroo_kernels import ops
from kangaroo_kernels.operation import OPERATIONS
from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.reference.qkv_rope import rope_table

ROWS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LENGTH, VOCAB = 3, 24, 4, 2, 8, 20, 37
NAMES = [name for name, operation in OPERATIONS.items() if operation.schema is not None]


def arguments(name: str, device: torch.device, paged: bool = False, bias: bool = False) -> tuple:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def number(value: int) -> Tensor:
        return torch.tensor([value], device=device)

    x, norm = random(ROWS, HIDDEN), random(HIDDEN)
    cache = (5, KV_HEADS, 4, HEAD_DIM) if paged else (KV_HEADS, LENGTH, HEAD_DIM)
    table = torch.tensor([3, 0, 4, 1, 2], dtype=torch.int32, device=device) if paged else None
    frequencies = 1e4 ** -torch.linspace(0, 1, HEAD_DIM // 2, device=device)
    phases = torch.view_as_real(rope_table(frequencies, LENGTH))
    position = number(LENGTH - ROWS - 1)

    def matrix(rows: int) -> tuple[Tensor, Tensor | None]:
        return random(rows, HIDDEN), random(rows) if bias else None

    if name == "qkv_rope":
        weight = matrix((HEADS + 2 * KV_HEADS) * HEAD_DIM)
        return (x, norm, *weight, phases, random(*cache), random(*cache), position, 1e-5, table)
    if name == "attention":
        return random(ROWS, HEADS, HEAD_DIM), random(*cache), random(*cache), position, 0.3, None, table
    if name == "linear_residual":
        return (x, *matrix(17), random(ROWS, 17))
    if name == "gate_up":
        return (x, norm, *matrix(22), 1e-5)
    if name == "top1_head":
        return x, norm, matrix(VOCAB)[0], 1e-5
    if name == "sample_head":
        return x, norm, matrix(VOCAB)[0], position, number(11), 1e-5, 0.7, 1, 9, 0.9
    if name == "look_up":
        return torch.tensor([4, 5, 6, 7, 3, 4, 5, 6, 7, 3, 9], device=device), number(9), 5, 3
    tokens = torch.tensor([4, 5, 6, 7], device=device)
    return tokens[:3], tokens, tokens[3:], number(10), number(20)


def plainly(name: str, args: tuple) -> tuple[Tensor, ...]:
    """What the references give, in the same order."""
    reference = OPERATIONS[name].reference

    def weight(matrix: Tensor, bias: Tensor | None) -> Tensor | PackedWeight:
        return matrix if bias is None else PackedWeight(matrix, bias, Layout.ROWS)

    if name == "qkv_rope":
        x, norm, matrix, bias, phases, keys, values, position, eps, table = args
        complex_phases = torch.view_as_complex(phases)
        return (
            reference(
                x, norm, weight(matrix, bias), complex_phases, keys, values, position, eps=eps, block_table=table
            ),
        )
    if name == "attention":
        return (reference(*args[:4], scale=args[4], block_table=args[6]),)
    if name == "linear_residual":
        return (reference(args[0], weight(*args[1:3]), args[3]),)
    if name == "gate_up":
        return (reference(*args[:2], weight(*args[2:4]), eps=args[4]),)
    if name == "top1_head":
        return tuple(reference(*args[:3], eps=args[3]))
    if name == "sample_head":
        x, norm, matrix, position, seed, eps, temperature, stream, top_k, top_p = args
        settings = {"eps": eps, "temperature": temperature, "seed": seed, "stream": stream}
        return tuple(reference(x, norm, matrix, position, **settings, top_k=top_k, top_p=top_p))
    return as_tuple(reference(*args))


def operation(name: str):
    return getattr(torch.ops.kangaroo, name).default


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


CASES = [
    *((name, False, False) for name in NAMES),
    ("qkv_rope", True, True),
    ("attention", True, False),
    ("linear_residual", False, True),
    ("gate_up", False, True),
]


@pytest.mark.parametrize(("name", "paged", "bias"), CASES)
def test_results_are_the_references(name, paged, bias, device):
    args, again = arguments(name, device, paged, bias), arguments(name, device, paged, bias)
    for ours, wanted in zip(as_tuple(operation(name)(*args)), plainly(name, again), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    for ours, wanted in zip(args, again, strict=True):  # the caches, and that nothing else was written
        if isinstance(ours, Tensor):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_launched_on_the_gpu_of_its_operands(name, monkeypatch):
    operation, given = OPERATIONS[name], SimpleNamespace(device=torch.device("cuda:1"))
    names = [argument.name for argument in getattr(torch.ops.kangaroo, name).default._schema.arguments]
    assert operation.schema.startswith(f"(Tensor {names[0]}, ")
    with pretended_gpus(monkeypatch) as current:
        monkeypatch.setitem(operation.__dict__, "launcher", lambda **given: [current.index])
        assert ops._launch(names, operation, [given], {}) == (1,)
        assert current.index == 0


@pytest.mark.parametrize(("name", "paged", "bias"), CASES)
def test_pytorch_accepts_the_registration(name, paged, bias, device):
    """Schema (what is written to, what is aliased), fake kernel against the real one, dispatch under tracing."""
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operation(name), arguments(name, device, paged, bias), test_utils=checks)


class Step(torch.nn.Module):
    """An attention block, an MLP and a head, as another engine would compile them."""

    def forward(self, qkv: tuple, output: tuple, mlp: tuple, down: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        kangaroo = torch.ops.kangaroo
        x, norm, _, _, _, keys, values, position, eps, _ = qkv
        q = kangaroo.qkv_rope(*qkv)
        mixed = kangaroo.attention(q * 1.0, keys, values, position, 0.3)
        hidden = kangaroo.linear_residual(mixed, *output, x)
        inner = kangaroo.gate_up(hidden, norm, *mlp, eps)
        hidden = kangaroo.linear_residual(inner, down, None, hidden)
        token, confidence = kangaroo.top1_head(hidden, norm, head, eps)
        return token + 0, confidence * 2.0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_a_whole_step_compiles_without_a_break(backend, device):
    generator = torch.Generator().manual_seed(1)
    shapes = ((HIDDEN, HEADS * HEAD_DIM), (2 * 20, HIDDEN), (HIDDEN, 20), (VOCAB, HIDDEN))
    output, mlp, down, head = (torch.randn(shape, generator=generator).to(device) for shape in shapes)

    def inputs() -> tuple:
        return arguments("qkv_rope", device), (output, None), (mlp, None), down, head

    torch._dynamo.reset()
    compiled = torch.compile(Step(), fullgraph=True, backend=backend)
    eager_inputs, compiled_inputs = inputs(), inputs()
    for wanted, ours in zip(Step()(*eager_inputs), compiled(*compiled_inputs), strict=True):
        assert torch.equal(wanted, ours)
    for place in (5, 6):  # the caches were written inside the graph, too
        assert torch.equal(eager_inputs[0][place], compiled_inputs[0][place])
        assert not torch.equal(compiled_inputs[0][place], inputs()[0][place])
