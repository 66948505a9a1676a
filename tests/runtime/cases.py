"""What every message layer must do: functions of a communicator, run over threads and over MPI alike."""

import sys
import time
from dataclasses import replace

import pytest
import torch

from gpp.plan import Edge, Stage, StageGraph, StageSeconds
from gpp.program.stage import Port, StageFunctions, ValueSpec
from gpp.runtime.agreement import DisagreementError, agree, same
from gpp.runtime.buffers import ReceiveChannel, Ring, SendChannel
from gpp.runtime.communicator import CommunicationError, Communicator
from gpp.runtime.exchange import Exchange
from gpp.runtime.neighbors import check_neighbors
from gpp.runtime.reduce import OrderedSum, Slots
from gpp.runtime.staging import Staging
from gpp.schedule.task import Channel, Direction, Schedule
from tests.runtime.slow_device import SlowDevice

MEBIBYTE = 1 << 20
FLOAT = ValueSpec("x", (3, 5), torch.float32, True)
INTEGER = ValueSpec("index", (7,), torch.int64, False)
HALF = ValueSpec("h", (9,), torch.bfloat16, True)


def ranks(comm: Communicator) -> tuple[int, ...]:
    return tuple(range(comm.size))


def noise(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(*shape, dtype=dtype, generator=generator)


def case_identity(comm: Communicator) -> None:
    assert comm.all_gather_object(comm.rank) == list(range(comm.size))
    assert len(comm.hosts) == comm.size


def case_ring_of_messages(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    received = torch.empty(5, dtype=torch.float64)
    comm.wait([comm.irecv(received, left, 0), comm.isend(noise(comm.rank, 5, dtype=torch.float64), right, 0)])
    assert torch.equal(received, noise(left, 5, dtype=torch.float64))


def case_long_messages_both_ways_at_once(comm: Communicator) -> None:
    """Longer than any eager limit, sent before a receive is posted anywhere: blocking sends would hang."""
    others = [r for r in range(comm.size) if r != comm.rank]
    mine = torch.full((MEBIBYTE,), comm.rank, dtype=torch.uint8)
    requests = [comm.isend(mine, other, 1) for other in others]
    comm.barrier()
    received = [torch.empty_like(mine) for _ in others]
    requests += [comm.irecv(r, other, 1) for r, other in zip(received, others, strict=True)]
    comm.wait(requests)
    for other, data in zip(others, received, strict=True):
        assert bool((data == other).all())


def case_many_in_flight_keep_their_order(comm: Communicator) -> None:
    """Two tags interleave; the tag that is sent second is received first."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    outgoing = [torch.tensor([comm.rank, tag, i]) for i in range(200) for tag in (0, 1)]
    requests = [comm.isend(message, right, int(message[1])) for message in outgoing]
    for tag in (1, 0):
        incoming = [torch.empty(3, dtype=torch.int64) for _ in range(200)]
        comm.wait([comm.irecv(message, left, tag) for message in incoming])
        assert [message.tolist() for message in incoming] == [[left, tag, i] for i in range(200)]
    comm.wait(requests)


def case_prepared_buffers_serve_many_messages(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    out, into = torch.empty(4), torch.empty(4)
    prepared_out, prepared_into = comm.prepare(out), comm.prepare(into)
    for round_ in range(3):
        out.copy_(noise(10 * comm.rank + round_, 4))
        comm.wait([comm.irecv(prepared_into, left, 0), comm.isend(prepared_out, right, 0)])
        assert torch.equal(into, noise(10 * left + round_, 4))


def case_empty_messages(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    comm.wait([comm.irecv(torch.empty(0), left, 0), comm.isend(torch.empty(0), right, 0)])
    pieces = [torch.empty(0) for _ in range(comm.size)]
    Exchange(comm, ranks(comm), pieces, pieces).run()
    assert Slots().gather(comm, ranks(comm), []) == [[]] * comm.size


def case_done_without_waiting(comm: Communicator) -> None:
    if comm.rank == 0:
        buffer = torch.empty(1)
        request = comm.irecv(buffer, 1, 0)
        assert not request.done()
        comm.barrier()
        end = time.monotonic() + 30
        while not request.done():
            assert time.monotonic() < end
        assert buffer.item() == 7
    else:
        comm.barrier()
        if comm.rank == 1:
            comm.wait([comm.isend(torch.tensor([7.0]), 0, 0)])


def case_a_cancelled_receive_takes_nothing(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    stale, fresh = torch.zeros(2), torch.zeros(2)
    posted = [comm.irecv(stale, left, 3) for _ in range(3)]
    assert [comm.cancel(request) for request in posted] == [True] * 3
    assert all(request.done() for request in posted)
    comm.barrier()
    comm.wait([comm.irecv(fresh, left, 3), comm.isend(torch.ones(2), right, 3)])
    assert stale.tolist() == [0, 0] and fresh.tolist() == [1, 1]


def case_a_matched_receive_cannot_be_cancelled(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    buffer = torch.zeros(1)
    request = comm.irecv(buffer, left, 3)
    comm.wait([comm.isend(torch.ones(1), right, 3), request])
    assert not comm.cancel(request)
    with pytest.raises(CommunicationError, match="only receives"):
        comm.cancel(comm.isend(buffer, comm.rank, 4))
    comm.wait([comm.irecv(torch.empty(1), comm.rank, 4)])


def case_a_wrong_size_is_an_error(comm: Communicator) -> None:
    """Short ones: Open MPI does not survive a long message of another size."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for sent, expected in ((4, 8), (8, 4)):
        request = comm.isend(torch.zeros(sent, dtype=torch.uint8), right, 5)
        with pytest.raises(CommunicationError, match=f"from rank {left} to rank {comm.rank} with tag 5"):
            comm.wait([comm.irecv(torch.zeros(expected, dtype=torch.uint8), left, 5)])
        comm.wait([request])
        comm.barrier()


def case_a_tensor_with_gaps_is_refused(comm: Communicator) -> None:
    with pytest.raises(CommunicationError, match=r"contiguous.*\(3, 2\)"):
        comm.isend(torch.zeros(2, 3).T, 0, 0)
    with pytest.raises(CommunicationError, match="contiguous"):
        comm.irecv(torch.zeros(1).expand(4), 0, 0)


def case_persistent_requests(comm: Communicator) -> None:
    """Started again and again, each time with what is in the buffer; done before the first start."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    out, into = torch.empty(4), torch.empty(4)
    send, receive = comm.send_init(out, right, 6), comm.recv_init(into, left, 6)
    comm.wait([send, receive])
    for round_ in range(4):
        out.copy_(noise(10 * comm.rank + round_, 4))
        receive.start()
        send.start()
        comm.wait([send, receive])
        assert torch.equal(into, noise(10 * left + round_, 4))


def case_a_request_under_way_is_not_started(comm: Communicator) -> None:
    receive = comm.recv_init(torch.empty(1), (comm.rank - 1) % comm.size, 6)
    receive.start()
    with pytest.raises(CommunicationError, match=r"still under way"):
        receive.start()
    assert comm.cancel(receive)
    comm.barrier()


def case_persistent_requests_match_in_the_order_of_their_starts(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    outgoing = [torch.full((1,), i) for i in range(3)]
    incoming = [torch.full((1,), -1) for _ in range(3)]
    sends = [comm.send_init(o, right, 6) for o in outgoing]
    receives = [comm.recv_init(i, left, 6) for i in incoming]
    for first in range(3):
        order = [(first + i) % 3 for i in range(3)]
        for i in order:
            receives[i].start()
        for i in reversed(order):
            sends[i].start()
        comm.wait([*sends, *receives])
        assert [int(incoming[i]) for i in order] == list(reversed(order))


def case_a_persistent_receive_can_be_cancelled_and_started_again(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    into = torch.zeros(2)
    receive = comm.recv_init(into, left, 3)
    receive.start()
    assert comm.cancel(receive) and receive.done()
    comm.barrier()
    receive.start()
    comm.wait([receive, comm.isend(torch.ones(2), right, 3)])
    assert into.tolist() == [1, 1] and not comm.cancel(receive)


def case_persistent_requests_are_dropped(comm: Communicator) -> None:
    """Thousands, each with a buffer of its own: none of them stays."""
    for number in range(2000):
        made = comm.send_init(torch.full((1,), number), comm.rank, 3)
        del made
    if hasattr(comm, "dropped"):
        assert len(comm.dropped) <= 1 and len(comm._persistent) <= 10


def case_something_is_polled_while_a_rank_waits(comm: Communicator) -> None:
    """What only the poll starts arrives, and it is asked no more once it has been taken back."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    looks = 0
    late = comm.send_init(torch.ones(1), right, 5)

    def poll() -> bool:
        nonlocal looks
        looks += 1
        if looks == 20:
            late.start()
        return looks < 20

    into = torch.zeros(1)
    comm.meanwhile(poll)
    comm.wait([comm.irecv(into, left, 5)])
    while poll():  # a rank whose message came early has looked less often
        pass
    comm.no_longer(poll)
    seen = looks
    comm.wait([late])
    comm.barrier()
    assert into.item() == 1 and looks == seen


def case_messages_get_on_while_a_rank_rests(comm: Communicator) -> None:
    """The one end rests, with its receive posted, and so does the other after it has sent."""
    size, value = 4 * MEBIBYTE, 7
    start = time.perf_counter()
    comm.rest(0.05)
    assert time.perf_counter() - start >= 0.05
    if comm.rank == 0:
        comm.rest(0.05)  # the other rests by then
        request = comm.isend(torch.full((size,), value, dtype=torch.uint8), 1, 3)
        while not request.done():
            comm.rest(0.05)
    elif comm.rank == 1:
        found = torch.zeros(size, dtype=torch.uint8)
        request = comm.irecv(found, 0, 3)
        for _ in range(100):
            comm.rest(0.05)
            if int(found[-1]) == value:  # and nobody has asked for it yet
                break
        assert int(found[0]) == int(found[-1]) == value
        comm.wait([request])


def case_exchanges_of_groups(comm: Communicator) -> None:
    for group in (ranks(comm), tuple(reversed(ranks(comm))), (comm.size - 1, 0)):
        if comm.rank in group:
            # the piece for member i has i + 1 elements, whoever sends it
            me = group.index(comm.rank)
            pieces = [torch.full((i + 1,), 100 * comm.rank + i) for i in range(len(group))]
            found = [torch.full((me + 1,), -1) for _ in group]
            exchange = Exchange(comm, group, pieces, found)
            for round_ in range(3):
                exchange.run()
                expected = [100 * r + me + 1000 * round_ if r != comm.rank else -1 for r in group]
                assert [p.tolist() for p in found] == [[e] * (me + 1) for e in expected]
                for piece in pieces:
                    piece += 1000


def case_a_gather_is_an_exchange_of_one_piece(comm: Communicator) -> None:
    for group in (tuple(reversed(ranks(comm))), (0, comm.size - 1)):
        if comm.rank in group:
            pieces = [torch.full((r,), comm.rank) for r in group]
            mine = pieces[group.index(comm.rank)]
            Exchange(comm, group, [mine] * len(group), pieces).run()
            assert [p.tolist() for p in pieces] == [[r] * r for r in group]


def case_a_foreign_group_is_refused(comm: Communicator) -> None:
    others = tuple(r for r in range(comm.size) if r != comm.rank)
    piece = torch.zeros(1)
    with pytest.raises(CommunicationError, match=f"rank {comm.rank} among them"):
        Exchange(comm, others, [piece] * len(others), [piece] * len(others))
    with pytest.raises(CommunicationError, match=f"rank {comm.rank} among them"):
        Slots().gather(comm, others, [0.0])
    with pytest.raises(CommunicationError, match="distinct"):
        Exchange(comm, (comm.rank, comm.rank), [piece] * 2, [piece] * 2)
    with pytest.raises(CommunicationError, match="as many pieces"):
        Exchange(comm, ranks(comm), [piece], [])


def case_objects(comm: Communicator) -> None:
    values = comm.all_gather_object({"rank": comm.rank, "text": "x" * 1000 * comm.rank})
    assert values == [{"rank": r, "text": "x" * 1000 * r} for r in range(comm.size)]
    for root in range(comm.size):
        called: list[int] = []

        def make(root: int = root, called: list[int] = called) -> dict[int, str]:
            called.append(comm.rank)
            return {root: "plan" * 5000}

        assert comm.broadcast_object(make, root) == {root: "plan" * 5000}
        assert called == ([root] if comm.rank == root else [])


def case_a_failing_broadcast_fails_everywhere(comm: Communicator) -> None:
    def make() -> None:
        raise FileNotFoundError("no plan.json here")

    expected = FileNotFoundError if comm.rank == 0 else CommunicationError
    with pytest.raises(expected, match=r"no plan\.json here"):
        comm.broadcast_object(make)
    with pytest.raises(SystemExit if comm.rank == 0 else CommunicationError, match="5"):
        comm.broadcast_object(lambda: sys.exit(5))
    comm.barrier()


def case_neighbor_exchange(comm: Communicator) -> None:
    """A fan-out of rank 0 and a chain: rank r receives from r - 1, and from 0 if that is another."""
    sources = sorted({0, comm.rank - 1}) if comm.rank else []
    everyone = set(range(1, comm.size)) if comm.rank == 0 else {comm.rank + 1}
    targets = sorted(t for t in everyone if t < comm.size)
    received = comm.neighbor_exchange(sources, targets, [(comm.rank, t) for t in targets])
    assert received == [(s, comm.rank) for s in sources]


def case_barrier(comm: Communicator) -> None:
    """Nobody leaves before the last has come."""
    if comm.rank == comm.size - 1:
        time.sleep(0.05)
    before = time.time()
    comm.barrier()
    after = time.time()
    times = comm.all_gather_object((before, after))
    assert max(b for b, _ in times) <= min(a for _, a in times)


def case_agree(comm: Communicator) -> None:
    assert agree(comm, None) is None
    assert agree(comm, "no such file" if comm.rank else None) == "rank 1: no such file"


def case_same(comm: Communicator) -> None:
    same(comm, "plan", "abc")
    others = ", ".join(map(str, range(1, comm.size)))
    noun = "rank" if comm.size == 2 else "ranks"
    with pytest.raises(DisagreementError, match=f"the plan .* abc on rank 0, xyz on {noun} {others};"):
        same(comm, "plan", "xyz" if comm.rank else "abc")


def case_ordered_sum_has_the_bits_of_the_sum_in_order(comm: Communicator) -> None:
    for dtype in (torch.float32, torch.float64):
        for length in (0, 1, comm.size + 1, 1000):
            for group in (ranks(comm), tuple(reversed(ranks(comm)))):
                parts = [noise(r, length, dtype=dtype) * 10.0**r for r in group]
                expected = parts[0].clone()
                for part in parts[1:]:
                    expected += part
                flat = noise(comm.rank, length, dtype=dtype) * 10.0**comm.rank
                OrderedSum(comm, group, flat, chunk=300).run()
                assert torch.equal(flat, expected)


def case_ordered_sum_of_a_subgroup(comm: Communicator) -> None:
    flat = noise(comm.rank, 100_000)
    mine = flat.clone()
    if comm.rank < 2:
        OrderedSum(comm, (1, 0), flat).run()
        assert torch.equal(flat, noise(1, 100_000) + noise(0, 100_000))
    else:
        OrderedSum(comm, (comm.rank,), flat).run()
        assert torch.equal(flat, mine)


def case_ordered_sum_refuses(comm: Communicator) -> None:
    with pytest.raises(CommunicationError, match="bfloat16"):
        OrderedSum(comm, ranks(comm), torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(CommunicationError, match=r"one dimension.*\(2, 2\)"):
        OrderedSum(comm, ranks(comm), torch.zeros(2, 2))
    with pytest.raises(CommunicationError, match="not in the group"):
        OrderedSum(comm, (comm.rank + 1,), torch.zeros(4))


def case_an_ordered_sum_serves_many_times(comm: Communicator) -> None:
    """In place, whatever is in it now."""
    flat = torch.empty(1001)
    ordered = OrderedSum(comm, ranks(comm), flat, chunk=100)
    for round_ in range(3):
        flat.copy_(noise(10 * comm.rank + round_, 1001))
        ordered.run()
        expected = noise(round_, 1001)
        for r in range(1, comm.size):
            expected += noise(10 * r + round_, 1001)
        assert torch.equal(flat, expected)


def case_slots(comm: Communicator) -> None:
    slots = Slots()
    for count in (1, 3, 1):
        found = slots.gather(comm, ranks(comm), [0.1 * comm.rank] * count)
        assert found == [[0.1 * r] * count for r in range(comm.size)]


def values_of(message: int, samples: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(message)
    return [
        torch.randn(samples, *FLOAT.shape, generator=generator),
        torch.randint(0, 100, (samples, *INTEGER.shape), generator=generator),
        torch.randn(samples, *HALF.shape, generator=generator).bfloat16(),
    ]


def ring_of_rank(
    comm: Communicator, slots: int, sending: bool, counts: list[int], staging: Staging | None = None
) -> Ring:
    """Rank r sends to r + 1."""
    source = comm.rank if sending else (comm.rank - 1) % comm.size
    channel = Channel(source, (source + 1) % comm.size, 2, 0, Direction.ACTIVATION, slots, 0)
    return Ring(comm, channel, (FLOAT, INTEGER, HALF), counts, staging)


def case_channels_carry_steps(comm: Communicator) -> None:
    """Three steps of unequal messages over two slots; the receiver holds one while it gets the next."""
    counts = [2, 1, 3]
    ring_in, ring_out = (ring_of_rank(comm, 2, sending, counts) for sending in (False, True))
    receive, send = ReceiveChannel(ring_in, counts), SendChannel(ring_out, counts)
    held = None
    for number in range(9):
        send.send(values_of(number, counts[number % 3]))
        message = receive.next()
        assert message.samples == counts[number % 3]
        for view, value in zip(message.views, values_of(number, message.samples), strict=True):
            assert torch.equal(view, value)
        if held is not None:
            for view, value in zip(held.views, values_of(number - 1, held.samples), strict=True):
                assert torch.equal(view, value)
            receive.release(held)
        held = message
    send.flush()
    comm.barrier()
    assert receive.close() == 0
    # after close and a barrier the same tag serves others
    comm.barrier()
    again = ReceiveChannel(ring_in, [1], messages=1)
    SendChannel(ring_out, [1]).send(values_of(99, 1))
    assert torch.equal(again.next().views[0], values_of(99, 1)[0])
    comm.barrier()


def case_channels_of_a_slow_device(comm: Communicator) -> None:
    """Slots are written and read later; whoever waits looks after them."""
    counts = [2, 1, 3]
    device = SlowDevice(50)
    ring_in, ring_out = (ring_of_rank(comm, 2, sending, counts, device) for sending in (False, True))
    receive, send = ReceiveChannel(ring_in, counts, 30), SendChannel(ring_out, counts)

    def progress() -> bool:
        return any([send.progress(), receive.progress()])

    comm.meanwhile(progress)
    for number in range(30):
        send.send(values_of(number, counts[number % 3]))
        message = receive.next()
        for view, value in zip(message.views, values_of(number, message.samples), strict=True):
            assert torch.equal(view, value)
        receive.release(message)
    send.flush()
    comm.no_longer(progress)
    assert receive.close() == 0
    comm.barrier()


def case_counted_channels_follow_one_another(comm: Communicator) -> None:
    """With the number of messages known, nothing is posted that a later user of the tag could lose."""
    training, evaluation = [2, 2], [3]
    ring_in, ring_out = (ring_of_rank(comm, 2, sending, [2, 3]) for sending in (False, True))
    receive, send = ReceiveChannel(ring_in, training, messages=4), SendChannel(ring_out, training)
    for number in range(4):
        send.send(values_of(number, 2))
        receive.release(receive.next())
    receive = ReceiveChannel(ring_in, evaluation, messages=1)
    send.flush()
    send = SendChannel(ring_out, evaluation)
    send.send(values_of(7, 3))
    assert torch.equal(receive.next().views[1], values_of(7, 3)[1])
    send.flush()
    with pytest.raises(CommunicationError, match="no receive is posted"):
        receive.next()


def case_close_counts_what_nobody_asked_for(comm: Communicator) -> None:
    ring_in, ring_out = (ring_of_rank(comm, 3, sending, [1]) for sending in (False, True))
    receive, send = ReceiveChannel(ring_in, [1]), SendChannel(ring_out, [1])
    for number in range(2):
        send.send(values_of(number, 1))
    send.flush()
    comm.barrier()
    receive.next()
    assert receive.close() == 1
    comm.barrier()


def stage(name: str, device: int) -> Stage:
    return Stage(name, (name,), (device,), 1, 1, StageSeconds(1, 1, 1))


def chain_ends(comm: Communicator) -> tuple[StageGraph, Schedule, StageFunctions]:
    """Stage r on rank r, a chain; every edge carries all three values."""
    last = comm.size - 1
    graph = StageGraph(
        tuple(stage(f"s{r}", r) for r in range(comm.size)),
        tuple(Edge(r, r + 1, ("x", "index", "h"), 100, 50) for r in range(last)),
    )
    channels = tuple(Channel(r, r + 1, 2 * r, r, Direction.ACTIVATION, 1, 100) for r in range(last))
    values = (FLOAT, INTEGER, HALF)
    functions = StageFunctions(
        inputs=values,
        outputs=values,
        batch_keys=(),
        receives=(Port(comm.rank - 1, values),) if comm.rank else (),
        sends=(Port(comm.rank, values),) if comm.rank < last else (),
        terms=(),
        sizes={},
    )
    return graph, Schedule(((),) * comm.size, channels, 1), functions


def case_neighbors_that_agree(comm: Communicator) -> None:
    graph, schedule, functions = chain_ends(comm)
    check_neighbors(comm, graph, schedule, [functions])


def case_neighbors_that_disagree(comm: Communicator) -> None:
    graph, schedule, functions = chain_ends(comm)
    wrong = replace(FLOAT, shape=(5, 3))
    if comm.rank == 1:
        functions = replace(functions, receives=(Port(0, (wrong, INTEGER, HALF)),))
    text = (
        r"edge 0 \(s0 -> s1\), value x: rank 0 produces x float32 \(3, 5\) with gradient, "
        r"rank 1 expects x float32 \(5, 3\) with gradient"
    )
    with pytest.raises(DisagreementError, match=text):
        check_neighbors(comm, graph, schedule, [functions])


def case_neighbors_that_disagree_about_gradients(comm: Communicator) -> None:
    graph, schedule, functions = chain_ends(comm)
    if comm.rank == 0:
        functions = replace(functions, sends=(Port(0, (FLOAT, INTEGER, replace(HALF, needs_grad=False))),))
    with pytest.raises(
        DisagreementError, match=r"value h: rank 0 produces .* without gradient, rank 1 .* with"
    ):
        check_neighbors(comm, graph, schedule, [functions])


def case_neighbors_with_a_value_too_few(comm: Communicator) -> None:
    graph, schedule, functions = chain_ends(comm)
    if comm.rank == 1:
        functions = replace(functions, receives=(Port(0, (FLOAT, INTEGER)),))
    with pytest.raises(DisagreementError, match=r"value h: .* rank 1 expects nothing there"):
        check_neighbors(comm, graph, schedule, [functions])


def case_neighbors_without_a_port(comm: Communicator) -> None:
    graph, schedule, functions = chain_ends(comm)
    with pytest.raises(DisagreementError, match=r"edge 0 \(s0 -> s1\): rank 1 does not expect it"):
        check_neighbors(comm, graph, schedule, [] if comm.rank == 1 else [functions])


def case_neighbors_with_different_schedules(comm: Communicator) -> None:
    graph, schedule, functions = chain_ends(comm)
    if comm.rank == 1:
        schedule = replace(schedule, channels=())
    with pytest.raises(DisagreementError, match="rank 0 sends to rank 1, which expects nothing"):
        check_neighbors(comm, graph, schedule, [functions])


CASES = {name.removeprefix("case_"): f for name, f in list(globals().items()) if name.startswith("case_")}
