"""The shared registry on Redis, for nodes on several machines.

Each node has one hash, `<prefix>:node:<id>`, of `name@version` to its record; the hash expires when
the node stops beating, by the clock of the server. Announcing is one script, so that of two nodes
that race with different signatures exactly one gets in.
"""

from collections.abc import Iterable
from typing import Any

from stores import EXPIRY_SECONDS, Conflict, PluginRecord, StoreError, flagged, readable

TIMEOUT_SECONDS = 1.0  # a server that does not answer by then is out
BATCH = 200  # records per call of the script

# KEYS: the set of nodes, the hash of this node. ARGV: prefix, node, expiry in ms, then per record
# its key, its signature hash and its JSON. Returns the key and host of each conflict.
_ANNOUNCE = """
local conflicts = {}
local others = {}
for _, node in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  if node ~= ARGV[2] then
    local hash = ARGV[1] .. ':node:' .. node
    if redis.call('EXISTS', hash) == 1 then
      others[#others + 1] = hash
    else
      redis.call('SREM', KEYS[1], node)
    end
  end
end
redis.call('HSET', KEYS[2], '', '')
for i = 4, #ARGV, 3 do
  local taken = nil
  for _, hash in ipairs(others) do
    local found = redis.pcall('HGET', hash, ARGV[i])
    if type(found) == 'string' and string.sub(found, 1, 64) ~= ARGV[i + 1] then
      local read, record = pcall(cjson.decode, string.sub(found, 65))
      taken = read and type(record) == 'table' and record.host or 'unknown'
    end
  end
  if taken then
    redis.call('HDEL', KEYS[2], ARGV[i])
    conflicts[#conflicts + 1] = ARGV[i]
    conflicts[#conflicts + 1] = taken
  else
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1] .. ARGV[i + 2])
  end
end
redis.call('SADD', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return conflicts
"""


class RedisStore:
    """A registry that nodes on several machines share."""

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "challenge3",
        expiry_seconds: float = EXPIRY_SECONDS,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise StoreError(
                "A shared registry on Redis needs its client: "
                "pip install -r requirements-services.txt"
            ) from error
        self._errors: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        self._prefix = f"{{{prefix}}}"  # one slot, also on a cluster
        self._expiry_ms = int(expiry_seconds * 1000)
        try:
            self._client: Any = redis.Redis.from_url(
                url,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError:
            raise StoreError(
                "The address of Redis cannot be used: REDIS_URL is like redis://host:6379/0."
            ) from None
        self._announce = self._client.register_script(_ANNOUNCE)

    @property
    def _nodes(self) -> str:
        return f"{self._prefix}:nodes"

    def _hash(self, node: str) -> str:
        return f"{self._prefix}:node:{node}"

    def _failed(self, error: Exception) -> StoreError:
        return StoreError(f"Redis does not answer ({type(error).__name__}).")

    def announce(self, node: str, records: Iterable[PluginRecord]) -> list[Conflict]:
        """Put records of a node, and count as its heartbeat; conflicting ones are left out."""
        waiting = list(records)
        conflicts: list[Conflict] = []
        try:
            for start in range(0, max(1, len(waiting)), BATCH):
                batch = {record.key: record for record in waiting[start : start + BATCH]}
                arguments: list[Any] = [self._prefix, node, self._expiry_ms]
                for key, record in batch.items():
                    arguments += [key, record.signature_hash, record.to_json()]
                told = self._announce(keys=[self._nodes, self._hash(node)], args=arguments)
                pairs = zip(told[::2], told[1::2], strict=True)
                conflicts += [Conflict(batch[key.decode()], host.decode()) for key, host in pairs]
        except self._errors as error:
            raise self._failed(error) from error
        return conflicts

    def heartbeat(self, node: str) -> bool:
        """Stay alive; False when the store knows nothing of the node (any more)."""
        try:
            return bool(self._client.pexpire(self._hash(node), self._expiry_ms))
        except self._errors as error:
            raise self._failed(error) from error

    def withdraw(self, node: str, keys: Iterable[str]) -> None:
        """Take records of a node out again."""
        gone = list(keys)
        try:
            if gone:
                self._client.hdel(self._hash(node), *gone)
        except self._errors as error:
            raise self._failed(error) from error

    def leave(self, node: str) -> None:
        """Take the node out with all its records."""
        try:
            with self._client.pipeline() as pipeline:
                pipeline.delete(self._hash(node))
                pipeline.srem(self._nodes, node)
                pipeline.execute()
        except self._errors as error:
            raise self._failed(error) from error

    def records(self) -> list[PluginRecord]:
        """The records of live nodes, by name, version and node."""
        try:
            nodes = [node.decode() for node in self._client.smembers(self._nodes)]
            with self._client.pipeline(transaction=False) as pipeline:
                pipeline.time()
                for node in nodes:
                    pipeline.hgetall(self._hash(node))
                    pipeline.pttl(self._hash(node))
                told = pipeline.execute(raise_on_error=False)
            if isinstance(told[0], Exception):
                raise told[0]
        except self._errors as error:
            raise self._failed(error) from error
        seconds, micros = told[0]
        now = seconds + micros / 1e6
        stored: list[tuple[bytes, float]] = []
        for held, left in zip(told[1::2], told[2::2], strict=True):
            if isinstance(held, dict) and isinstance(left, int):
                beat = now - (self._expiry_ms - max(0, left)) / 1000
                stored += [(value[64:], beat) for key, value in held.items() if key]
        return flagged(readable(stored))

    def ping(self) -> None:
        """Return when the server answers."""
        try:
            self._client.ping()
        except self._errors as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
