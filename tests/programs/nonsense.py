"""Calls with arguments that make no sense: prints what each gave.  The same over the kernel and on a node."""

import ctypes
import errno
import select
import socket
import struct

libc = ctypes.CDLL(None, use_errno=True)
HIGH = ctypes.c_void_p(0xFFFF800000000000)  # not a program's
ONE = ctypes.c_void_p(1)
NOTHING = ctypes.c_void_p(None)
POINTERS = {"NULL": NOTHING, "1": ONE, "high": HIGH}

listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
fresh = socket.socket()
for sock in (listener, client, server):
    sock.setblocking(False)
c, s, fd = client.fileno(), server.fileno(), fresh.fileno()
client.send(b"hello")
select.select([server], [], [])


def call(what: str, name: str, *arguments: object) -> None:
    ctypes.set_errno(0)
    result = getattr(libc, name)(*arguments)
    error = errno.errorcode[ctypes.get_errno()] if result == -1 else ""
    print(what, name, result, error)


def vector(*pieces: tuple[ctypes.c_void_p, int]) -> ctypes.Array[ctypes.c_char]:
    packed = b"".join(struct.pack("Pn", at.value or 0, length) for at, length in pieces)
    return ctypes.create_string_buffer(packed, len(packed))


def message(iov: object, count: int) -> ctypes.Array[ctypes.c_char]:
    at = ctypes.addressof(iov) if isinstance(iov, ctypes.Array) else iov
    packed = struct.pack("PIPNPNi", 0, 0, at or 0, count, 0, 0, 0)
    return ctypes.create_string_buffer(packed.ljust(56, b"\0"), 56)


number = ctypes.byref(ctypes.c_int(16))
space = ctypes.create_string_buffer(256)
at_space = ctypes.c_void_p(ctypes.addressof(space))
port = listener.getsockname()[1]
good = struct.pack("=HH4s8x", socket.AF_INET, socket.htons(port), socket.inet_aton("127.0.0.1"))
for name, bad in POINTERS.items():
    call(name, "send", c, bad, 5, 0)
    call(name, "write", c, bad, 5)
    call(name, "send", c, bad, 0, 0)
    call(name, "sendto", c, bad, 5, 0, NOTHING, 0)
    call(name, "writev", c, bad, 1)
    call(name, "writev", c, vector((bad, 3)), 1)
    call(name, "writev", c, vector((bad, 0)), 1)
    call(name, "sendmsg", c, bad, 0)
    call(name, "sendmsg", c, message(bad.value, 1), 0)
    call(name, "sendmsg", c, message(vector((bad, 1)), 1), 0)
    call(name, "recv", s, bad, 5, 0)
    call(name, "recv", s, bad, 5, int(socket.MSG_PEEK))
    call(name, "read", s, bad, 5)
    call(name, "recv", s, bad, 0, 0)
    call(name, "readv", s, bad, 1)
    call(name, "readv", s, vector((bad, 3)), 1)
    call(name, "recvmsg", s, bad, 0)
    call(name, "recvmsg", s, message(bad.value, 1), 0)
    call(name, "bind", fd, bad, 16)
    call(name, "connect", fd, bad, 16)
    call(name, "bind", fd, bad, 0)
    call(name, "getsockname", s, bad, number)
    call(name, "getsockname", s, space, bad)
    call(name, "getpeername", s, bad, number)
    call(name, "getpeername", s, space, bad)
    call(name, "getsockopt", s, socket.SOL_SOCKET, socket.SO_TYPE, bad, number)
    call(name, "getsockopt", s, socket.SOL_SOCKET, socket.SO_TYPE, space, bad)
    call(name, "setsockopt", s, socket.SOL_SOCKET, socket.SO_REUSEADDR, bad, 4)
    call(name, "setsockopt", s, socket.IPPROTO_TCP, socket.TCP_NODELAY, bad, 4)
    call(name, "setsockopt", s, socket.SOL_SOCKET, socket.SO_LINGER, bad, 8)
    call(name, "setsockopt", s, socket.SOL_SOCKET, socket.SO_RCVTIMEO, bad, 16)
    call(name, "ioctl", s, 0x541B, bad)  # FIONREAD
    call(name, "ioctl", s, 0x5421, bad)  # FIONBIO
    call(name, "poll", bad, 1, 0)

for length in (-1, 0, 1, 15, 129, 1 << 20):
    call(str(length), "bind", fd, space, length)
    call(str(length), "connect", fd, ctypes.create_string_buffer(good, 256), ctypes.c_uint(length))
    call(str(length), "setsockopt", s, socket.SOL_SOCKET, socket.SO_REUSEADDR, space, length)
    room = ctypes.byref(ctypes.c_int(length))
    call(str(length), "getsockname", s, space, room)
    room = ctypes.byref(ctypes.c_int(length))
    call(str(length), "getsockopt", s, socket.SOL_SOCKET, socket.SO_TYPE, space, room)
    fresh.close()
    fresh = socket.socket()
    fd = fresh.fileno()
    while True:  # those that came to be connected
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            break
for count in (-1, 0, 1025):
    call(str(count), "writev", c, vector((at_space, 1)), count)
    call(str(count), "readv", s, vector((at_space, 1)), count)
call("length", "writev", c, vector((at_space, -1)), 1)
call("length", "readv", s, vector((at_space, -1)), 1)
call("length", "sendmsg", c, message(vector((at_space, -1)), 1), 0)
call("iovecs", "sendmsg", c, message(vector((at_space, 1)), 1025), 0)
call("iovecs", "recvmsg", s, message(vector((at_space, 1)), 1025), 0)
for flags in (0x10000000, 0x7FFFFFFF & ~0x40 & ~0x2001):
    call(hex(flags), "accept4", listener.fileno(), NOTHING, NOTHING, flags)
call("how", "shutdown", c, 3)
call("how", "shutdown", c, -1)
call("name", "getsockopt", s, socket.SOL_SOCKET, 12345, space, number)
call("name", "setsockopt", s, socket.SOL_SOCKET, 12345, space, 4)
call("request", "ioctl", s, 0x12345678, space)
call("command", "fcntl", s, 12345, 0)
client.setblocking(True)
client.sendall(b"x")
server.setblocking(True)
print(server.recv(6, socket.MSG_WAITALL))
