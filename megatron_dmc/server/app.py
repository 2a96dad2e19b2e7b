"""The application: routes and their responses."""

import time
from collections.abc import Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from megatron_dmc import __version__
from megatron_dmc.server import errors
from megatron_dmc.server.bodies import BodyReader
from megatron_dmc.server.completions import answer
from megatron_dmc.server.errors import ApiError, JsonResponse
from megatron_dmc.server.limits import Gate
from megatron_dmc.server.live import snapshot
from megatron_dmc.server.metrics import Metrics
from megatron_dmc.server.protocol import ChatCompletionRequest, CompletionRequest
from megatron_dmc.server.service import Service


class ErrorDetail(BaseModel):
    """The error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every error response."""

    error: ErrorDetail


_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "invalid request",
        401: "no valid API key",
        404: "no such model",
        408: "the request did not arrive in time",
        413: "body too large",
        429: "too many completions in progress",
        503: "the engine has failed or is shutting down",
    }.items()
}
_COMPLETION: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the completion, or server-sent events where stream is true",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    **_REFUSALS,
}
_BODIES = (CompletionRequest, ChatCompletionRequest)

_MODEL: dict[int | str, dict[str, Any]] = {
    401: _REFUSALS[401],
    404: _REFUSALS[404],
    422: {"description": "never sent"},
}


def build_app(
    service: Service, metrics: Metrics, *, api_keys: Sequence[str] = (), max_body_bytes: int
) -> FastAPI:
    """The application over a running engine.

    Args:
        metrics: the observer of the service's engine.
        api_keys: each of them grants access to /v1; empty: no key is required.
        max_body_bytes: longer bodies are rejected.
    """
    app = FastAPI(
        title="megatron-dmc", version=__version__, docs_url=None, redoc_url=None,
        description="OpenAI-compatible completions over a compressed KV cache.",
    )  # fmt: skip
    errors.install(app)
    app.add_middleware(Gate, api_keys=api_keys, max_body_bytes=max_body_bytes)  # type: ignore[arg-type]

    bodies = BodyReader(max_body_bytes)

    @app.post("/v1/completions", responses=_COMPLETION, openapi_extra=_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await answer(service, request, bodies.read(request, CompletionRequest))

    @app.post(
        "/v1/chat/completions", responses=_COMPLETION, openapi_extra=_body(ChatCompletionRequest)
    )
    async def chat_completions(request: Request) -> Response:
        return await answer(service, request, bodies.read(request, ChatCompletionRequest))

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": int(service.started),
            "owned_by": "megatron-dmc",
            "root": service.model_names[0],
            "max_model_len": service.max_model_len,
        }

    @app.get("/v1/models", responses={401: _REFUSALS[401]})
    async def models() -> Response:
        return JsonResponse({"object": "list", "data": [card(n) for n in service.model_names]})

    @app.get("/v1/models/{name:path}", responses=_MODEL)
    async def model(name: str) -> Response:
        service.check_model(name)
        return JsonResponse(card(name))

    @app.get("/health", response_class=Response, responses={503: _REFUSALS[503]})
    async def health() -> Response:
        if service.llm.failure is not None:
            raise ApiError(503, str(service.llm.failure), code="engine_dead")
        return Response(status_code=200)

    @app.get("/version")
    async def version() -> Response:
        return JsonResponse({"version": __version__})

    @app.get("/metrics", response_class=PlainTextResponse, responses={503: _REFUSALS[503]})
    async def prometheus() -> Response:
        text = metrics.render(await service.llm.stats())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/live", responses={503: _REFUSALS[503]})
    async def live() -> Response:
        return JsonResponse(snapshot(service, await service.llm.stats(), time.time()))

    page = (resources.files("megatron_dmc.server") / "page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    document = app.openapi

    def openapi() -> dict[str, Any]:
        """The OpenAPI document with the bodies' schemas, which FastAPI does not see."""
        if app.openapi_schema is None:
            _, models = models_json_schema(
                [(model, "validation") for model in _BODIES],
                ref_template="#/components/schemas/{model}",
            )
            document()["components"]["schemas"] |= models["$defs"]
        return document()

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _body(model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)
