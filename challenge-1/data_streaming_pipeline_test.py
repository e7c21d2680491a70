"""The 10 s scenario of the stream processor: `python data_streaming_pipeline_test.py`.

Three irregular streams, together 9 records a second, go to a downstream that admits 10 calls a
second (the processor has to find that out), and fails 15 % of them. Imported, it starts nothing.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from commands import configure_logs
from delivery import StreamProcessor
from streaming_test_framework import SOURCES, DownstreamAPI, PipelineMetrics, data_stream

SECONDS = 10.0
DRAIN_SECONDS = 10.0
SAMPLE_SECONDS = 0.1
PER_SECOND = 3.0  # of each stream


@dataclass
class Outcome:
    """What the scenario showed."""

    metrics: PipelineMetrics
    processed_in_time: int
    seconds: float
    backlog_at_end: int
    samples: list[int]
    accepted: int

    @property
    def rate(self) -> float:
        """Records processed per second, within the time of the scenario."""
        return self.processed_in_time / self.seconds

    def targets(self) -> list[tuple[str, bool]]:
        """The targets, and whether each is met."""
        metrics = self.metrics
        return [
            (f"processing rate {self.rate:.2f}/s >= 5/s", self.rate >= 5),
            (f"attempt error rate {metrics.error_rate:.1%} <= 30 %", metrics.error_rate <= 0.30),
            (f"final error rate {metrics.final_error_rate:.2%} <= 1 %",
             metrics.final_error_rate <= 0.01),
            (f"backlog {max(self.samples)} <= 100 at every sample, {metrics.max_backlog_size} at "
             "its highest", max(*self.samples, metrics.max_backlog_size) <= 100),
            (f"accepted once each downstream: {self.accepted} of {metrics.total_processed}",
             self.accepted >= metrics.total_processed),
        ]  # fmt: skip


async def scenario(
    seconds: float = SECONDS, seed: int = 7, clock: Callable[[], float] = time.monotonic
) -> Outcome:
    """Run it."""
    downstream = DownstreamAPI(seed=seed, clock=clock)
    streams = [data_stream(source, per_second=PER_SECOND, seed=seed) for source in SOURCES]
    processor = StreamProcessor(streams, downstream, clock=clock)
    samples = [0]
    running = asyncio.create_task(processor.run(seconds, drain_seconds=DRAIN_SECONDS))
    began = clock()
    while not running.done() and clock() - began < seconds:
        samples.append(processor.metrics.backlog_size)
        await asyncio.wait({running}, timeout=SAMPLE_SECONDS)
    took, processed = clock() - began, processor.metrics.total_processed
    backlog = processor.metrics.backlog_size
    metrics = await running
    return Outcome(metrics, processed, took, backlog, samples, len(downstream.accepted))


def positive_seconds(text: str) -> float:
    """More than none, and up to an hour."""
    if 0 < (seconds := float(text)) <= 3600:
        return seconds
    raise ValueError


def main() -> int:
    """Run it, print the figures and the verdict; 0 when every target is met, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=positive_seconds, default=SECONDS, metavar="N")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    configure_logs("ERROR")
    print(f"{len(SOURCES)} streams for {options.seconds:g} s ...", flush=True)
    found = asyncio.run(scenario(options.seconds, options.seed))
    metrics = found.metrics
    print(f"Total processed:         {metrics.total_processed}")
    print(f"Processing rate:         {found.rate:.2f}/s")
    print(f"Average processing time: {metrics.average_processing_time_ms:.1f} ms")
    print(f"Error rate:              {metrics.error_rate:.1%} of attempts, "
          f"{metrics.final_error_rate:.2%} of records")  # fmt: skip
    print(f"Final backlog:           {found.backlog_at_end} after {found.seconds:.1f} s, "
          f"{metrics.backlog_size} after {metrics.seconds:.1f} s")  # fmt: skip
    print(f"Rate-limit hits:         {metrics.rate_limit_hits}")
    for text, met in found.targets():
        print(f"  {'met   ' if met else 'MISSED'}  {text}")
    passed = all(met for _, met in found.targets())
    print(f"Verdict: {'PASS' if passed else 'FAIL'}")
    return 0 if passed else 1


def test_the_verdict_asks_for_every_target() -> None:
    good = PipelineMetrics(total_processed=80, attempts=100, failed_attempts=15)
    bad = PipelineMetrics(total_processed=80, dead_lettered=2, attempts=100, failed_attempts=40,
                          max_backlog_size=101)  # fmt: skip

    assert all(met for _, met in Outcome(good, 80, 10, 3, [5], 80).targets())
    assert not any(met for _, met in Outcome(bad, 40, 10, 3, [101], 79).targets())


if __name__ == "__main__":
    sys.exit(main())
