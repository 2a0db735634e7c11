//! The header in front of each frame (virtio 1.3, section 5.1.6), and what is believed of a guest's.
//!
//! The host's kernel trusts a header little, but its checks have had holes; so nothing reaches it that contradicts
//! the frame's length, the negotiated features or the specification.

use virtio_bindings::bindings::virtio_net as abi;

use super::bit;

/// Bytes of the header: with VERSION_1 always the long form (section 5.1.6.1).
pub const SIZE: usize = 12;

/// A frame is at least its two addresses and a type.
pub const MIN_FRAME: usize = 14;

/// Longest frame in bytes: the largest IPv6 packet (40 + 65535), an Ethernet header and two VLAN tags.
pub const MAX_FRAME: usize = 40 + 65_535 + MIN_FRAME + 8;

/// Where `num_buffers` lies.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;

/// Bytes of a checksum.
const CHECKSUM: usize = 2;

const GSO_NONE: u8 = abi::VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_ECN: u8 = abi::VIRTIO_NET_HDR_GSO_ECN as u8;
const NEEDS_CSUM: u8 = abi::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;

/// Kinds of large frames, and the feature that allows a guest to send them.
const GSO: [(u32, u32); 3] = [
    (abi::VIRTIO_NET_HDR_GSO_TCPV4, abi::VIRTIO_NET_F_HOST_TSO4),
    (abi::VIRTIO_NET_HDR_GSO_TCPV6, abi::VIRTIO_NET_F_HOST_TSO6),
    (abi::VIRTIO_NET_HDR_GSO_UDP_L4, abi::VIRTIO_NET_F_HOST_USO),
];

/// What is wrong with a frame of the guest.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lie {
    /// no frame at all
    #[error("{0} bytes are no frame")]
    Short(usize),
    /// more than any frame has
    #[error("a frame has at most {MAX_FRAME} bytes, not {0}")]
    Long(usize),
    /// a checksum beyond the end
    #[error("its checksum at {start}+{offset} does not lie in its {length} bytes")]
    Checksum { start: u16, offset: u16, length: usize },
    /// a checksum that was not agreed on
    #[error("it leaves its checksum to the host without having agreed to that")]
    NoChecksum,
    /// an unknown or unwanted kind
    #[error("it is of the large kind {0:#x}, which was not agreed on")]
    Kind(u8),
    /// pieces of no size
    #[error("it is to be cut into pieces of no size, or without their checksums")]
    Pieces,
    /// headers beyond the end
    #[error("it has {headers} bytes of headers in {length} bytes")]
    Headers { headers: u16, length: usize },
}

/// Says what the host's kernel is to hear of a guest's frame with this header: no more than was agreed on.
pub fn check(header: [u8; SIZE], length: usize, features: u64) -> Result<[u8; SIZE], Lie> {
    if length < MIN_FRAME {
        return Err(Lie::Short(length));
    }
    if length > MAX_FRAME {
        return Err(Lie::Long(length));
    }
    let field = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let (flags, kind) = (header[0] & NEEDS_CSUM, header[1]);
    let (headers, size, start, offset) = (field(2), field(4), field(6), field(8));
    let mut checked = [0; SIZE];
    checked[0] = flags;
    if flags != 0 {
        if features & bit(abi::VIRTIO_NET_F_CSUM) == 0 {
            return Err(Lie::NoChecksum);
        }
        let end = usize::from(start) + usize::from(offset) + CHECKSUM;
        if usize::from(start) < MIN_FRAME || end > length {
            return Err(Lie::Checksum { start, offset, length });
        }
        checked[6..10].copy_from_slice(&header[6..10]);
    }
    if kind == GSO_NONE {
        return Ok(checked);
    }
    let agreed = |feature: u32| features & bit(feature) != 0;
    let known = GSO.iter().any(|(gso, feature)| u32::from(kind & !GSO_ECN) == *gso && agreed(*feature));
    if !known || (kind & GSO_ECN != 0 && !agreed(abi::VIRTIO_NET_F_HOST_ECN)) {
        return Err(Lie::Kind(kind));
    }
    if size == 0 || flags == 0 {
        return Err(Lie::Pieces);
    }
    if usize::from(headers) > length {
        return Err(Lie::Headers { headers, length });
    }
    checked[1..6].copy_from_slice(&header[1..6]);
    Ok(checked)
}

