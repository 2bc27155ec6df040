"""What a request passes before a handler sees it: the token, the limits of its body, and strict JSON."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.types import ASGIApp, Receive, Scope, Send

from buffer.service.bodies import ErrorBody
from buffer.service.refusals import answer

BODY_TIMEOUT_S = 60.0
OPEN_PATHS = frozenset({"/health", "/openapi.json"})
"""Told without a token."""


class StrictRequest(Request):
    """A body that comes in time and stays within its limit; JSON as the standard has it, of limited depth."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    self._body = await self._read(limit=self.app.state.max_body_bytes)
            except TimeoutError:
                raise HTTPException(408, f"the body took more than {BODY_TIMEOUT_S:g} s. Send it again.") from None
        return self._body

    async def _read(self, *, limit: int) -> bytes:
        chunks, size = [], int(self.headers.get("content-length", "0"))
        if size <= limit:
            size = 0
            async for chunk in self.stream():
                size += len(chunk)
                chunks.append(chunk)
                if size > limit:
                    break
        if size > limit:
            raise HTTPException(413, f"got a body of more than {limit} bytes. Send fewer groups at a time.")
        return b"".join(chunks)

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(422, f"got a body that is not JSON ({error}). Send JSON, in UTF-8.") from None


class StrictRoute(APIRoute):
    """Gives every handler a `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


class TokenGate:
    """Lets requests with the token through, and the rest nowhere: not even their bodies are read."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app = app
        self._expected = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._has_token(scope):
            await self._app(scope, receive, send)
            return
        body = ErrorBody(
            error="Unauthorized",
            message="got no token of this service. Send `Authorization: Bearer TOKEN`, with what its token file holds.",
        )
        await answer(401, body)(scope, receive, send)

    def _has_token(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return scheme.lower() == b"bearer" and secrets.compare_digest(token, self._expected)
