//! The assembly of a VM, from top to bottom in two steps: [`Shell::create`] makes what every VM has, before the
//! supervisor has said what this one is to be; [`Shell::furnish`] does the rest.
//!
//! Order matters where KVM says so: interrupt controllers before vCPUs, CPUID before MSRs. The ioctls are as few
//! as they can be, because several of them wait for a grace period in the host: one RAM slot where possible, no
//! interrupt routing, no 8259, no PIT.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemory as _, GuestMemoryError, GuestMemoryRegion};

use crate::bus::Bus;
use crate::control::Boot;
use crate::host;
use crate::io_apic::IoApic;
use crate::io_loop::IoHandle;
use crate::jail;
use crate::kernel;
use crate::memory::{self, GuestMemory};
use crate::serial::Console;
use crate::slots::Slot;
use crate::vcpu::cpuid::{self, Processor};
use crate::vcpu::{Vcpus, registers};
use crate::virtio::mmio::{MmioTransport, QUEUE_NOTIFY, TransportError};
use crate::virtio::vsock::{Dialer, Refusal};
use crate::virtio::{Device, fs, net, rng, vsock};
use crate::{boot_params, cmdline, mp_table};

/// Most vCPUs: what the guest kernel is built for (`CONFIG_NR_CPUS`).
pub const MAX_VCPUS: u8 = 32;

/// The guest's context id on the socket device: the first that is not reserved.
pub const GUEST_CID: u64 = 3;

/// The share directory's name in the guest (`mount -t virtiofs`).
pub const SHARE_TAG: &str = "share";

/// Where Intel processors without "unrestricted guest" keep three pages of their own for real mode: below the
/// BIOS area at the end of the 32-bit gap (KVM API, 4.36).
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Called for each connect with its id when the guest has answered it.
pub type Replies = Box<dyn Fn(u64, Result<(), Refusal>) + Send>;

