"""Personal data out of JSON before it is stored or shown: by pattern, and by check digits.

All patterns are linear: none has a repetition inside a repetition.
"""

import ipaddress
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from utils import Transformer

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}")
_IBAN = re.compile(r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_CARD = re.compile(r"(?<![\d.])[0-9](?:[ -]?[0-9]){12,18}(?![\d.])")
_PHONE = re.compile(r"(?<![\w.])(?:\+|00)[1-9](?:[ ()/.-]{0,2}[0-9]){6,14}(?!\w)")
_IPV4 = re.compile(r"(?<![\w.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w.]*\w)")


def is_card(text: str) -> bool:
    """Whether the check digit (Luhn) is right."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether the check digits (ISO 7064, modulo 97) are right."""
    packed = text.replace(" ", "")
    turned = packed[4:] + packed[:4]
    return 15 <= len(packed) <= 34 and int("".join(str(int(c, 36)) for c in turned)) % 97 == 1


def is_address(text: str) -> bool:
    """Whether it is an IPv4 address."""
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _always(text: str) -> bool:
    return bool(text)


RULES: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("email", _EMAIL, _always),
    ("iban", _IBAN, is_iban),
    ("card", _CARD, is_card),
    ("phone", _PHONE, _always),
    ("ip", _IPV4, is_address),
)


def redact_text(text: str) -> str:
    """The text with marks such as `[email]` in place of personal data."""
    for label, pattern, holds in RULES:
        text = pattern.sub(partial(_marked, f"[{label}]", holds), text)
    return text


def _marked(mark: str, holds: Callable[[str], bool], found: re.Match[str]) -> str:
    return mark if holds(found[0]) else found[0]


class RedactPersonalData(Transformer[Any, Any]):
    """Replaces e-mail addresses, phone, card and account numbers and IP addresses in any JSON."""

    version = "1.0.0"
    description = "Replaces personal data in any JSON by marks such as [email]."
    author = "challenge-3"
    example = {  # noqa: RUF012  (read only)
        "note": "Call +49 151 2345 6789 or write to ada@example.org",
        "payment": ["4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00"],
        "client": "192.0.2.17",
    }

    def transform(self, data: Any) -> Any:
        """A copy; names of members are looked at too, numbers and structure stay."""
        if isinstance(data, str):
            return redact_text(data)
        if isinstance(data, list):
            return [self.transform(item) for item in data]
        if isinstance(data, dict):
            redacted: dict[str, Any] = {}
            for key, value in data.items():
                name = redact_text(key)
                while name in redacted:  # two names became the same mark: both values stay
                    name += "_"
                redacted[name] = self.transform(value)
            return redacted
        return data
