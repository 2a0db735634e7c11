//! A guest with a listening agent, packet by packet, and the host's ends of its streams.

use super::*;

pub(super) const CID: u64 = 3;
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
/// As in Linux.
pub(super) const RX_BUFFER: u32 = 4096;
pub(super) const BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

pub(super) type Outcome = (u64, Result<(), Refusal>);

/// A guest with a listening agent, and the host's side of it.
pub(super) struct Guest {
    pub(super) driver: TestDriver,
    pub(super) io: TestLoop,
    pub(super) dialer: Dialer,
    pub(super) replies: Receiver<Outcome>,
    pub(super) rx: std::collections::HashMap<u16, u64>,
    /// Receive buffers are put back after use.
    pub(super) refill: bool,
    pub(super) received: VecDeque<(Header, Vec<u8>)>,
}

impl Guest {
    pub(super) fn down() -> Self {
        let io = TestLoop::new();
        let (sender, replies) = channel();
        let answer = Box::new(move |id, result| {
            let _ = sender.send((id, result));
        });
        let (device, dialer) = new(CID, io.handle.clone(), answer).unwrap();
        let driver = TestDriver::new(device);
        Self { driver, io, dialer, replies, rx: Default::default(), refill: true, received: VecDeque::new() }
    }

    /// Up, with receive buffers, but nobody listens yet.
    pub(super) fn booting() -> Self {
        let mut guest = Self::down();
        guest.start();
        guest
    }

    pub(super) fn start(&mut self) {
        self.driver.start();
        self.rx.clear();
        for _ in 0..64 {
            self.add_receive_buffer(RX_BUFFER);
        }
    }

    pub(super) fn listening() -> Self {
        let mut guest = Self::booting();
        guest.hint();
        guest
    }

    /// What the agent does once it listens.
    pub(super) fn hint(&mut self) {
        self.send_raw(Op::Request as u16, 2048, 1024, 0, &[], (0, 0));
        assert_eq!(u32::from(self.expect(Op::Rst).0.dst_port), 2048);
    }

    pub(super) fn add_receive_buffer(&mut self, len: u32) {
        let address = self.driver.alloc(len.into());
        let head = self.driver.add(RX, &[Buf::Write(address, len)]);
        self.rx.insert(head, address);
    }

    pub(super) fn send_raw(
        &mut self,
        op: u16,
        from: u32,
        to: u32,
        flags: u32,
        data: &[u8],
        credit: (u32, u32),
    ) {
        let header = Header {
            src_cid: CID.into(),
            dst_cid: 2.into(),
            src_port: from.into(),
            dst_port: to.into(),
            len: (data.len() as u32).into(),
            kind: 1.into(),
            op: op.into(),
            flags: flags.into(),
            buf_alloc: credit.0.into(),
            fwd_cnt: credit.1.into(),
        };
        self.send_header(header, data);
    }

    pub(super) fn send_header(&mut self, header: Header, data: &[u8]) {
        let at = self.tx_room(HEADER_SIZE + data.len());
        self.driver.memory.write_slice(header.as_slice(), GuestAddress(at)).unwrap();
        let mut bufs = vec![Buf::Read(at, HEADER_SIZE as u32)];
        if !data.is_empty() {
            let at = at + HEADER_SIZE as u64;
            self.driver.memory.write_slice(data, GuestAddress(at)).unwrap();
            bufs.push(Buf::Read(at, data.len() as u32));
        }
        while self.driver.used(TX).is_some() {}
        self.driver.add(TX, &bufs);
        self.driver.kick(TX);
        // The device has read it then, and the buffer can be used again.
        self.io.barrier();
    }

    pub(super) fn tx_room(&mut self, len: usize) -> u64 {
        // At the end of memory, out of the way of the heap.
        assert!(len <= 1 << 20);
        (crate::virtio::testing::LOW_MEMORY - (1 << 20)) as u64
    }

