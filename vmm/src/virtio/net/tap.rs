//! The host's end: a tap that carries a virtio header in front of each frame (`drivers/net/tun.c`).
//!
//! One read is one frame and one write is one frame, never waited for.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use virtio_bindings::bindings::virtio_net as abi;

use super::bit;
use super::header;

/// What the kernel may leave to the guest, and the feature with which the guest takes it.
const OFFLOADS: [(u32, u64); 6] = [
    (libc::TUN_F_CSUM, bit(abi::VIRTIO_NET_F_GUEST_CSUM)),
    (libc::TUN_F_TSO4, bit(abi::VIRTIO_NET_F_GUEST_TSO4)),
    (libc::TUN_F_TSO6, bit(abi::VIRTIO_NET_F_GUEST_TSO6)),
    (libc::TUN_F_TSO_ECN, bit(abi::VIRTIO_NET_F_GUEST_ECN)),
    (libc::TUN_F_USO4, bit(abi::VIRTIO_NET_F_GUEST_USO4)),
    (libc::TUN_F_USO6, bit(abi::VIRTIO_NET_F_GUEST_USO6)),
];

const TSO: u32 = libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
/// The kernel takes both or none.
const USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;
/// What kernels before 6.2 have. UFO, which Linux gave up in 4.14, is left out on purpose: nobody sends it, and its
/// code in the host need not be in a guest's reach.
const OLD: u32 = libc::TUN_F_CSUM | TSO | libc::TUN_F_TSO_ECN;

/// Hands the kernel's `TUN_F_*` to a descriptor.
pub type SetOffload = fn(BorrowedFd, u32) -> io::Result<()>;

/// A tap, or in tests a socket that keeps frames apart as one does.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    offloads: u32,
    set_offload: SetOffload,
}

impl Tap {
    /// Takes a tap over: fails if it is none, or one with other headers.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // `struct ifreq`: a name of 16 bytes, and a union of which the flags come first.
        let mut request = [0u8; size_of::<libc::ifreq>()];
        // SAFETY: TUNGETIFF fills an ifreq, for which there is room.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, request.as_mut_ptr()) })?;
        let flags = i32::from(i16::from_ne_bytes([request[16], request[17]]));
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & (wanted | libc::IFF_TUN) != wanted {
            return Err(io::Error::other(format!("its flags are {flags:#x}")));
        }
        let size = header::SIZE as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int, which lives until the call returns.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &size) })?;
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let offloads = match set_offload(fd.as_fd(), OLD | USO) {
            Ok(()) => OLD | USO,
            Err(_) => OLD,
        };
        Ok(Tap { fd, offloads, set_offload })
    }

    /// A socket in place of a tap.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn fake(fd: OwnedFd, set_offload: SetOffload) -> Self {
        Tap { fd, offloads: OLD | USO, set_offload }
    }

    /// The features that need this kernel.
    pub fn features(&self) -> u64 {
        let guest = OFFLOADS
            .iter()
            .filter(|(offload, _)| self.offloads & offload != 0)
            .fold(0, |all, (_, feature)| all | feature);
        if self.offloads & USO == 0 { guest } else { guest | bit(abi::VIRTIO_NET_F_HOST_USO) }
    }

    /// Has the kernel leave to the guest what these features allow. Returns whether frames may come that are longer
    /// than the MTU, because they stand for several.
    pub fn apply(&self, features: u64) -> io::Result<bool> {
        let offloads = self.offloads & offloads_of(features);
        (self.set_offload)(self.fd.as_fd(), offloads)?;
        Ok(offloads & (TSO | USO) != 0)
    }

    /// Reads one frame with its header into `to`. An error of kind `WouldBlock` means that there is none.
    pub fn read(&self, to: &mut [libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller made the iovecs of memory that lives and may be written.
        let n = unsafe { libc::readv(self.fd.as_raw_fd(), to.as_mut_ptr(), to.len() as libc::c_int) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Writes one frame with its header.
    pub fn write(&self, from: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller made the iovecs of memory that lives.
        let n = unsafe { libc::writev(self.fd.as_raw_fd(), from.as_ptr(), from.len() as libc::c_int) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// What the kernel calls a set of features. It refuses a set in which one needs another that is not there; so does
/// the specification (section 5.1.3.1), but a guest may not have read it.
fn offloads_of(features: u64) -> u32 {
    let mut offloads = OFFLOADS
        .iter()
        .filter(|(_, feature)| features & feature != 0)
        .fold(0, |all, (offload, _)| all | offload);
    if offloads & libc::TUN_F_CSUM == 0 {
        return 0;
    }
    if offloads & TSO == 0 {
        offloads &= !libc::TUN_F_TSO_ECN;
    }
    if offloads & USO != USO {
        offloads &= !USO;
    }
    offloads
}

fn set_offload(fd: BorrowedFd, offloads: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_never_asked_for_what_needs_something_else() {
        let of = |features: &[u32]| offloads_of(features.iter().fold(0, |all, f| all | bit(*f)));
        assert_eq!(of(&[abi::VIRTIO_NET_F_GUEST_TSO4]), 0);
        assert_eq!(of(&[abi::VIRTIO_NET_F_GUEST_CSUM, abi::VIRTIO_NET_F_GUEST_ECN]), libc::TUN_F_CSUM);
        assert_eq!(of(&[abi::VIRTIO_NET_F_GUEST_CSUM, abi::VIRTIO_NET_F_GUEST_USO4]), libc::TUN_F_CSUM);
        assert_eq!(offloads_of(u64::MAX), OLD | USO);
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let (one, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
        assert!(Tap::new(one.into()).is_err());
        assert!(Tap::new(std::fs::File::open("/dev/null").unwrap().into()).is_err());
    }
}
