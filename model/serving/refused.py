"""What a client is told when its request is not answered, in OpenAI's form."""

from typing import Any


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        message: one sentence that says what would be right.
        status: of HTTP.
        param: the parameter that is wrong, where it is one.
        code: OpenAI's name for the mistake, where it has one.
        retry_after: seconds after which another attempt makes sense.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after = retry_after

    def as_dict(self) -> dict[str, Any]:
        """The body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


CLOSING = "the server is shutting down; try again once it runs."


def closing() -> RefusedError:
    """What a client is told whose text the server's end cuts off, or does not begin."""
    return RefusedError(CLOSING, status=503, code="shutting_down")
