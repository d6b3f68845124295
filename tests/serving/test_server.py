"""The server over loopback: openpi's protocol, refusals, limits, batching, draining."""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from spatial_forcing.errors import ConfigError, EnvironmentSetupError
from spatial_forcing.serving import PolicyClient, PolicyFailed, RequestRefused, ServerConfig, serving
from spatial_forcing.serving.codec import pack, unpack
from tests.golden import golden
from tests.serving.served import message, observation

GOLDEN = golden("openpi_websocket").config


def raw(port, **options):
    return connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, **options).__enter__()


def get(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def in_process(policy, seed):
    with torch.inference_mode():
        return policy.student.act([observation(seed)], [torch.Generator().manual_seed(seed)])[0].numpy()


def structure(value):
    """Types and keys, without the numbers."""
    if isinstance(value, dict):
        return {key: structure(each) for key, each in value.items()}
    return type(value).__name__


def test_answers_equal_in_process_actions_exactly(client, policy):
    for seed in range(3):
        answer = client.infer(message(seed))
        assert answer["actions"].dtype == np.float32
        np.testing.assert_array_equal(answer["actions"], in_process(policy, seed))


def test_without_a_seed_the_noise_differs(client):
    request = message()
    del request["seed"]
    first, second = (client.infer(request)["actions"] for _ in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.golden
def test_frames_are_those_of_the_original_server(server):
    """The recorded session, with our policy's own observation: frame types, keys, order, timing fields."""
    frames = GOLDEN["session"]["server_frames"]
    with raw(server.port) as connection:
        replies = [connection.recv()]
        for _ in range(2):
            connection.send(pack(message()))
            replies.append(connection.recv())
    assert all(frame["opcode"] == "binary" for frame in frames[: len(replies)])
    assert all(isinstance(reply, bytes) for reply in replies)
    for recorded, reply in zip(frames[1:3], replies[1:], strict=True):
        theirs, mine = unpack(bytes.fromhex(recorded["payload_hex"])), unpack(reply)
        assert list(mine) == list(theirs)
        assert structure(mine["actions"]) == structure(theirs["actions"])
        assert mine["server_timing"].keys() - theirs["server_timing"].keys() == {"queue_ms"}
        assert mine["policy_timing"].keys() == theirs["policy_timing"].keys()


@pytest.mark.golden
def test_http_answers_are_those_of_the_original_server(server):
    status, body = get(server.port, "/healthz")
    recorded = GOLDEN["http"]["GET /healthz"]
    assert recorded.startswith(f"HTTP/1.1 {status} ")
    assert recorded.endswith(f"\r\n\r\n{body}")
    for path in ("/", "/healthz/", "/healthz?x=1"):
        status, body = get(server.port, path)
        assert GOLDEN["http"][f"GET {path}"].startswith(f"HTTP/1.1 {status} ")
        assert GOLDEN["http"][f"GET {path}"].endswith(f"\r\n\r\n{body}")
    with connect(f"ws://127.0.0.1:{server.port}/any/path", compression="deflate") as connection:
        assert unpack(connection.recv())["model_type"] == "nano"
        assert not connection.protocol.extensions  # as the original: no compression


def test_the_published_client_works_unchanged(server, policy):
    openpi = pytest.importorskip("openpi_client.websocket_client_policy", reason="pip install openpi-client")
    from openpi_client.action_chunk_broker import ActionChunkBroker

    client = openpi.WebsocketClientPolicy("127.0.0.1", server.port)
    assert client.get_server_metadata()["chunk"] == 6
    expected = in_process(policy, 3)
    np.testing.assert_array_equal(client.infer(message(3))["actions"], expected)
    broker = ActionChunkBroker(client, action_horizon=4)
    broker.reset()
    for step in range(4):
        np.testing.assert_array_equal(broker.infer(message(3))["actions"], expected[step])
    with pytest.raises(RuntimeError, match="Error in inference server:\nRequest refused: image 'front'"):
        client.infer({"prompt": "go"})
    client._ws.close()


def test_a_wrong_request_is_refused_and_the_connection_goes_on(client, policy):
    bad = message()
    del bad["observation/wrist"]
    with pytest.raises(RequestRefused, match="image 'wrist' is missing from the request"):
        client.infer(bad)
    np.testing.assert_array_equal(client.infer(message(1))["actions"], in_process(policy, 1))
    assert client.reconnects == 0


def test_a_refusal_does_not_echo_without_end(client):
    with pytest.raises(RequestRefused) as refused:
        client.infer({"x" * 5000 + str(i): i for i in range(50)})
    assert len(str(refused.value)) < 3000


@pytest.mark.parametrize("bad", sorted(GOLDEN["bad_inputs"]))
def test_malformed_frames_are_answered_in_words(server, bad):
    data = {
        "invalid_msgpack": b"\xc1",
        "text_frame": "hello",
        "trailing_bytes": msgpack.packb({}) + b"\x00",
        "non_dict": msgpack.packb([1, 2]),
        "empty_dict": msgpack.packb({}),
    }[bad]
    with raw(server.port) as connection:
        connection.recv()
        connection.send(data)
        reply = connection.recv()
        assert isinstance(reply, str)
        assert reply.startswith("Request refused: ")
        assert "Traceback" not in reply
        connection.send(pack(message()))
        assert isinstance(connection.recv(), bytes)


def test_rtc_continues_the_running_chunk(client):
    running = client.infer(message(1))["actions"]
    left = running[2:]
    answer = client.infer(message(5, rtc={"previous": left, "delay": 3}))["actions"]
    np.testing.assert_allclose(answer[:3], left[:3], atol=1e-5)
    with pytest.raises(RequestRefused, match=r"rtc\.delay is 9"):
        client.infer(message(5, rtc={"previous": left, "delay": 9}))


def test_too_large_a_message_closes_its_connection_only(policy):
    small = ServerConfig(port=0, max_message_mb=0.05)
    with serving(policy, small) as server, PolicyClient(port=server.port) as other:
        connection = raw(server.port)
        connection.recv()
        connection.send(pack({"observation/front": np.zeros((300, 300, 3), np.uint8)}))
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
        assert closed.value.rcvd.code == 1009
        assert other.infer(message())["actions"].shape == (6, 3)


def test_api_key(policy):
    with serving(policy, ServerConfig(port=0, api_key="secret")) as server:
        for header in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "secret"}):
            with pytest.raises(InvalidStatus) as refused:
                raw(server.port, additional_headers=header)
            assert refused.value.response.status_code == 401
            assert get(server.port, "/metrics", **header)[0] == 401
        assert get(server.port, "/healthz")[0] == get(server.port, "/readyz")[0] == 200
        with PolicyClient(port=server.port, api_key="secret") as client:
            assert client.infer(message())["actions"].shape == (6, 3)
        with pytest.raises(ConfigError, match=r"ws://127\.0\.0\.1:\d+ .*API key"):
            PolicyClient(port=server.port, api_key="Secret")
        assert (
            "rejected_connections_total 7" in get(server.port, "/metrics", Authorization="Api-Key secret")[1]
        )
        assert "secret" not in repr(server.config)


