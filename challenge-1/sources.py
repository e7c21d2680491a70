"""From an unreliable product API to typed products: one bounded GET, one schema, one decimal mark.

Everything a source answers is hostile until it is proven: bytes, time, type, encoding, redirects
and cursors are bounded or checked here, and every refusal is a CallError with a kind to count by.
"""

import asyncio
import datetime as dt
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Final
from urllib.parse import quote, urljoin

import httpx2
import msgspec
from pydantic import ValidationError

from fetch_settings import Source, origin
from limiter import RateLimiter, Slot
from parsing import BodyError, decoder_of
from records import Product
from resilience import Failed, Limited, Refused

MAX_REDIRECTS: Final = 3
MAX_PAGES: Final = 100_000
MAX_RECORDS: Final = 20_000  # of one answer
MAX_IDS: Final = 200_000
MAX_CURSOR_CHARACTERS: Final = 2048
SAFE_ID: Final = re.compile(r"[A-Za-z0-9._~:@+-]{1,128}")
CURRENCY_SIGNS: Final = {
    "$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY", "₹": "INR", "US$": "USD", "A$": "AUD",
    "C$": "CAD", "R$": "BRL", "Fr": "CHF", "zł": "PLN", "Kč": "CZK", "₽": "RUB", "₩": "KRW",
    "₺": "TRY", "₴": "UAH", "₪": "ILS",
}  # fmt: skip
NUMBER: Final = re.compile(r"[.,]?[0-9](?:[0-9.,'\u2019 ]*[0-9])?")
MISSING: Final = object()


# --- one request ------------------------------------------------------------------------------


class SourceClient:
    """Bounded GETs. Use it as `async with`; it is shared by all sources of a run."""

    def __init__(
        self,
        *,
        max_body_bytes: int,
        request_seconds: float,
        connections: int,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._max_body_bytes = max_body_bytes
        self._request_seconds = request_seconds
        self._http = httpx2.AsyncClient(
            timeout=request_seconds,
            follow_redirects=False,
            cookies=no_cookies(),
            trust_env=False,  # a proxy of the environment would see what is meant for loopback
            headers={"Accept": "application/json", "Accept-Encoding": "gzip"},
            # Servers close idle connections after 5 s (uvicorn): be first, or meet the closing.
            limits=httpx2.Limits(max_connections=connections, keepalive_expiry=2),
            transport=transport,
        )

    async def __aenter__(self) -> "SourceClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def get(
        self,
        url: str,
        params: Mapping[str, str],
        headers: Mapping[str, str],
        slot: Slot,
        limiter: RateLimiter,
    ) -> bytes:
        """The decoded body of a 200 with JSON; raise Failed, Refused or Limited.

        A redirect is followed to the same scheme, host and port only, and takes a slot of its own.
        """
        home, target = origin(url), str(httpx2.URL(url).copy_merge_params(dict(params)))
        used = slot
        try:
            for _ in range(1 + MAX_REDIRECTS):
                answer = await self._one(target, headers, used)
                if isinstance(answer, bytes):
                    return answer
                target = urljoin(target, answer.location)
                if origin_or_none(target) != home:
                    raise Refused(
                        "redirect",
                        "It redirects to another host or port, which is not followed; if that is "
                        "right, configure the new URL.",
                    )
                used.close()
                used = await limiter.acquire()
            raise Refused("redirect", f"It redirects more than {MAX_REDIRECTS} times.")
        finally:
            used.close()

    async def _one(self, url: str, headers: Mapping[str, str], slot: Slot) -> "bytes | _Redirect":
        async def trace(event: str, info: object) -> None:
            del info
            if event == "http11.send_request_body.complete":
                slot.sent()

        try:
            async with (
                asyncio.timeout(self._request_seconds),
                self._http.stream(
                    "GET", url, headers=dict(headers), extensions={"trace": trace}
                ) as response,
            ):
                slot.answered()
                if response.status_code in (301, 302, 303, 307, 308):
                    return _Redirect(response.headers.get("location", ""))
                _check_status(response)
                return await self._body(response)
        except (TimeoutError, httpx2.TimeoutException):
            raise Failed(
                "timeout", f"There was no whole answer within {self._request_seconds:g} s."
            ) from None
        except httpx2.HTTPError as error:
            if isinstance(error, httpx2.ConnectError):
                raise Failed("connect", "Nothing takes connections there.") from error
            raise Failed("transport", f"The connection broke: {type(error).__name__}.") from error
        except httpx2.InvalidURL:
            raise Refused("redirect", "It redirects to something that is no URL.") from None

    async def _body(self, response: httpx2.Response) -> bytes:
        media_type = response.headers.get("content-type", "").split(";")[0].strip().lower()
        if media_type != "application/json" and not media_type.endswith("+json"):
            raise Failed("content_type", f"It answered {media_type[:80] or 'no type'}, not JSON.")
        declared = response.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            inflate = decoder_of(response.headers.get("content-encoding", ""))
            inflater = inflate() if inflate else None
            async for raw in response.aiter_raw():
                for piece in inflater.feed(raw) if inflater else (raw,):
                    size += len(piece)
                    if size > self._max_body_bytes:
                        raise self._too_large()
                    parts.append(piece)
            if inflater is not None:
                parts += inflater.finish()
        except BodyError:
            raise Failed("encoding", "Its body is neither plain nor valid gzip.") from None
        return b"".join(parts)

    def _too_large(self) -> Failed:
        return Failed("too_large", f"Its body has more than {self._max_body_bytes:,} bytes.")


