"""Where a server is, as a URL: chosen by argument or environment, and shown without its secrets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from settings import Settings

KINDS: Mapping[str, Mapping[str, str]] = {
    "database": {"postgresql": "postgresql", "postgres": "postgresql", "sqlite": "sqlite"},
    "cache": {"redis": "redis", "rediss": "rediss", "memory": "memory"},
    "queue": {"amqp": "amqp", "amqps": "amqps", "sqlite": "sqlite", "sqlite+queue": "sqlite"},
    "api": {"http": "http", "https": "https", "embedded": "embedded"},
}
PORTS = {"postgresql": 5432, "redis": 6379, "rediss": 6379, "amqp": 5672, "amqps": 5671}
EMBEDDED = frozenset({"sqlite", "memory", "embedded"})
SHORTEST_SECRET = 3  # what is shorter occurs in any text


@dataclass(frozen=True)
class Address:
    """A parsed URL. `shown` and `repr` have no secret."""

    scheme: str
    host: str = ""
    port: int | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    path: str = ""
    query: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def embedded(self) -> bool:
        """Whether it needs no server."""
        return self.scheme in EMBEDDED

    @property
    def shown(self) -> str:
        """The address for people: scheme, host, port and path."""
        if self.embedded:
            return f"{self.scheme}:///{self.path}" if self.path else f"{self.scheme}://"
        port = f":{self.port}" if self.port else ""
        return f"{self.scheme}://{_bracketed(self.host)}{port}/{self.path}".rstrip("/")

    @property
    def url(self) -> str:
        """The address for drivers, with its secrets."""
        login = ""
        if self.user is not None or self.password is not None:
            login = quote(self.user or "", safe="")
            login += "" if self.password is None else ":" + quote(self.password, safe="")
            login += "@"
        port = f":{self.port}" if self.port else ""
        query = "&".join(f"{quote(k)}={quote(v, safe='')}" for k, v in self.query.items())
        path = quote(self.path, safe="/%")
        return f"{self.scheme}://{login}{_bracketed(self.host)}{port}/{path}" + (
            f"?{query}" if query else ""
        )

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be shown, longest first."""
        found = {value for name, value in self.query.items() if "pass" in name or "key" in name}
        if self.password:
            found |= {self.password, quote(self.password, safe="")}
        return tuple(sorted((s for s in found if len(s) >= SHORTEST_SECRET), key=len, reverse=True))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def parse(url: str, kind: str) -> Address:
    """Read a URL of a kind of resource; ValueError says what is wrong without repeating it."""
    known = KINDS[kind]
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(f"The {kind} URL cannot be read: look at its host and port.") from None
    scheme = known.get(parts.scheme.lower())
    if scheme is None:
        raise ValueError(
            f"A {kind} URL begins with one of {', '.join(f'{name}://' for name in known)}."
        )
    if scheme in EMBEDDED:
        return Address(scheme, path=unquote(parts.path.removeprefix("/") or parts.netloc))
    if not parts.hostname:
        raise ValueError(f"The {kind} URL names no host.")
    return Address(
        scheme,
        parts.hostname,
        port or PORTS.get(scheme),
        None if parts.username is None else unquote(parts.username),
        None if parts.password is None else unquote(parts.password),
        unquote(parts.path.lstrip("/")) if kind != "api" else parts.path.lstrip("/"),
        dict(parse_qsl(parts.query)),
    )


def chosen(kind: str, url: str | None, host: str | None, parts: Mapping[str, Any]) -> Address:
    """The URL's address, else the host's with these parts, else what the environment says."""
    if url is not None:
        return parse(url, kind)
    settings = Settings()
    configured = {
        "database": settings.database_url, "cache": settings.redis_url,
        "queue": settings.amqp_url, "api": settings.api_url,
    }[kind]  # fmt: skip
    if host is None and configured is not None:
        return parse(configured.get_secret_value(), kind)
    found = _by_parts(kind, settings, host, parts)
    return found or _embedded(kind, settings)


def _by_parts(
    kind: str, settings: Settings, host: str | None, parts: Mapping[str, Any]
) -> Address | None:
    password: Any
    if kind == "database":
        host = host or settings.postgres_host
        password = settings.postgres_password
        defaults = ("postgresql", settings.postgres_port, settings.postgres_user, settings.postgres_db)  # noqa: E501  # fmt: skip
    elif kind == "cache":
        host = host or settings.redis_host
        password = None
        defaults = ("redis", settings.redis_port, None, str(settings.redis_db))  # type: ignore[assignment]
    elif kind == "queue":
        host = host or settings.rabbitmq_host
        password = settings.rabbitmq_password
        defaults = ("amqp", settings.rabbitmq_port, settings.rabbitmq_user, "")
    else:
        return None
    if host is None:
        return None
    scheme, port, user, path = defaults
    secret = password.get_secret_value() if password is not None else None
    return Address(
        scheme, host, parts.get("port") or port, parts.get("user") or user,
        parts.get("password") or secret, str(parts.get("db") or path),
    )  # fmt: skip


def _embedded(kind: str, settings: Settings) -> Address:
    if kind == "cache":
        return Address("memory")
    if kind == "api":
        return Address("embedded", path="echo")
    name = "resources.db" if kind == "database" else "queue.db"
    return Address("sqlite", path=str(settings.embedded_dir / name))


def embedded_of(kind: str) -> Address:
    """The embedded stand-in of a kind."""
    return _embedded(kind, Settings())


def scrub(error: BaseException, secrets: tuple[str, ...]) -> None:
    """Take secrets out of an error of a driver, and out of those it stems from."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen and secrets:
        seen.add(id(each))
        if any(secret in repr(each.args) for secret in secrets):
            each.args = tuple(_scrubbed(argument, secrets) for argument in each.args)
        each = each.__cause__ or each.__context__


def _scrubbed(value: Any, secrets: tuple[str, ...]) -> Any:
    text = value if isinstance(value, str) else repr(value)
    if not any(secret in text for secret in secrets):
        return value
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
