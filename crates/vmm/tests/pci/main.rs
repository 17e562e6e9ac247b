//! Virtio devices on the bus, as a guest sees them: enumerated, sized, negotiated and driven the way Linux does it, and
//! the way nobody should.

#![allow(clippy::unwrap_used)]

mod bring_up;
mod driver;
mod echo;
mod guest;
mod hostile;
mod interrupts;
mod lifecycle;
mod machine;
mod placement;
