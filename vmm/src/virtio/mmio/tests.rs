use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::virtio::testing::{HIGH_MEMORY, LOW_MEMORY, TestDriver};
use crate::virtio::{ConfigSpace, F_EVENT_IDX};

/// A device that does nothing but count what the transport does to it.
struct Probe {
    config: Arc<ConfigSpace>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    activated: AtomicUsize,
    stopped: AtomicUsize,
    features: std::sync::Mutex<u64>,
    sizes: std::sync::Mutex<Vec<u16>>,
}

struct Active(Arc<Counts>);

impl Running for Active {}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.stopped.fetch_add(1, Ordering::SeqCst);
    }
}

impl Device for Probe {
    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX | 1 << 40
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 64]
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&self, activation: Activation) -> Result<Box<dyn Running>, ActivateError> {
        self.counts.activated.fetch_add(1, Ordering::SeqCst);
        *self.counts.features.lock().unwrap() = activation.features;
        *self.counts.sizes.lock().unwrap() = activation.queues.iter().map(Virtqueue::size).collect();
        Ok(Box::new(Active(self.counts.clone())))
    }
}

fn driver() -> (TestDriver, Arc<Counts>, Arc<ConfigSpace>) {
    let counts = Arc::new(Counts::default());
    let config = Arc::new(ConfigSpace::new((1..=10).collect()));
    let driver = TestDriver::new(Box::new(Probe { config: config.clone(), counts: counts.clone() }));
    (driver, counts, config)
}

fn activated(counts: &Counts) -> usize {
    counts.activated.load(Ordering::SeqCst)
}

fn stopped(counts: &Counts) -> usize {
    counts.stopped.load(Ordering::SeqCst)
}

#[test]
fn the_identity_registers_say_virtio_mmio_version_2() {
    let (mut driver, ..) = driver();
    assert_eq!(driver.read(0x0), u32::from_le_bytes(*b"virt"));
    assert_eq!(driver.read(0x4), 2);
    assert_eq!(driver.read(0x8), 42);
    assert_eq!(driver.read(0xc), u32::from_le_bytes(*b"STKD"));
    // No shared memory region.
    assert_eq!(driver.read(0xb0), u32::MAX);
    assert_eq!(driver.read(0xb4), u32::MAX);
}

#[test]
fn a_whole_negotiation_activates_once_with_what_was_agreed() {
    let (mut driver, counts, _) = driver();
    driver.negotiate(1 << 40);
    driver.set_up_queue(0, 8);
    driver.set_up_queue(1, 64);
    assert_eq!(activated(&counts), 0);
    driver.write(0x70, 15);
    assert_eq!(driver.status(), 15);
    assert_eq!(activated(&counts), 1);
    assert_eq!(*counts.features.lock().unwrap(), F_VERSION_1 | 1 << 40);
    assert_eq!(*counts.sizes.lock().unwrap(), [8, 64]);
}

#[test]
fn setting_driver_ok_again_does_not_activate_again() {
    let (mut driver, counts, _) = driver();
    driver.start();
    driver.write(0x70, 15);
    driver.write(0x70, 11);
    driver.write(0x70, 15);
    assert_eq!(driver.status(), 15);
    assert_eq!(activated(&counts), 1);
    assert_eq!(stopped(&counts), 0);
}

#[test]
fn a_reset_stops_the_device_and_a_new_negotiation_starts_a_fresh_one() {
    let (mut driver, counts, _) = driver();
    for round in 1..=3 {
        driver.start();
        assert_eq!(activated(&counts), round);
        driver.write(0x70, 0);
        assert_eq!(driver.status(), 0);
        assert_eq!(stopped(&counts), round);
        driver.write(0x30, 0);
        assert_eq!(driver.read(0x44), 0);
    }
}

#[test]
fn status_moves_along_the_specified_steps_only() {
    let (mut driver, counts, _) = driver();
    for (from, to) in [(0u32, 2u32), (0, 3), (0, 15), (0, 4), (0, 8)] {
        driver.write(0x70, to);
        assert_eq!(driver.status(), from, "{from} to {to}");
    }
    driver.write(0x70, 1);
    for to in [2, 5, 9, 11, 15, 0x41] {
        driver.write(0x70, to);
        assert_eq!(driver.status(), 1, "1 to {to}");
    }
    driver.write(0x70, 3);
    for to in [1, 7, 15] {
        driver.write(0x70, to);
        assert_eq!(driver.status(), 3, "3 to {to}");
    }
    assert_eq!(activated(&counts), 0);
}

#[test]
fn a_driver_that_gives_up_is_remembered_as_failed_until_reset() {
    let (mut driver, counts, _) = driver();
    driver.write(0x70, 1);
    driver.write(0x70, 0x81);
    assert_eq!(driver.status(), 0x81);
    driver.write(0x70, 3);
    assert_eq!(driver.status(), 0x81);
    driver.start();
    assert_eq!(activated(&counts), 1);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let (mut driver, ..) = driver();
    assert_eq!(driver.offered_features(), F_VERSION_1 | F_EVENT_IDX | 1 << 40);
    for features in [F_VERSION_1 | 1, F_VERSION_1 | 1 << 63, u64::MAX, 0, F_EVENT_IDX] {
        driver.write(0x70, 0);
        driver.write(0x70, 1);
        driver.write(0x70, 3);
        driver.accept_features(features);
        driver.write(0x70, 11);
        assert_eq!(driver.status(), 3, "{features:#x}");
    }
}

