//! The packet header on the wire (virtio 1.3, section 5.10.6).

use vm_memory::{ByteValued, Le16, Le32, Le64};

/// Length of the header, in bytes.
pub const HEADER_SIZE: usize = size_of::<Header>();

/// The host's context id.
pub const HOST_CID: u64 = 2;

/// `type` of a stream socket's packets.
pub const TYPE_STREAM: u16 = 1;

/// Largest payload of one packet, as in Linux (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
pub const MAX_PAYLOAD: usize = 64 << 10;

/// SHUTDOWN flag: the sender receives no more data.
pub const SHUTDOWN_RCV: u32 = 1;
/// SHUTDOWN flag: the sender sends no more data.
pub const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Connect.
    Request = 1,
    /// Connected.
    Response = 2,
    /// Refused, or no such stream, or gone.
    Rst = 3,
    /// No more data in one or both directions.
    Shutdown = 4,
    /// Data.
    Rw = 5,
    /// Carries nothing but the credit fields.
    CreditUpdate = 6,
    /// Asks for a credit update.
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number, if there is one.
    pub fn from_wire(op: u16) -> Option<Self> {
        use Op::*;
        [Request, Response, Rst, Shutdown, Rw, CreditUpdate, CreditRequest]
            .into_iter()
            .find(|known| *known as u16 == op)
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, packed)]
pub struct Header {
    pub src_cid: Le64,
    pub dst_cid: Le64,
    pub src_port: Le32,
    pub dst_port: Le32,
    pub len: Le32,
    pub kind: Le16,
    pub op: Le16,
    pub flags: Le32,
    pub buf_alloc: Le32,
    pub fwd_cnt: Le32,
}

// SAFETY: the structure is packed, without padding, and every field is valid with any bytes.
unsafe impl ByteValued for Header {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_the_length_of_the_specification() {
        assert_eq!(HEADER_SIZE, 44);
    }

    #[test]
    fn operations_beyond_the_specification_are_unknown() {
        assert_eq!(Op::from_wire(5), Some(Op::Rw));
        assert_eq!(Op::from_wire(0), None);
        assert_eq!(Op::from_wire(8), None);
    }
}
