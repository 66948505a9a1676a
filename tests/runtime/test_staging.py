"""Messages of devices that are done later: devices of the tests, and a real one where there is one."""

from collections import deque
from dataclasses import replace
from functools import partial

import pytest
import torch

from gpp.program.stage import ValueSpec
from gpp.runtime import staging
from gpp.runtime.buffers import ReceiveChannel, Ring, SendChannel
from gpp.runtime.communicator import Communicator
from gpp.runtime.loopback import LoopbackWorld, run
from gpp.runtime.staging import OnHost, Staging, host_staging
from gpp.schedule.task import Channel, Direction
from tests.equality.cases import CASES
from tests.equality.harness import compare, prepare, run_rank

from .fake_cuda import Machine, Memory
from .slow_device import SlowDevice

X = ValueSpec("x", (3,), torch.float32, True)
CHANNEL = Channel(0, 1, 4, 6, Direction.ACTIVATION, 2, 1)


def rows(number: int) -> torch.Tensor:
    return torch.arange(3.0).view(1, 3) + 10 * number


@pytest.mark.parametrize("lag", [1, 7])
@pytest.mark.parametrize(
    "name", ["diamond-zero-bubble", "replicas-1-2-1-clipped", "integer-edge", "chain-eager"]
)
def test_training_is_the_reference(name: str, lag: int) -> None:
    torch.set_num_threads(1)
    case = next(case for case in CASES if case.name == name)
    ready = prepare(case)
    programs = [ready.programs(rank) for rank in range(case.ranks)]

    def body(comm: Communicator):
        return run_rank(ready, comm, programs[comm.rank], SlowDevice(lag))

    compare(ready, run(LoopbackWorld(case.ranks), body))


def test_a_send_starts_when_its_slot_is_written() -> None:
    first, second = LoopbackWorld(2).communicators
    device = SlowDevice(3)
    send = SendChannel(Ring(first, CHANNEL, (X,), [1], device), [1])
    receive = ReceiveChannel(Ring(second, CHANNEL, (X,), [1]), [1])
    send.send([rows(1)])  # the first look
    send.send([rows(2)])
    assert not receive._posted[0].request.done()
    assert send.progress()  # the first is written and gone, the second was not looked at before that
    assert torch.equal(receive.next().views[0], rows(1))
    while send.progress():
        pass
    assert torch.equal(receive.next().views[0], rows(2))


def test_a_receive_is_posted_when_its_slot_is_read() -> None:
    first, second = LoopbackWorld(2).communicators
    channel = replace(CHANNEL, slots=1)
    send = SendChannel(Ring(first, channel, (X,), [1]), [1])
    device = SlowDevice(3)
    receive = ReceiveChannel(Ring(second, channel, (X,), [1], device), [1])
    send.send([rows(1)])
    message = receive.next()
    send.send([rows(2)])
    receive.release(message)  # the first look
    assert receive.progress() and torch.equal(device.slots[0].wire[:12].view(torch.float32), rows(1)[0])
    assert not receive.progress()
    assert torch.equal(receive.next().views[0], rows(2))


def test_who_has_nothing_else_to_do_waits_for_the_device() -> None:
    """All slots are being written or read: then the device is waited for, and not a message."""
    first, second = LoopbackWorld(2).communicators
    send = SendChannel(Ring(first, CHANNEL, (X,), [1], SlowDevice(1000)), [1])
    receive = ReceiveChannel(Ring(second, CHANNEL, (X,), [1], SlowDevice(1000)), [1])
    for number in range(3):
        if number == 2:
            send._filled[0].slot.settle()  # as `send` does, with the other end in another thread
            send.progress()
            receive.release(receive.next())
        send.send([rows(number)])
    assert len(send._filled) + len(send._under_way) == 2
    for message in send._filled:
        message.slot.settle()
    send.progress()
    for number in (1, 2):
        message = receive.next()
        assert torch.equal(message.views[0], rows(number))
        receive.release(message)


def test_the_host_shares_its_memory_with_stages() -> None:
    made = host_staging(torch.device("cpu"))
    assert isinstance(made, OnHost) and not made.is_polled
    slot = made.slot(64, sending=False)
    assert slot.local is slot.wire and slot.ready()


