"""What goes wrong through no fault of the code: one sentence that names it and says what would be right."""


class KangarooError(ValueError):
    """A user's mistake: a file, a checkpoint or a setting that cannot serve. Its message is one clear sentence."""
