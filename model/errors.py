"""The error for what goes wrong through no fault of the code."""


class KangarooError(ValueError):
    """A user's mistake: a file, a checkpoint or a setting that cannot be used.

    Its message is one clear sentence that names the mistake and says what would be right.
    """