def no_cookies() -> CookieJar:
    """A jar that takes none: they would be shared by what runs on one host, and pile up."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


@dataclass(frozen=True)
class _Redirect:
    location: str


def origin_or_none(url: str) -> tuple[str, str, int] | None:
    """The origin of a URL, or None where that is none."""
    try:
        return origin(url)
    except ValueError:
        return None


def _check_status(response: httpx2.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    if status == 429:
        raise Limited(retry_after_seconds(response.headers.get("retry-after")))
    if status >= 500 or status in (408, 425):
        raise Failed(f"http_{status}", f"It answered {status}.")
    raise Refused(f"http_{status}", f"It answered {status}.")


def retry_after_seconds(
    text: str | None, now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC)
) -> float | None:
    """What a Retry-After asks for: seconds, or a date; None where it says nothing sensible, such
    as a moment that is over.
    """
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = parsedate_to_datetime(text)
        except (ValueError, OverflowError):
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=dt.UTC)
        seconds = (moment - now()).total_seconds()
    return seconds if seconds >= 0 else None  # nor is NaN


# --- what a body says -------------------------------------------------------------------------


@dataclass
class Page:
    """What one answer held."""

    products: list[Product] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)  # kind, message
    records: int = 0
    next: str | None = None
    pages: int | None = None


def decode(body: bytes) -> Any:
    """A JSON document; raise Failed when it is none (NaN and bad UTF-8 included)."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Failed("malformed", "Its body is no JSON document.") from None


def read_page(source: Source, body: bytes, fetched_at: dt.datetime) -> Page:
    """The products of a page; raise Failed when the document has another shape."""
    document = decode(body)
    if source.paging == "single":
        records: Any = [document]
    else:
        records = at_path(document, source.records)
    if not isinstance(records, list):
        raise Failed("shape", f"There is no list of records at `{source.records}`.")
    if len(records) > MAX_RECORDS:
        raise Failed("too_large", f"It holds more than {MAX_RECORDS:,} records.")
    page = Page(records=len(records))
    for number, record in enumerate(records):
        try:
            product, faults = normalise(source, record, fetched_at)
        except ValueError as error:
            page.faults.append(("invalid_product", f"Record {number}: {error}"))
        else:
            page.products.append(product)
            page.faults += [("bad_field", f"Product {product.id}: {text}") for text in faults]
    if source.paging == "cursor":
        page.next = _cursor(at_path(document, source.next))
    elif source.paging == "pages" and source.pages:
        page.pages = _page_count(at_path(document, source.pages))
    return page


def read_ids(source: Source, body: bytes) -> list[str]:
    """The ids of an index; raise Failed when it has another shape."""
    found = at_path(decode(body), source.ids)
    if not isinstance(found, list):
        raise Failed("shape", f"There is no list of ids at `{source.ids}`.")
    if len(found) > MAX_IDS:
        raise Failed("too_large", f"Its index holds more than {MAX_IDS:,} ids.")
    ids = [_text(each) if _is_short(each) else "" for each in found]
    if not all(SAFE_ID.fullmatch(each) for each in ids):
        raise Failed("shape", "The index holds something that is no id.")
    return list(dict.fromkeys(ids))


def _is_short(value: Any) -> bool:
    return not isinstance(value, int) or abs(value) < 2**64


def item_url(source: Source, item_id: str) -> str:
    """The URL of one product; an id cannot leave its place in the path."""
    if item_id in (".", "..") or source.item_url is None:
        raise Refused("shape", "That is no id.")
    return source.item_url.replace("{id}", quote(item_id, safe=""))


def _cursor(value: Any) -> str | None:
    if value is MISSING or value is None or value == "":
        return None
    if isinstance(value, str | int) and len(text := str(value)) <= MAX_CURSOR_CHARACTERS:
        return text
    raise Failed("shape", "Its cursor is no short text.")


def _page_count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_PAGES:
        raise Failed("shape", f"Its number of pages is no number up to {MAX_PAGES:,}.")
    return value


