//! Packets of the socket device: false credit, ports, lengths and operations, on streams that the host reads, writes
//! and closes meanwhile.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use arbitrary::{Result, Unstructured};
use stockade_vmm::fuzzing;
use stockade_vmm::virtio::testing::{Buf, TestDriver, TestLoop};
use stockade_vmm::virtio::vsock::Dialer;

const RX: usize = 0;
const TX: usize = 1;
const HEADER: usize = 44;
const BUFFER: u32 = 4096;
/// The port of the stream that must work in the end.
const LAST: u32 = 4711;

pub fn run(input: &[u8]) {
    let io = TestLoop::new();
    let (device, dialer) = fuzzing::vsock(3, io.handle.clone()).unwrap();
    let mut guest = Guest {
        driver: TestDriver::started(device),
        io,
        dialer,
        buffers: HashMap::new(),
        hosts: Vec::new(),
        ports: vec![0, 1 << 30],
        last: None,
    };
    guest.driver.heap = 1 << 20;
    for _ in 0..16 {
        let at = guest.driver.alloc(BUFFER.into());
        guest.post(at);
    }
    let _ = guest.attack(&mut Unstructured::new(input));
    // Streams that the guest has broken are the guest's own; a device begun anew carries new ones.
    guest.driver.write(0x70, 0);
    guest.driver.heap = 1 << 20;
    guest.driver.start();
    guest.buffers.clear();
    for _ in 0..16 {
        let at = guest.driver.alloc(BUFFER.into());
        guest.post(at);
    }
    guest.packet(1, 1000, 1000, 0, &[], 0, (0, 0), 2);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.dialer.connect(99, LAST, theirs.into());
    let port = loop {
        if let Some(port) = guest.last {
            break port;
        }
        if !guest.collect() {
            guest.driver.wait_interrupt();
        }
    };
    guest.packet(2, LAST, port, 0, &[], 0, (1 << 16, 0), 2);
    // Before the next one is written over it.
    guest.io.barrier();
    guest.packet(5, LAST, port, 0, b"alive", 5, (1 << 16, 0), 2);
    let mut said = [0; 5];
    ours.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"alive");
}

struct Guest {
    driver: TestDriver,
    io: TestLoop,
    dialer: Dialer,
    buffers: HashMap<u16, u64>,
    hosts: Vec<Option<UnixStream>>,
    /// Of the host's ends, as far as the guest was told.
    ports: Vec<u32>,
    /// Where [`LAST`] is asked for.
    last: Option<u32>,
}