def test_keys_are_compared_in_constant_time(policy, monkeypatch):
    seen = []
    compare = __import__("hmac").compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: seen.append((a, b)) or compare(a, b))
    with serving(policy, ServerConfig(port=0, api_key="secret")) as server:
        get(server.port, "/metrics", Authorization="Api-Key x")
    assert seen == [(b"Api-Key x", b"Api-Key secret")]


def test_pages(server, client):
    client.infer(message())
    with pytest.raises(RequestRefused):
        client.infer({})
    status, page = get(server.port, "/metrics")
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert status == 200
    assert int(values['spatial_forcing_requests_total{outcome="answered"}']) >= 1
    assert int(values['spatial_forcing_requests_total{outcome="refused"}']) >= 1
    assert int(values["spatial_forcing_open_connections"]) == 1
    buckets = [int(v) for k, v in values.items() if k.startswith("spatial_forcing_request_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == int(values["spatial_forcing_request_seconds_count"])
    assert json.loads(get(server.port, "/metadata")[1]) == client.metadata


def test_more_clients_than_allowed_are_turned_away(policy):
    with serving(policy, ServerConfig(port=0, max_clients=1)) as server, PolicyClient(port=server.port):
        with pytest.raises(InvalidStatus) as refused:
            raw(server.port)
        assert refused.value.response.status_code == 503
        with pytest.raises(EnvironmentSetupError, match=r"ws://127\.0\.0\.1:\d+ .*HTTP 503"):
            PolicyClient(port=server.port, connect_timeout=0.2)


class Odd:
    """The policy with something in the way of `act`."""

    def __init__(self, policy, before):
        self.signature, self._act, self._before, self.sizes = policy.signature, policy.act, before, []

    def act(self, requests):
        self.sizes.append(len(requests))
        self._before(requests)
        return self._act(requests)


def boom(requests):
    if any(request.observation["task"] == "boom" for request in requests):
        raise ValueError("boom at /home/robot")


@pytest.mark.parametrize("debug", [False, True])
def test_a_failing_policy_closes_with_1011_and_shows_its_traceback_in_debug_only(policy, debug, caplog):
    caplog.set_level(logging.ERROR)
    recorded = GOLDEN["error_session"]["server_frames"]
    with serving(Odd(policy, boom), ServerConfig(port=0, debug=debug)) as server:
        with raw(server.port) as connection:
            connection.recv()
            connection.send(pack(message(prompt="boom")))
            reply = connection.recv()
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv()
        assert recorded[1]["opcode"] == "text"
        assert isinstance(reply, str)
        assert closed.value.rcvd.code == recorded[2]["decoded_close"]["code"]
        assert ("Traceback" in reply) == ("/home/robot" in reply) == debug
        if debug:
            assert closed.value.rcvd.reason == recorded[2]["decoded_close"]["reason"]
        with PolicyClient(port=server.port) as client:
            with pytest.raises(PolicyFailed):
                client.infer(message(prompt="boom"))
            assert client.infer(message())["actions"].shape == (6, 3)
    assert "boom at /home/robot" in caplog.text


def together(port, requests, clients):
    """Every client's answer to its request, sent at the same time."""
    barrier = threading.Barrier(clients)

    def one(request):
        with PolicyClient(port=port) as client:
            barrier.wait()
            try:
                return client.infer(request)["actions"]
            except PolicyFailed as error:
                return error

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, requests))


