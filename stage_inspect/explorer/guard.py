"""Who may ask, and what the browser may do with the answer: the same for every path.

The server listens on this machine's loopback address alone, but a page of any site can make the reader's browser ask
there. So a request must name this server as its host (DNS rebinding), and one that changes or computes something must
come from its own pages.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware: refuses strangers, and adds `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app = app
        self.hosts = {f"{name}:{port}" for name in NAMES} | (set(NAMES) if port == 80 else set())
        self.origins = {f"http://{host}" for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self.refusal(scope["method"], Headers(scope=scope))
        if refusal is not None:
            await JSONResponse({"error": refusal}, status_code=403)(scope, receive, guarded)
            return
        await self.app(scope, receive, guarded)

    def refusal(self, method: str, headers: Headers) -> str | None:
        """Why a request is not answered, or None where it is."""
        if headers.getlist("host") not in [[host] for host in self.hosts]:
            return "this server answers to its own address only"
        if method in ("GET", "HEAD"):
            return None
        if headers.get("origin") not in self.origins:
            return "only this server's own pages may ask that"
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return "the request must be JSON"
        return None
