"""The error for what goes wrong through no fault of the code, and how a library's errors are read and quoted."""

FULL = ("allocate memory", "out of memory", "not enough memory", "alloc_failed", "bad_alloc")
"""How PyTorch, CUDA and its libraries say that memory is full. An "illegal memory access" is another thing."""


class KangarooError(ValueError):
    """A user's mistake: a file, a checkpoint or a setting that cannot be used.

    Its message is one clear sentence that names the mistake and says what would be right.
    """


class TooLongError(KangarooError):
    """A prompt that the model's context does not hold."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is full. PyTorch raises a ``RuntimeError`` then, on a CPU and on a GPU."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(words in said for words in FULL))


def reason(error: Exception) -> str:
    """What a library's error says, in words that fit into a sentence: its first line, else its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
