"""Our client: what it does when servers are absent, silent, restarted; and that it needs no torch."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from websockets.sync.server import serve as serve_raw

from spatial_forcing.errors import ConfigError, DataError, EnvironmentSetupError
from spatial_forcing.serving import PolicyClient, PolicyFailed, ServerConfig, serving
from spatial_forcing.serving.codec import pack
from tests.serving.served import message


def test_it_needs_no_torch():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import spatial_forcing.serving.client, spatial_forcing.serving.control\n"
        "heavy = {'transformers', 'accelerate', 'PIL', 'gymnasium', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_it_comes_back_after_a_restart_and_asks_again(policy):
    with serving(policy) as first:
        port = first.port
        client = PolicyClient(port=port, connect_timeout=20)
        before = client.infer(message())["actions"]
    with serving(policy, ServerConfig(port=port)):
        np.testing.assert_array_equal(client.infer(message())["actions"], before)
    assert client.reconnects == 1
    client.close()
    client.close()


def test_an_absent_server_is_named_after_growing_waits():
    now, waits = [0.0], []

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    with pytest.raises(
        EnvironmentSetupError, match=r"no policy server answers at ws://127.0.0.1:9 .*spatial-forcing serve"
    ):
        PolicyClient(port=9, connect_timeout=8, clock=lambda: now[0], sleep=sleep)
    assert waits[:4] == [0.05, 0.1, 0.2, 0.4]
    assert max(waits) == 2.0
    assert sum(waits) <= 8


@pytest.fixture
def fake():
    """`fake(handler)` -> port of a raw websocket server."""
    servers = []

    def start(handler):
        server = serve_raw(handler, "127.0.0.1", 0, compression=None)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server.socket.getsockname()[1]

    yield start
    for server in servers:
        server.shutdown()


def test_a_silent_server_runs_into_the_timeout_and_late_answers_are_not_mixed_up(fake):
    served = []

    def handler(connection):
        served.append(connection)
        connection.send(pack({}))
        for number, _ in enumerate(connection):
            if len(served) > 1:
                connection.send(pack({"actions": np.full((1, 1), number)}))

    with PolicyClient(port=fake(handler), timeout=0.3) as client:
        with pytest.raises(EnvironmentSetupError, match=r"did not answer within 0\.3 s"):
            client.infer({})
        assert client.infer({})["actions"] == 0  # the first answer on a new connection


def test_a_connection_that_is_lost_over_and_over_is_given_up(fake):
    served = []

    def handler(connection):
        served.append(connection)
        connection.send(pack({}))
        connection.recv()
        connection.close(1009)

    with PolicyClient(port=fake(handler)) as client:
        with pytest.raises(EnvironmentSetupError, match=r"ended the connection 3 times .*max-message-mb"):
            client.infer({})
        assert client.reconnects == len(served) - 1 == 3


def test_a_server_of_another_protocol_is_refused(fake):
    with pytest.raises(ConfigError, match="sent no metadata"):
        PolicyClient(port=fake(lambda connection: connection.send("hello")))


def test_openpi_servers_errors_are_raised(fake):
    def handler(connection):
        connection.send(pack({}))
        connection.recv()
        connection.send("Traceback (most recent call last): ...")
        connection.close(1011)

    with PolicyClient(port=fake(handler)) as client, pytest.raises(PolicyFailed, match="Traceback"):
        client.infer({})


def test_what_cannot_be_sent_is_refused_here(client):
    with pytest.raises(DataError, match="cannot be packed"):
        client.infer({"observation/front": np.array([object()])})
    with pytest.raises(DataError, match="cannot be packed"):
        client.infer({"observation/front": {1, 2}})


def test_a_url_and_openpis_names(server):
    with PolicyClient(f"ws://127.0.0.1:{server.port}", port=None) as client:
        assert client.get_server_metadata() == client.metadata
        client.reset()


def test_a_proxy_in_the_environment_is_not_used_unless_asked_for(policy, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(policy) as server:
        with PolicyClient(port=server.port, connect_timeout=20) as client:
            assert client.infer(message())["actions"].ndim == 2
        for proxy in (True, "http://127.0.0.1:9"):
            with pytest.raises(EnvironmentSetupError, match="no policy server answers"):
                PolicyClient(port=server.port, connect_timeout=0.5, proxy=proxy)
