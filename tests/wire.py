"""A wire that is slow and loses packets, for kernels without netem: python wire.py DEVICE DEVICE SECONDS LOSS"""

import ctypes
import fcntl
import heapq
import random
import select
import socket
import struct
import sys
import time

ETH_P_ALL, SOL_PACKET, PACKET_IGNORE_OUTGOING = 3, 263, 23
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17


def compute_checksums(device):
    """Have the kernel compute checksums before it sends, which a device that is not one would never do."""
    wanted = ctypes.create_string_buffer(struct.pack("II", ETHTOOL_STXCSUM, 0))
    with socket.socket() as probe:
        fcntl.ioctl(probe, SIOCETHTOOL, struct.pack("16sP16x", device.encode(), ctypes.addressof(wanted)))


def carry(devices, delay, loss):
    """Carry frames from each device to the other, each `delay` seconds later, and none with a probability of `loss`."""
    ends = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) for _ in devices]
    for end, device in zip(ends, devices):
        end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**24)
        end.bind((device, ETH_P_ALL))
    choose, under_way = random.Random(1), []  # (when it arrives, number, where, frame)
    print("ready", flush=True)
    for number in range(sys.maxsize):
        wait = max(0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, [], [], wait)[0]:
            frame, other = end.recv(2**16), ends[end is ends[0]]
            if choose.random() >= loss:
                heapq.heappush(under_way, (time.monotonic() + delay, 2 * number + (end is ends[0]), other, frame))
        while under_way and under_way[0][0] <= time.monotonic():
            *_, other, frame = heapq.heappop(under_way)
            other.send(frame)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        compute_checksums(sys.argv[1])
    else:
        carry(sys.argv[1:3], float(sys.argv[3]), float(sys.argv[4]))
