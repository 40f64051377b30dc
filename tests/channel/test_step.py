"""The step of a bulk transfer with a scripted socket: it takes any number of bytes, blocks, fails, ends and is stopped."""

from __future__ import annotations

import ctypes
import errno
import random
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from trimig.channel.step import SendPlan, Step
from trimig.channel.vectored import CALL_BYTES, MAX_ELEMENTS, Pieces, Records, Span, elements

SEEDS: Final = (0, 1, 2)
BODY: Final = 64
COUNT: Final = 9


def content(span: Span, most: int) -> bytes:
    """The first *most* bytes at the places of *span*."""
    return b"".join(ctypes.string_at(address, size) for address, size in elements(span).tolist())[:most]


def fill(span: Span, data: bytes) -> None:
    """Put *data* where *span* says."""
    for address, size in elements(span).tolist():
        part, data = data[:size], data[size:]
        ctypes.memmove(address, part, len(part))


class ScriptedSocket:
    """Takes some bytes of each call, as *seed* says, and blocks now and then.

    Args:
        at: the number of the call, from 1, in which something happens; 0 for none.
        happens: called in that call, before it would take anything.
    """

    def __init__(self, seed: int, at: int = 0, happens: Callable[[], None] | None = None) -> None:
        self._random = random.Random(seed)
        self._at = at
        self._happens = happens
        self.calls = 0
        self.stream = bytearray()

    def _some(self, span: Span) -> int | None:
        """How many bytes the next call moves."""
        assert span[1]
        self.calls += 1
        if self.calls == self._at and self._happens is not None:
            self._happens()
        if self._random.random() < 0.2:
            return None
        most = int(elements(span)[:MAX_ELEMENTS, 1].sum())
        assert most
        return min(most, self._random.choice((1, 8, 8 + BODY, self._random.randint(1, 3 * BODY))))

    def write(self, span: Span) -> int | None:
        """As writev."""
        count = self._some(span)
        if count is not None:
            self.stream += content(span, count)
        return count

    def read(self, span: Span) -> int | None:
        """As readv, from the front of ``stream``."""
        count = self._some(span)
        if count is None:
            return None
        count = min(count, len(self.stream))
        fill(span, bytes(self.stream[:count]))
        del self.stream[:count]
        return count