#[test]
fn features_cannot_be_changed_after_they_were_accepted() {
    let (mut driver, counts, _) = driver();
    driver.negotiate(0);
    driver.accept_features(F_VERSION_1 | 1 << 40);
    driver.set_up_queue(0, 16);
    driver.set_up_queue(1, 64);
    driver.write(0x70, 15);
    assert_eq!(*counts.features.lock().unwrap(), F_VERSION_1);
}

#[test]
fn selectors_out_of_range_read_as_zero_and_write_nothing() {
    let (mut driver, ..) = driver();
    driver.write(0x14, 2);
    assert_eq!(driver.read(0x10), 0);
    driver.negotiate(u64::MAX);
    for selector in [2, u32::MAX] {
        driver.write(0x30, selector);
        assert_eq!(driver.read(0x34), 0);
        driver.write(0x38, 8);
        driver.write(0x44, 1);
        assert_eq!(driver.read(0x44), 0);
    }
}

#[test]
fn queues_cannot_be_configured_before_features_are_agreed() {
    let (mut driver, ..) = driver();
    for status in [0, 1, 3] {
        driver.write(0x70, status);
        driver.configure_queue(0, 16, 0x1000, 0x2000, 0x3000);
        assert_eq!(driver.read(0x44), 0, "status {status}");
    }
}

