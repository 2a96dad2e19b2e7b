"""Every refusal in the OpenAI error shape: `{"error": {message, type, param, code}}`."""

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from megatron_dmc.errors import EngineDead, InvalidRequest

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A request that is refused, with its HTTP status."""

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
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
        return JsonResponse(self.body(), self.status_code, headers=headers.get(self.status_code))


class JsonResponse(Response):
    """JSON as pure ASCII: any text can be sent, lone surrogates included."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()


def to_json(content: Any) -> str:
    """A compact document; refuses NaN, which is not JSON."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest):
        return ApiError(400, str(error))
    if isinstance(error, EngineDead):
        return ApiError(503, str(error), code="engine_dead")
    return ApiError(500, f"{type(error).__name__}: {error}")


def validation_message(error: RequestValidationError) -> tuple[str, str | None]:
    """(message, param) of the first field that is wrong; of a union, what all its forms would be."""
    errors = error.errors()
    first = errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "not_supported":
        return first["msg"], first["ctx"]["name"]
    if first["type"] == "value_error" and not path:
        return first["msg"].removeprefix("Value error, "), None
    if first["type"] == "json_invalid" or not path or first["loc"] == ("body",):
        return (
            f"the body is not a JSON object (Content-Type: application/json): {first['msg']}",
            None,
        )
    param = path[0]
    if first["type"] == "extra_forbidden":
        return f"{param}: this server does not know the parameter; leave it out", param
    if first["type"] == "missing":
        return f"{'.'.join(path)}: missing; it is required", param
    same = [e["msg"] for e in errors if param in e["loc"]]
    if len(same) > 1:  # one for each form that would have been right
        return f"{param}: {'; or '.join(dict.fromkeys(same))}", param
    return f"{'.'.join(path)}: {first['msg'].removeprefix('Value error, ')}", param


def install(app: FastAPI) -> None:
    """Have the application answer all its errors in this shape."""

    async def refused(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, param = validation_message(error)
        return ApiError(400, message, param=param).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(InvalidRequest, refused)
    app.add_exception_handler(EngineDead, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, refused)