def test_concurrent_clients_share_a_batch_and_get_their_own_answers(policy):
    odd = Odd(policy, lambda requests: time.sleep(0.05))
    with serving(odd, ServerConfig(port=0, max_batch=4)) as server:
        answers = together(server.port, [message(seed) for seed in range(6)], 6)
    assert max(odd.sizes) > 1
    assert max(odd.sizes) <= 4
    for seed, actions in enumerate(answers):
        np.testing.assert_allclose(actions, in_process(policy, seed), atol=1e-5)


@pytest.mark.parametrize("seconds", [0.0, 0.15])
def test_a_lone_client_of_a_fast_policy_needs_no_other_thread(policy, seconds):
    threads = []

    def before(requests):
        threads.append(threading.current_thread().name)
        time.sleep(seconds)

    def asks(client, seed):
        np.testing.assert_array_equal(client.infer(message(seed))["actions"], in_process(policy, seed))
        return threads.pop()

    fast = seconds == 0 and "policy-server"
    with serving(Odd(policy, before)) as server, PolicyClient(port=server.port) as client:
        assert asks(client, 0) == "policy"  # nobody knows yet how fast it is
        names = [asks(client, seed) for seed in range(1, 9)]
        assert ("policy-server" in names) == bool(fast)  # on a busy machine some calls may seem slow
        with PolicyClient(port=server.port) as second:
            assert {asks(each, seed) for each in (client, second) for seed in range(3)} == {"policy"}


def test_errors_of_an_inline_call_reach_the_client(policy):
    with serving(Odd(policy, boom)) as server, PolicyClient(port=server.port) as client:
        for _ in range(3):
            client.infer(message())
            with pytest.raises(PolicyFailed):
                client.infer(message(prompt="boom"))


def test_one_failing_request_does_not_spoil_its_batch(policy):
    gate = threading.Event()

    def slow_boom(requests):
        gate.wait(0.1)
        boom(requests)

    with serving(Odd(policy, slow_boom), ServerConfig(port=0)) as server:
        requests = [message(0), message(1, prompt="boom"), message(2)]
        answers = together(server.port, requests, 3)
    assert isinstance(answers[1], PolicyFailed)
    for seed in (0, 2):
        np.testing.assert_allclose(answers[seed], in_process(policy, seed), atol=1e-5)


def test_a_killed_client_is_taken_off_the_queue(policy):
    entered, gate = threading.Event(), threading.Event()

    def block(requests):
        entered.set()
        gate.wait(10)

    odd = Odd(policy, block)
    one = ServerConfig(port=0, max_batch=1)
    with serving(odd, one) as server, ThreadPoolExecutor(1) as pool, PolicyClient(port=server.port) as first:
        answer = pool.submit(first.infer, message(0))
        assert entered.wait(10)
        dead = raw(server.port)
        dead.recv()
        dead.send(pack(message(1)))
        dead.socket.close()  # no goodbye, as when a process is killed
        deadline = time.monotonic() + 10
        while server.counters.connections > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.counters.connections == 1
        gate.set()
        np.testing.assert_array_equal(answer.result(10)["actions"], in_process(policy, 0))
        first.infer(message(2))
    assert len(odd.sizes) == 2  # the dead client's request was never computed