STAGINGS = {"device": staging.OnDevice, "pinned": staging.Pinned}
MESSAGES = 12


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", STAGINGS)
def test_what_is_sent_is_what_was_computed(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams run in any order; freed memory is used again at once, as by torch's allocator."""
    machine = Machine(seed)
    monkeypatch.setattr(staging, "torch", machine)
    made = STAGINGS[kind](torch.device("cuda", 0))
    slots = [made.slot(64, sending=True) for _ in range(2)]
    pool = [Memory(machine), Memory(machine), Memory(machine)]
    waiting: deque[tuple[object, int]] = deque()

    def take() -> None:
        slot, number = waiting.popleft()
        slot.settle() if machine.random.random() < 0.3 else None
        while not slot.ready():
            pass
        assert slot.wire.value == number  # what MPI would read now

    for number in range(MESSAGES):
        held = [m for slot in slots for m in getattr(slot, "_sources", ())]
        source = next(m for m in pool if not any(m is h for h in held))
        machine.launch(partial(setattr, source, "value", number))
        slot = slots[number % 2]
        slot.writer([slot.wire])([source])
        waiting.append((slot, number))
        if len(waiting) == 2:
            take()
    take()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", STAGINGS)
def test_what_stages_read_is_what_arrived(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(seed)
    monkeypatch.setattr(staging, "torch", machine)
    made = STAGINGS[kind](torch.device("cuda", 0))
    slots = [made.slot(64, sending=False) for _ in range(2)]
    seen: list[int] = []
    for number in range(MESSAGES):
        slot = slots[number % 2]
        while not slot.ready():
            pass
        slot.wire.value = number  # MPI receives
        slot.arrived(64)
        for _ in range(2):  # a forward and a backward
            machine.launch(lambda slot=slot: seen.append(slot.local.value))
        slot.launched()
    while machine.step():
        pass
    assert seen == [number for number in range(MESSAGES) for _ in range(2)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_pinned_memory_carries_what_a_device_computes() -> None:
    """Two ranks as threads, messages of four mebibytes: what arrives is what was computed before it was
    sent, though the memory of its source is used again at once."""
    device = torch.device("cuda", 0)
    value = ValueSpec("x", (1 << 20,), torch.float32, True)

    def body(comm: Communicator) -> None:
        made: Staging = host_staging(device)
        ring = Ring(comm, CHANNEL, (value,), [1], made)
        if comm.rank == 0:
            send = SendChannel(ring, [1])
            comm.meanwhile(send.progress)
            for number in range(20):
                send.send([torch.full((1, 1 << 20), 1.0, device=device).cumsum(1) + number])
            send.flush()
            return
        receive = ReceiveChannel(ring, [1])
        comm.meanwhile(receive.progress)
        expected = torch.arange(1.0, (1 << 20) + 1, device=device)
        for number in range(20):
            message = receive.next()
            assert torch.equal(message.views[0][0], expected + number)
            receive.release(message)

    run(LoopbackWorld(2), body, threads=1)


LAID_OUT = {
    "in a row": torch.arange(6.0).view(2, 3),
    "apart": torch.arange(6.0).view(3, 2).T,
    "large": torch.randn(1 << 11, 1 << 10, generator=torch.Generator().manual_seed(1)),
    "nothing": torch.empty(2, 0),
    "conjugated": torch.complex(torch.arange(6.0), torch.ones(6)).conj(),
    "negated": torch.complex(torch.zeros(1), torch.ones(1)).conj().imag,
    "a leaf that learns": torch.ones(3, requires_grad=True),
    "bits": torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_what_the_host_fills_in_is_the_tensor(name: str) -> None:
    tensor = LAID_OUT[name]
    value = ValueSpec("x", tuple(tensor.shape[1:]), tensor.dtype, True)
    first, second = LoopbackWorld(2).communicators
    send = SendChannel(Ring(first, CHANNEL, (value,), [len(tensor)]), [len(tensor)])
    receive = ReceiveChannel(Ring(second, CHANNEL, (value,), [len(tensor)]), [len(tensor)])
    for _ in range(3):  # more than the first cycle
        send.send([tensor])
        message = receive.next()
        assert torch.equal(message.views[0], tensor) and not message.views[0].requires_grad
        message.views[0].zero_()
        receive.release(message)
