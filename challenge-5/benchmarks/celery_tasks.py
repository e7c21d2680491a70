"""A no-op for Celery."""

import importlib
import os

REDIS = "redis://127.0.0.1:6379/0"
app = importlib.import_module("celery").Celery("bench", broker=REDIS, backend=REDIS)
app.conf.task_default_queue = os.environ["CELERY_QUEUE"]


@app.task  # type: ignore[untyped-decorator]
def noop() -> None:
    return None
