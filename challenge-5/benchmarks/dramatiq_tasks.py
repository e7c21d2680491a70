"""A no-op for Dramatiq."""

import importlib
import os

dramatiq = importlib.import_module("dramatiq")
broker_of = importlib.import_module("dramatiq.brokers.redis").RedisBroker
backend_of = importlib.import_module("dramatiq.results.backends").RedisBackend
results = importlib.import_module("dramatiq.results").Results
SPACE = os.environ["DRAMATIQ_SPACE"]

broker = broker_of(url="redis://127.0.0.1:6379/0", namespace=SPACE)
broker.add_middleware(results(backend=backend_of(url="redis://127.0.0.1:6379/0", namespace=SPACE)))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)  # type: ignore[untyped-decorator]
def noop() -> bool:
    return True
