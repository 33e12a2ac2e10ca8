"""A host on a network that answers ARP and ping: the other end for a guest's network card."""

import struct

ADDRESS, MAC = bytes([10, 0, 0, 2]), bytes.fromhex("525400000002")
_ARP, _IPV4 = 0x0806, 0x0800
_ICMP, _ECHO, _REPLY, _REQUEST = 1, 8, 0, 1


def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) & ~1])) + (data[-1] << 8 if len(data) % 2 else 0)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class EchoHost:
    """A network of its own: give `plug` to a machine. `heard` are the frames that the guest sent."""

    def __init__(self):
        self.heard = []
        self._receive = None

    def plug(self, receive):
        self._receive = receive
        return self

    def close(self):
        pass

    def send(self, frame):
        self.heard.append(frame)
        (kind,) = struct.unpack_from(">H", frame, 12)
        body = frame[14:]
        if kind == _ARP and struct.unpack_from(">H", body, 6)[0] == _REQUEST and body[24:28] == ADDRESS:
            answer = body[:6] + b"\0\2" + MAC + ADDRESS + body[8:18]
            self._receive(frame[6:12] + MAC + frame[12:14] + answer)
        elif kind == _IPV4 and body[9] == _ICMP and body[16:20] == ADDRESS and body[20] == _ECHO:
            echo = bytes([_REPLY, 0, 0, 0]) + body[24 : struct.unpack_from(">H", body, 2)[0]]
            echo = echo[:2] + struct.pack(">H", checksum(echo)) + echo[4:]
            head = body[:10] + b"\0\0" + body[16:20] + body[12:16]
            head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
            self._receive(frame[6:12] + MAC + frame[12:14] + head + echo)
