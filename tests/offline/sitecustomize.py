"""No network in tests: a connection or name look-up that leaves this machine raises, here and in every subprocess.

`tests/conftest.py` puts this folder on PYTHONPATH, and Python imports `sitecustomize` when it starts."""
import os, socket

LOCAL = {'', 'localhost', '::', '::1', '0.0.0.0', 'ip6-localhost', socket.gethostname(), socket.getfqdn() if os.name == 'nt' else socket.gethostname()}

class NetworkBlocked(ConnectionRefusedError): "A test tried to leave this machine."

def stays_here(host):
    if host is None: return True
    if isinstance(host, bytes): host = host.decode(errors='replace')
    return host in LOCAL or host.startswith('127.') or host.split('.')[0] == socket.gethostname().split('.')[0]

def guard(name):
    inner = getattr(socket.socket, name)
    def call(self, *a):
        address = a[-1]
        if self.family in (socket.AF_INET, socket.AF_INET6) and not stays_here(address[0]):
            raise NetworkBlocked(f'tests run with the network blocked: {name} to {address}')
        return inner(self, *a)
    setattr(socket.socket, name, call)

def look_up(host, *a, _inner=socket.getaddrinfo, **kw):
    if not stays_here(host): raise NetworkBlocked(f'tests run with the network blocked: look-up of {host!r}')
    return _inner(host, *a, **kw)

if not getattr(socket, '_latentcourse_offline', False):
    for name in ('connect', 'connect_ex', 'sendto'): guard(name)
    socket.getaddrinfo, socket._latentcourse_offline = look_up, True
