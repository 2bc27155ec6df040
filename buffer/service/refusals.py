"""Errors as HTTP answers, and back: every refusal is ``{"error": class, "message": ...}`` with its class's status."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from buffer.service.bodies import ErrorBody
from slime.errors import BufferFull, DataError, Fenced, LedgerError, SlimeError, StopRun, StorageError

STATUS: dict[type[SlimeError], int] = {
    DataError: 422,
    BufferFull: 429,
    Fenced: 409,
    StorageError: 503,
    StopRun: 503,
    LedgerError: 409,
    SlimeError: 409,
}
"""The first class that fits decides."""
RETRY_AFTER_S = 1
"""Told with every 429 and 503."""
MAX_MESSAGE = 1000

DESCRIPTIONS = {
    401: "No token, or not this service's.",
    404: "No such run, path or samples.",
    408: "The body does not come.",
    409: "The ledger refuses the move, or another consumer has taken over (`Fenced`).",
    413: "The body is too large.",
    422: "The body or a parameter is not what this document says.",
    429: "The staleness bound admits no more now (`BufferFull`). Come again after the next training step.",
    503: "The ledger cannot be written (`StorageError`), or the service ends. Nothing of this request is recorded.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "model": ErrorBody,
        "description": description,
        **({"headers": {"Retry-After": {"schema": {"type": "integer"}}}} if status in (429, 503) else {}),
    }
    for status, description in DESCRIPTIONS.items()
}
"""Every refusal, for OpenAPI."""


def refusal(error: SlimeError) -> ErrorBody:
    """What a client is told of an error."""
    known = next(known for known in STATUS if isinstance(error, known))
    return ErrorBody(error=known.__name__, message=str(error)[:MAX_MESSAGE])


def as_error(body: ErrorBody) -> SlimeError:
    """The error that a service refused with."""
    return next((known for known in STATUS if known.__name__ == body.error), SlimeError)(body.message)


def answer(status: int, body: ErrorBody) -> Response:
    """The HTTP answer."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return Response(body.model_dump_json(), status_code=status, media_type="application/json", headers=headers)


def answer_errors(app: FastAPI) -> None:
    """Make every error that a request can end with such an answer."""

    @app.exception_handler(SlimeError)
    async def refused(_: Request, error: SlimeError) -> Response:
        body = refusal(error)
        return answer(next(status for known, status in STATUS.items() if known.__name__ == body.error), body)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        problems = [f"{'.'.join(map(str, problem['loc']))[:200]}: {problem['msg']}" for problem in error.errors()[:3]]
        message = f"got {'; '.join(problems)}. /openapi.json says what each request takes."
        return answer(422, ErrorBody(error="DataError", message=message[:MAX_MESSAGE]))

    @app.exception_handler(HTTPException)
    async def failed(_: Request, error: HTTPException) -> Response:
        body = ErrorBody(error=HTTPStatus(error.status_code).phrase.replace(" ", ""), message=str(error.detail))
        response = answer(error.status_code, body)
        response.headers.update(error.headers or {})
        return response