#[test]
fn queues_are_frozen_once_the_device_runs() {
    let (mut driver, counts, _) = driver();
    driver.start();
    driver.configure_queue(0, 4, 0xdead_0000, 0xdead_0000, 0xdead_0000);
    driver.write(0x44, 0);
    assert_eq!(driver.read(0x44), 1);
    assert_eq!(*counts.sizes.lock().unwrap(), [16, 64]);
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_queue_that_is_ready_is_frozen_until_it_is_taken_back() {
    let (mut driver, counts, _) = driver();
    driver.negotiate(0);
    driver.set_up_queue(0, 16);
    driver.write(0x38, 4);
    driver.set_up_queue(1, 64);
    driver.write(0x30, 1);
    driver.write(0x44, 0);
    assert_eq!(driver.read(0x44), 0);
    driver.write(0x38, 32);
    driver.write(0x44, 1);
    driver.write(0x70, 15);
    assert_eq!(*counts.sizes.lock().unwrap(), [16, 32]);
}

#[test]
fn a_missing_queue_makes_the_device_ask_for_a_reset() {
    let (mut driver, counts, _) = driver();
    driver.negotiate(0);
    driver.set_up_queue(0, 16);
    driver.write(0x70, 15);
    assert_eq!(driver.status(), 15 | 0x40);
    assert_eq!(driver.wait_interrupt(), 2);
    assert_eq!(activated(&counts), 0);
    driver.start();
    assert_eq!(activated(&counts), 1);
}

#[test]
fn impossible_queues_make_the_device_ask_for_a_reset() {
    let (mut driver, counts, _) = driver();
    let (low, high) = (LOW_MEMORY as u64, HIGH_MEMORY);
    for (size, desc, avail, used) in [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (128, 0x1000, 0x2000, 0x3000),
        (0x1_0010, 0x1000, 0x2000, 0x3000),
        (u32::MAX, 0x1000, 0x2000, 0x3000),
        (16, 0x1008, 0x2000, 0x3000),
        (16, 0x1000, 0x2001, 0x3000),
        (16, 0x1000, 0x2000, 0x3002),
        (16, low - 16, 0x2000, 0x3000),
        (16, 0x1000, low - 2, 0x3000),
        (16, 0x1000, 0x2000, high - 4),
        (16, u64::MAX - 15, 0x2000, 0x3000),
        (16, 0x1000, 0xd000_0000, 0x3000),
    ] {
        driver.negotiate(0);
        driver.configure_queue(0, size, desc, avail, used);
        driver.configure_queue(1, 16, 0x4000, 0x5000, 0x6000);
        driver.write(0x70, 15);
        assert_eq!(driver.status(), 15 | 0x40, "{size} {desc:#x} {avail:#x} {used:#x}");
    }
    assert_eq!(activated(&counts), 0);
}

#[test]
fn a_ring_that_ends_where_memory_ends_is_fine() {
    let (mut driver, counts, _) = driver();
    driver.negotiate(0);
    driver.configure_queue(0, 16, LOW_MEMORY as u64 - 256, 0x2000, 0x3000);
    driver.configure_queue(1, 16, HIGH_MEMORY, 0x5000, 0x6000);
    driver.write(0x70, 15);
    assert_eq!(driver.status(), 15);
    assert_eq!(activated(&counts), 1);
}

#[test]
fn a_kick_reaches_the_event_of_its_queue_while_the_device_runs_only() {
    let (mut driver, ..) = driver();
    driver.kick(0);
    assert!(driver.transport.queue_events()[0].read().is_err());
    driver.start();
    for queue in [0, 1] {
        // Activation itself has the worker look at its queues.
        driver.transport.queue_events()[queue].read().unwrap();
        driver.kick(queue);
        assert_eq!(driver.transport.queue_events()[queue].read().unwrap(), 1);
    }
    driver.kick(2);
    driver.kick(usize::MAX & 0xffff_ffff);
    driver.kick(1);
    driver.write(0x70, 0);
    assert!(driver.transport.queue_events()[1].read().is_err(), "a kick outlived the reset");
}

#[test]
fn accesses_of_the_wrong_width_or_place_do_nothing() {
    let (mut driver, ..) = driver();
    driver.start();
    for width in [1, 2, 3, 8] {
        let mut data = vec![0xff; width];
        driver.transport.read(0x0, &mut data);
        assert_eq!(data, vec![0; width]);
        driver.transport.write(0x70, &vec![0; width]);
    }
    driver.write(0x71, 0);
    driver.write(0xffc, 0);
    driver.transport.write(u64::MAX, &[0; 4]);
    assert_eq!(driver.status(), 15);
    assert_eq!(driver.read(0xf8), 0);
}

#[test]
fn configuration_space_is_read_in_any_width_and_is_zero_beyond_its_end() {
    let (mut driver, ..) = driver();
    let mut byte = [0];
    driver.transport.read(0x103, &mut byte);
    assert_eq!(byte, [4]);
    let mut eight = [0xff; 8];
    driver.transport.read(0x106, &mut eight);
    assert_eq!(eight, [7, 8, 9, 10, 0, 0, 0, 0]);
    for offset in [0x10a, 0xfff, u64::MAX - 8, u64::MAX] {
        driver.transport.read(offset, &mut eight);
        assert_eq!(eight, [0; 8]);
    }
    driver.transport.write(0x100, &[9]);
    driver.transport.read(0x100, &mut byte);
    assert_eq!(byte, [1]);
}

#[test]
fn a_change_of_the_configuration_counts_up_its_generation() {
    let (mut driver, _, config) = driver();
    let before = driver.read(0xfc);
    config.replace(vec![7]);
    assert_ne!(driver.read(0xfc), before);
    let mut byte = [0];
    driver.transport.read(0x100, &mut byte);
    assert_eq!(byte, [7]);
}

#[test]
fn acknowledging_clears_the_reasons_that_are_named() {
    let (mut driver, ..) = driver();
    driver.start();
    driver.transport.interrupt.used();
    driver.transport.interrupt.config_changed();
    assert_eq!(driver.read(0x60), 3);
    driver.write(0x64, 1);
    assert_eq!(driver.read(0x60), 2);
    driver.write(0x64, 0xffff_ffff);
    assert_eq!(driver.read(0x60), 0);
    assert_eq!(driver.irq.read().unwrap(), 2);
}

/// Takes a driver to one of the states of the specification, the last of which is a device that runs.
fn take_to(driver: &mut TestDriver, state: u32) {
    driver.write(0x70, 0);
    for step in [1, 3, 11].into_iter().filter(|step| *step <= state) {
        if step == 11 {
            driver.accept_features(F_VERSION_1);
        }
        driver.write(0x70, step);
    }
    if state == 15 {
        driver.configure_queue(0, 16, 0x1000, 0x2000, 0x3000);
        driver.configure_queue(1, 64, 0x4000, 0x5000, 0x6000);
        driver.write(0x70, 15);
    }
    assert_eq!(driver.status(), state);
}

#[test]
fn every_register_takes_every_kind_of_value_in_every_state_and_a_reset_makes_good() {
    let (mut driver, counts, _) = driver();
    // The bits, what is beside them, and every value of a byte.
    let bits = (0..32).map(|bit| 1u32 << bit);
    let mut values: Vec<u32> = bits.flat_map(|bit| [bit - 1, bit, bit + 1]).chain(0..=255).collect();
    values.extend([u32::MAX - 1, u32::MAX]);
    values.sort_unstable();
    values.dedup();
    for state in [0, 1, 3, 11, 15] {
        for offset in (0..CONFIG_SPACE).step_by(4).chain([0x100, 0x104, WINDOW_SIZE - 4, WINDOW_SIZE]) {
            take_to(&mut driver, state);
            for value in &values {
                driver.write(offset, *value);
                driver.read(offset);
                let now = driver.status() & !(NEEDS_RESET | FAILED);
                assert!([0, 1, 3, 11, 15].contains(&now), "{value:#x} to {offset:#x} in {state}: {now}");
                let running = activated(&counts) - stopped(&counts);
                assert!(
                    running <= usize::from(now == 15),
                    "{value:#x} to {offset:#x} in {state}: {now}, {running}"
                );
            }
        }
    }
    let before = activated(&counts);
    take_to(&mut driver, 15);
    assert_eq!(activated(&counts), before + 1);
    driver.write(0x70, 0);
    assert_eq!(activated(&counts), stopped(&counts));
}