/// Errors of the assembly; each is one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM is not usable
    #[error(transparent)]
    Host(#[from] host::Error),
    /// an ioctl fails
    #[error("KVM refuses to {what}: {source}; see the host's kernel log")]
    Kvm {
        /// What was asked of KVM.
        what: &'static str,
        /// What it says.
        source: kvm_ioctls::Error,
    },
    /// too few or too many vCPUs
    #[error("a VM cannot have {0} vCPUs: it must be 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    /// the jail
    #[error(transparent)]
    Jail(#[from] jail::Error),
    /// guest memory
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// writing to guest memory
    #[error("cannot write {what} to guest memory: {source}")]
    Write {
        /// What does not go there.
        what: &'static str,
        /// Why.
        source: GuestMemoryError,
    },
    /// the kernel or the initrd
    #[error("{name} {source}")]
    File {
        /// What the supervisor calls the file.
        name: String,
        /// What is wrong with it.
        source: kernel::Error,
    },
    /// the command line
    #[error(transparent)]
    Cmdline(#[from] cmdline::Error),
    /// the CPUID table
    #[error("the CPUID table does not fit KVM's: {0:?}")]
    Cpuid(vmm_sys_util::fam::Error),
    /// a device
    #[error("cannot make the {name} device: {source}")]
    Device {
        /// Which.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
    /// a transport
    #[error("cannot connect a device: {0}")]
    Transport(#[from] TransportError),
    /// threads or their events
    #[error("cannot start the vCPU threads: {0}; look at the limits of processes and open files")]
    Threads(#[source] io::Error),
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { what, source }
}

fn write(what: &'static str) -> impl Fn(GuestMemoryError) -> Error {
    move |source| Error::Write { what, source }
}

/// The descriptors that come with [`Boot`].
pub struct Files {
    pub kernel: OwnedFd,
    pub initrd: OwnedFd,
    pub console: OwnedFd,
}

/// A VM without memory, devices and vCPUs.
pub struct Shell {
    kvm: Kvm,
    vm: Arc<VmFd>,
}

/// A VM that is ready to run, paused.
pub struct Machine {
    /// The vCPU threads. First, because they are to end before anything else does.
    pub vcpus: Vcpus,
    /// Opens streams to the guest.
    pub dialer: Dialer,
    /// Makes interfaces of the network slots, which are all here or none.
    pub plugs: Vec<net::Plug>,
    /// Its memory, which can be added to.
    pub ram: Ram,
}

/// The memory of a VM that runs.
#[derive(Clone)]
pub struct Ram {
    vm: Arc<VmFd>,
    memory: GuestMemory,
}

impl Ram {
    /// Has so many bytes be there besides those that the VM began with: see [`GuestMemory::set_added`].
    pub fn set_added(&self, bytes: u64) -> Result<(), memory::Error> {
        self.memory.set_added(bytes, &|region| {
            // SAFETY: what `memory` tells are mappings of its own, which are never unmapped, and guest memory is only
            // accessed as memory that others change.
            let set = unsafe { self.vm.set_user_memory_region(region) };
            set.map_err(|e| io::Error::from_raw_os_error(e.errno()))
        })
    }
}

impl Shell {
    /// Makes a VM with interrupt controllers.
    pub fn create() -> Result<Self, Error> {
        let kvm_device = host::open_kvm()?;
        let vm = kvm_device.create_vm().map_err(kvm("create a VM"))?;
        if cpuid::host_is_intel() {
            vm.set_tss_address(TSS_ADDRESS).map_err(kvm("set the TSS address"))?;
        }
        // Local APICs only, with no pins of an I/O APIC among KVM's interrupt routes: see `io_apic`.
        let split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        vm.enable_cap(&split).map_err(kvm("create the local APICs"))?;
        Ok(Shell { kvm: kvm_device, vm: Arc::new(vm) })
    }

    /// Gives it memory with a kernel in it, devices and vCPUs. `loaded` is called when kernel and initrd are in
    /// memory.
    pub fn furnish(
        self,
        boot: &Boot,
        files: Files,
        io: &IoHandle,
        replies: Replies,
        loaded: impl FnOnce(),
    ) -> Result<Machine, Error> {
        if !(1..=MAX_VCPUS).contains(&boot.vcpus) {
            return Err(Error::Vcpus(boot.vcpus));
        }
        let Shell { kvm: kvm_device, vm } = self;
        let memory = memory::create(boot.memory_bytes)?;
        let named = |name: &str| {
            let name = name.to_owned();
            move |source| Error::File { name, source }
        };
        let kernel = kernel::load(&memory, &File::from(files.kernel)).map_err(named(&boot.kernel_name))?;
        let initrd = kernel::load_initrd(&memory, &File::from(files.initrd), &kernel)
            .map_err(named(&boot.initrd_name))?;
        loaded();

        let (vsock, dialer) = vsock::new(GUEST_CID, io.clone(), replies)
            .map_err(|source| Error::Device { name: "vsock", source })?;
        let fs = fs::new(SHARE_TAG, jail::SHARE).map_err(|source| Error::Device { name: "fs", source })?;
        // Its thread has them; whatever is started from here on is to have none.
        jail::drop_capabilities()?;
        let mut devices = vec![(Slot::VSOCK, vsock), (Slot::FS, fs), (Slot::RNG, rng::new(io.clone()))];
        let mut plugs = Vec::new();
        for (index, slot) in Slot::NET.into_iter().enumerate().filter(|_| boot.network) {
            let (device, plug) = net::new(format!("net{index}"))
                .map_err(|source| Error::Device { name: "network", source })?;
            devices.push((slot, device));
            plugs.push(plug);
        }
        let slots: Vec<Slot> = devices.iter().map(|(slot, _)| *slot).collect();
        let cmdline = cmdline::compose(boot.vcpus, boot.memory_bytes, &slots, &boot.cmdline)?;
        boot_params::write(&memory, &cmdline, &initrd).map_err(write("the boot parameters"))?;
        mp_table::write(&memory, boot.vcpus, &slots).map_err(write("the MP table"))?;
        registers::write_tables(&memory).map_err(write("the page tables"))?;
        register_memory(&vm, &memory)?;

        let io_apic = Arc::new(IoApic::new({
            let vm = Arc::clone(&vm);
            // An error is an interrupt that no local APIC takes: on a real machine it would be lost as well.
            Box::new(move |message| {
                let _ = vm.signal_msi(message);
            })
        }));
        let transports = devices
            .into_iter()
            .map(|(slot, device)| Ok((slot, plug(&vm, &memory, &io_apic, slot, device)?)))
            .collect::<Result<Vec<_>, Error>>()?;
        let console =
            Console::new(files.console).map_err(|source| Error::Device { name: "console", source })?;
        let bus = Arc::new(Bus::new(console, io_apic, transports));

        let vcpus = create_vcpus(&kvm_device, &vm, boot.vcpus)?;
        registers::set_boot(&vcpus[0], kernel.entry).map_err(kvm("set the registers"))?;
        let vcpus = Vcpus::start(vcpus, bus).map_err(Error::Threads)?;
        Ok(Machine { vcpus, dialer, plugs, ram: Ram { vm, memory } })
    }
}

/// Tells KVM of guest memory: one slot for each region.
pub fn register_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), Error> {
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is a mapping of our own of this length, which is never unmapped (see `memory`),
        // and guest memory is only accessed as memory that others change.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("take guest memory"))?;
    }
    Ok(())
}

/// Puts a device into its slot: interrupt line, registers, and a doorbell for each queue.
fn plug(
    vm: &VmFd,
    memory: &GuestMemory,
    io_apic: &Arc<IoApic>,
    slot: Slot,
    device: Box<dyn Device>,
) -> Result<MmioTransport, Error> {
    let transport = MmioTransport::new(device, memory.clone(), Box::new(io_apic.line(slot.irq())))?;
    let doorbell = IoEventAddress::Mmio(slot.base() + QUEUE_NOTIFY);
    for (queue, event) in transport.queue_events().iter().enumerate() {
        vm.register_ioevent(event, &doorbell, queue as u32).map_err(kvm("connect a queue"))?;
    }
    Ok(transport)
}

/// Makes all vCPUs with their CPUID and MSRs.
pub fn create_vcpus(kvm_device: &Kvm, vm: &VmFd, count: u8) -> Result<Vec<VcpuFd>, Error> {
    let vcpus = (0..count)
        .map(|id| vm.create_vcpu(id.into()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(kvm("create a vCPU"))?;
    let supported =
        kvm_device.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("tell what CPUID it supports"))?;
    let tsc_khz = vcpus.first().and_then(|vcpu| vcpu.get_tsc_khz().ok());
    let processor = Processor { vcpus: count, tsc_khz, brand: cpuid::host_brand() };
    let mut entries = cpuid::prepare(supported.as_slice(), processor);
    for (id, vcpu) in vcpus.iter().enumerate() {
        cpuid::set_id(&mut entries, id as u8);
        let table = cpuid::to_kvm(&entries).map_err(Error::Cpuid)?;
        vcpu.set_cpuid2(&table).map_err(kvm("take the CPUID table"))?;
        registers::set_xcr0(vcpu, &entries).map_err(kvm("enable extended state"))?;
        registers::set_msrs(vcpu).map_err(kvm("set the MSRs"))?;
    }
    Ok(vcpus)
}