def at_path(document: Any, path: str) -> Any:
    """What stands at a dotted path (`price.amount`, `tags.0`), or MISSING."""
    found = document
    for step in path.split(".") if path else ():
        if isinstance(found, dict):
            found = found.get(step, MISSING)
        elif isinstance(found, list) and step.isdigit() and int(step) < len(found):
            found = found[int(step)]
        else:
            return MISSING
    return found


# --- one product ------------------------------------------------------------------------------


def normalise(source: Source, record: Any, fetched_at: dt.datetime) -> tuple[Product, list[str]]:
    """The product of a record, and which of its optional parts could not be read.

    Raises ValueError when it has no id or no name.
    """
    if not isinstance(record, dict):
        raise ValueError("it is no object")  # noqa: TRY004  (bad data, not a bad call)
    paths = source.fields
    faults: list[str] = []

    def optional(path: str | None, read: Callable[[Any], Any], what: str) -> Any:
        value = at_path(record, path) if path else MISSING
        if value is MISSING or value is None or value == "":
            return None
        try:
            return read(value)
        except ValueError as error:
            faults.append(f"{what}: {error}")
            return None

    price, currency = optional(
        paths.price, lambda value: read_price(value, source.decimal_mark), "price"
    ) or (None, None)
    try:
        product = Product(
            source=source.name,
            id=_text(at_path(record, paths.id)),
            name=_text(at_path(record, paths.name)),
            price=price,
            currency=optional(paths.currency, _currency, "currency") or currency,
            category=optional(paths.category, _text, "category"),
            stock=optional(paths.stock, _whole, "stock"),
            fetched_at=fetched_at,
        )
    except ValidationError as error:
        wrong = sorted({str(each["loc"][0]) for each in error.errors()})
        raise ValueError(f"no usable {', '.join(wrong)}") from None
    return product, faults


def read_price(value: Any, mark: str = "auto") -> tuple[Decimal, str | None]:
    """Amount and currency of `12.5`, `"$1,299.00"`, `"1.299,00 €"` or `"CHF 1'299.50"`.

    With both marks present the last one is the decimal mark. A single mark before exactly three
    digits (`"1.234"`) is ambiguous: it separates thousands unless the source's `decimal_mark` says
    otherwise. Raises ValueError for what is no price.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("it is no number and no text")  # noqa: TRY004  (bad data, not a bad call)
    if not isinstance(value, str):
        return _amount(str(value)), None
    text = value.replace("\u00a0", " ").replace("\u202f", " ").strip()
    found = NUMBER.search(text)
    if found is None or len(text) > 64:
        raise ValueError("it is no price")
    before, after = text[: found.start()], text[found.end() :]
    if "-" in before or re.match(r"\s*-", after):  # but "5,-" is 5
        raise ValueError("it is negative")
    sign = (before + after).strip(" .-\u2013,")
    currency = _currency(sign) if sign else None
    return _amount(_with_point(found[0], mark)), currency


def _with_point(digits: str, mark: str) -> str:
    digits = re.sub(r"['\u2019 ]", "", digits)
    if digits[0] in ".,":
        digits = f"0{digits}"
    if mark == "auto":
        last = max(digits.rfind("."), digits.rfind(","))
        other = "," if last >= 0 and digits[last] == "." else "."
        mark = digits[last] if last >= 0 else "."
        is_repeated = digits.count(mark) > 1
        is_thousands = len(digits) - last - 1 == 3 and other not in digits
        if last >= 0 and (is_repeated or (is_thousands and digits[:last] != "0")):
            mark = other
    thousands = "," if mark == "." else "."
    whole, _, rest = digits.partition(mark)
    if thousands in rest or mark in rest:
        raise ValueError("its marks stand in the wrong places")
    groups = whole.split(thousands)
    if len(groups) > 1 and not (len(groups[0]) <= 3 and all(len(g) == 3 for g in groups[1:])):
        raise ValueError("its marks stand in the wrong places")
    return f"{''.join(groups)}.{rest}" if rest else "".join(groups)


def _amount(text: str) -> Decimal:
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise ValueError("it is no price") from None
    if not amount.is_finite() or amount < 0 or amount > 1_000_000_000_000:
        raise ValueError("it is no price")
    return amount


def _currency(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else ""
    if re.fullmatch(r"[A-Za-z]{3}", text):
        return text.upper()
    if text in CURRENCY_SIGNS:
        return CURRENCY_SIGNS[text]
    raise ValueError("it is no currency known here")


def _text(value: Any) -> str:
    """Text of a text or a whole number; empty for everything else, which no product accepts."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError("it is no whole number")  # noqa: TRY004  (bad data, not a bad call)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,15}", value.strip()):
        return int(value)
    if isinstance(value, int | float) and value == value // 1 and 0 <= value <= 2**53:
        return int(value)
    raise ValueError("it is no whole number")
