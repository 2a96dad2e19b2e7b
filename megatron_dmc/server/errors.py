"""Errors in the OpenAI shape: `{"error": {message, type, param, code}}`."""

import json
from collections.abc import Sequence
from typing import Any

import pydantic_core
from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from megatron_dmc.errors import EngineDead, InvalidRequest, RequestFailed

_FORMS = {"str", "int", "float", "bool", "dict"}
"""Pydantic's names of a union's forms; the others are not identifiers."""
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A rejected request, with its HTTP status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(status, message)
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON document."""
        fallback = "server_error" if self.status_code >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status_code, fallback),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> "JsonResponse":
        """The HTTP response."""
        headers = {
            401: {"WWW-Authenticate": "Bearer"},
            413: {"Connection": "close"},
            429: {"Retry-After": "1"},
        }
        return JsonResponse(self.body(), self.status_code, headers=headers.get(self.status_code))


class JsonResponse(Response):
    """JSON as pure ASCII: any text can be sent, lone surrogates included."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()


def to_json(content: Any) -> str:
    """A compact document; refuses NaN, which is not JSON."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def chunk_json(content: Any) -> bytes:
    """A compact document of texts from a tokenizer or a parsed request, which are valid Unicode: several times
    as fast as `to_json`."""
    return pydantic_core.to_json(content)


def as_api_error(error: Exception) -> ApiError:
    """The error response for an exception of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest):
        return ApiError(400, str(error))
    if isinstance(error, EngineDead):
        return ApiError(503, str(error), code="engine_dead")
    if isinstance(error, RequestFailed):
        return ApiError(500, str(error), code="request_failed")
    return ApiError(500, f"{type(error).__name__}: {error}")


def validation_error(error: ValidationError) -> ApiError:
    """The error response for a JSON body that fails validation: the first of the deepest errors, or all
    forms that the field may have."""
    errors = error.errors(include_url=False, include_input=False)
    first = max(errors, key=lambda e: len(_path(e["loc"])))
    path = _path(first["loc"])
    if name := first.get("ctx", {}).get("name"):
        param = _dotted([*path, name])
        middle = " is " if first["type"] == "not_supported" else ": "
        return ApiError(400, f"{param}{middle}{first['msg']}", param=param)
    same = [e["msg"].removeprefix("Value error, ") for e in errors if _path(e["loc"]) == path]
    message = "; or ".join(dict.fromkeys(same))
    if not path:
        return ApiError(400, message)
    return ApiError(400, f"{_dotted(path)}: {message}", param=_dotted(path))


def _path(location: Sequence[str | int]) -> list[str | int]:
    """A path in the body; pydantic also names the form of a union that it has tried."""
    return [p for p in location if isinstance(p, int) or (p.isidentifier() and p not in _FORMS)]


def _dotted(path: Sequence[str | int]) -> str:
    """The path as OpenAI writes it: messages[0].content."""
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p[:60]}" for p in path)
    return text.removeprefix(".")


def install(app: FastAPI) -> None:
    """Make the application answer all errors in this shape."""

    async def refused(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(InvalidRequest, refused)
    app.add_exception_handler(EngineDead, refused)
    app.add_exception_handler(RequestFailed, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, refused)
