//! Counts lines of the log.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Those that start in a certain way.
#[derive(Clone)]
pub(crate) struct Lines {
    start: &'static str,
    count: Arc<AtomicUsize>,
}

impl Lines {
    pub(crate) fn that_start_with(start: &'static str) -> Self {
        Self { start, count: Arc::default() }
    }

    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

impl Subscriber for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        struct Text(&'static str, bool);
        impl Visit for Text {
            fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
                self.1 |= field.name() == "message" && format!("{value:?}").starts_with(self.0);
            }
        }
        let mut text = Text(self.start, false);
        event.record(&mut text);
        self.count.fetch_add(text.1.into(), Ordering::Relaxed);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}
