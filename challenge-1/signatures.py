"""Webhook signatures after Standard Webhooks: who sent this, unchanged, and not long ago.

HMAC-SHA256 over `id.timestamp.body` as it came over the wire, checked while the body streams in, so
a signed upload needs no more memory than an unsigned one. Several secrets may be valid at once (a
rotation), and a sender may sign with several.
"""

import base64
import binascii
import hmac
import re
from collections.abc import Callable, Iterable
from typing import Final

from parsing import BodyError

TOLERANCE_SECONDS: Final = 300
PREFIX: Final = "whsec_"
MAX_SIGNATURES: Final = 16
_TIMESTAMP: Final = re.compile(r"[0-9]{1,12}")
_REFUSED: Final = (
    "The request is not signed as Standard Webhooks asks for: webhook-id, webhook-timestamp and "
    "webhook-signature (v1, HMAC-SHA256 over id.timestamp.body) with a secret of WEBHOOK_SECRET."
)


def secrets_of(text: str) -> list[bytes]:
    """The keys in WEBHOOK_SECRET: one or several, separated by commas or white space.

    `whsec_` and base64, as the standard has it; a secret without the prefix is taken as it stands
    and, where it is base64, decoded as well. Raises ValueError for a broken or empty one.
    """
    keys: list[bytes] = []
    for secret in re.split(r"[\s,]+", text.strip()):
        encoded = secret.removeprefix(PREFIX)
        try:
            decoded = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
        except (binascii.Error, ValueError):
            decoded = b""
        if secret.startswith(PREFIX):
            if not decoded:
                raise ValueError("WEBHOOK_SECRET holds a whsec_ secret that is no base64.")
            keys.append(decoded)
        elif secret:
            keys += [secret.encode(), *([decoded] if decoded else [])]
    if not keys:
        raise ValueError("WEBHOOK_SECRET is set, but holds no secret.")
    return keys


class Signature:
    """The signature of one request: `update` with every piece of its body, then `verify`."""

    def __init__(
        self, keys: Iterable[bytes], message_id: str, timestamp: str, given: str, now: float
    ) -> None:
        """Raise BodyError 401 when the headers alone tell that it is no good."""
        if not (message_id and given and _TIMESTAMP.fullmatch(timestamp)):
            raise BodyError(401, _REFUSED)
        if abs(now - int(timestamp)) > TOLERANCE_SECONDS:
            raise BodyError(
                401,
                "The webhook-timestamp is more than 5 minutes away from now: signed too long ago, "
                "or a clock is wrong. Sign it anew.",
            )
        self._given = []
        for each in given.split(" ")[:MAX_SIGNATURES]:
            version, _, signature = each.partition(",")
            if version == "v1":
                self._given.append(signature.encode("latin-1", "replace"))
        head = f"{message_id}.{timestamp}.".encode("latin-1", "replace")
        self._hashes = [hmac.new(key, head, "sha256") for key in keys]

    def update(self, piece: bytes) -> None:
        """Take a piece of the body as it came."""
        for each in self._hashes:
            each.update(piece)

    def verify(self) -> None:
        """Raise BodyError 401 unless one of the signatures is right."""
        expected = [base64.b64encode(each.digest()) for each in self._hashes]
        matches = [hmac.compare_digest(mine, given) for mine in expected for given in self._given]
        if not any(matches):
            raise BodyError(401, "The webhook-signature does not belong to this body.")


Sign = Callable[[str, str, str], Signature]
