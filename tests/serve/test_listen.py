"""The socket that the server listens on."""

import socket

from ds_serve.server.run import _listen


def test_what_is_sent_in_pieces_waits_for_no_acknowledgement():
    with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