impl Guest {
    fn attack(&mut self, bytes: &mut Unstructured) -> Result<()> {
        while !bytes.is_empty() {
            match bytes.int_in_range(0..=15u8)? {
                0 if self.hosts.len() < 8 => {
                    let (ours, theirs) = UnixStream::pair().unwrap();
                    ours.set_nonblocking(true).unwrap();
                    self.dialer.connect(
                        self.hosts.len() as u64,
                        bytes.int_in_range(1024..=1025)?,
                        theirs.into(),
                    );
                    self.hosts.push(Some(ours));
                }
                1 => {
                    let n = bytes.arbitrary::<u16>()?;
                    if let Some(host) = self.host(bytes)? {
                        let _ = host.write(&vec![7; n.into()]);
                    }
                }
                2 => {
                    if let Some(host) = self.host(bytes)? {
                        let _ = host.read(&mut [0; 5000]);
                    }
                }
                3 => {
                    let how = *bytes.choose(&[Shutdown::Read, Shutdown::Write, Shutdown::Both])?;
                    if let Some(host) = self.host(bytes)? {
                        let _ = host.shutdown(how);
                    }
                }
                4 if !self.hosts.is_empty() => {
                    let index = bytes.choose_index(self.hosts.len())?;
                    self.hosts[index] = None;
                }
                5 | 6 => {
                    self.io.barrier();
                    self.collect();
                }
                // The usual first answer, without which there is no stream.
                7 | 8 => {
                    let port = *bytes.choose(&self.ports)?;
                    let from = bytes.int_in_range(1024..=1025)?;
                    self.packet(2, from, port, 0, &[], 0, (bytes.arbitrary()?, 0), 2);
                }
                _ => {
                    let op = bytes.int_in_range(0..=9)?;
                    let from = *bytes.choose(&[1024, 1025, 1025, 0])?;
                    let to =
                        if bytes.ratio(9, 10)? { *bytes.choose(&self.ports)? } else { bytes.arbitrary()? };
                    let flags = bytes.int_in_range(0..=4)?;
                    let payload =
                        vec![9; usize::from(bytes.arbitrary::<u8>()?) << bytes.int_in_range(0..=8u8)?];
                    let len = if bytes.ratio(4, 5)? { payload.len() as u32 } else { bytes.arbitrary()? };
                    let credit = match bytes.int_in_range(0..=3u8)? {
                        0 => (1 << 16, 0),
                        1 => (u32::MAX, 0),
                        2 => (0, u32::MAX),
                        _ => bytes.arbitrary()?,
                    };
                    let cid = if bytes.ratio(9, 10)? { 2 } else { bytes.arbitrary()? };
                    self.packet(op, from, to, flags, &payload, len, credit, cid);
                }
            }
        }
        self.io.barrier();
        self.collect();
        Ok(())
    }

    fn host(&mut self, bytes: &mut Unstructured) -> Result<Option<&mut UnixStream>> {
        if self.hosts.is_empty() {
            return Ok(None);
        }
        let index = bytes.choose_index(self.hosts.len())?;
        Ok(self.hosts[index].as_mut())
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of a header")]
    fn packet(
        &mut self,
        op: u16,
        from: u32,
        to: u32,
        flags: u32,
        payload: &[u8],
        len: u32,
        credit: (u32, u32),
        cid: u64,
    ) {
        let packet = [
            &3u64.to_le_bytes()[..],
            &cid.to_le_bytes(),
            &from.to_le_bytes(),
            &to.to_le_bytes(),
            &len.to_le_bytes(),
            &1u16.to_le_bytes(),
            &op.to_le_bytes(),
            &flags.to_le_bytes(),
            &credit.0.to_le_bytes(),
            &credit.1.to_le_bytes(),
            payload,
        ]
        .concat();
        while self.driver.used(TX).is_some() {}
        // What the device has not yet read may be overwritten: a guest can do that.
        self.driver.heap = 4 << 20;
        let at = self.driver.put(&packet);
        if self.driver.try_add(TX, &[Buf::Read(at, packet.len() as u32)]).is_some() {
            self.driver.kick(TX);
        }
    }

    fn post(&mut self, at: u64) {
        if let Some(head) = self.driver.try_add(RX, &[Buf::Write(at, BUFFER)]) {
            self.buffers.insert(head, at);
        }
        self.driver.kick(RX);
    }

    /// Takes what the device sent, each packet of which must be one.
    fn collect(&mut self) -> bool {
        let mut any = false;
        while let Some((head, written)) = self.driver.used(RX) {
            any = true;
            let at = self.buffers.remove(&head).expect("a buffer that was the device's");
            let packet = self.driver.get(at, written as usize);
            let word = |at: usize| u32::from_le_bytes(packet[at..at + 4].try_into().unwrap());
            assert!(packet.len() >= HEADER && word(24) as usize == packet.len() - HEADER, "a false length");
            assert_eq!(word(8), 3, "a packet for somebody else");
            let op = word(28) >> 16;
            assert!((1..=7).contains(&op), "operation {op}");
            // A request: the host's end of a new stream.
            if op == 1 && word(20) == LAST {
                self.last = Some(word(16));
            } else if op == 1 && self.ports.len() < 16 {
                self.ports.push(word(16));
            }
            self.post(at);
        }
        any
    }
}
