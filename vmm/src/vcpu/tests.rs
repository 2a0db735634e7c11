//! Guests of a few instructions on a real /dev/kvm: first state, exits, pause, stop, and the whole process from
//! `Boot` to `Stopped`. Where /dev/kvm does not open, each test says SKIPPED in its output.

use super::*;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::control::{Boot, Client, Event};
use crate::io_apic::IoApic;
use crate::io_loop::IoLoop;
use crate::machine::{create_vcpus, register_memory};
use crate::memory::{self, GAP_START, GuestMemory, PAGE, PAGE_TABLES};
use crate::serial::Console;
use crate::slots::Slot;
use crate::virtio::{mmio::MmioTransport, rng};
use crate::{host, process};

const CODE: GuestAddress = GuestAddress(0x10_0000);
const COUNTER: GuestAddress = GuestAddress(0x20_0000);

/// mov dx, 0x3f8; out "hi\n"; ud2, which is a triple fault without an IDT
const SAY_HI: &[u8] =
    &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'h', 0xee, 0xb0, b'i', 0xee, 0xb0, b'\n', 0xee, 0x0f, 0x0b];
/// mov ecx, 0xd0000000; mov eax, [rcx]; mov dx, 0x3f8; 4 × (out dx, al; shr eax, 8); ud2
const SAY_MAGIC: &[u8] = &[
    0xb9, 0, 0, 0, 0xd0, 0x8b, 0x01, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xc1, 0xe8, 8, 0xee, 0xc1, 0xe8, 8, 0xee,
    0xc1, 0xe8, 8, 0xee, 0x0f, 0x0b,
];
/// l: inc qword [0x200000]; jmp l
const COUNT: &[u8] = &[0x48, 0xff, 0x04, 0x25, 0, 0, 0x20, 0, 0xeb, 0xf6];
/// l: hlt; jmp l
const HALT: &[u8] = &[0xf4, 0xeb, 0xfd];

struct Guest {
    vcpus: Vcpus,
    memory: GuestMemory,
    console: io::PipeReader,
}

fn kvm() -> Option<Kvm> {
    host::open_kvm().inspect_err(|e| eprintln!("SKIPPED, this needs a usable /dev/kvm: {e}")).ok()
}