    /// Collects what the device has put into receive buffers.
    pub(super) fn collect(&mut self) -> bool {
        let mut any = false;
        while let Some((head, len)) = self.driver.used(RX) {
            any = true;
            let address = self.rx.remove(&head).unwrap();
            let bytes = self.driver.get(address, len as usize);
            let header: Header = *Header::from_slice(&bytes[..HEADER_SIZE]).unwrap();
            assert_eq!(u32::from(header.len) as usize, bytes.len() - HEADER_SIZE);
            assert_eq!(u64::from(header.dst_cid), CID);
            self.received.push_back((header, bytes[HEADER_SIZE..].to_vec()));
            if self.refill {
                let head = self.driver.add(RX, &[Buf::Write(address, RX_BUFFER)]);
                self.rx.insert(head, address);
            }
        }
        if any && self.refill {
            self.driver.kick(RX);
        }
        any
    }

    pub(super) fn receive(&mut self) -> (Header, Vec<u8>) {
        loop {
            if let Some(packet) = self.received.pop_front() {
                return packet;
            }
            if !self.collect() {
                self.driver.wait_interrupt();
            }
        }
    }

    pub(super) fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        let packet = self.receive();
        assert_eq!(Op::from_wire(packet.0.op.into()), Some(op), "{:?}", packet.0);
        assert_eq!(u64::from(packet.0.src_cid), 2);
        packet
    }

    /// Nothing more comes from the device once it has seen everything.
    pub(super) fn expect_silence(&mut self) {
        self.io.barrier();
        self.collect();
        assert!(self.received.is_empty(), "{:?}", self.received);
    }

    pub(super) fn reply(&self) -> Outcome {
        self.replies.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    /// Dials, without the guest's answer.
    pub(super) fn dial(&mut self, id: u64, port: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.dialer.connect(id, port, theirs.into());
        ours
    }

    /// An established stream.
    pub(super) fn open(&mut self, credit: u32) -> Peer {
        let host = self.dial(7, 1025);
        let (request, _) = self.expect(Op::Request);
        assert_eq!(u32::from(request.dst_port), 1025);
        let mut peer = Peer {
            host,
            port: 1025,
            host_port: request.src_port.into(),
            credit,
            got: 0,
            sent: 0,
            forwarded: request.fwd_cnt.into(),
            room: request.buf_alloc.into(),
        };
        peer.send(self, Op::Response, 0, &[]);
        assert_eq!(self.reply(), (7, Ok(())));
        peer
    }
}

/// The guest's end of a stream, and the host's.
pub(super) struct Peer {
    pub(super) host: UnixStream,
    pub(super) port: u32,
    pub(super) host_port: u32,
    /// What the guest says of itself.
    pub(super) credit: u32,
    pub(super) got: u32,
    /// What the guest has sent and may send.
    pub(super) sent: u32,
    pub(super) forwarded: u32,
    pub(super) room: u32,
}

impl Peer {
    pub(super) fn send(&mut self, guest: &mut Guest, op: Op, flags: u32, data: &[u8]) {
        self.sent += data.len() as u32;
        let credit = (self.credit, self.got);
        guest.send_raw(op as u16, self.port, self.host_port, flags, data, credit);
    }

    pub(super) fn allowance(&self) -> u32 {
        self.room - (self.sent - self.forwarded)
    }

    pub(super) fn note(&mut self, header: &Header) {
        self.forwarded = header.fwd_cnt.into();
        self.room = header.buf_alloc.into();
    }

    /// Receives up to `want` bytes of data on this stream.
    pub(super) fn receive_data(&mut self, guest: &mut Guest, want: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < want {
            let (header, payload) = guest.expect(Op::Rw);
            assert_eq!(u32::from(header.src_port), self.host_port);
            self.note(&header);
            self.got += payload.len() as u32;
            data.extend(payload);
        }
        data
    }
}
