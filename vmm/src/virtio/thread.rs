//! Threads of devices that do not share the I/O thread.
//!
//! Such a thread is there before the VM runs, whether or not the guest will ever use its device, because nothing in
//! the jail can start one later ([`crate::jail`]): it keeps what its kind of work needs, and no other thread has to
//! have it. Each activation of the device is a job for it. Stopping waits for what the job is at; only then is the
//! device gone.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{ActivateError, Running};
use crate::jail::{self, Kind};

/// The thread, idle between jobs. It ends when this is dropped, and no job runs.
pub struct DeviceThread<J> {
    jobs: Sender<Job<J>>,
}

struct Job<J> {
    job: J,
    stop: EventFd,
    /// Told whether the activation has succeeded.
    begun: Sender<Result<(), ActivateError>>,
    /// Dropped when nothing of it is left.
    _gone: Sender<()>,
}

/// A running job. Dropping it waits until the thread is idle again.
pub struct Working {
    stop: EventFd,
    gone: Receiver<()>,
}

impl Running for Working {}

impl Drop for Working {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            tracing::error!(%error, "cannot stop a device's thread");
            return;
        }
        // Never sent to: it ends with the sender.
        let _ = self.gone.recv();
    }
}

impl<J: Send + 'static> DeviceThread<J> {
    /// Starts a thread of this name. `prepare` makes of each job what is then run until the event it is given,
    /// which becomes readable when the job has to stop.
    pub fn start<R: FnOnce()>(
        kind: Kind,
        name: String,
        prepare: impl Fn(J, &EventFd) -> Result<R, ActivateError> + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, queue) = channel::<Job<J>>();
        std::thread::Builder::new().spawn(move || {
            if let Err(error) = jail::close_thread(kind, &name) {
                // Then there is nobody to take a job, and activations say so.
                tracing::error!(%error, "cannot confine a device's thread");
                return;
            }
            while let Ok(Job { job, stop, begun, _gone }) = queue.recv() {
                match prepare(job, &stop) {
                    Ok(run) => {
                        // Fails when who has asked is gone; then the stop is on its way.
                        let _ = begun.send(Ok(()));
                        run();
                    }
                    Err(error) => drop(begun.send(Err(error))),
                }
            }
        })?;
        Ok(Self { jobs })
    }

    /// Has the thread do `job`, once it is done with the one before. Returns when it has begun.
    pub fn begin(&self, job: J) -> Result<Working, ActivateError> {
        let host = |what| move |error| ActivateError::Host { what, error };
        let lost = || host("use the device's thread, which has ended")(io::ErrorKind::BrokenPipe.into());
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("make an event descriptor"))?;
        let theirs = stop.try_clone().map_err(host("make an event descriptor"))?;
        let (begun, answer) = channel();
        let (_gone, gone) = channel();
        self.jobs.send(Job { job, stop: theirs, begun, _gone }).map_err(|_| lost())?;
        answer.recv().map_err(|_| lost())??;
        Ok(Working { stop, gone })
    }
}
