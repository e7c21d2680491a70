"""Writes the text of a generator function for the shape of a segment.

Inside the loops a rejected element is a `continue`, never one more nesting; `flat_map` is a nested
loop. Each line is owned by an operation, so that an error is put down to the right one for free.
"""

from collections.abc import Callable
from typing import Any

from expressions import CONSTANT, VALUE


def write_chain(shape: tuple[Any, ...]) -> tuple[str, list[int | None]]:
    """The text for a shape, and for each line (from 1) the operation that it belongs to."""
    writer = _Writer(shape)
    writer.write()
    return "\n".join(writer.lines) + "\n", writer.owners


class _Writer:
    """Writes the lines of one generator function, and remembers whose each line is."""

    def __init__(self, shape: tuple[Any, ...]) -> None:
        self.reads, self.gathers, self.metered, *parts = shape
        self.shape = [part if isinstance(part, tuple) else (part,) for part in parts]
        self.lines: list[str] = []
        self.owners: list[int | None] = []  # the operation that a line belongs to
        self.inits: list[str] = []
        self.owner: int | None = None
        self.depth = 2
        self.loop_depths: list[int] = []  # of the loops around the innermost one
        self.limited = [False]  # per loop: does a flag say that this element is the last one
        self.used = 0  # parameters
        self.subs = 0  # iterables of flat_map
        # The catch around these lines, by position, and whether a replacement may be under way.
        self.catch: int | None = None
        self.catches = _next_catches(self.shape)
        self.replaces_across_loops = False
        self.inside_flat_map = False

    # --- lines ---

    def put(self, text: str, indent: int = 0) -> None:
        self.lines.append("    " * (self.depth + indent) + text)
        self.owners.append(self.owner)

    def argument(self) -> str:
        self.used += 1
        return f"a{self.used - 1}"

    def fill(self, template: str) -> str:
        """The template with its constants named."""
        pieces = template.split(CONSTANT)
        text = pieces[0] + "".join(self.argument() + piece for piece in pieces[1:])
        return text.replace(VALUE, "v")

    def write(self) -> None:
        self.put_source()
        started = bool(self.shape) and self.shape[0][0] == "batch"
        for position, part in enumerate(self.shape):
            if position == 0 and started:
                continue
            if self.catch is None and self.catches[position] not in (None, position):
                self.open_catch(position)
            self.owner = position
            if self._may_end_here(position, part):
                self.put_final_take()
                break
            measured = self.metered and part[0] != "catch"
            if measured:
                self.put("m = meter.start()")
            getattr(self, f"put_{part[0]}")(part, position)
            if measured:
                if part[0] != "flat_map":
                    self.put(f"meter.stop(numbers[{position}], m)")
                self.put(f"meter.counts[numbers[{position}]] += 1")
        else:
            self.put_result()
            self.close_loops()
        self.frame()

    def frame(self) -> None:
        parameters = ", out" if self.gathers else ""
        parameters += "".join(f", a{number}" for number in range(self.used))
        if self.metered:
            parameters += ", meter, numbers"
        head = [f"def chain(run{parameters}):", *(f"    {line}" for line in self.inits), "    try:"]
        tail = [
            "    except Exception as error:",
            "        blame(error, run, OWNERS)",
            "        raise",
            "    finally:",
            "        run.end()",
            *(f"        release(s{number})" for number in range(self.subs)),
        ]
        self.lines = [*head, *self.lines, *tail]
        self.owners = [None] * (1 + len(head)) + self.owners + [None] * len(tail)

    def put_source(self) -> None:
        asks = self.reads == "asked"
        if not asks:
            self.put("source = run.begin()")
        if self.metered and self.reads == "source":
            self.put("source = meter.measure(source, 0)")
        if not (self.shape and self.shape[0][0] == "batch"):
            self.put("while (v := (yield NEED)) is not END:" if asks else "for v in source:")
            self.depth += 1
            return
        size, strict = self.argument(), self.shape[0][1]
        self.put("while True:")
        self.depth += 1
        if self.metered:
            self.put("m = meter.start()")
        if asks:
            self.put("v = []")
            self.put(f"while len(v) < {size} and (w := (yield NEED)) is not END:")
            self.put("v.append(w)", 1)
        else:
            self.put(f"v = list(islice(source, {size}))")
        if self.metered:
            self.put("meter.stop(numbers[0], m)")
        self.put(f"if len(v) < {size}:")
        self.put("if not v:", 1)
        self.put("return", 2)
        if strict:
            self.owner = 0
            self.put("raise ValueError(SHORT_BATCH.format(len(v)))", 1)
            self.owner = None
        self.put("last0 = True", 1)
        self.limit()
        if self.metered:
            self.put("meter.counts[numbers[0]] += 1")

    # --- going on, and ending ---

    def skip(self) -> None:
        """Go on with the next element, unless this was the last one wanted."""
        if self.metered and self.owner is not None and self.shape[self.owner][0] != "catch":
            self.put(f"meter.stop(numbers[{self.owner}], m)")
        if self.limited[-1]:
            self.put(f"if last{len(self.limited) - 1}:")
            self.put("return", 1)
        self.put("continue")

    def limit(self) -> None:
        """From here on in this loop a flag says that the element is the last one wanted."""
        if not self.limited[-1]:
            self.limited[-1] = True
            self.inits.append(f"last{len(self.limited) - 1} = False")

    def close_loops(self) -> None:
        while True:
            if self.limited.pop():
                self.put(f"if last{len(self.limited)}:")
                self.put("return", 1)
            if not self.limited:
                return
            self.depth = self.loop_depths.pop()

    def _may_end_here(self, position: int, part: tuple[Any, ...]) -> bool:
        """A last take needs no flag."""
        last = position == len(self.shape) - 1 and not self.metered
        return last and part[0] == "take" and self.limited == [False]

    def put_final_take(self) -> None:
        self.inits.append(f"n = {self.argument()}")
        self.put_result()
        self.put("n -= 1")
        self.put("if not n:")
        self.put("return", 1)

    def put_result(self) -> None:
        self.owner = None
        self.put("out.append(v)" if self.gathers else "yield v")

    # --- computations ---

    def put_computed(self, part: tuple[Any, ...], line: str) -> None:
        """A line with the computation in it; where expressions have a rule, under its guard.

        Nothing else in the line may fail.
        """
        _, template, guard = part
        if template is None:
            self.put(line.format(f"{self.argument()}(v)"))
            return
        text = self.fill(template)
        if not guard:
            self.put(line.format(text))
            return
        self.put("try:")
        self.put(line.format(text), 1)
        self.put("except GUARD:")
        self.put(line.format(f"{self.argument()}(v)"), 1)

    def put_unless(self, part: tuple[Any, ...], action: Callable[[], None]) -> None:
        """Do something where the predicate does not hold."""
        _, template, guard = part
        text = f"{self.argument()}(v)" if template is None else self.fill(template)
        if not guard:
            self.put(f"if not {text}:")
            self.put_indented(action)
            return
        self.put("try:")
        self.depth += 1
        self.put(f"if not {text}:")
        self.put_indented(action)
        self.depth -= 1
        self.put("except GUARD:")
        self.depth += 1
        self.put(f"if not {self.argument()}(v):")
        self.put_indented(action)
        self.depth -= 1

    def put_indented(self, action: Callable[[], None]) -> None:
        self.depth += 1
        action()
        self.depth -= 1

    def put_map(self, part: tuple[Any, ...], position: int) -> None:
        del position
        self.put_computed(part, "v = {}")

    def put_keyed(self, part: tuple[Any, ...], position: int) -> None:
        del position
        self.put_computed(part, "v = ({}, v)")

    def put_filter(self, part: tuple[Any, ...], position: int) -> None:
        del position
        self.put_unless(part, self.skip)

    def put_take_while(self, part: tuple[Any, ...], position: int) -> None:
        del position
        self.put_unless(part, lambda: self.put("return"))

    def put_skip_while(self, part: tuple[Any, ...], position: int) -> None:
        self.inits.append(f"w{position} = True")
        self.put(f"if w{position}:")
        self.depth += 1
        self.put_computed(part, "k = {}")
        self.put("if k:")
        self.depth += 1
        self.skip()
        self.depth -= 1
        self.put(f"w{position} = False")
        self.depth -= 1

    def put_tap(self, part: tuple[Any, ...], position: int) -> None:
        del part, position
        self.put(f"{self.argument()}(v)")

    def put_distinct(self, part: tuple[Any, ...], position: int) -> None:
        self.inits += [f"d{position} = set()", f"add{position} = d{position}.add"]
        _, computed, bounded = part
        name = "v"
        if computed is not None:
            name = "k"
            self.put_computed(computed, "k = {}")
        self.put(f"if {name} in d{position}:")
        self.depth += 1
        self.skip()
        self.depth -= 1
        if bounded:
            limit = self.argument()
            self.put(f"if len(d{position}) >= {limit}:")
            self.put(f"raise TooManyKeysError(TOO_MANY_KEYS.format({limit}))", 1)
        self.put(f"add{position}({name})")

    def put_enumerate(self, part: tuple[Any, ...], position: int) -> None:
        del part
        self.inits.append(f"n{position} = {self.argument()}")
        self.put(f"v = (n{position}, v)")
        self.put(f"n{position} += 1")

    def put_scan(self, part: tuple[Any, ...], position: int) -> None:
        function, first = self.argument(), self.argument()
        self.inits.append(f"t{position} = {first}")
        computed = f"{function}(t{position}, v)"
        if part[1]:
            computed = f"v if t{position} is {first} else {computed}"
        self.put(f"v = t{position} = {computed}")

    put_reduce = put_scan

    def put_take(self, part: tuple[Any, ...], position: int) -> None:
        del part
        self.limit()
        self.inits.append(f"n{position} = {self.argument()}")
        self.put(f"n{position} -= 1")
        self.put(f"if not n{position}:")
        self.put(f"last{len(self.limited) - 1} = True", 1)

    def put_skip(self, part: tuple[Any, ...], position: int) -> None:
        del part
        self.inits.append(f"n{position} = {self.argument()}")
        self.put(f"if n{position}:")
        self.depth += 1
        self.put(f"n{position} -= 1")
        self.skip()
        self.depth -= 1

    def put_stride(self, part: tuple[Any, ...], position: int) -> None:
        del part
        step = self.argument()
        self.inits.append(f"n{position} = 0")
        self.put(f"if n{position}:")
        self.depth += 1
        self.put(f"n{position} -= 1")
        self.skip()
        self.depth -= 1
        self.put(f"n{position} = {step} - 1")

    def put_row(self, part: tuple[Any, ...], position: int) -> None:
        del position
        names = [self.argument() for _ in range(part[1])]
        self.put("(" + "".join(f"c{number}, " for number in range(part[1])) + ") = v")
        fields = ", ".join(f"{name}: c{number}" for number, name in enumerate(names))
        self.put("v = {" + fields + "}")

    # --- flat_map and catch ---

    def put_flat_map(self, part: tuple[Any, ...], position: int) -> None:
        sub = f"s{self.subs}"
        self.subs += 1
        self.inits.append(f"{sub} = None")
        if self.catch is not None:
            self.put_covered_flat_map(part, position, sub)
            return
        self.put_computed(part, f"{sub} = {{}}")
        if self.metered:
            self.put(f"meter.stop(numbers[{position}], m)")
            self.put(f"{sub} = meter.measure(iter({sub}), numbers[{position}], counts=False)")
        self.put(f"for v in {sub}:")
        self.enter_loop()

    def enter_loop(self) -> None:
        self.loop_depths.append(self.depth)
        self.limited.append(False)
        self.depth += 1

    def open_catch(self, position: int) -> None:
        catch = self.catch = self.catches[position]
        across = any(part[0] == "flat_map" for part in self.shape[position:catch])
        self.replaces_across_loops = across and self.shape[catch or 0][1]
        if self.replaces_across_loops:
            self.inits.append("raw = False")
        self.inside_flat_map = False
        self.open_try(position)

    def open_try(self, position: int) -> None:
        """Begin a covered step; a replacement that is under way passes it by."""
        if self.replaces_across_loops and self.inside_flat_map:
            self.put("if raw:")
            another = any(part[0] == "flat_map" for part in self.shape[position : self.catch])
            self.put(f"s{self.subs} = iter((v,))" if another else "raw = False", 1)
            self.put("else:")
            self.depth += 1
        self.put("try:")
        self.depth += 1

    def close_try(self, *replaced: str) -> None:
        self.depth -= 1
        self.put_handler(*replaced)
        if self.replaces_across_loops and self.inside_flat_map:
            self.depth -= 1

    def put_handler(self, *replaced: str, always: str = "") -> None:
        """Go on with the replacement and the lines for it, or with the next element."""
        catch = self.catch or 0
        _, replaces, calls, _ = self.shape[catch]
        self.put(f"except e{catch} as error:")
        self.depth += 1
        owner = self.owner
        if always:
            self.put(always)
        if replaces:
            self.owner = catch
            self.put(f"v = r{catch}(error)" if calls else f"v = r{catch}")
            for line in replaced:
                self.put(line)
        else:
            self.owner = None
            self.skip()
        self.owner = owner
        self.depth -= 1

    def put_covered_flat_map(self, part: tuple[Any, ...], position: int, sub: str) -> None:
        """Each step has a `try` of its own, so that an error costs one element and no more."""
        self.put_computed(part, f"{sub} = {{}}")
        self.put(f"{sub} = iter({sub})")
        self.close_try(f"{sub} = iter((v,))", "raw = True")
        self.put("while True:")
        self.enter_loop()
        self.put("try:")
        self.put(f"v = next({sub}, END)", 1)
        self.put_handler("raw = True", always=f"{sub} = iter(())")
        self.put("if v is END:")
        self.put("break", 1)
        self.inside_flat_map = True
        self.open_try(position + 1)

    def put_catch(self, part: tuple[Any, ...], position: int) -> None:
        self.inits.append(f"e{position} = {self.argument()}")
        if part[1]:
            self.inits.append(f"r{position} = {self.argument()}")
        if self.catch is not None:
            self.put("pass")
            self.close_try()
        self.catch = None
        self.inside_flat_map = self.replaces_across_loops = False
        if self.metered and part[3]:
            self.put(f"meter.counts[numbers[{position}]] += 1")


def _next_catches(shape: list[tuple[Any, ...]]) -> list[int | None]:
    """For each operation the position of the catch that covers it."""
    found: list[int | None] = []
    following: int | None = None
    for position in range(len(shape) - 1, -1, -1):
        if shape[position][0] == "catch":
            following = position
        found.append(following)
    return found[::-1]