fn guest(kvm: &Kvm, count: u8, code: &[u8]) -> Guest {
    let vm = kvm.create_vm().unwrap();
    let split =
        kvm_bindings::kvm_enable_cap { cap: kvm_bindings::KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    vm.enable_cap(&split).unwrap();
    let memory = memory::create(memory::MIN_BYTES).unwrap();
    register_memory(&vm, &memory).unwrap();
    registers::write_tables(&memory).unwrap();
    map_devices(&memory);
    memory.write_slice(code, CODE).unwrap();

    let (console, output) = io::pipe().unwrap();
    let io_apic = Arc::new(IoApic::new(Box::new(|_| {})));
    let line = Box::new(io_apic.line(Slot::VSOCK.irq()));
    let device = rng::new(IoLoop::new().unwrap().handle());
    let transport = MmioTransport::new(device, memory.clone(), line).unwrap();
    let bus = Bus::new(Console::new(output.into()).unwrap(), io_apic, vec![(Slot::VSOCK, transport)]);
    let vcpus = create_vcpus(kvm, &vm, count).unwrap();
    registers::set_boot(&vcpus[0], CODE).unwrap();
    Guest { vcpus: Vcpus::start(vcpus, Arc::new(bus)).unwrap(), memory, console }
}

/// Adds the last GiB below 4 GiB to the identity map, with a directory behind the command line's page.
fn map_devices(memory: &GuestMemory) {
    let directory = memory::CMDLINE.unchecked_add(PAGE);
    memory.write_obj(directory.raw_value() | 3, PAGE_TABLES.unchecked_add(PAGE + 3 * 8)).unwrap();
    for i in 0..512 {
        let entry = (3 << 30 | i << 21) | 0x83;
        memory.write_obj::<u64>(entry, directory.unchecked_add(i * 8)).unwrap();
    }
    const { assert!(GAP_START >= 3 << 30) };
}

impl Guest {
    fn wait_for_event(&self) {
        let handle = self.vcpus.handle();
        // SAFETY: `handle` keeps the descriptor open for longer than it is borrowed.
        let event = unsafe { BorrowedFd::borrow_raw(handle.event().as_raw_fd()) };
        let mut fds = [PollFd::new(event, PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(20_000u16)), Ok(1), "nothing happens");
        handle.event().read().unwrap();
    }

    fn run_to_end(self) -> (StopReason, String) {
        self.vcpus.handle().resume();
        let reason = loop {
            self.wait_for_event();
            if let Some(reason) = self.vcpus.handle().ended() {
                break reason;
            }
        };
        drop(self.vcpus);
        let mut text = String::new();
        { self.console }.read_to_string(&mut text).unwrap();
        (reason, text)
    }

    fn pause(&self) -> u64 {
        self.vcpus.handle().pause();
        while !self.vcpus.handle().is_paused() {
            self.wait_for_event();
        }
        self.count()
    }

    fn count(&self) -> u64 {
        self.memory.read_obj(COUNTER).unwrap()
    }

    fn wait_for_more_than(&self, count: u64) {
        let start = Instant::now();
        while self.count() <= count {
            assert!(start.elapsed() < Duration::from_secs(20), "the guest does not run");
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_guest_starts_in_long_mode_and_its_triple_fault_is_a_reset() {
    let Some(kvm) = kvm() else { return };
    assert_eq!(guest(&kvm, 1, SAY_HI).run_to_end(), (StopReason::Reset, "hi\n".into()));
}

#[test]
fn a_load_from_a_slot_reaches_its_device() {
    let Some(kvm) = kvm() else { return };
    assert_eq!(guest(&kvm, 1, SAY_MAGIC).run_to_end(), (StopReason::Reset, "virt".into()));
}

#[test]
fn nothing_runs_before_resume_and_nothing_while_paused() {
    let Some(kvm) = kvm() else { return };
    let guest = guest(&kvm, 2, COUNT);
    assert_eq!(guest.pause(), 0);
    for _ in 0..20 {
        guest.vcpus.handle().resume();
        guest.wait_for_more_than(guest.count());
        let count = guest.pause();
        std::thread::yield_now();
        assert_eq!(guest.count(), count);
    }
}

#[test]
fn a_spinning_and_a_halted_guest_are_stopped_promptly() {
    let Some(kvm) = kvm() else { return };
    for code in [COUNT, HALT] {
        let guest = guest(&kvm, 4, code);
        guest.vcpus.handle().resume();
        if code == COUNT {
            guest.wait_for_more_than(0);
        }
        let start = Instant::now();
        drop(guest.vcpus);
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    }
}

/// An ELF file with one segment, [`CODE`] at its start.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 0x78];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[18] = 62;
    for (at, value) in [(24, CODE.raw_value()), (32, 64), (72, 0x78), (88, CODE.raw_value())] {
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    bytes[54] = 56;
    bytes[56] = 1;
    bytes[64] = 1;
    for at in [96, 104] {
        bytes[at..at + 8].copy_from_slice(&(code.len() as u64).to_le_bytes());
    }
    bytes.extend_from_slice(code);
    bytes
}

fn file(bytes: &[u8]) -> OwnedFd {
    let mut file: std::fs::File =
        nix::sys::memfd::memfd_create(c"file", nix::sys::memfd::MFdFlags::empty()).unwrap().into();
    file.write_all(bytes).unwrap();
    file.into()
}

/// Runs the VMM as its process would, on a thread and so without a jail, up to the answer to `Boot`.
fn boot(code: &[u8]) -> (Client, io::PipeReader, JoinHandle<ExitCode>, Option<Event>) {
    let (client, socket) = Client::pair().unwrap();
    let vmm = std::thread::spawn(move || process::run_confined(socket, |_| Ok(())));
    let (reader, writer) = io::pipe().unwrap();
    let boot = Boot {
        vcpus: 1,
        memory_bytes: memory::MIN_BYTES,
        cmdline: String::new(),
        kernel_name: "kernel".into(),
        initrd_name: "initrd".into(),
        network: false,
    };
    let share = std::fs::File::open("/").unwrap();
    let (kernel, initrd) = (file(&elf(code)), file(b""));
    client.boot(boot, kernel.as_fd(), initrd.as_fd(), share.as_fd(), writer.as_fd()).unwrap();
    let answer = client.recv().unwrap();
    (client, reader, vmm, answer)
}

#[test]
fn a_vm_tells_when_it_started_what_its_guest_said_and_how_it_ended() {
    if kvm().is_none() {
        return;
    }
    let (client, mut console, vmm, answer) = boot(SAY_HI);
    let Some(Event::Started(timeline)) = answer else { panic!("{answer:?}") };
    let times =
        [timeline.entered_ns, timeline.vm_created_ns, timeline.kernel_loaded_ns, timeline.first_run_ns];
    assert!(times.is_sorted() && times[0] > 0, "{times:?}");
    assert_eq!(client.recv().unwrap(), Some(Event::Stopped(StopReason::Reset)));
    assert_eq!(client.recv().unwrap(), None);
    assert_eq!(vmm.join().unwrap(), ExitCode::SUCCESS);
    let mut text = String::new();
    console.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hi\n");
}

#[test]
fn a_vm_is_paused_resumed_and_stopped_by_its_supervisor() {
    if kvm().is_none() {
        return;
    }
    let (client, _console, vmm, _) = boot(COUNT);
    client.pause().unwrap();
    assert_eq!(client.recv().unwrap(), Some(Event::Paused));
    client.pause().unwrap();
    assert_eq!(client.recv().unwrap(), Some(Event::Paused));
    client.resume().unwrap();
    assert_eq!(client.recv().unwrap(), Some(Event::Resumed));
    client.stop().unwrap();
    assert_eq!(client.recv().unwrap(), None);
    assert_eq!(vmm.join().unwrap(), ExitCode::SUCCESS);
}

#[test]
fn a_vm_that_runs_gets_and_gives_memory_as_its_supervisor_says() {
    if kvm().is_none() {
        return;
    }
    let (client, _console, vmm, _) = boot(COUNT);
    let block = memory::Window::of(memory::MIN_BYTES).block;
    for added_bytes in [2 * block, 3 * block, block, block, 0] {
        client.set_memory(added_bytes).unwrap();
        assert_eq!(client.recv().unwrap(), Some(Event::MemorySet { added_bytes }));
    }
    for absurd in [1, u64::MAX] {
        client.set_memory(absurd).unwrap();
        let Some(Event::MemoryRefused { reason }) = client.recv().unwrap() else { panic!("not refused") };
        assert!(reason.contains("multiple") && !reason.contains('\n'), "{reason}");
    }
    client.stop().unwrap();
    assert_eq!(client.recv().unwrap(), None);
    assert_eq!(vmm.join().unwrap(), ExitCode::SUCCESS);
}

#[test]
fn a_vm_ends_when_its_supervisor_is_gone() {
    if kvm().is_none() {
        return;
    }
    let (client, _console, vmm, _) = boot(HALT);
    drop(client);
    assert_eq!(vmm.join().unwrap(), ExitCode::SUCCESS);
}

#[test]
fn a_kernel_that_is_none_is_said_to_be_so_in_one_line() {
    if kvm().is_none() {
        return;
    }
    let (client, socket) = Client::pair().unwrap();
    let vmm = std::thread::spawn(move || process::run_confined(socket, |_| Ok(())));
    let null = std::fs::File::open("/dev/null").unwrap();
    let boot = Boot {
        vcpus: 1,
        memory_bytes: memory::MIN_BYTES,
        cmdline: String::new(),
        kernel_name: "/some/vmlinux".into(),
        initrd_name: "initrd".into(),
        network: false,
    };
    let fd = null.as_fd();
    client.boot(boot, fd, fd, fd, fd).unwrap();
    let Some(Event::Failed { message }) = client.recv().unwrap() else { panic!("no failure") };
    assert!(message.starts_with("/some/vmlinux is not an ELF file") && !message.contains('\n'), "{message}");
    assert_eq!(vmm.join().unwrap(), ExitCode::FAILURE);
}
