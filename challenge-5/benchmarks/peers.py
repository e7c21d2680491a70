"""The tools people use today, each as a no-op throughput; started, measured and ended here."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import workload

HERE = Path(__file__).resolve().parent
REDIS = "redis://127.0.0.1:6379/0"
WAIT_SECONDS = 60


@contextmanager
def process_pool(workers: int = 2) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for future in [pool.submit(workload.noop) for _ in range(200)]:
            future.result()
        yield pool


def loky(number: int) -> float:
    module = importlib.import_module("loky")
    pool = module.get_reusable_executor(max_workers=2, timeout=60)
    for future in [pool.submit(workload.noop) for _ in range(50)]:
        future.result()
    began = time.perf_counter()
    for future in [pool.submit(workload.noop) for _ in range(number)]:
        future.result()
    took = time.perf_counter() - began
    pool.shutdown(wait=True, kill_workers=True)
    return number / took


def dask_map(number: int) -> float:
    distributed = importlib.import_module("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
            host="127.0.0.1",
        ) as cluster,
        distributed.Client(cluster) as client,
    ):  # fmt: skip
        client.gather(client.map(lambda _: None, range(20), pure=False))
        began = time.perf_counter()
        client.gather(client.map(lambda _: None, range(number), pure=False))
        return number / (time.perf_counter() - began)


@contextmanager
def _worker(command: list[str], **environment: str) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=HERE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(HERE), **environment},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _fresh(name: str, **environment: str) -> Any:
    """Import a module of tasks with its own queue, so that runs do not meet."""
    os.environ.update(environment)
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def sqlite_huey(number: int, scratch: Path) -> float:
    path = str(scratch / f"huey-{uuid.uuid4().hex}.db")
    module = _fresh("huey_tasks", HUEY_PATH=path)
    command = ["huey.bin.huey_consumer", "huey_tasks.queue", "-w", "2", "-k", "process",
               "-d", "0.001", "-m", "0.001", "-q"]  # fmt: skip
    with _worker(command, HUEY_PATH=path):
        module.noop()(blocking=True, timeout=WAIT_SECONDS)
        began = time.perf_counter()
        results = [module.noop() for _ in range(number)]
        for result in results:
            result(blocking=True, timeout=WAIT_SECONDS, backoff=1.0, max_delay=0.002, preserve=True)
        return number / (time.perf_counter() - began)


def celery(number: int) -> float:
    queue = f"bench-{uuid.uuid4().hex}"
    module = _fresh("celery_tasks", CELERY_QUEUE=queue)
    command = ["celery", "-A", "celery_tasks", "worker", "-c", "2", "-Q", queue, "-l", "ERROR",
               "--without-gossip", "--without-mingle", "--without-heartbeat"]  # fmt: skip
    with _worker(command, CELERY_QUEUE=queue):
        module.noop.delay().get(timeout=WAIT_SECONDS)
        began = time.perf_counter()
        results = [module.noop.delay() for _ in range(number)]
        for result in results:
            result.get(timeout=WAIT_SECONDS)
        took = time.perf_counter() - began
        for result in results:
            result.forget()
        module.app.control.purge()
        return number / took


def dramatiq(number: int) -> float:
    space = f"bench-{uuid.uuid4().hex}"
    module = _fresh("dramatiq_tasks", DRAMATIQ_SPACE=space)
    with _worker(["dramatiq", "dramatiq_tasks", "-p", "2", "-t", "1"], DRAMATIQ_SPACE=space):
        module.noop.send().get_result(block=True, timeout=WAIT_SECONDS * 1000)
        began = time.perf_counter()
        messages = [module.noop.send() for _ in range(number)]
        for message in messages:
            message.get_result(block=True, timeout=WAIT_SECONDS * 1000)
        took = time.perf_counter() - began
    _forget(space)
    return number / took


def rq(number: int) -> float:
    redis, module = importlib.import_module("redis"), importlib.import_module("rq")
    name = f"bench-{uuid.uuid4().hex}"
    queue = module.Queue(name, connection=redis.Redis.from_url(REDIS))
    command = ["rq.cli", "worker", "-q", "-w", "rq.worker.SimpleWorker", "-u", REDIS, name]
    with _worker(command), _worker(command):
        first = queue.enqueue(workload.noop)
        _until_finished([first])
        began = time.perf_counter()
        jobs = [queue.enqueue(workload.noop) for _ in range(number)]
        _until_finished(jobs)
        took = time.perf_counter() - began
    for job in [first, *jobs]:
        job.delete()
    queue.delete()
    return number / took


def _until_finished(jobs: list[Any]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    for job in jobs:
        while job.get_status().value != "finished":
            if time.monotonic() > deadline:
                raise TimeoutError("RQ did not finish")
            time.sleep(0.0005)


def _forget(prefix: str) -> None:
    client = importlib.import_module("redis").Redis.from_url(REDIS)
    for key in client.scan_iter(f"{prefix}*"):
        client.delete(key)