class Memory:
    """Headers and bodies, and the plans over them."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.lead = generator.integers(0, 256, 21, np.uint8)
        self.words = generator.integers(0, 1 << 63, COUNT, np.uint64)
        self.bodies = generator.integers(0, 256, (2 * COUNT, BODY), np.uint8)
        self.order = np.sort(generator.choice(2 * COUNT, COUNT, replace=False)).astype(np.uint64)

    @property
    def addresses(self) -> NDArray[np.uint64]:
        return np.uint64(self.bodies.ctypes.data) + self.order * np.uint64(BODY)

    def records(self) -> tuple[SendPlan, bytes, list[int]]:
        """The plan; its bytes; where its units end."""
        record = self.bodies[self.order.astype(np.intp)]
        data = b"".join(w.tobytes() + b.tobytes() for w, b in zip(self.words, record, strict=True))
        plan = Records(self.words.ctypes.data, 8, self.addresses, BODY)
        return plan, data, [(n + 1) * (8 + BODY) for n in range(COUNT)]

    def records_with_lead(self) -> tuple[SendPlan, bytes, list[int]]:
        _, data, ends = self.records()
        lead = (self.lead.ctypes.data, len(self.lead))
        plan = Records(self.words.ctypes.data, 8, self.addresses, BODY, lead)
        return plan, self.lead.tobytes() + data[8:], [end + len(self.lead) - 8 for end in ends]

    def packets(self) -> tuple[SendPlan, bytes, list[int]]:
        """Packets of a header and some bodies each, in which neighbours are one piece."""
        addresses, sizes, ends, data = [], [], [], b""
        for first in range(0, COUNT, 4):
            part = self.order[first : first + 4].tolist()
            addresses.append(self.lead.ctypes.data)
            sizes.append(len(self.lead))
            data += self.lead.tobytes()
            for run in runs(part):
                addresses.append(self.bodies.ctypes.data + run[0] * BODY)
                sizes.append(len(run) * BODY)
                data += self.bodies[run].tobytes()
            ends.append(len(data))
        plan = Pieces(np.array([addresses, sizes], np.uint64).T.copy(), np.array(ends))
        return plan, data, ends


def runs(numbers: list[int]) -> Iterator[list[int]]:
    """Consecutive ones together."""
    run: list[int] = []
    for number in numbers:
        if run and number != run[-1] + 1:
            yield run
            run = []
        run.append(number)
    yield run


Planned: TypeAlias = Callable[[Memory], tuple[SendPlan, bytes, list[int]]]
PLANS: Final[tuple[Planned, ...]] = (Memory.records, Memory.records_with_lead, Memory.packets)


def drive(step: Step, call: Callable[[Span], int | None]) -> None:
    """As a thread does it, but that it need not wait."""
    while not step.run(call):
        pass
    assert step.over


@pytest.mark.parametrize("planned", PLANS)
@pytest.mark.parametrize("seed", SEEDS)
def test_all_bytes_leave_once_and_in_order(seed: int, planned: Planned) -> None:
    memory = Memory(seed)
    plan, data, _ = planned(memory)
    socket = ScriptedSocket(seed)
    step = Step(plan)
    drive(step, socket.write)
    assert bytes(socket.stream) == data
    assert (step.done, plan.left, step.whole, step.ended) == (len(data), 0, True, False)
    assert plan.rest_of_unit() == b""


@pytest.mark.parametrize("planned", PLANS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_failure_or_a_stop_at_every_call_leaves_an_exact_count(seed: int, planned: Planned) -> None:
    """And the rest of the record or packet that was cut off."""
    memory = Memory(seed)
    calls = ScriptedSocket(seed)
    drive(Step(planned(memory)[0]), calls.write)
    assert calls.calls > 10
    for at in range(1, calls.calls + 1):
        for kind in ("failure", "stop"):
            plan, data, ends = planned(memory)
            step = Step(plan)

            def fail() -> None:
                raise ConnectionResetError(errno.ECONNRESET, "reset")

            socket = ScriptedSocket(seed, at, fail if kind == "failure" else step.stop)
            if kind == "failure":
                with pytest.raises(ConnectionResetError):
                    drive(step, socket.write)
            else:
                drive(step, socket.write)
                assert step.whole == (at == calls.calls)
            assert socket.calls == at
            assert bytes(socket.stream) == data[: step.done]
            assert plan.left == len(data) - step.done
            rest = plan.rest_of_unit()
            assert rest is not None
            assert data[step.done : step.done + len(rest)] == rest
            assert step.done + len(rest) in (0, *ends)


@pytest.mark.parametrize("planned", PLANS)
@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_come_to_their_places_and_the_rest_stays_in_the_socket(seed: int, planned: Planned) -> None:
    """Stopped at every call, and with a stream that ends at every byte, each seed at another third."""
    source = Memory(seed)
    _, data, _ = planned(source)
    calls = ScriptedSocket(seed)
    calls.stream += data
    drive(Step(planned(source)[0]), calls.read)
    for at in range(1, calls.calls + 1):
        target = Memory(seed)
        plan, _, _ = planned(target)
        target.bodies[:] = 0
        step = Step(plan)
        socket = ScriptedSocket(seed, at, step.stop)
        socket.stream += data
        drive(step, socket.read)
        assert bytes(socket.stream) == data[step.done :]
        assert not step.ended
        if planned is Memory.records:
            whole = step.done // (8 + BODY)
            chosen = target.order.astype(np.intp)
            assert (target.bodies[chosen[:whole]] == source.bodies[chosen[:whole]]).all()
            assert not target.bodies[chosen[whole + 1 :]].any()
    for cut in range(seed, len(data), len(SEEDS)):
        target = Memory(seed)
        step = Step(planned(target)[0])
        socket = ScriptedSocket(seed)
        socket.stream += data[:cut]
        drive(step, socket.read)
        assert (step.done, step.ended, step.whole) == (cut, True, False)


def test_pieces_without_units_have_no_known_rest() -> None:
    memory = np.arange(64, dtype=np.uint8)
    plan = Pieces(np.array([[memory.ctypes.data, 32], [memory.ctypes.data + 32, 32]], np.uint64))
    assert plan.rest_of_unit() == b""
    plan.advance(32)
    assert plan.rest_of_unit() is None
    plan.advance(32)
    assert plan.rest_of_unit() == b""
    assert not Pieces(np.empty((0, 2), np.uint64)).rest[1]


def test_a_call_is_given_no_more_than_one_call_may_move() -> None:
    size = CALL_BYTES // 4
    memory = np.zeros(10 * size, np.uint8)
    plan = Pieces(np.array([[memory.ctypes.data + n * size, size] for n in range(10)], np.uint64))
    assert plan.rest[1] == 4
    plan.advance(1)
    assert int(elements(plan.rest)[:, 1].sum()) == 4 * size - 1
    plan.advance(9 * size)
    assert elements(plan.rest).tolist() == [[memory.ctypes.data + 9 * size + 1, size - 1]]


def test_a_step_that_was_stopped_before_makes_no_call() -> None:
    memory = Memory(0)
    step = Step(memory.records()[0])
    step.stop()
    assert step.over
    assert not step.whole


def test_a_step_gives_others_a_turn_after_the_bytes_that_were_asked_for() -> None:
    memory = Memory(0)
    plan, data, _ = memory.records()
    step, socket, turns = Step(plan), ScriptedSocket(0), 0
    while not step.over:
        before = step.done
        step.run(socket.write, 100)
        assert step.done - before < 100 + 3 * BODY  # the last call may move more
        turns += step.done - before >= 100
    assert bytes(socket.stream) == data
    assert turns > 3