/// Says in the header of a received frame over how many buffers it goes.
pub fn set_buffers(header: &mut [u8; SIZE], buffers: u16) {
    header[NUM_BUFFERS].copy_from_slice(&buffers.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;

    fn header(flags: u8, kind: u8, fields: [u16; 4]) -> [u8; SIZE] {
        let mut header = [0xaa; SIZE];
        (header[0], header[1]) = (flags, kind);
        for (at, field) in fields.iter().enumerate() {
            header[2 + 2 * at..4 + 2 * at].copy_from_slice(&field.to_le_bytes());
        }
        header
    }

    #[test]
    fn a_plain_frame_keeps_nothing_of_what_is_written_beside_it() {
        let garbage = header(0xfe, 0, [9999, 1, 2, 3]);
        assert_eq!(check(garbage, 60, 0), Ok([0; SIZE]));
    }

    #[test]
    fn a_large_frame_keeps_what_the_host_needs() {
        let honest = header(1, 1, [54, 1448, 34, 16]);
        let mut wanted = honest;
        wanted[NUM_BUFFERS].fill(0);
        assert_eq!(check(honest, 60_000, ALL), Ok(wanted));
        let ecn = header(1, 0x84, [74, 1440, 54, 16]);
        assert!(check(ecn, 60_000, ALL).is_ok());
    }

    #[test]
    fn lengths_that_no_frame_has_are_lies() {
        for length in [0, 1, 13] {
            assert_eq!(check([0; SIZE], length, ALL), Err(Lie::Short(length)));
        }
        assert!(check([0; SIZE], MIN_FRAME, ALL).is_ok());
        assert!(check([0; SIZE], MAX_FRAME, ALL).is_ok());
        assert_eq!(check([0; SIZE], MAX_FRAME + 1, ALL), Err(Lie::Long(MAX_FRAME + 1)));
    }

    #[test]
    fn checksums_outside_of_the_frame_are_lies() {
        for (start, offset) in [(59, 0), (0, 16), (13, 0), (14, 45), (u16::MAX, u16::MAX), (34, u16::MAX)] {
            let lie = check(header(1, 0, [0, 0, start, offset]), 60, ALL);
            assert_eq!(lie, Err(Lie::Checksum { start, offset, length: 60 }));
        }
        assert!(check(header(1, 0, [0, 0, 34, 24]), 60, ALL).is_ok());
        let not_agreed = ALL & !bit(abi::VIRTIO_NET_F_CSUM);
        assert_eq!(check(header(1, 0, [0, 0, 34, 16]), 60, not_agreed), Err(Lie::NoChecksum));
    }

    #[test]
    fn kinds_that_are_unknown_or_were_not_agreed_on_are_lies() {
        for kind in [2, 3, 6, 7, 0x7f, 0x80, 0xff] {
            assert_eq!(check(header(1, kind, [54, 1448, 34, 16]), 3000, ALL), Err(Lie::Kind(kind)));
        }
        for (kind, feature) in GSO {
            let kind = kind as u8;
            let without = ALL & !bit(feature);
            assert_eq!(check(header(1, kind, [54, 1448, 34, 16]), 3000, without), Err(Lie::Kind(kind)));
        }
        let without = ALL & !bit(abi::VIRTIO_NET_F_HOST_ECN);
        assert_eq!(check(header(1, 0x81, [54, 1448, 34, 16]), 3000, without), Err(Lie::Kind(0x81)));
    }

    #[test]
    fn large_frames_without_size_checksum_or_headers_are_lies() {
        assert_eq!(check(header(1, 1, [54, 0, 34, 16]), 3000, ALL), Err(Lie::Pieces));
        assert_eq!(check(header(0, 1, [54, 1448, 34, 16]), 3000, ALL), Err(Lie::Pieces));
        let lie = Lie::Headers { headers: 3001, length: 3000 };
        assert_eq!(check(header(1, 1, [3001, 1448, 34, 16]), 3000, ALL), Err(lie));
    }
}
