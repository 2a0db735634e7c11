//! An id and its state directory, for as long as they are this process's.

use std::cell::Cell;
use std::rc::Rc;

use crate::state::StateDir;

/// An id that is ours: given back when this is dropped, unless somebody else is to do it.
pub struct Reservation {
    dir: Rc<StateDir>,
    ours: Cell<bool>,
}

impl Reservation {
    /// Takes a directory that has just been made.
    pub fn new(dir: StateDir) -> Self {
        Reservation { dir: Rc::new(dir), ours: Cell::new(true) }
    }

    /// The directory.
    pub fn dir(&self) -> &Rc<StateDir> {
        &self.dir
    }

    /// Leaves it to `delete`.
    pub fn keep(&self) {
        self.ours.set(false);
    }

    /// Whether it was left to `delete`.
    pub fn is_kept(&self) -> bool {
        !self.ours.get()
    }

    /// Gives it back now.
    pub fn release(&self) {
        if self.ours.replace(false)
            && let Err(e) = self.dir.remove()
        {
            tracing::warn!("{e}");
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release();
    }
}
