"""Caches behind one interface: in memory by cachetools, or Redis.

Values are what JSON can say (and bytes); they are stored encoded, so nobody shares an object with
the cache, and both caches answer the same. Concurrent loads of one key become a single one.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from cachetools import TLRUCache

from addresses import Address
from connections import Connection, Connector, driver
from failures import OperationError

MISSING: Any = object()
BYTES_MARK = "\x00bytes:"  # begins no JSON text


class Cache(Connection):
    """`await get(key)`, `await set(key, value)`, `await delete(key)`, `await get_or_load(...)`."""

    def __init__(self, address: Address, operation_timeout: float, ttl: float | None) -> None:
        super().__init__(address, operation_timeout)
        self.ttl = ttl
        self.hits = self.misses = 0
        self._loading: dict[str, tuple[asyncio.Task[Any], list[int]]] = {}

    async def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default when there is none or its time is over."""
        text = await self._read(_key(key))
        if text is None:
            self.misses += 1
            return default
        self.hits += 1
        return _decoded(text)

    async def set(self, key: str, value: Any, ttl: float | None = None) -> None:
        """Keep a value for `ttl` seconds (default: that of the cache)."""
        ttl = self.ttl if ttl is None else ttl
        if ttl is not None and not ttl > 0:
            raise ValueError("A time to live is more than zero seconds.")
        await self._write(_key(key), _encoded(value), ttl)

    async def delete(self, key: str) -> bool:
        """Forget a value; whether there was one."""
        return await self._remove(_key(key))

    async def get_or_load(self, key: str, load: Callable[[], Any], ttl: float | None = None) -> Any:
        """The value, else what `load` returns: asked once, however many wait for it.

        An error of `load` reaches all who wait, and nothing is kept.
        """
        value = await self.get(key, MISSING)
        if value is not MISSING:
            return value
        while key in self._loading and self._loading[key][0].cancelling():
            await asyncio.wait({self._loading[key][0]})  # given up by others: not to be joined
        if key not in self._loading:
            task = asyncio.create_task(self._load(key, load, ttl))
            self._loading[key] = (task, [0])
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        task, waiting = self._loading[key]
        waiting[0] += 1
        try:
            return await asyncio.shield(task)
        finally:
            waiting[0] -= 1
            if not waiting[0] and not task.done():
                task.cancel()  # nobody waits for it any more

    async def _load(self, key: str, load: Callable[[], Any], ttl: float | None) -> Any:
        value = load()
        if inspect.isawaitable(value):
            value = await value
        await self.set(key, value, ttl)
        return value

    async def check(self) -> None:
        """Write, read and delete a key of its own."""
        key = f"\x01check:{id(self)}"
        await self._write(key, "1", 10.0)
        if await self._read(key) is None:
            raise OperationError(f"{self.address.shown} forgot what it was told.")
        await self._remove(key)

    def stats(self) -> Mapping[str, float]:
        """Hits, misses, and what is under way."""
        return {
            "hits": float(self.hits),
            "misses": float(self.misses),
            "loading": float(len(self._loading)),
            "in_use": float(self.in_use),
        }

    async def _stop_loading(self) -> None:
        tasks = [task for task, _ in self._loading.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _read(self, key: str) -> str | None:
        raise NotImplementedError

    async def _write(self, key: str, text: str, ttl: float | None) -> None:
        raise NotImplementedError

    async def _remove(self, key: str) -> bool:
        raise NotImplementedError


def _key(key: str) -> str:
    if not isinstance(key, str) or not 0 < len(key) <= 512:
        raise ValueError("A key is a string of 1 to 512 characters.")
    return key


def _encoded(value: Any) -> str:
    if isinstance(value, bytes):
        return BYTES_MARK + base64.b64encode(value).decode()
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise TypeError(
            f"A {type(value).__name__} cannot be kept: values are bytes, or what JSON can say."
        ) from None


def _decoded(text: str) -> Any:
    if text.startswith(BYTES_MARK):
        return base64.b64decode(text[len(BYTES_MARK) :])
    return json.loads(text)


class MemoryCache(Cache):
    """Least recently used go first when it is full; each has its own time to live."""

    def __init__(
        self,
        address: Address,
        operation_timeout: float,
        ttl: float | None,
        maxsize: int,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(address, operation_timeout, ttl)
        self._kept: TLRUCache[str, tuple[str, float]] = TLRUCache(
            maxsize, ttu=lambda _key, value, now: now + value[1], timer=timer
        )
        self.evictions = 0

    async def _read(self, key: str) -> str | None:
        async with self.operation("a read"):
            found = self._kept.get(key)
            return None if found is None else found[0]

    async def _write(self, key: str, text: str, ttl: float | None) -> None:
        async with self.operation("a write"):
            full = key not in self._kept and self._kept.currsize >= self._kept.maxsize
            self._kept[key] = (text, float("inf") if ttl is None else ttl)
            self.evictions += full

    async def _remove(self, key: str) -> bool:
        async with self.operation("a deletion"):
            return self._kept.pop(key, None) is not None

    async def close(self) -> None:
        """Forget everything."""
        await self._stop_loading()
        self.closed = True
        self._kept.clear()

    def stats(self) -> Mapping[str, float]:
        """Size, evictions, hits and misses."""
        size = float(self._kept.currsize)
        more = {"size": size, "max": float(self._kept.maxsize), "evictions": float(self.evictions)}
        return {**super().stats(), **more}


class RedisCache(Cache):
    """A Redis server. Failures are reported at once: nothing here retries."""

    def __init__(self, address: Address, operation_timeout: float, ttl: float | None) -> None:
        super().__init__(address, operation_timeout, ttl)
        self._redis = driver("redis", "redis")
        asynchronous = driver("redis.asyncio", "redis")
        retry = driver("redis.asyncio.retry", "redis")
        backoff = driver("redis.backoff", "redis")
        self._client = asynchronous.Redis.from_url(
            address.url, decode_responses=True, retry=retry.Retry(backoff.NoBackoff(), 0),
            socket_timeout=None, socket_connect_timeout=None,  # `operation` has the deadline
        )  # fmt: skip

    async def open(self) -> None:
        """Ask it once; the manager has the deadline."""
        await self._client.ping()

    def is_connection_error(self, error: Exception) -> bool:
        """What redis-py raises when the server is gone."""
        return isinstance(error, (OSError, self._redis.ConnectionError, self._redis.TimeoutError))

    async def _read(self, key: str) -> str | None:
        async with self.operation("GET"):
            text: str | None = await self._client.get(key)
            return text

    async def _write(self, key: str, text: str, ttl: float | None) -> None:
        async with self.operation("SET"):
            await self._client.set(key, text, px=None if ttl is None else max(1, int(ttl * 1000)))

    async def _remove(self, key: str) -> bool:
        async with self.operation("DELETE"):
            return bool(await self._client.delete(key))

    async def close(self) -> None:
        """Close its connections."""
        await self._stop_loading()
        self.closed = True
        await self._client.aclose()

    def stats(self) -> Mapping[str, float]:
        """Hits, misses and connections."""
        pool = self._client.connection_pool
        used, idle = len(pool._in_use_connections), len(pool._available_connections)
        return {**super().stats(), "used": float(used), "idle": float(idle)}


class CacheConnection(Connector):
    """A cache: in memory, or Redis where a URL or a host says so."""

    kind = "cache"
    address_kind = "cache"

    def __init__(
        self,
        url: str | None = None,
        *,
        maxsize: int = 1024,
        ttl: float | None = 300.0,
        timer: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        super().__init__(url, **options)
        self._maxsize = maxsize
        self._ttl = ttl
        self._timer = timer

    async def connect(self, address: Address) -> Cache:
        """Make it, and ask it once."""
        if address.embedded:
            return MemoryCache(
                address, self.operation_timeout, self._ttl, self._maxsize, self._timer
            )
        cache = RedisCache(address, self.operation_timeout, self._ttl)
        try:
            await cache.open()
        except BaseException:
            await cache.close()
            raise
        return cache
