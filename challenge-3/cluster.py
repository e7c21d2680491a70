"""This process among those that share a registry store.

One thread announces the plugins, beats every five seconds and answers for conflicts. No call of a
plugin ever waits for it: while the store is out, plugins serve from memory, health says so, and
when the store is back everything is announced again.
"""

import atexit
import os
import socket
import threading
import uuid
from collections.abc import Callable

from documents import schemas_of
from logs import get_logger
from registry import Failure, Plugin, Registry, State
from settings import Settings
from stores import Conflict, PluginRecord, RegistryStore, SQLiteStore, StoreError, flagged
from utils import registry as process_registry
from versions import Version, parse_version

log = get_logger("cluster")

HEARTBEAT_SECONDS = 5.0


class Cluster:
    """Keeps a store in step with a registry."""

    def __init__(
        self,
        registry: Registry,
        store: RegistryStore,
        *,
        host: str | None = None,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self.registry = registry
        self.store = store
        self.host = host or socket.gethostname()
        self.node = f"{self.host}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.reachable = False
        self._heartbeat_seconds = heartbeat_seconds
        self._announced: dict[str, Plugin] = {}
        self._conflicts: dict[str, Plugin] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._lock = threading.Lock()  # one step at a time
        self._thread: threading.Thread | None = None
        self._unsubscribe: Callable[[], None] = lambda: None

    # --- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Announce in the background, now and on."""
        if self._thread is None:
            self._unsubscribe = self.registry.subscribe(lambda _: self._wake.set())
            self._thread = threading.Thread(target=self._run, name="cluster", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Leave; nodes that stay see it at once."""
        self._stopping = True
        self._unsubscribe()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        try:
            self.store.leave(self.node)
        except StoreError as error:
            log.warning("cluster_leave_failed", error=str(error))
        self.store.close()

    def _run(self) -> None:
        while not self._stopping:
            self.step()
            self._wake.wait(self._heartbeat_seconds)
            self._wake.clear()

    def step(self) -> None:
        """Beat, and announce what has changed or what the store has lost."""
        with self._lock:
            try:
                if not self.store.heartbeat(self.node):
                    self._announced.clear()
                self._announce()
            except StoreError as error:
                if self.reachable or not self._announced:
                    log.warning("registry_store_out", error=str(error))
                self.reachable = False
                self._announced.clear()  # nobody knows what it kept
            except Exception:  # the boundary: this thread must live as long as the process
                log.exception("cluster_step_failed")
            else:
                if not self.reachable:
                    log.info("registry_store_works", node=self.node)
                self.reachable = True

    def _announce(self) -> None:
        plugins = {f"{p.name}@{p.version}": p for p in self.registry.snapshot()}
        gone = [key for key, plugin in self._announced.items() if plugins.get(key) is not plugin]
        if lost := [key for key in gone if key not in plugins]:
            self.store.withdraw(self.node, lost)
        for key in gone:
            del self._announced[key]
        for key in [key for key, p in self._conflicts.items() if plugins.get(key) is not p]:
            self._settle(key)
        new = {key: plugin for key, plugin in plugins.items() if key not in self._announced}
        if not new and self._announced:
            return
        conflicts = self.store.announce(self.node, [self.record_of(p) for p in new.values()])
        refused = {conflict.record.key: conflict for conflict in conflicts}
        for key, plugin in new.items():
            if key in refused:
                self._clash(key, plugin, refused[key])
            else:
                self._announced[key] = plugin
                self._settle(key)

    def _clash(self, key: str, plugin: Plugin, conflict: Conflict) -> None:
        """This node must not serve it: its callers would meet two signatures."""
        if self._conflicts.get(key) is plugin:
            return
        self._conflicts[key] = plugin
        reason = f"host {conflict.host} serves this version with other signatures"
        self.registry.failures[key] = Failure(
            phase="conflict", name=plugin.name,
            error=f"{plugin.name} {plugin.version} is not served here: {reason}. "
            "Give the changed one a higher version.",
        )  # fmt: skip
        self.registry.set_state(plugin, State.CONFLICT, reason)
        log.warning("plugin_conflict", plugin=plugin.name, version=str(plugin.version),
                    host=conflict.host)  # fmt: skip

    def _settle(self, key: str) -> None:
        if (plugin := self._conflicts.pop(key, None)) is not None:
            self.registry.failures.pop(key, None)
            if plugin.state is State.CONFLICT:
                self.registry.set_state(plugin, State.ENABLED)

    # --- records ------------------------------------------------------------------------------

    def record_of(self, plugin: Plugin) -> PluginRecord:
        """What others may know of a plugin."""
        takes, gives = schemas_of(plugin)
        return PluginRecord(
            name=plugin.name,
            version=plugin.version.text,
            contract=plugin.contracts[0] if plugin.contracts else "",
            signature_hash=plugin.signature_hash,
            code_hash=plugin.code_hash,
            host=self.host,
            node=self.node,
            capabilities=sorted(plugin.capabilities),
            input_schema=takes,
            output_schema=gives,
            description=plugin.description,
            author=plugin.author,
        )

    def records(self) -> tuple[list[PluginRecord], bool]:
        """Those of the store, and True; while it is out those of this process, and False."""
        try:
            return self.store.records(), True
        except StoreError:
            return flagged(map(self.record_of, self.registry.snapshot())), False

    def by_name(self) -> dict[str, PluginRecord]:
        """One record for each name: what this process serves by default, else the highest."""
        self.step()
        found: dict[str, PluginRecord] = {}
        ranks: dict[str, tuple[bool, Version]] = {}
        for record in self.records()[0]:
            version = parse_version(record.version)
            if version is None:
                continue
            default = self.registry.peek_default(record.name)
            rank = record.node == self.node and default == record.version, version
            if record.name not in found or rank > ranks[record.name]:
                found[record.name], ranks[record.name] = record, rank
        return found

    def works(self) -> bool:
        """Whether the store answers now."""
        try:
            self.store.ping()
        except StoreError:
            return False
        return True


def store_of(settings: Settings) -> RegistryStore:
    """Redis where it is set, else the embedded store."""
    if (address := settings.redis) is not None:
        from redis_store import RedisStore

        return RedisStore(address)
    return SQLiteStore(settings.registry_path)


_joined: Cluster | None = None
_joining = threading.Lock()


def join(settings: Settings | None = None) -> Cluster:
    """The membership of this process in the store that the settings name."""
    global _joined
    with _joining:
        if _joined is None:
            _joined = Cluster(process_registry, store_of(settings or Settings()))
            _joined.start()
            atexit.register(leave)
        return _joined


def leave() -> None:
    """End the membership of this process."""
    global _joined
    with _joining:
        cluster, _joined = _joined, None
    if cluster is not None:
        cluster.stop()
