"""Addresses of the form host:port: taken apart, and whether their host is this one."""

from __future__ import annotations

import errno
import ipaddress
import socket

from paged_dist._errors import require


def split_address(argument: str, address: str) -> tuple[str, int]:
    """(host, port) of `host:port` or `[ipv6]:port`; raises ValueError, naming `argument`, for anything else."""
    example = "write host:port, such as 10.0.0.1:8476 or [::1]:8476"
    require(isinstance(address, str), argument, address, "must be a string", example)
    host, colon, port = address.rpartition(":")
    require(
        bool(colon) and bool(host) and not any(c.isspace() or c == "/" for c in host),
        argument,
        address,
        "must be a host and a port",
        example,
    )
    bracketed = host.startswith("[") and host.endswith("]")
    require(bracketed or ":" not in host, argument, address, "must have an IPv6 host in brackets", example)
    require(
        port.isascii() and port.isdigit() and 1 <= int(port) <= 65535,
        argument,
        address,
        "must have a port from 1 to 65535",
        example,
    )
    return host[1:-1] if bracketed else host, int(port)


def is_loopback(host: str) -> bool:
    """Whether `host` is localhost, or an IP address that only this host can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_on_this_host(address: str) -> bool:
    """Whether the host of `address` is this one. True where that cannot be told."""
    host, _ = split_address("coordinator_address", address)
    try:
        family, *_, found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as s:
            s.bind(found)
    except OSError as e:
        return e.errno != errno.EADDRNOTAVAIL
    return True
