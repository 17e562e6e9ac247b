//! The numbers of memory slots: each is somebody's until it is given back.

use std::sync::{Arc, Mutex, PoisonError};

#[derive(Debug)]
struct Numbers {
    /// The first that was never given out.
    next: u32,
    /// Given back.
    free: Vec<u32>,
}

/// All numbers of a machine.
#[derive(Clone, Debug)]
pub(crate) struct SlotNumbers {
    numbers: Arc<Mutex<Numbers>>,
    max: u32,
}

/// One number. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct SlotNumber {
    number: u32,
    keep: bool,
    numbers: Arc<Mutex<Numbers>>,
}

impl SlotNumbers {
    /// The numbers below `max`.
    pub(crate) fn new(max: u32) -> Self {
        Self { numbers: Arc::new(Mutex::new(Numbers { next: 0, free: Vec::new() })), max }
    }

    /// A number that nobody has.
    pub(crate) fn take(&self) -> Option<SlotNumber> {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let number = numbers.free.pop().or_else(|| {
            let number = numbers.next;
            numbers.next += u32::from(number < self.max);
            (number < self.max).then_some(number)
        })?;
        Some(SlotNumber { number, keep: false, numbers: self.numbers.clone() })
    }
}

impl SlotNumber {
    pub(crate) fn get(&self) -> u32 {
        self.number
    }

    /// Nobody else may ever have it.
    pub(crate) fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for SlotNumber {
    fn drop(&mut self) {
        if !self.keep {
            self.numbers.lock().unwrap_or_else(PoisonError::into_inner).free.push(self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_have_the_same_number_and_none_is_lost() {
        let numbers = SlotNumbers::new(3);
        let (a, b, mut c) = (numbers.take().unwrap(), numbers.take().unwrap(), numbers.take().unwrap());
        assert_eq!([a.get(), b.get(), c.get()], [0, 1, 2]);
        assert!(numbers.take().is_none());
        c.keep();
        drop((b, c));
        assert_eq!(numbers.take().map(|number| number.get()), Some(1));
        let again = numbers.take().unwrap();
        assert_eq!(again.get(), 1);
        assert!(numbers.take().is_none());
    }
}
