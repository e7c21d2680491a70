"""Idempotency keys: the first request decides, every repeat gets its answer.

A key is known from the moment its first request is complete (repeats wait for it), then from the
log (until it is applied), then from the store. Belongs to the event loop.
"""

import asyncio
from dataclasses import dataclass

import msgspec

from batches import Promise, Receipt
from storage import Store

Key = tuple[bytes, bytes]  # digests of the Idempotency-Key and of the body


class Busy(Exception):
    """More is waiting than the bounds allow; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class KeyReused(Exception):
    """An Idempotency-Key came back with another body."""


@dataclass
class _Promised:
    """A key whose first request is on its way."""

    body: bytes
    answer: "asyncio.Future[Receipt]"
    submitted: bool = False  # from then on only the log decides


class Answers:
    """What idempotency keys were answered, wherever that stands now."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._promised: dict[bytes, _Promised] = {}
        self._unapplied: dict[bytes, tuple[bytes, Receipt]] = {}

    async def to(self, key: Key) -> Receipt | None:
        """The answer this key got; without an await when it is new. Raises KeyReused."""
        name, body = key
        if (promised := self._promised.get(name)) is not None:
            known = promised.body
            receipt = await asyncio.shield(promised.answer)
        elif name in self._unapplied:
            known, receipt = self._unapplied[name]
        elif (stored := self._store.answer(name)) is not None:
            known = stored.body
            receipt = msgspec.msgpack.decode(stored.answer, type=Receipt)
        else:
            return None
        if known != body:
            raise KeyReused(
                "This Idempotency-Key was used with another body. Use a new key for a new body."
            )
        return receipt

    def promise(self, key: Key) -> None:
        """Let repeats of this key wait for the request that begins now."""
        answer: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._promised[key[0]] = _Promised(key[1], answer)

    def submitted(self, name: bytes) -> None:
        """The request with this key has been handed to the log."""
        self._promised[name].submitted = True

    def withdraw(self, key: Key) -> None:
        """The first request with this key failed before it reached the log."""
        promised = self._promised.get(key[0])
        if promised is not None and not promised.submitted:
            del self._promised[key[0]]
            promised.answer.set_exception(
                Busy("The first request with this Idempotency-Key failed; send it again.", 1)
            )
            promised.answer.exception()

    def settled(self, promise: Promise | None, error: BaseException | None = None) -> None:
        """The log has taken the request with this promise, if any, or has refused it."""
        if promise is None:
            return
        promised = self._promised.pop(promise.key)
        if error is not None:
            promised.answer.set_exception(error)
            promised.answer.exception()
            return
        self._unapplied[promise.key] = (promise.body, promise.receipt)
        promised.answer.set_result(promise.receipt)

    def recovered(self, promise: Promise | None, end: int) -> None:
        """An answer was found in the unapplied end of the log."""
        if promise is not None:
            promise.receipt.position = end
            self._unapplied[promise.key] = (promise.body, promise.receipt)

    def applied(self, names: list[bytes]) -> None:
        """These stand in the store from now on."""
        for name in names:
            self._unapplied.pop(name, None)
