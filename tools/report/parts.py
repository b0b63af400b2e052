"""What a report is made of: parts in their order, each with its share of the time."""

from typing import NamedTuple

from command import refuse


class Part(NamedTuple):
    """A part of a report.

    Attributes:
        name: of the part; unless it is tests, the module of that name in this package runs it.
        share: of the time, relative to the other parts'.
        what: it does, in a few words.
        tests: pytest's arguments, where the part is tests.
        workers: the most processes that run those tests.
    """

    name: str
    share: float
    what: str
    tests: tuple[str, ...] = ()
    workers: int = 1


WORKERS = 12
"""Most of a small test's time is the host's."""

DECODE = Part("decode", 140, "decode speeds with random weights, plain and Kangaroo")
ENVIRONMENT = Part("environment", 25, "versions, and what the card's memory gives")
KERNELS = Part("kernels", 80, "microbenchmarks beside PyTorch's own ways")

PARTS = (
    ENVIRONMENT,
    Part("tests", 85, "the tests that need a GPU", ("tests", "--ignore=tests/gpu"), WORKERS),
    Part("equality", 45, "bits and tokens at real models' shapes", ("tests/gpu",)),
    KERNELS,
    DECODE,
    Part("baselines", 130, "transformers and compiled PyTorch on the same card"),
    Part("timeline", 20, "one iteration, kernel by kernel"),
)
VLLM = Part("vllm", 120, "vLLM on the same card")
PAIR = Part("pair", 90, "a trained pair on held-out prompts")

REAL_SHAPES, LAUNCHES, ONE_KERNEL = (
    f"tests/gpu/test_{name}.py" for name in ("real_shapes", "ways_to_launch", "zz_one_kernel")
)
OPERATIONS = "operation or rows_of_trees"
LOOP_TESTS = "tests/kernels/test_draft_loop.py"
CHOSEN = "bits or wherever or captured or thousand or lost or wait or graphs or the_same or (plain_tokens and bfloat16)"
"""Of the GPU's tests those that hold bits, graphs and waiting."""

SMALL = ("tests/kernels", "tests/model", f"--ignore={LOOP_TESTS}", "-k", CHOSEN)

FIRST = (
    ENVIRONMENT,
    Part("operations", 35, "every operation at real shapes, its error and its bits", (REAL_SHAPES, "-k", OPERATIONS)),
    Part("launches", 35, "plain decoding's tokens in every way to launch", (LAUNCHES,)),
    Part("loop", 45, "the persistent kernel at sizes that fill the card", (ONE_KERNEL, "-k", "stages or again")),
    Part("tests", 70, "the tests of bits, graphs and waiting", SMALL, WORKERS),
    Part("loop_tests", 35, "the persistent kernel's own tests, alone on the card", (LOOP_TESTS,)),
    KERNELS._replace(share=45),
    DECODE._replace(share=60),
)
"""The first minutes on a card (``gpu_report.py --first``): is it right, and how fast at the first model's shape."""


def choose(only: str | None) -> list[Part]:
    """The report's parts whose names stand in ``only``, with commas between them; all of them without it."""
    parts = {part.name: part for part in (*PARTS, VLLM, PAIR)}
    names = list(parts) if only is None else [name.strip() for name in only.split(",")]
    if unknown := [name for name in names if name not in parts]:
        refuse("gpu_report", f"there is no part called {', '.join(map(repr, unknown))}; there are {', '.join(parts)}.")
    return [part for name, part in parts.items() if name in names]
