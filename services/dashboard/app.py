"""The dashboard's web application: a static page, the history as JSON, updates as server-sent events, controls."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from services.dashboard.access import Access
from services.dashboard.controls import Action, Controls
from services.dashboard.feed import Feed
from services.dashboard.history import Axis
from services.errors import SlipstreamError

STATIC = Path(__file__).parent / "static"

NO_STORE = {"Cache-Control": "no-store"}

PAGE_HEADERS = {
    # Bokeh styles its shadow roots with style elements; every script is a file of ours or of the bokeh package.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

HTTP_STATUS = {
    "NOT_FOUND": HTTPStatus.NOT_FOUND,
    "INVALID_ARGUMENT": HTTPStatus.UNPROCESSABLE_ENTITY,
    "UNAVAILABLE": HTTPStatus.SERVICE_UNAVAILABLE,
    "DEADLINE_EXCEEDED": HTTPStatus.GATEWAY_TIMEOUT,
}
"""Of our errors; any other is a conflict with the state of the run."""


MOST_BODY_BYTES = 16 * 1024
"""A request to steer is a few dozen bytes."""


class SmallBodies:
    """Refuses large requests before they are read: FastAPI reads a body before it asks for the token."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            length = headers.get("content-length", "0")
            if "transfer-encoding" in headers or not length.isdecimal() or int(length) > MOST_BODY_BYTES:
                detail = f"a request must say its length, and have at most {MOST_BODY_BYTES} bytes"
                answer = JSONResponse({"detail": detail}, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, NO_STORE)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Files(StaticFiles):
    """Static files that a browser asks for again each time, so that a new version of the page shows at once."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        """The file, or that it has not changed."""
        response = super().file_response(*args, **options)
        response.headers["Cache-Control"] = "no-cache"
        return response


def create_app(feed: Feed, access: Access, controls: Controls) -> FastAPI:
    """The application of one dashboard.

    Args:
        feed: The run; followed while the application runs.
        access: Who may read and steer.
        controls: Carries out what the page asks for.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(feed.follow())
        yield
        await feed.close()  # again: whoever serves this has done it before closing connections
        await following

    def steerer(authorization: Annotated[str | None, Header()] = None) -> None:
        refusal = access.refusal(authorization)
        if refusal:
            raise HTTPException(HTTPStatus.UNAUTHORIZED, refusal, {"WWW-Authenticate": "Bearer", **NO_STORE})

    def reader(authorization: Annotated[str | None, Header()] = None) -> None:
        if not access.is_local:
            steerer(authorization)

    app = FastAPI(title="Slipstream dashboard", lifespan=lifespan, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=access.names)
    app.add_middleware(SmallBodies)
    one_at_a_time = asyncio.Lock()

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = [f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in error.errors()]
        return JSONResponse({"detail": "; ".join(problems)}, HTTPStatus.UNPROCESSABLE_ENTITY, NO_STORE)

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)

    @app.get("/api/health", dependencies=[Depends(reader)])
    async def health() -> JSONResponse:
        return JSONResponse({"streams": feed.num_streams}, headers=NO_STORE)

    @app.get("/api/token", dependencies=[Depends(steerer)])
    async def token() -> Response:
        return Response(status_code=HTTPStatus.NO_CONTENT, headers=NO_STORE)

    @app.get("/api/history", dependencies=[Depends(reader)])
    async def history(axis: Axis = "step", low: float = -math.inf, high: float = math.inf) -> Response:
        return Response(await feed.history(axis, low, high), media_type="application/json", headers=NO_STORE)

    @app.get("/api/events", dependencies=[Depends(reader)])
    async def events(last_event_id: Annotated[str | None, Header()] = None) -> StreamingResponse:
        headers = NO_STORE | {"X-Accel-Buffering": "no"}
        return StreamingResponse(_event_stream(feed, last_event_id), media_type="text/event-stream", headers=headers)

    @app.post("/api/control", dependencies=[Depends(steerer)])
    async def control(action: Action) -> JSONResponse:
        status = await feed.status()
        if not status["is_live"]:
            raise HTTPException(HTTPStatus.CONFLICT, f"there is nothing to steer: {status['explanation']}")
        async with one_at_a_time:
            try:
                answer = await asyncio.to_thread(controls.act, status["run_id"], action)
            except SlipstreamError as error:
                code = HTTP_STATUS.get(error.status, HTTPStatus.CONFLICT)
                raise HTTPException(code, str(error), NO_STORE) from error
        return JSONResponse({"message": answer}, headers=NO_STORE)

    app.mount("/static", Files(directory=STATIC))
    app.mount("/bokeh", Files(directory=bokeh_scripts()))
    return app


def bokeh_scripts() -> Path:
    """Folder of the JavaScript that the bokeh package ships. The package itself is never imported."""
    spec = find_spec("bokeh")
    if spec is None or spec.origin is None:
        raise SlipstreamError("the dashboard draws with bokeh, which is not installed: pip install bokeh")
    return Path(spec.origin).parent / "server" / "static" / "js"


async def _event_stream(feed: Feed, last_id: str | None) -> AsyncIterator[str]:
    async with contextlib.aclosing(feed.updates(last_id)) as updates:
        async for event, place, data in updates:
            text = json.dumps(data, separators=(",", ":"), allow_nan=False)
            yield f"id: {place}\nevent: {event}\ndata: {text}\n\n" if place else f"event: {event}\ndata: {text}\n\n"
