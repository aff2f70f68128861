"The network guard itself: it stops this process and its subprocesses, and lets the loopback through."
import socket, subprocess, sys, urllib.request
import pytest

TRY = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=2)"

def test_this_process_is_offline():
    with pytest.raises(OSError, match='network blocked'): socket.create_connection(('192.0.2.1', 80), timeout=2)
    with pytest.raises(OSError, match='network blocked'): urllib.request.urlopen('http://example.org', timeout=2)

def test_subprocesses_are_offline():
    done = subprocess.run([sys.executable, '-c', TRY], capture_output=True, text=True)
    assert done.returncode and 'network blocked' in done.stderr

def test_loopback_works():
    with socket.create_server(('127.0.0.1', 0)) as server, socket.create_connection(server.getsockname(), timeout=5): pass
