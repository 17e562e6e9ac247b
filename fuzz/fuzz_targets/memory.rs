//! See `fuzz::memory`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::memory::run(data));
