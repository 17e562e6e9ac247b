//! The qcow2 image format and the engine that changes images so that no crash harms them, without any I/O: no file, no
//! socket, no clock.
//!
//! * [`header`], [`layout`], [`entry`] and [`refcount`] are the format as its specification has it.
//! * [`image`] reads what an engine begins with, [`prepare`] makes an image ready to be written; [`check`](mod@check) and
//!   [`repair`](mod@repair) are for whole images.
//!
//! Everything read from an image is hostile: it is checked before it is used, and nothing here panics or takes memory or
//! time without a bound because of it.

pub mod bitmaps;
pub mod check;
pub mod create;
pub mod engine;
pub mod entry;
pub mod error;
pub mod header;
pub mod image;
pub mod inflate;
pub mod layout;
pub mod map;
pub mod prepare;
pub mod readers;
pub mod refcount;
pub mod repair;