def test_draining_answers_what_is_open_and_says_goodbye(policy):
    entered = threading.Event()
    odd = Odd(policy, lambda requests: (entered.set(), time.sleep(0.2)))
    with ThreadPoolExecutor(1) as pool:
        with serving(odd, ServerConfig(port=0)) as server:
            idle, busy = raw(server.port), raw(server.port)
            idle.recv()
            busy.recv()
            busy.send(pack(message(4)))
            reply = pool.submit(busy.recv)
            assert entered.wait(10)
        np.testing.assert_allclose(unpack(reply.result(10))["actions"], in_process(policy, 4), atol=1e-5)
        for connection in (idle, busy):
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(timeout=5)
            assert closed.value.rcvd.code == 1001
    with pytest.raises(OSError):
        raw(server.port)


def test_a_request_that_takes_too_long_does_not_hold_up_the_drain(policy):
    entered, gate = threading.Event(), threading.Event()
    odd = Odd(policy, lambda requests: (entered.set(), gate.wait(20)))
    with serving(odd, ServerConfig(port=0, drain_seconds=0.2)) as server:
        stuck = raw(server.port)
        stuck.recv()
        stuck.send(pack(message()))
        assert entered.wait(10)
    gate.set()
    with pytest.raises(ConnectionClosed):
        stuck.recv(timeout=5)


def test_an_occupied_port_is_named(policy, server):
    with (
        pytest.raises(EnvironmentSetupError, match=f"cannot listen on 127.0.0.1:{server.port}"),
        serving(policy, ServerConfig(port=server.port)),
    ):
        pass


@pytest.mark.parametrize(
    "wrong", [{"port": 70000}, {"max_batch": 0}, {"api_key": " "}, {"max_message_mb": 0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        ServerConfig(**wrong)


def mutated(data: bytes, cut: int, at: int, byte: int) -> bytes:
    changed = bytearray(data[: max(1, len(data) - cut)])
    changed[at % len(changed)] = byte
    return bytes(changed)


frames = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=50),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
        max_leaves=8,
    ).map(msgpack.packb),
    st.builds(
        mutated,
        st.just(pack(message())),
        st.integers(0, 9000),
        st.integers(0, 10**6),
        st.integers(0, 255),
    ),
)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_frames_disturb_nobody(server, client, policy, count):
    """Every frame gets one answer on the same connection, and a client beside it its exact actions."""
    expected = in_process(policy, 7)
    connection = raw(server.port)
    connection.recv()

    @given(frames)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def fuzz(frame):
        connection.send(frame)
        reply = connection.recv(timeout=10)
        assert isinstance(reply, bytes) or reply.startswith("Request refused: ")
        if len(frame) % 16 == 0:
            np.testing.assert_array_equal(client.infer(message(7))["actions"], expected)

    fuzz()
    connection.close()
    assert client.reconnects == 0


def test_truncated_websocket_frames_disturb_nobody(server, client, policy):
    """Below the protocol: connections that break off in the handshake, in a frame header, in a payload."""
    import socket

    upgrade = GOLDEN["session"]["client_http"].encode()
    masked = b"\x82\xfe\x01\x1d" + bytes(4) + bytes(100)  # announces 285 bytes, brings 100
    for data in (
        b"",
        b"\x00\xff" * 50,
        b"GET / HT",
        upgrade,
        upgrade + b"\x82",
        upgrade + masked,
        upgrade + b"\xff" * 30,
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(data)
    np.testing.assert_array_equal(client.infer(message(7))["actions"], in_process(policy, 7))


def test_served_policy_batches_with_and_without_rtc(policy):
    signature = policy.signature
    plain = [signature.parse(message(seed)) for seed in (0, 1)]
    left = policy.act(plain[:1])[0][3:]
    mixed = [plain[0], signature.parse(message(2, rtc={"previous": left, "delay": 1})), plain[1]]
    answers = policy.act(mixed)
    np.testing.assert_allclose(answers[0], in_process(policy, 0), atol=1e-5)
    np.testing.assert_allclose(answers[2], in_process(policy, 1), atol=1e-5)
    np.testing.assert_allclose(answers[1][0], left[0], atol=1e-5)
