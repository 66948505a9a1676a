"""Layouts, rings and the two ends of a channel."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpp.graph import DTYPE_BYTES
from gpp.program.stage import ValueSpec
from gpp.runtime.buffers import (
    ALIGNMENT,
    ReceiveChannel,
    Ring,
    SendChannel,
    channel_values,
    check_rows,
    message_bytes,
    message_views,
)
from gpp.runtime.communicator import CommunicationError, Communicator
from gpp.runtime.loopback import LoopbackWorld, run
from gpp.schedule.task import Channel, Direction

X = ValueSpec("x", (3,), torch.float32, True)
MASK = ValueSpec("mask", (), torch.bool, False)
H = ValueSpec("h", (5, 2), torch.bfloat16, True)


def channel(direction: Direction = Direction.ACTIVATION, slots: int = 2) -> Channel:
    return Channel(0, 1, 4, 6, direction, slots, 1)


@pytest.mark.parametrize(
    ("values", "samples", "size"),
    [
        ((X,), 1, 12),
        ((X,), 6, 72),
        ((X, MASK, H), 4, 64 + 64 + 80),  # 48 and padding, 4 and padding, 80
        ((ValueSpec("exact", (16,), torch.float32, True),), 2, 128),
        ((ValueSpec("empty", (0, 4), torch.float32, True), X), 2, 24),
    ],
)
def test_message_bytes(values: tuple[ValueSpec, ...], samples: int, size: int) -> None:
    assert message_bytes(values, samples) == size


value_specs = st.builds(
    ValueSpec,
    name=st.just("v"),
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)).map(lambda name: getattr(torch, name)),
    needs_grad=st.booleans(),
)


@given(st.lists(value_specs, min_size=1, max_size=4), st.integers(1, 5))
def test_views_are_aligned_disjoint_and_fill_no_more_than_the_message(
    values: list[ValueSpec], samples: int
) -> None:
    buffer = torch.zeros(message_bytes(values, samples), dtype=torch.uint8)
    views = message_views(buffer, values, samples)
    end = buffer.data_ptr()
    for view, value in zip(views, values, strict=True):
        assert view.shape == (samples, *value.shape) and view.dtype == value.dtype
        if view.numel():
            assert view.data_ptr() >= end and view.data_ptr() % ALIGNMENT == buffer.data_ptr() % ALIGNMENT
            end = view.data_ptr() + view.numel() * view.element_size()
    assert end <= buffer.data_ptr() + buffer.numel()
    tensors = [torch.ones(samples, *v.shape, dtype=v.dtype) for v in values]
    check_rows(views, tensors, values)
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor)
    assert all(torch.equal(view, tensor) for view, tensor in zip(views, tensors, strict=True))


def test_a_message_copies_any_layout_and_no_graph() -> None:
    def body(comm: Communicator) -> None:
        ring = Ring(comm, channel(), (X,), [4])
        tensor = torch.arange(12.0).view(3, 4).T.requires_grad_()
        if comm.rank == 0:
            send = SendChannel(ring, [4])
            send.send([tensor])
            send.flush()
        else:
            received = ReceiveChannel(ring, [4], 1).next().views[0]
            assert torch.equal(received, tensor) and not received.requires_grad

    run(LoopbackWorld(2), body, threads=1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.zeros(1, 3)], r"x is torch.float32 of shape \(1, 3\), the message carries .* \(2, 3\)"),
        ([torch.zeros(2, 3, dtype=torch.float64)], "x is torch.float64"),
        ([], r"carries 1 values \(x\), not 0"),
    ],
)
def test_what_a_copy_would_bend_is_refused(tensors: list[torch.Tensor], message: str) -> None:
    views = message_views(torch.zeros(64, dtype=torch.uint8), (X,), 2)
    with pytest.raises(CommunicationError, match=message):
        check_rows(views, tensors, (X,))


def test_gradients_travel_only_for_values_that_need_one() -> None:
    assert channel_values((X, MASK, H), Direction.ACTIVATION) == (X, MASK, H)
    assert channel_values((X, MASK, H), Direction.GRADIENT) == (X, H)


def test_a_ring_holds_the_largest_message_in_each_slot() -> None:
    comm = LoopbackWorld(2).communicators[0]
    ring = Ring(comm, channel(Direction.GRADIENT, slots=3), (X, MASK), [6, 1])
    assert ring.bytes == 3 * 72
    starts = {ring.message(slot, 6).views[0].data_ptr() for slot in range(3)}
    assert len(starts) == 3
    for slot in range(3):
        short, long = ring.message(slot, 1), ring.message(slot, 6)
        assert short.views[0].data_ptr() == long.views[0].data_ptr()
        assert short.size == 12 and long.size == 72


@pytest.mark.parametrize(
    ("broken", "values", "sizes"),
    [
        (channel(slots=0), (X,), [1]),
        (channel(), (X,), []),
        (channel(), (X,), [0]),
        (channel(Direction.GRADIENT), (MASK,), [1]),
    ],
)
def test_a_ring_without_room_is_refused(
    broken: Channel, values: tuple[ValueSpec, ...], sizes: list[int]
) -> None:
    with pytest.raises(CommunicationError, match=r"edge 6 .* needs slots, values and messages"):
        Ring(LoopbackWorld(2).communicators[0], broken, values, sizes)


def test_a_sender_waits_for_a_slot_only_when_all_are_on_their_way() -> None:
    def body(comm: Communicator) -> int:
        ring = Ring(comm, channel(slots=2), (X,), [1])
        if comm.rank == 0:
            send = SendChannel(ring, [1])
            send.send([torch.full((1, 3), 1.0)])
            send.send([torch.full((1, 3), 2.0)])
            comm.barrier()  # reached although nothing has been received
            send.send([torch.full((1, 3), 3.0)])
            send.flush()
            return 0
        comm.barrier()
        receive = ReceiveChannel(ring, [1])
        got = []
        for _ in range(3):
            message = receive.next()
            got.append(message.views[0][0, 0].item())
            receive.release(message)
        assert got == [1, 2, 3]
        return receive.close()

    assert run(LoopbackWorld(2), body, threads=1) == [0, 0]


def test_an_error_names_the_edge_and_the_value() -> None:
    send = SendChannel(Ring(LoopbackWorld(2).communicators[0], channel(), (X,), [2]), [2])
    with pytest.raises(
        CommunicationError, match=r"edge 6 \(activations from rank 0 to rank 1\): x is torch.float32"
    ):
        send.send([torch.zeros(3, 3)])


def test_more_messages_than_slots_and_a_slot_given_back_twice_are_refused() -> None:
    def body(comm: Communicator) -> None:
        ring = Ring(comm, channel(slots=1), (X,), [1])
        if comm.rank == 0:
            send = SendChannel(ring, [1])
            send.send([torch.zeros(1, 3)])
            send.flush()
            return
        receive = ReceiveChannel(ring, [1])
        message = receive.next()
        with pytest.raises(CommunicationError, match="1 of 1 slots are in use; release one"):
            receive.next()
        receive.release(message)
        with pytest.raises(CommunicationError, match="slot 0 is not in use"):
            receive.release(message)
        assert receive.close() == 0

    run(LoopbackWorld(2), body, threads=1)
