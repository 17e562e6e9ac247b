//! Real clients against the real program: a Linux kernel's own virtio drivers, in User-Mode Linux and in QEMU, use a
//! disk that `exitless blk` serves, and both sides are then asked whether every byte is where it should be.
//!
//! A test reads as a story in its own file ([`filesystem`], [`multiqueue`], [`entropy`], [`nested`], [`restart`], [`migration`]). What the guest
//! does is a shell script in `guest/jobs`; it answers in lines `RESULT name ok|fail detail`, which [`guest`] collects.
//! A test whose tools are missing, or do not work here, says so through [`needs`], and `./test` counts it as skipped.
//!
//! One guest is ours: [`embedded`] boots the guest that the program embeds.
//!
//! `EXITLESS_TEST_SERVER=qsd` puts qemu-storage-daemon in our program's place. A test that fails with both servers is
//! itself at fault.

mod embedded;
mod entropy;
mod filesystem;
mod lifecycle;
mod migration;
mod multiqueue;
mod nested;
mod readonly;
mod restart;

mod compile;
mod guest;
mod initramfs;
mod kernel;
mod linux;
mod needs;
mod probe;
mod process;
mod qemu;
mod qmp;
mod scratch;
mod service;
mod uml;
