"""The error for what goes wrong through no fault of the code, and how it quotes a library's."""


class KangarooError(ValueError):
    """A user's mistake: a file, a checkpoint or a setting that cannot be used.

    Its message is one clear sentence that names the mistake and says what would be right.
    """


class TooLongError(KangarooError):
    """A prompt that the model's context does not hold."""


def reason(error: Exception) -> str:
    """What a library's error says, in words that fit into a sentence: its first line, else its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
